"""The FP8 layer as ``torch.compile`` sees it: the primitives of csrc/linear.cpp in a form that can be traced.

Why twice: in eager mode the host's time decides, and the C++ function is the faster one. A trace cannot look into it
and follows a Python ``autograd.Function``. What the C++ side remembers between calls does not exist here: the weight is
cast in every forward, and what the host decides, whether a tensor is scaled by its own amax or by its slot, is a guard
of the graph (``Linear.fp8_has_history``): a graph for the first step, and one for all that follow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..recipe import ConstantScaling, CurrentScaling

if TYPE_CHECKING:
    from .linear import Linear

_INPUT, _WEIGHT, _GRAD_OUTPUT = range(3)
_E4M3 = torch.float8_e4m3fn


class Call(NamedTuple):
    """What is constant in a traced call."""

    own_amax: tuple[bool, bool, bool]  # by role, as all triples here
    margins: tuple[int, int, int]
    power_of_two: bool
    grad_dtype: torch.dtype
    fast_accum: tuple[bool, bool, bool]  # fprop, dgrad, wgrad
    record: bool
    dtype: torch.dtype  # of the output
    for_input: bool  # which gradients are wanted
    for_weight: bool
    for_bias: bool
    dummy_grad: bool


def linear(layer: Linear, x: Tensor, main_grad: Tensor | None = None, dummy_grad: bool = False) -> Tensor:
    """``layer(x)``, as csrc/linear.cpp computes it; the same bits, forward and backward."""
    weight, bias, recipe = layer.weight, layer.bias, layer.recipe
    autocast = torch.is_autocast_enabled(x.device.type)
    if x.dim() == 0 or x.shape[-1] != layer.in_features:
        raise RuntimeError(
            f"torch_fp8: the input's last dimension must be in_features = {layer.in_features}, got an input of shape "
            f"{list(x.shape)}"
        )
    if not autocast and x.dtype != weight.dtype:
        raise TypeError(
            f"torch_fp8: the input is {x.dtype} but the weight is {weight.dtype}; cast one of them, or use "
            "torch.autocast"
        )
    grads = torch.is_grad_enabled()
    current, constant = isinstance(recipe, CurrentScaling), isinstance(recipe, ConstantScaling)
    margin, grad_margin = recipe.margins
    call = Call(
        # Looked up for delayed scaling only: what is looked up becomes a guard.
        own_amax=(current,) * 3 if current or constant else tuple(not known for known in layer.fp8_has_history),
        margins=(margin, margin, grad_margin),
        power_of_two=constant or recipe.power_of_two,
        grad_dtype=recipe.grad_dtype,
        fast_accum=tuple(gemm in recipe.fast_accum for gemm in ("fprop", "dgrad", "wgrad")),
        record=grads and layer.training and not constant,
        dtype=torch.get_autocast_dtype(x.device.type) if autocast else x.dtype,
        for_input=grads and x.requires_grad,
        for_weight=grads and weight.requires_grad,
        for_bias=grads and bias is not None and bias.requires_grad,
        dummy_grad=dummy_grad,
    )
    if grads and layer.training:
        _note_training()
    return _Linear.apply(x, weight, bias, layer.fp8_slots, layer._grad_slots, main_grad, call)


_traced_training = False


def traced_training() -> bool:
    """A training step was traced in this process. A graph cannot say which layers it used: recomputation allows no
    side effects, and the layers of equal blocks share a graph. So from then on every layer may have been used; to count
    one that was not is harmless, for a role that saw nothing keeps its scale."""
    return _traced_training


@torch.compiler.assume_constant_result
def _note_training() -> bool:
    """Runs when a step is traced, and leaves nothing in the graph."""
    global _traced_training
    _traced_training = True
    return True


def _quantize(x: Tensor, slots: Tensor, role: int, call: Call, dtype: torch.dtype, **what: object):
    return torch.ops.torch_fp8.quantize(
        x, slots, role, dtype,
        own_amax=call.own_amax[role], power_of_two=call.power_of_two, margin=call.margins[role], record=call.record,
        **what,
    )  # fmt: skip


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, slots, grad_slots, main_grad, call):
        xq, xt, x_scale_inv, _ = _quantize(x, slots, _INPUT, call, _E4M3, columnwise=call.for_weight)
        wq, wt, w_scale_inv, _ = _quantize(weight, slots, _WEIGHT, call, _E4M3, columnwise=call.for_input)
        ctx.save_for_backward(xt, x_scale_inv, wt, w_scale_inv)
        ctx.slots, ctx.main_grad, ctx.call = grad_slots, main_grad, call
        ctx.x_size, ctx.x_dtype = x.shape, x.dtype
        ctx.weight_size, ctx.weight_dtype = weight.shape, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        size = [*x.shape[:-1], weight.shape[0]]
        bias = bias if bias is None else bias.to(call.dtype)
        return torch.ops.torch_fp8.gemm(xq, wq, x_scale_inv, w_scale_inv, bias, size, call.dtype, call.fast_accum[0])

    @staticmethod
    def backward(ctx, dy):
        xt, x_scale_inv, wt, w_scale_inv = ctx.saved_tensors
        call, gemm = ctx.call, torch.ops.torch_fp8.gemm
        gq, gt, g_scale_inv, dbias = _quantize(
            dy, ctx.slots, _GRAD_OUTPUT, call, call.grad_dtype,
            rowwise=call.for_input, columnwise=call.for_weight, dbias=ctx.bias_dtype if call.for_bias else None,
        )  # fmt: skip
        dx = dw = None
        if call.for_input:
            dx = gemm(gq, wt, g_scale_inv, w_scale_inv, None, ctx.x_size, ctx.x_dtype, call.fast_accum[1])
        if call.for_weight and ctx.main_grad is not None:
            torch.ops.torch_fp8.gemm_accumulate_(ctx.main_grad, gt, xt, g_scale_inv, x_scale_inv, call.fast_accum[2])
            if call.dummy_grad:
                dw = dy.new_empty(ctx.weight_size, dtype=ctx.weight_dtype)
        elif call.for_weight:
            dw = gemm(gt, xt, g_scale_inv, x_scale_inv, None, ctx.weight_size, ctx.weight_dtype, call.fast_accum[2])
        return dx, dw, dbias if call.for_bias else None, None, None, None, None
