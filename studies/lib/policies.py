"""The scale policies of arXiv 2309.17224, on the formats of this hardware (OCP) and of the paper's (Graphcore).

A power-of-two scale is told by its bias: ``scale = 2**bias``, so a positive bias moves up. ``cast`` is what a tensor
becomes on its way through FP8, for any bias; the layers of torch_fp8 do the same where the hardware has the format.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CLIP = 31  # of every bias, in the paper's code


class Format(NamedTuple):
    dtype: torch.dtype
    max: float  # the largest number: mantissa * 2**exponent
    mantissa: float
    exponent: int
    bits: int  # of mantissa
    lowest: int  # exponent of the smallest normal number


E4M3 = Format(torch.float8_e4m3fn, 448.0, 1.75, 8, 3, -6)
E5M2 = Format(torch.float8_e5m2, 57344.0, 1.75, 15, 2, -14)
GRAPHCORE_E4M3 = Format(torch.float8_e4m3fnuz, 240.0, 1.875, 7, 3, -7)
GRAPHCORE_E5M2 = Format(torch.float8_e5m2fnuz, 57344.0, 1.75, 15, 2, -15)


def amax_bias(amax: Tensor, to: Format, margin: int = 0) -> Tensor:
    """FP8-AMAX, int32 of amax's shape: ``clip(clip(floor(log2(max / amax)), -31, 31) - margin, -31, 31)``, in integers:
    of ``amax = m * 2**e`` the floor is the maximum's exponent less e, and one less where m is above its mantissa.
    Where amax says nothing (0, Inf, NaN) the bias is 0."""
    usable = amax.isfinite() & (amax > 0)
    m, e = torch.frexp(torch.where(usable, amax.float(), 1.0))  # of [0.5, 1)
    bias = to.exponent - (e - 1) - (2 * m > to.mantissa).int()
    bias = (bias.clamp(-CLIP, CLIP) - margin).clamp(-CLIP, CLIP)
    return torch.where(usable, bias, 0).int()


def cast(x: Tensor, bias: Tensor | int, to: Format) -> Tensor:
    """What x becomes in FP8 with the scale ``2**bias``, in x's dtype, which holds it exactly: rounded to nearest even,
    saturated where x is finite, else NaN."""
    scale = torch.as_tensor(bias, device=x.device).float().exp2()
    scaled = (x.float() * scale).clamp(-to.max, to.max).masked_fill(~x.isfinite(), float("nan"))
    return (scaled.to(to.dtype).float() / scale).to(x.dtype)
