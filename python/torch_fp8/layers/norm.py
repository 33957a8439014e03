"""RMSNorm and LayerNorm in one pass, with the residual added before and the FP8 codes of the result made for the layers
that read it, which then cast nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _C
from ..state import InputGroup
from . import traced
from .dtensor import is_dtensor
from .frozen import FrozenLinear
from .given import casts_rows, offer
from .linear import SUPPORTED_DTYPES, Layer, linear_layer
from .transforms import is_transformed


class Norm(NamedTuple):
    """What a norm computes beside its parameters: n * (gain + gain_offset) + bias."""

    eps: float
    layer_norm: bool = False
    gain_offset: float = 0.0


def norm(
    x: Tensor, gain: Tensor | None, bias: Tensor | None, how: Norm, residual: Tensor | None = None,
    readers: Sequence[nn.Module] = (),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The norm of x + residual over the last dimension, computed in float32 and rounded once, and the sum itself: x,
    where there is no residual. Whoever goes on with the sum in the place of x has both gradients added by the norm.

    x, residual (..., K) of one dtype; gain, bias (K). readers: the layers that read the result; where they are FP8
    layers in one group they take its codes, and so do frozen ones, where no gradient is wanted."""
    if (frozen := _frozen_reader(x, readers)) is not None and not _is_differentiated(x, residual, gain, bias):
        codes = casts_rows(x)
        slot = frozen.input_slot if frozen.activations == "static" else None
        y, total, q, scale = torch.ops.torch_fp8.frozen_norm(
            x, residual, gain, bias, how.eps, how.layer_norm, how.gain_offset, slot, codes
        )
        if codes:
            y = _operators(y)
            offer(y, q, scale, slot)
        return y, x if residual is None else total
    reader = _leader(readers)
    if torch.compiler.is_compiling() and not torch._dynamo.config.compiled_autograd:
        return _traced(x, gain, bias, how, residual, reader)
    given, recompute = (None, False) if reader is None else (linear_layer(reader), reader.fp8_state.recompute)
    return _C.norm(x, residual, gain, bias, how.eps, how.layer_norm, how.gain_offset, given, recompute)


def _frozen_reader(x: Tensor, readers: Sequence[nn.Module]) -> FrozenLinear | None:
    """As which of these layers codes of a tensor like x are made: None where no frozen layer would take them."""
    if not readers or not isinstance(layer := readers[0], FrozenLinear) or x.dim() == 0:
        return None
    if layer.granularity == "block" or layer.in_features != x.shape[-1]:
        return None
    needed = layer.input_slot if layer.activations == "static" else layer.weight
    fits = layer.activations in ("token", "static") and needed is not None and needed.device == x.device
    return layer if fits else None


def _is_differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def can_norm(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels take these tensors; else PyTorch's own norm computes."""
    tensors = [x, *(other for other in others if other is not None)]
    return not is_transformed(*tensors) and all(
        t.dtype in SUPPORTED_DTYPES and t.layout == torch.strided and not is_dtensor(t) and not t.is_nested
        and t.device == x.device
        for t in tensors
    )  # fmt: skip


def feed(readers: Sequence[Layer]) -> None:
    """Put layers that read the result of a norm into a group, where they are in none: by it they take its codes."""
    if len(readers) == 1 and readers[0].fp8_state.group is None:
        group = InputGroup(1)
        readers[0].fp8_state.group, readers[0].fp8_state.member = group, 0
        group.join(readers[0].fp8_state)


def _leader(readers: Sequence[nn.Module]) -> Layer | None:
    """By whose scaling state the codes are made: of the layer that the others follow. None where they take none."""
    for layer in readers:
        if not (isinstance(layer, Layer) and layer.fp8_enabled and layer.training) or is_dtensor(layer.weight):
            return None
        state = layer.fp8_state
        if state.group is None or not state.group.reads_norms:
            return None
        if state.group.follows[state.member] < 0:
            return layer
    return None


def _operators(y: Tensor) -> Tensor:
    """Dynamo lays attributes down on what an operator gave as its one result."""
    return y.view(y.shape) if torch.compiler.is_compiling() else y


def _traced(
    x: Tensor, gain: Tensor | None, bias: Tensor | None, how: Norm, residual: Tensor | None, reader: Any
) -> tuple[Tensor, Tensor]:
    state, call = None, None
    if reader is not None:
        call = traced.call_of(reader, x, x.requires_grad)
        state = reader.fp8_state if traced.takes_codes(reader.fp8_state, call) else None
    slots = None if state is None else state.slots
    y, total, *codes = _Norm.apply(x, residual, gain, bias, how, slots, call)
    y = _operators(y)
    if state is not None and call is not None:
        traced.offer_codes(state, y, call, (codes[0], codes[1], codes[2]))
    return y, total


class _Norm(torch.autograd.Function):
    """As csrc/norm.cpp computes it, where torch.compile can see it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, gain: Tensor | None, bias: Tensor | None, how: Norm,
        slots: Tensor | None, call: traced.Call | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        casts, history, training, record, columnwise = [0, 0, 0], 0, False, False, False
        if call is not None:
            casts, history, training, record = call.casts, call.history, call.training, call.record
            columnwise = call.grad_weight and call.fp8[2]
        y, total, q, q_t, scale_inv, stats = torch.ops.torch_fp8.norm_cast(
            x, residual, gain, bias, how.eps, how.layer_norm, how.gain_offset, slots, 0, casts, history, training,
            record, slots is not None, columnwise, True,
        )  # fmt: skip
        ctx.save_for_backward(x if residual is None else total, gain, stats)
        ctx.how, ctx.has_residual = how, residual is not None
        ctx.wants = [p is not None and p.requires_grad for p in (gain, bias)]
        ctx.mark_non_differentiable(q, q_t, scale_inv)
        ctx.set_materialize_grads(False)
        return y, x if residual is None else total, q, q_t, scale_inv

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None, *others: Any) -> tuple[Tensor | None, ...]:
        x, gain, stats = ctx.saved_tensors
        if dy is None:
            return (dsum, dsum if ctx.has_residual else None, *[None] * 5)
        dx, dgain, dbias = torch.ops.torch_fp8.norm_backward(
            dy, x, dsum, gain, stats, ctx.how.layer_norm, ctx.how.gain_offset, *ctx.wants
        )
        return (
            dx, dx if ctx.has_residual else None, dgain if ctx.wants[0] else None, dbias if ctx.wants[1] else None,
            None, None, None,
        )  # fmt: skip
