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


def histogram_bias(x: Tensor, to: Format, margin: int = 0) -> Tensor:
    """The third policy of the paper's code: the bias of least estimated mean squared error, int32 of no dimensions.

    Magnitudes are counted by exponent and the first three bits of mantissa, whose bounds are those of the formats'
    largest numbers. Beyond the largest number x becomes that; below half of the smallest, zero; between them the error
    is that of rounding, a twelfth of the spacing squared. Of equal biases the smallest is taken, which saturates last.
    Where x says nothing (no element that is finite and not 0) the bias is 0.
    """
    magnitude = x.detach().float().abs().flatten()
    magnitude = magnitude[magnitude.isfinite() & (magnitude > 0)]
    if not magnitude.numel():
        return torch.zeros((), dtype=torch.int32, device=x.device)
    bins = magnitude.view(torch.int32) >> 20
    count, first, second = (
        torch.bincount(bins, weights=weight, minlength=2048)
        for weight in (None, magnitude.double(), magnitude.double().square())
    )
    low = torch.arange(2048, dtype=torch.int32, device=x.device)
    exponent = (low >> 3) - 127
    mantissa = 1 + (low & 7) / 8
    bias = torch.arange(-CLIP, CLIP + 1, device=x.device)[:, None]
    unscale = torch.exp2(-bias.double())
    scaled = exponent + bias  # (biases, bins), the exponent after scaling
    above = (scaled > to.exponent) | ((scaled == to.exponent) & (mantissa >= to.mantissa))
    below = scaled < to.lowest - to.bits - 1
    largest = to.max * unscale
    spacing = torch.exp2(scaled.clamp(min=to.lowest).double() - to.bits) * unscale
    overflow = second - 2 * largest * first + largest.square() * count
    error = torch.where(above, overflow, torch.where(below, second, spacing.square() / 12 * count)).sum(1)
    best = bias[error.argmin(), 0]
    return (best - margin).clamp(-CLIP, CLIP).int()
