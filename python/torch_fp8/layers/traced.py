"""The FP8 layer as ``torch.compile`` sees it: the ops of csrc/ops/linear.cpp under a function that can be traced.

In eager mode the host's time decides, and the C++ function of csrc/autograd.cpp is the faster one. A trace cannot look
into it and follows a Python ``autograd.Function``. Neither has rules. What the C++ side remembers between calls does
not exist here: the weight is cast in every forward, and what the host decides, whether a tensor is scaled by its own
amax or by its slot, is a guard of the graph (``State.has_history``): a graph for the first step, and one for all
that follow.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..recipe import ConstantScaling, DelayedScaling
from ..state import groups

if TYPE_CHECKING:
    from ..state import LayerState
    from .linear import Layer


Codes = tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]


class Call(NamedTuple):
    """What is constant in a traced call, as the ops take it."""

    casts: list[int]
    history: int
    fp8: list[bool]
    fast_accum: list[bool]
    training: bool
    record: bool
    grad_x: bool
    grad_weight: bool
    grad_bias: bool
    gathered: bool
    dummy_grad: bool
    autocast: torch.dtype | None


def call_of(layer: Layer, x: Tensor, grad_x: bool) -> Call:
    """A call of that layer in the step that is being traced, whose input's gradient is wanted or not."""
    weight, bias, state = layer.matrix, layer.bias, layer.fp8_state
    if state.slots.device != weight.device:
        state.follow(weight)
    device = x.device.type
    grads = torch.is_grad_enabled()
    history = 0
    if isinstance(state.recipe, DelayedScaling):  # only there: what is looked up becomes a guard
        history = state.known_roles()
    if grads and layer.training:
        note_training()
    return Call(
        casts=state.casts,
        history=history,
        fp8=state.fp8_gemms,
        fast_accum=state.fast_accum,
        training=layer.training,
        record=grads and layer.training and not isinstance(state.recipe, ConstantScaling),
        grad_x=grads and grad_x,
        grad_weight=grads and weight.requires_grad,
        grad_bias=grads and bias is not None and bias.requires_grad,
        gathered=state.gathered,
        dummy_grad=False,
        autocast=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
    )


def linear(layer: Layer, x: Tensor, main_grad: Tensor | None = None, dummy_grad: bool = False) -> Tensor:
    """``layer(x)``, as csrc/autograd.cpp computes it; the same bits, forward and backward."""
    state = layer.fp8_state
    call = call_of(layer, x, x.requires_grad)._replace(dummy_grad=dummy_grad)
    codes = shared_codes(state, x, call)
    return _Linear.apply(x, layer.matrix, layer.bias, state.slots, state.grad_slots, main_grad, *codes, call)


def shared_codes(state: LayerState, x: Tensor, call: Call) -> Codes:
    """The codes of x where layers read it together, by the rules of csrc/siblings.h; what the first of them made lies
    on the tensor itself. None where a layer casts for itself."""
    group, nothing = state.group, (None, None, None)
    delayed = isinstance(state.recipe, DelayedScaling)
    by_history = delayed and call.history & 1
    if group is None or not call.training or not torch.is_grad_enabled() or (delayed and not by_history):
        return nothing  # until it has a history, each layer records for itself
    version = _version_of_x()
    if version < 0:
        return nothing
    wanted = _wanted(call, version)
    offer = getattr(x, "_fp8_codes", None)
    if offer is not None:
        of_group, maker, outside, made, left, codes = offer
        may_take = not by_history or group.follows[state.member] == maker or (outside and state.member == maker)
        if of_group is group and made == wanted and may_take:
            rest = (of_group, maker, outside, made, left - 1, codes) if left > 1 else None
            x._fp8_codes = rest  # type: ignore[attr-defined]
            if outside and state.member == maker:
                _note_offer(group.number, -1)
            return codes
    if by_history and call.record:
        _note_cast(group.number, state.member)
    left = sum(maker == state.member for maker in group.follows) if by_history else group.size - 1
    if not left or not (call.fp8[0] or (call.grad_weight and call.fp8[2])):
        return nothing
    with torch.no_grad():
        codes = torch.ops.torch_fp8.cast(
            x, state.slots, 0, call.casts, call.history, call.training, call.record, *wanted[:2]
        )
    x._fp8_codes = (group, state.member, False, wanted, left, codes)  # type: ignore[attr-defined]
    return codes


def _wanted(call: Call, version: int) -> tuple[bool, bool, bool, bool, int]:
    """What decides which codes a layer makes of a tensor: rowwise and columnwise first."""
    return (call.fp8[0], call.grad_weight and call.fp8[2], call.record, call.training, version)


def takes_codes(state: LayerState, call: Call) -> bool:
    """Whether the layer, and those in its group, would take codes of their input that were made outside of them."""
    delayed = isinstance(state.recipe, DelayedScaling)
    return (
        state.group is not None and call.training and torch.is_grad_enabled() and call.fp8[0]
        and not (delayed and not call.history & 1)
    )  # fmt: skip


def offer_codes(state: LayerState, x: Tensor, call: Call, codes: Codes) -> None:
    """Lay down on x its codes, which were made outside of the layers that read it, as this one makes them."""
    group = state.group
    version = _version_of_x()
    if group is None or version < 0:
        return
    by_history = isinstance(state.recipe, DelayedScaling)
    left = 1 + sum(maker == state.member for maker in group.follows) if by_history else group.size
    if by_history and call.record:
        _note_offer(group.number, state.member)
    x._fp8_codes = (group, state.member, True, _wanted(call, version), left, codes)  # type: ignore[attr-defined]


def offer_rows(x: Tensor, q: Tensor, scale: Tensor, slot: Tensor | None) -> None:
    """The same for frozen layers (given.py): codes by row, or by that slot."""
    version = _version_of_x()
    if version >= 0:
        x._fp8_rows = (version, q, scale if slot is None else None, slot)  # type: ignore[attr-defined]


def rows_of(x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """What was laid down so, if x is the same still."""
    made = getattr(x, "_fp8_rows", None)
    if made is None or made[0] != _version_of_x():
        return None
    return made[1], made[2], made[3]


def _version_of_x() -> int:
    """Runs when a step is traced: the version of its caller's x, which Dynamo knows and the traced code does not. -1
    where nothing may be laid down on x: within activation checkpointing, where x comes from outside of the graph, so
    that others may write to it after, where Dynamo takes no attributes (results of an autograd.Function), where writes
    are not counted (inference mode), and in traces that are not Dynamo's."""
    laid_down = (shared_codes.__code__, offer_codes.__code__, offer_rows.__code__, rows_of.__code__)
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        tracer: Any = frame.f_locals.get("self")
        if getattr(tracer, "f_code", None) in laid_down:
            x = tracer.symbolic_locals["x"].realize()
            if x.source is not None or tracer.output.current_tracer.parent is not None:
                return -1
            if not tracer.output.side_effects.is_attribute_mutation(x):
                return -1
            example = x.proxy.node.meta["example_value"]
            return -1 if example.is_inference() else example._version
        frame = frame.f_back
    return -1


def _note_cast(number: int, member: int) -> bool:
    """Runs when a step is traced: this member casts for itself. If it follows another, their scales part; if a norm has
    cast in its place, its amax says something of what it has not read."""
    group = groups[number]
    if group.follows[member] >= 0:
        group.reads_apart = True
    if group.offered == member:
        group.note_unread(member)
    return True


def _note_offer(number: int, member: int) -> bool:
    """Runs when a step is traced: a norm has cast in the place of this member, or -1: it has taken that."""
    groups[number].offered = member
    return True


_traced_training = False


def traced_training() -> bool:
    """A training step was traced in this process. A graph cannot say which layers it used: recomputation allows no
    side effects, and the layers of equal blocks share a graph. So from then on every layer may have been used in a step
    of its optimizer; to count one that was not is harmless, for a role that saw nothing keeps its scale."""
    return _traced_training


def note_training() -> bool:
    """Runs when a step is traced, and leaves nothing in the graph."""
    global _traced_training
    _traced_training = True
    return True


# What torch.compiler.assume_constant_result sets. Calling it would import torch._dynamo, which takes as long as torch.
note_training._dynamo_marked_constant = True  # type: ignore[attr-defined]
_note_cast._dynamo_marked_constant = True  # type: ignore[attr-defined]
_note_offer._dynamo_marked_constant = True  # type: ignore[attr-defined]
_version_of_x._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Kept(NamedTuple):
    """What the backward of a call needs besides its tensors."""

    slots: Tensor
    main_grad: Tensor | None
    call: Call
    x_dtype: torch.dtype
    weight_dtype: torch.dtype
    in_features: int
    bias_dtype: torch.dtype | None


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, slots: Tensor, given: Codes, call: Call,
    residual: Tensor | None = None,
) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
    """y, and the six tensors that backward needs."""
    codes = [] if given[0] is None else list(given)
    y, x_t, x_scale_inv, weight_t, weight_scale_inv = torch.ops.torch_fp8.linear_forward(
        x, weight, bias, slots, codes, [], call.casts, call.history, call.fp8, call.fast_accum, call.training,
        call.record, call.grad_x, call.grad_weight, call.gathered, call.autocast, residual,
    )  # fmt: skip
    if codes:
        _, x_t, x_scale_inv = codes
    x_16 = x if call.grad_weight and not call.fp8[2] else None
    if x_16 is not None and call.autocast is not None:
        x_16 = x_16.to(call.autocast)
    weight_16 = weight if call.grad_x and (call.gathered or not call.fp8[1]) else None
    return y, [x_t, x_scale_inv, weight_t, weight_scale_inv, x_16, weight_16]


def backward(
    dy: Tensor, dy_codes: list[Tensor], saved: Sequence[Tensor | None], kept: Kept, dx_sum: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias, as far as they are wanted and not added to main_grad or dx_sum."""
    call = kept.call
    dx, dweight, dbias = torch.ops.torch_fp8.linear_backward(
        dy, dy_codes, *saved, kept.slots, kept.main_grad, dx_sum, call.casts, call.history, call.fp8,
        call.fast_accum, call.training, call.record, call.grad_x, call.grad_weight, kept.bias_dtype,
        kept.in_features, kept.x_dtype, kept.weight_dtype, call.dummy_grad,
    )  # fmt: skip
    has_dweight = call.grad_weight and (kept.main_grad is None or call.dummy_grad)
    return (
        dx if call.grad_x and dx_sum is None else None,
        dweight if has_dweight else None,
        dbias if call.grad_bias else None,
    )


def kept_of(
    x: Tensor, weight: Tensor, bias: Tensor | None, grad_slots: Tensor, main_grad: Tensor | None, call: Call
) -> Kept:
    bias_dtype = bias.dtype if bias is not None and call.grad_bias else None
    return Kept(grad_slots, main_grad, call, x.dtype, weight.dtype, weight.shape[1], bias_dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, slots: Tensor, grad_slots: Tensor,
        main_grad: Tensor | None, q: Tensor | None, q_t: Tensor | None, scale_inv: Tensor | None, call: Call,
    ) -> Tensor:  # fmt: skip
        codes: Any = (q, q_t, scale_inv)
        y, saved = forward(x, weight, bias, slots, codes, call)
        ctx.save_for_backward(*saved)
        ctx.kept = kept_of(x, weight, bias, grad_slots, main_grad, call)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gradients = backward(dy, [], ctx.saved_tensors, ctx.kept)
        return (*gradients, None, None, None, None, None, None, None)
