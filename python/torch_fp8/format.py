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
