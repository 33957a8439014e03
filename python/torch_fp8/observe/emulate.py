"""``frozen_linear`` in plain PyTorch: the same FP8 codes and scales, multiplied in float32.

What a model loses with this function is what FP8's rounding costs; what a GPU's kernels lose beyond it is what their
accumulation costs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _C
from ..format import BLOCK, E4M3_MAX, dequantize, quantize
from ..layers.frozen import ACTIVATIONS


def emulated_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_slot: Tensor | None,
    activations: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``y = x W^T + b`` of an input (..., K) and an E4M3 weight (N, K), with the arguments of the op ``frozen_linear``.

    weight_scale: float32 multipliers, of 1 element, (N, 1) or (ceil(N/128), ceil(K/128)). input_slot: float32
    ``{scale_inv, scale, 0, 0}`` (1, 4), for static activations. activations: the index in ``ACTIVATIONS``; which inputs
    are quantised is told at :class:`torch_fp8.FrozenLinear`. dtype: of y; the input's unless given. An amax without
    meaning (0, Inf, NaN) gives scale 1. Raises RuntimeError for a wrong shape.
    """
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise RuntimeError(
            f"torch_fp8: the input's last dimension must be in_features = {weight.shape[1]}, got an input of shape "
            f"{list(x.shape)}"
        )
    dtype = x.dtype if dtype is None else dtype
    x = x.float()
    (n, k), rows, how = weight.shape, x.shape[:-1].numel(), ACTIVATIONS[activations]
    blocks = weight_scale.numel() > 1 and weight_scale.shape != (n, 1)
    if _C.is_input_quantized(rows, n, k, "block" if blocks else "channel", how):
        if how == "static":
            if input_slot is None:
                raise RuntimeError("torch_fp8: static activations need an input_slot, got None")
            x = quantize(x, input_slot[0, 1]).float() * input_slot[0, 0]
        else:
            groups = x.unflatten(-1, (-1, BLOCK)) if blocks else x
            amax = groups.abs().amax(-1, keepdim=True) if how == "token" else x.abs().amax()
            scale = torch.full_like(amax, E4M3_MAX) / amax  # a number over a tensor PyTorch rounds twice
            scale = scale.clamp(2.0**-126, 2.0**126)
            scale = torch.where((amax > 0) & amax.isfinite(), scale, 1.0)
            x = (quantize(groups, scale).float() * scale.reciprocal()).view(x.shape)
    bias = None if bias is None else bias.to(dtype).float()
    return F.linear(x, dequantize(weight, weight_scale), bias).to(dtype)
