"""The FP8 format of weights and inputs, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
BLOCK = 128  # rows and columns of a weight, or columns of an input, that share a block's scale


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """E4M3 codes of ``x * scale``, saturated where x is finite, else NaN; x and scale float32. Without the clamp
    PyTorch's cast makes NaN of what is too large."""
    return (x * scale).clamp(-E4M3_MAX, E4M3_MAX).masked_fill(~x.isfinite(), float("nan")).to(E4M3)


def dequantize(weight: Tensor, weight_scale: Tensor) -> Tensor:
    """The float32 values of an (N, K) E4M3 weight; weight_scale of 1 element, (N, 1) or (ceil(N/128), ceil(K/128))."""
    n, k = weight.shape
    if weight_scale.numel() > 1 and weight_scale.shape != (n, 1):
        weight_scale = weight_scale.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]
    elif weight_scale.numel() == 1:
        weight_scale = weight_scale.reshape(1, 1)
    return weight.float() * weight_scale
