"""``ScaledDotProductAttention``: a module around attention's two products, which holds their scaling state."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Sequence
from types import FrameType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from .. import _C
from ..checks import check, check_bools, modules_of
from ..recipe import CurrentScaling, Recipe, recipe_of
from ..state import Role, State, role_of
from . import dtensor
from .dtensor import has_whole_heads, is_dtensor
from .modes import MODES, Choice, choose
from .scaled import Scaled
from .traced import note_training

# As enum AttentionRole in csrc/kernels.h has them.
ROLES = ("q", "k", "v", "p", "o", "grad_o", "grad_p", "grad_q", "grad_k", "grad_v")
_P, _O = ROLES.index("p"), ROLES.index("o")
_GRADIENTS = ROLES.index("grad_o")  # from here on
FORWARD_ROLES = (1 << _GRADIENTS) - 1  # one bit each
EVERY_ROLE = (1 << len(ROLES)) - 1
BACKWARD_ROLES = EVERY_ROLE - FORWARD_ROLES


class AttentionState(State):
    """The scaling state of attention, with the roles ``ROLES``: q, k, v, p and o are cast as a recipe has inputs cast,
    the gradients as it has output gradients cast. The scales of q and k are powers of two, so that their codes are
    numbers of 16 bits too: a backward in 16 bits finds the probabilities that forward had, however large the scores.

    shared_scale: q, k and v have one scale, that of the largest of their amaxes.
    p_scale: the constant scale of p, a power of two; None: it is scaled as the others are.
    """

    copied: ClassVar[tuple[str, ...]] = (*State.copied, "shared_scale", "p_scale")

    def __init__(self, recipe: Recipe, device: torch.device, shared_scale: bool, p_scale: float | None) -> None:
        self.shared_scale, self.p_scale = shared_scale, p_scale
        super().__init__(recipe, device)

    def _make_roles(self) -> list[Role]:
        self.one_scale = slice(3 if self.shared_scale else 0)
        options, (bias, _, grad_bias) = self.recipe.options(), self.recipe.biases
        forward, backward = options.cast(0), options.cast(2)
        of_scores = _C.Cast(dtype=forward.dtype, scaling=forward.scaling, power_of_two=True, margin=forward.margin)
        of_v = of_scores if self.shared_scale else forward
        casts = [of_scores, of_scores, of_v, *[forward] * (_GRADIENTS - 3), *[backward] * (len(ROLES) - _GRADIENTS)]
        biases = [bias] * _GRADIENTS + [grad_bias] * (len(ROLES) - _GRADIENTS)
        roles = [role_of(*role) for role in zip(ROLES, casts, biases, strict=True)]
        if self.p_scale is not None:
            constant = _C.Cast(dtype=forward.dtype, scaling=_C.Scaling.constant, power_of_two=True, margin=0)
            roles[_P] = Role("p", constant, self.p_scale)
        return roles

    def _join(self) -> None:
        super()._join()
        delayed = (role.cast.scaling == _C.Scaling.delayed for role in self.roles)
        self.delayed_roles = sum(known << i for i, known in enumerate(delayed))
        self.has_own_o = self.roles[_O].cast.scaling == _C.Scaling.current

    def runs_twice(self, begins_history: bool) -> bool:
        """Whether forward's kernel runs a second time, with the scale of the amax that o had in the first one, and not
        only until a history is there."""
        is_delayed = bool(self.delayed_roles >> _O & 1)
        return self.has_own_o or (is_delayed and not self.has_history[_O] and not begins_history)


class Call(NamedTuple):
    """What is constant in one call of attention, as its ops take it."""

    slots: Tensor
    grad_slots: Tensor  # the same memory, for backward in a trace
    casts: list[int]
    history: int
    training: bool
    record: bool
    shared_scale: bool


class Owners:
    """Modules and parameters, held weakly; copied and pickled with what they are in there."""

    def __init__(self, *found: nn.Module | Tensor) -> None:
        self._refs = tuple(weakref.ref(owner) for owner in found)

    def found(self) -> list[nn.Module | Tensor]:
        return [owner for ref in self._refs if (owner := ref()) is not None]

    def parameters(self) -> list[Tensor]:
        found = self.found()
        # Of a module they are looked up when they are asked for: FSDP2 exchanges them.
        return [p for owner in found for p in (owner.parameters() if isinstance(owner, nn.Module) else (owner,))]

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a model has the copies of the owners. One of the attention alone has none: nobody else holds its
        copies of them."""
        return {"found": self.found()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._refs = tuple(weakref.ref(owner) for owner in state["found"])


class ScaledDotProductAttention(Scaled):
    """``torch.nn.functional.scaled_dot_product_attention`` as a module that can compute in FP8: it has no parameters
    and no buffers, but a scaling state with the ten roles q, k, v, p, o, grad_o, grad_p, grad_q, grad_k and grad_v.

    recipe: how scales are chosen; ``DelayedScaling()`` by default. What reads and what comes out forward is cast as an
        ``fp8.Linear``'s input, gradients as its output gradient. ``fast_accum`` and ``fp8_gemms`` have no meaning here.
    mode: ``"16bit"``, ``"fp8_forward"`` (backward in 16 bits), ``"fp8"``, or ``"auto"``, whichever is fastest, and
        16 bits for what FP8 cannot compute, which another mode refuses, and where the result has no scale before it is
        there: with ``CurrentScaling``, and in inference without a history (of training, or loaded with
        ``torch_fp8.load_state_dict``; saved weights have none). ``last`` says what ran last, and why, and
        ``torch_fp8.summary`` too.
    shared_scale: q, k and v have one scale.
    p_scale: the constant scale of the probabilities, a power of two up to 256; None: scaled as the others are.
    auto_update: let ``optimizer.step()`` update the scales; otherwise call ``torch_fp8.update_scales``.

    The scaling state is an object of its own, ``fp8_state``, as that of ``fp8.Linear``; it goes where the queries are.
    Which optimizer's step ends its step is said by ``goes_with``. Recipe and auto_update stay what they were made with,
    whatever ``convert`` gives to layers, unless the attribute ``follows_layers`` is set to True: then ``convert`` and
    ``fuse`` keep them those of the FP8 layers that it goes with.

    Raises ValueError for another mode or p_scale, or an option that is no bool; TypeError for another recipe.
    """

    follows_layers = False

    def __init__(
        self,
        recipe: Recipe | None = None,
        *,
        mode: str = "auto",
        shared_scale: bool = False,
        p_scale: float | None = 256.0,
        auto_update: bool = True,
    ) -> None:
        super().__init__()
        recipe = recipe_of(recipe)
        check_bools(shared_scale=shared_scale, auto_update=auto_update)
        check(mode in MODES, "mode", f"one of {MODES}", mode)
        is_power = isinstance(p_scale, int | float) and 2.0**-31 <= p_scale <= 256 and math.frexp(p_scale)[0] == 0.5
        is_power = is_power and not isinstance(p_scale, bool)
        check(p_scale is None or is_power, "p_scale", "None or a power of two from 2**-31 to 256", p_scale)
        self.mode = mode
        self.auto_update = auto_update
        self.fp8_enabled = True
        self.last: tuple[str, str] | None = None  # the mode that the last call ran in, and why
        self.fp8_owners = Owners()
        device = torch.get_default_device()
        self.fp8_state: AttentionState = AttentionState(
            recipe, device, shared_scale, None if p_scale is None else float(p_scale)
        )

    def goes_with(self, *owners: nn.Module | Tensor) -> ScaledDotProductAttention:
        """Its step ends with that of an optimizer which holds a parameter of one of these; returns the module. They are
        held weakly. Without owners that train it goes with its model or its thread, as a layer that no optimizer
        holds."""
        for owner in owners:
            if not isinstance(owner, nn.Module | Tensor):
                raise TypeError(
                    f"torch_fp8: attention goes with modules or parameters, got {type(owner).__name__}; give it the "
                    "layers whose results it reads"
                )
        self.fp8_owners = Owners(*owners)
        self.settle()
        return self

    def owners(self) -> Sequence[Tensor]:
        return self.fp8_owners.parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """What ``torch.nn.functional.scaled_dot_product_attention`` gives for the same arguments."""
        return _attend(self, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)

    def note(self, mode: str, why: str) -> None:
        """Note what a call ran in that did not come here."""
        note_ran(self, mode, why)

    def settle(self) -> None:
        owner = next(iter(self.owners()), None)
        if owner is not None:
            self.fp8_state.follow(owner)
        elif self.fp8_slots.is_meta:
            self.fp8_state.renew(torch.device("cpu"))  # a forward brings it to where the queries are

    def _apply(self, fn: Any, recurse: bool = True) -> ScaledDotProductAttention:
        super()._apply(fn, recurse)
        state = self.fp8_state
        state.memo.forget()
        try:
            moved = fn(torch.zeros(1, dtype=torch.float32, device=state.slots.device))
        except Exception:  # what knows parameters alone
            return self
        state.follow(moved)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.fp8_slots.is_meta:
            self.settle()
        # Other weights around it, as for a layer's own.
        if not self.fp8_state.was_loaded:
            self.reset_scaling()

    def extra_repr(self) -> str:
        state = self.fp8_state
        said = [f"recipe={self.recipe}", f"mode={self.mode!r}"]
        said += ["shared_scale=True"] if state.shared_scale else []
        said += [f"p_scale={state.p_scale}"] if state.p_scale != 256 else []
        return ", ".join(said)


def call_of(attention: ScaledDotProductAttention, query: Tensor, roles: int) -> Call:
    """What an op needs for a call in which these roles (one bit each) are cast, which in training is noted."""
    compiling = torch.compiler.is_compiling()
    state, grads = attention.fp8_state, torch.is_grad_enabled()
    if compiling:
        _follow_in_trace()
    elif query.device != state.slots.device and not query.is_meta:
        state.follow(query)
    trains = grads and attention.training
    delayed = roles & state.delayed_roles & (EVERY_ROLE if attention.training else FORWARD_ROLES)
    history = 0
    if delayed:  # only there: what is looked up becomes a guard
        history = state.known_roles() if compiling else state.memo.history(state.slots, delayed)
    if trains and compiling:
        note_training()
    elif trains:
        state.memo.note_forward(query)
        state.memo.note_used_roles(roles)
    slots, grad_slots = state.slots, state.grad_slots
    if query.is_meta:
        slots = grad_slots = torch.empty_like(slots, device="meta")
    record = trains and not state.is_constant
    return Call(slots, grad_slots, state.casts, history, attention.training, record, state.shared_scale)


def note_ran(attention: ScaledDotProductAttention, mode: str, why: str) -> None:
    """Note what a call ran in."""
    if not (torch.compiler.is_compiling() and _note_in_checkpoint(mode, why)):
        attention.last = mode, why


def _tracer_of(function: Any) -> Any:
    """Dynamo's, while it traces a call of that function."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        tracer: Any = frame.f_locals.get("self")
        if getattr(tracer, "f_code", None) is function.__code__:
            return tracer
        frame = frame.f_back
    return None


def _note_in_checkpoint(mode: str, why: str) -> bool:
    """Runs when a step is traced. Within activation checkpointing a trace may leave nothing on a module, so what
    ``note_ran`` notes is noted here, once."""
    tracer = _tracer_of(note_ran)
    inside = tracer is not None and tracer.output.current_tracer.parent is not None
    if inside:
        tracer.symbolic_locals["attention"].realize().value.last = mode, why
    return inside


def _follow_in_trace() -> bool:
    """Runs when a step is traced, before that sees the state: brings it to where the queries are."""
    tracer = _tracer_of(call_of)
    if tracer is not None:
        device = tracer.symbolic_locals["query"].realize().proxy.node.meta["example_value"].device
        if device.type != "meta":
            state = tracer.symbolic_locals["attention"].realize().value.fp8_state
            state.follow(torch.empty(0, dtype=torch.float32, device=device))
    return True


# As in traced.py.
_note_in_checkpoint._dynamo_marked_constant = True  # type: ignore[attr-defined]
_follow_in_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]


def run(
    call: Call, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None, fp8_backward: bool,
    expand: bool,
) -> Tensor:  # fmt: skip
    """The two products in FP8, and backward in FP8 or in 16 bits."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    slots, grad_slots, casts, history, training, record, shared_scale = call
    return torch.ops.torch_fp8.attention(
        query, key, value, slots, grad_slots, casts, history, training, record, causal, scale, shared_scale,
        fp8_backward, expand,
    )  # fmt: skip


def _attend(
    module: ScaledDotProductAttention | None, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None,
    dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool, mode: str | None = None,
) -> Tensor:  # fmt: skip
    if mode is None or (module is not None and not module.fp8_enabled):
        assert module is not None
        mode = module.mode if module.fp8_enabled else "16bit"
    query, key, value = under_autocast(query, key, value)
    heads = query, key, value
    if mode != "16bit" and is_dtensor(query) and attn_mask is None and not dropout_p and has_whole_heads(*heads):
        return dtensor.attention(
            lambda q, k, v: _attend(module, q, k, v, None, 0.0, is_causal, scale, enable_gqa, mode), *heads
        )
    grads = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    choice = choose(mode, query, key, value, attn_mask, dropout_p, is_causal, enable_gqa, grads, scale)
    if mode == "auto" and choice.mode != "16bit" and _runs_twice(module):
        choice = Choice("16bit", "its result has no scale before it is there, and FP8 would compute it twice")
    if module is not None:
        note_ran(module, choice.mode, choice.why if module.fp8_enabled else "disabled")
    if choice.mode == "16bit":
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    fp8_backward = grads and choice.mode == "fp8"
    roles = EVERY_ROLE if fp8_backward else FORWARD_ROLES
    call = _stateless(query.device) if module is None else call_of(module, query, roles)
    return run(call, query, key, value, is_causal, scale, fp8_backward, choice.expand)


def _runs_twice(module: ScaledDotProductAttention | None) -> bool:
    if module is None:  # every role by its own amax
        return True
    return module.fp8_state.runs_twice(begins_history=module.training and torch.is_grad_enabled())


def under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As PyTorch's own function takes them there."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


_STATELESS: dict[torch.device, AttentionState] = {}


def _stateless(device: torch.device) -> Call:
    """Every role by its own amax; nothing is recorded."""
    _make_stateless(device)
    state = _STATELESS[device]
    return Call(state.slots, state.grad_slots, state.casts, 0, training=False, record=False, shared_scale=False)


def _make_stateless(device: torch.device) -> bool:
    """Its tensors serve every later call, so that no mode of the first one may be in them."""
    if device not in _STATELESS:
        with _disable_current_modes():
            _STATELESS[device] = AttentionState(CurrentScaling(), device, shared_scale=False, p_scale=256.0)
    return True


_make_stateless._dynamo_marked_constant = True  # type: ignore[attr-defined]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    mode: str = "auto",
    state: ScaledDotProductAttention | None = None,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` with its two products in FP8 where that is faster, or where
    it is asked for: query (batch, heads, tokens, head_dim), key and value (batch, kv_heads, kv_tokens, head_dim),
    bfloat16 or float16, any strides; the result has query's shape and dtype.

    mode: ``"fp8_forward"``: forward in FP8; the gradient in 16 bits, of the numbers that FP8 computed with. ``"fp8"``:
        the gradient's five products in FP8 too, for a head_dim of 128. ``"16bit"``. ``"auto"``: what was measured to be
        fastest at the nearest size, with the gradient if one is wanted.
    state: whose scales are used, and whose amaxes are recorded. Without it each tensor is scaled by its own amax, which
        is of all tokens, so that what follows a token changes its result a little, as with ``CurrentScaling``; the
        result is computed twice for its own, and mode "auto" runs in 16 bits.

    FP8 takes no mask, no dropout, no empty sequence, a positive scale, keys and values of one width, and a head_dim
    that is a multiple of 16 up to 256; else mode "auto" runs in 16 bits, and another raises ValueError, which names the
    modes that can.

    Scores, ``scale * query @ key.T``, should stay below some hundreds, as norms of q and k keep them: codes of q and k
    have 3 bits of mantissa, and a tensor core sums their products with 14. On an H200 the gradient of value is off by
    0.27 of its norm where the largest score is 300, and by 0.35 where it is 1,000. In mode ``"fp8_forward"`` backward
    finds other probabilities than forward had: at 10,000 they sum to up to 97, and gradients are as wrong. Gradients of
    query and key also read the codes of the result: where the values of a head have a part in common that is 3 times as
    large as the rest they are off by 0.15 of their norm, and by 0.5 where it is 10 times (computed on the CPU).
    """
    if state is not None and not isinstance(state, ScaledDotProductAttention):
        raise TypeError(f"torch_fp8: state must be a ScaledDotProductAttention or None, got {type(state).__name__}")
    return _attend(state, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, mode)


def attentions(model: nn.Module) -> dict[str, ScaledDotProductAttention]:
    """The attentions of a model by name; one that occurs twice has its first name."""
    return {name: module for name, module in modules_of(model) if isinstance(module, ScaledDotProductAttention)}
