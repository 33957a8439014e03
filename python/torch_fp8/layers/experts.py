"""The experts of a mixture, whose weights are E4M3 for good. ``swap/freeze.py`` says how a model gets them.

transformers holds the experts of a layer in one module, with a stack of weights for each projection. ``layout_of``
knows what such a module computes from what it says of itself, or by its class; who cannot be known stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..format import E4M3
from .frozen import ACTIVATIONS, FrozenState, autocast_dtype, scale_shape


@dataclass(frozen=True)
class Layout:
    """What a module of experts holds and computes."""

    has_gate: bool = True  # gate_up_proj, not up_proj
    has_bias: bool = False
    is_transposed: bool = False  # weights are (in, out)
    is_interleaved: bool = False  # outputs are gate, up, gate, up, not all gates first
    is_routed: bool = True  # takes tokens and their routing, not rows that are sorted by expert and equally many

    @property
    def up(self) -> str:
        return "gate_up_proj" if self.has_gate else "up_proj"

    def parts(self, projection: str) -> int:
        return 2 if projection == "gate_up_proj" else 1

    def separated(self, outputs: Tensor, projection: str, dim: int = 0) -> Tensor:
        """With all gates above all ups along that dimension, which is that of a projection's outputs."""
        if not self.is_interleaved or self.parts(projection) == 1:
            return outputs
        halves = outputs.unflatten(dim, (-1, 2)).unbind(dim + 1)
        return torch.cat(halves, dim)

    def joined(self, outputs: Tensor, projection: str, dim: int) -> Tensor:
        """The opposite of ``separated``."""
        if not self.is_interleaved or self.parts(projection) == 1:
            return outputs
        return torch.stack(outputs.chunk(2, dim), dim + 1).flatten(dim, dim + 1)


# Classes of transformers that say nothing of themselves.
_KNOWN = {"Llama4TextExperts": Layout(is_transposed=True, is_routed=False), "Step3p7Experts": Layout()}

# What transformers' use_experts_implementation says of a module. Any module with these computes what its functions for
# all models compute: the projections, ``_apply_gate`` or ``act_fn``, ``post_expert_norm``, the routing weights.
_SAID = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")


def layout_of(module: Any) -> Layout:
    """What ``module`` computes. Raises ValueError where it is not known."""
    layout = find_layout(module)
    if layout is None:
        raise ValueError(f"torch_fp8: what {type(module).__name__} computes is not known")
    return layout


def find_layout(module: Any) -> Layout | None:
    """The same; None where it is not known."""
    cls = type(module)
    if all(isinstance(getattr(module, name, None), bool) for name in _SAID):
        if not hasattr(cls.forward, "__wrapped__"):  # a subclass with a forward of its own
            return None
        return Layout(module.has_gate, module.has_bias, module.is_transposed, not module.is_concatenated)
    return _KNOWN.get(cls.__name__) if cls.__module__.startswith("transformers.") else None


def stacks(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of a module that are a stack of matrices."""
    found = {name: p for name, p in module._parameters.items() if p is not None and p.dim() == 3}
    return {name: p for name, p in found.items() if p.is_floating_point()}


def is_experts(module: nn.Module) -> bool:
    """Whether a module is one of experts in 16 or 32 bits, be it known or not."""
    is_named = "expert" in type(module).__name__.lower() or hasattr(module, "num_experts")
    return is_named and not isinstance(module, FrozenExperts) and bool(stacks(module))


def experts_in(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of experts in 16 or 32 bits, by name."""
    return {name: module for name, module in model.named_modules() if is_experts(module)}


def routers(model: nn.Module, linears: Mapping[str, Any]) -> set[str]:
    """Layers that choose experts, or weigh those that all tokens share: within the module around experts, with as many
    outputs as there are experts, or one. They are small and decide much; no reader of FP8 checkpoints expects them in
    FP8."""
    found: set[str] = set()
    for name, module in model.named_modules():
        if not is_experts(module):
            continue
        block = name.rpartition(".")[0]
        prefix = f"{block}." if block else ""
        outputs = {1, *(stack.shape[0] for stack in stacks(module).values())}
        found |= {
            layer
            for layer, linear in linears.items()
            if layer.startswith(prefix) and not layer.startswith(f"{name}.") and linear.weight.shape[0] in outputs
        }
    return found


def frozen_experts(model: nn.Module) -> dict[str, FrozenExperts]:
    """The frozen experts of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FrozenExperts)}


def why_not_experts(module: Any) -> str:
    """Why the experts cannot be frozen; "" where they can."""
    layout = find_layout(module)
    if layout is None:
        return f"what {type(module).__name__} computes is not known"
    if "forward" in module.__dict__:
        return "its forward was replaced on the object, as accelerate's device_map does; freeze before that"
    expected = {layout.up, "down_proj"}
    if set(stacks(module)) != expected:
        return f"{type(module).__name__} has {', '.join(stacks(module))}, expected {', '.join(sorted(expected))}"
    for name, parameter in stacks(module).items():
        if type(parameter) is not nn.Parameter:
            return f"{name} is a {type(parameter).__name__}"
        if parameter.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"{parameter.dtype} parameters"
        if not parameter.numel():
            return "empty"
    up, down = (_shape(module, layout, name) for name in (layout.up, "down_proj"))
    parts = layout.parts(layout.up)
    biases: dict[str, Any] = {name: getattr(module, f"{name}_bias", None) for name in (layout.up, "down_proj")}
    if (up[0], up[1], up[2]) != (down[0], parts * down[2], down[1]):
        return f"{layout.up} is {list(up)} and down_proj {list(down)} (experts, out, in), which do not fit"
    if any((bias is not None) != layout.has_bias for bias in biases.values()):
        return f"it says has_bias={layout.has_bias}, and has not"
    if layout.has_bias and not all(tuple(biases[name].shape) == size[:2] for name, size in
                                   ((layout.up, up), ("down_proj", down))):  # fmt: skip
        return f"its biases are {[list(bias.shape) for bias in biases.values()]}, which do not fit"
    return ""


def _shape(module: nn.Module, layout: Layout, name: str) -> tuple[int, int, int]:
    """(experts, out, in)"""
    experts, n, k = getattr(module, name).shape
    return (experts, k, n) if layout.is_transposed else (experts, n, k)


def matrices(module: nn.Module, layout: Layout, name: str) -> tuple[Tensor, Tensor | None]:
    """A stack of weights as (experts, out, in), without a copy, and its bias."""
    weight, bias = getattr(module, name).detach(), getattr(module, f"{name}_bias", None)
    weight = weight.transpose(1, 2) if layout.is_transposed else weight
    return weight, None if bias is None else bias.detach()


@torch.no_grad()
def input_amaxes(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
) -> Tensor:
    """The largest magnitudes that the inputs of both projections of 16-bit experts have."""
    layout = layout_of(module)
    tokens = hidden_states.detach().reshape(-1, hidden_states.shape[-1])
    up, bias = matrices(module, layout, layout.up)
    amaxes = torch.zeros(2, device=tokens.device, dtype=torch.float32)
    for e in range(up.shape[0]):
        if top_k_index is None:
            x = tokens.view(up.shape[0], -1, tokens.shape[-1])[e]
        else:
            x = tokens[(top_k_index == e).any(-1)]
        if x.numel():
            y = nn.functional.linear(x, up[e], None if bias is None else bias[e])
            y = activated(module, layout, type(module), y)
            amaxes = torch.maximum(amaxes, torch.stack((x.abs().amax(), y.abs().amax())).float())
    return amaxes


class Stack(NamedTuple):
    """A linear layer of each expert in FP8. The outputs are in parts (gate and up: 2), each with scales of its own."""

    codes: Tensor  # (experts, out_features, in_features) float8_e4m3fn
    scale: Tensor  # float32 (experts, parts), (experts, out_features, 1), or each part's grid of blocks above the next
    bias: Tensor | None  # (experts, out_features)
    slot: Tensor | None  # (experts, 4), with static activations only


SUFFIXES = ("", "_scale", "_bias", "_slot")  # of their names


def stack_scale_shape(weight: str, shape: tuple[int, ...], parts: int) -> tuple[int, ...]:
    """Of the scale of a :class:`Stack`."""
    experts, n, k = shape
    one = scale_shape(weight, n // parts, k)
    return (experts, parts * one[0], *one[1:])


# In Python, since the other way of making a fake expects all tensors on one device, and offsets is on the CPU.
@torch.library.register_fake("torch_fp8::frozen_experts")  # type: ignore[untyped-decorator]
def _(
    x: Tensor, offsets: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, input_slot: Tensor | None,
    activations: int, parts: int = 1, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], weight.shape[1], dtype=dtype or x.dtype)


@torch.library.register_fake("torch_fp8::frozen_experts_backward")  # type: ignore[untyped-decorator]
def _(
    dy: Tensor, offsets: Tensor, weight: Tensor, weight_scale: Tensor, activations: int, parts: int,
    x_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return dy.new_empty(dy.shape[0], weight.shape[2], dtype=x_dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offsets, weight, weight_scale, _, _, activations, parts, _ = inputs
    if any(ctx.needs_input_grad[1:]):
        raise RuntimeError(
            "torch_fp8: frozen experts compute the gradient of their input only, but one of their own tensors requires "
            "one; train adapters beside them, or leave the experts in 16 bits by freeze's filter"
        )
    ctx.save_for_backward(offsets, weight, weight_scale)
    ctx.numbers = activations, parts, x.dtype


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "torch_fp8: the backward of frozen experts cannot be differentiated again (create_graph=True); leave them "
            "in 16 bits for that, by the filter of torch_fp8.freeze"
        )
    dx = torch.ops.torch_fp8.frozen_experts_backward(dy, *ctx.saved_tensors, *ctx.numbers)
    return dx, *[None] * 8


torch.library.register_autograd("torch_fp8::frozen_experts", _backward, setup_context=_save)


class FrozenExperts(FrozenState):
    """The experts of a mixture in FP8, not trained. ``freeze`` makes these of transformers' experts, in place: the
    module takes what it took and gives what it gave, with its own activation and gate.

    Its projections are ``gate_up_proj`` (``up_proj``, of experts without a gate) and ``down_proj``. The state of each
    is buffers, a :class:`Stack`: codes under the name of the weight, which are (experts, out, in) with gates above what
    they gate, whatever the weight was, and beside them ``_scale``, ``_bias`` and ``_slot``. Codes and scales keep their
    dtype when the module is cast, and move with it.

    Tokens are sorted by expert, and each expert multiplies its own, by the rules of :class:`FrozenLinear` for as many
    rows. The host reads once a call how many those are, so a call cannot be recorded in a CUDA graph. The input and the
    routing weights get their gradients, as with :class:`FrozenLinear`; the experts' own tensors get none.
    """

    layout: Layout
    made_of: type[nn.Module]  # the class that the module had
    activations: str
    granularity: str
    down_proj: Tensor
    post_expert_norm: nn.Module

    def projections(self) -> tuple[str, str]:
        return self.layout.up, "down_proj"

    def stack(self, projection: str) -> Stack:
        return Stack(*(getattr(self, projection + suffix) for suffix in SUFFIXES))

    def fp8_state(self) -> dict[str, torch.dtype]:
        dtypes = (E4M3, torch.float32, None, torch.float32)
        return {
            name + suffix: dtype
            for name in self.projections()
            for suffix, dtype in zip(SUFFIXES, dtypes, strict=True)
            if dtype is not None
        }

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        experts = self.down_proj.shape[0]
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        if not self.layout.is_routed:
            rows = tokens.shape[0] // experts
            if rows * experts != tokens.shape[0]:
                raise ValueError(
                    f"torch_fp8: {experts} experts take equally many rows each, got {tokens.shape[0]} in all"
                )
            return self._of_sorted(tokens, torch.arange(experts + 1, device="cpu", dtype=torch.int64) * rows)
        if top_k_index is None or top_k_weights is None:
            raise TypeError("torch_fp8: these experts take hidden_states, top_k_index and top_k_weights")
        choices = top_k_index.shape[-1]
        expert, order = top_k_index.reshape(-1).sort(stable=True)
        # Numbers behind the last expert's stand for none, as transformers has it.
        bounds = torch.arange(experts + 1, device=expert.device, dtype=expert.dtype)
        y = self._of_sorted(tokens[order // choices], _on_host(torch.searchsorted(expert, bounds)))
        y = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(y)
        back[order] = y
        back = back.view(tokens.shape[0], choices, y.shape[-1]).sum(1)
        return back.to(hidden_states.dtype).view(hidden_states.shape)

    def _of_sorted(self, x: Tensor, offsets: Tensor) -> Tensor:
        """offsets: where each expert's rows begin, and the last one's end; on the CPU."""
        y = self.layout.joined(self._multiplied(self.layout.up, x, offsets), self.layout.up, dim=1)
        y = self._multiplied("down_proj", activated(self, self.layout, self.made_of, y), offsets)
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)
        return y

    def _multiplied(self, projection: str, x: Tensor, offsets: Tensor) -> Tensor:
        return torch.ops.torch_fp8.frozen_experts(
            x, offsets, *self.stack(projection), ACTIVATIONS.index(self.activations), self.layout.parts(projection),
            autocast_dtype(x),
        )  # fmt: skip

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name}={list(getattr(self, name).shape)}" for name in self.projections())
        return f"{shapes}, activations={self.activations}, weight={self.granularity}"


def _on_host(offsets: Tensor) -> Tensor:
    if offsets.is_meta:
        return offsets
    if offsets.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "torch_fp8: frozen experts ask the device how many tokens each of them has, which a CUDA graph cannot "
            "record; capture the layers around them, or leave the experts in 16 bits by freeze's filter"
        )
    return offsets.cpu()


def activated(module: Any, layout: Layout, made_of: type[nn.Module], y: Tensor) -> Tensor:
    """What the experts of class ``made_of`` make of the first projection's output."""
    gate: Callable[..., Tensor] | None = getattr(made_of, "_apply_gate", None)
    if layout.has_gate and gate is not None:
        return gate(module, y)
    act: Callable[[Tensor], Tensor] = module.act_fn
    if not layout.has_gate:
        return act(y)
    gates, ups = y.chunk(2, dim=-1)
    return act(gates) * ups


def become_frozen_experts(module: Any, up: Stack, down: Stack, activations: str, granularity: str) -> None:
    """Change the class of a module of experts in place: the object, its name and its hooks stay."""
    layout, made_of = layout_of(module), type(module)
    for name, stack in ((layout.up, up), ("down_proj", down)):
        for suffix, tensor in zip(SUFFIXES, stack, strict=True):
            module._parameters.pop(name + suffix, None)
            module.register_buffer(name + suffix, tensor)
    module.__class__ = FrozenExperts
    module.layout, module.made_of = layout, made_of
    module.activations, module.granularity = activations, granularity
