"""What the library must compute, in a few lines of plain PyTorch and numpy that share nothing with it."""

import math

import numpy as np
import torch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MAX = {E4M3: 448.0, E5M2: 57344.0}
# Rounding to nearest is off by at most half a unit in the last place: a relative 2^-(mantissa bits + 1), or in the
# subnormal range half the smallest number.
RELATIVE = {E4M3: 2.0**-4, E5M2: 2.0**-3}
ABSOLUTE = {E4M3: 2.0**-10, E5M2: 2.0**-17}
# Of an output: half a unit in the last place for rounding it, and half for a sum that lies just beside a tie; and
# half of the smallest subnormal of float16.
OUTPUT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
OUTPUT_SUBNORMAL = {torch.bfloat16: 0.0, torch.float16: 2.0**-25, torch.float32: 0.0}


def codes(x: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """(x * scale) in FP8 as uint8: float32 product, saturated, rounded to nearest even by PyTorch; 0x7F, a NaN, where x
    is not finite."""
    scaled = (x.float() * torch.tensor(scale, dtype=torch.float32)).clamp(-MAX[dtype], MAX[dtype])
    return scaled.to(dtype).view(torch.uint8).masked_fill(~x.isfinite(), 0x7F)


def exact_scale(amax: float, dtype: torch.dtype, margin: int = 0) -> float:
    """fp8_max / (amax * 2^margin) in float32, between 2^-126 and 2^126; 1 where the amax says nothing."""
    if not 0 < amax < float("inf"):
        return 1.0
    with np.errstate(over="ignore"):
        scale = np.float32(MAX[dtype] * 2.0**-margin) / np.float32(amax)
    return float(np.clip(scale, np.float32(2.0**-126), np.float32(2.0**126)))


def power_of_two_scale(amax: float, dtype: torch.dtype, margin: int = 0) -> float:
    """2^b with b = clip(clip(floor(log2(fp8_max / amax)), -31, 31) - margin, -31, 31), as arXiv 2309.17224 has it."""
    if not 0 < amax < float("inf"):
        return 1.0
    mantissa, exponent = math.frexp(amax)  # of [0.5, 1); both formats' maxima are 0.875 * 2**e
    b = math.frexp(MAX[dtype])[1] - exponent - (mantissa > 0.875)
    clip = lambda bias: max(-31, min(31, bias))  # noqa: E731
    return 2.0 ** clip(clip(b) - margin)


def quantised(x: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """x after its way through FP8, in float64."""
    return codes(x, scale, dtype).view(dtype).double() / scale


def amax(x: torch.Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def rounding(x: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """The largest error that rounding to FP8 can make in each element of x (where nothing saturates)."""
    return (RELATIVE[dtype] * x.double().abs()).clamp(min=ABSOLUTE[dtype] / scale)


def accumulation(device: torch.device, k: int) -> float:
    """Error of a sum of k products and its scaling, in parts of the sum of their magnitudes.

    Scaling: scale_inv twice, their product, the product with the sum, the bias: five float32 roundings.
    CPU: float32, k additions of half a unit in the last place each.
    Hopper's tensor core aligns the products of an instruction (32 of them) to the largest and cuts them off 13 bits
    below it (DeepSeek-V3 report, 3.3.2). Each may lose 2^-13 of the largest, which on random data adds up to 2^-12 of
    their magnitudes an instruction.
    """
    scaling = 5 * 2.0**-24
    return scaling + (k * 2.0**-24 if device.type == "cpu" else min(k / 32 + 1, 32) * 2.0**-12)


def weight_of(n: int, k: int, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a frozen layer: random codes, scales of powers of two and others, and the weight in float64."""
    weight = (torch.randn(n, k) * 100).clamp(-448, 448).to(E4M3)
    size = {"tensor": (1,), "channel": (n, 1), "block": (math.ceil(n / 128), math.ceil(k / 128))}[kind]
    scale = torch.rand(size) * 2.0**-7 + 2.0**-9
    spread = scale
    if kind == "block":
        spread = scale.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    return weight, scale, weight.double() * spread.double()


def by_own_amax(x: torch.Tensor) -> torch.Tensor:
    """x in float64 as its own amax has it in FP8."""
    return quantised(x, exact_scale(amax(x), E4M3), E4M3)


def by_row(x: torch.Tensor) -> torch.Tensor:
    """The same of each row."""
    return torch.stack([by_own_amax(row) for row in x])
