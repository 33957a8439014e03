"""From 16-bit weights to codes and multipliers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..format import BLOCK, E4M3, E4M3_MAX, quantize
from ..layers.experts import Layout, Stack, layout_of, matrices, stack_scale_shape
from ..layers.frozen import new_slot, scale_shape


def quantize_weight(weight: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    """The E4M3 codes of a finite (N, K) weight, and their float32 multipliers.

    Every multiplier is a bfloat16 value, amax / 448 rounded up, so that readers with bfloat16 scales and with float32
    ones see the same number. With one scale a tensor it is a power of two: readers that fuse q, k and v requantise at
    the largest of their scales, and only factors of two lose nothing there. It costs 0.06 dB of 31.56 on Gaussian
    weights; with long tails more (Student's t of 3 degrees: 29.1 for 32.3 dB), for then the largest weights carry the
    signal, and amax / 448 puts them upon a code. So channels and blocks, which nobody requantises, do without.
    """
    n, k = weight.shape
    if granularity == "block":
        grid = scale_shape("block", n, k)
        padded = nn.functional.pad(weight.float(), (0, grid[1] * BLOCK - k, 0, grid[0] * BLOCK - n))
        amax = padded.view(grid[0], BLOCK, grid[1], BLOCK).abs().amax((1, 3))
    elif granularity == "channel":
        amax = weight.abs().amax(1, keepdim=True).float()
    else:
        amax = weight.abs().amax().float().reshape(1)
    scale = (power_of_two_above if granularity == "tensor" else _bfloat16_above)(amax / E4M3_MAX)
    scale = torch.where(amax > 0, scale, 1.0).clamp(min=2.0**-126)
    inverse = scale.reciprocal()
    if granularity == "block":
        inverse = inverse.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]
    return quantize(weight.float(), inverse).contiguous(), scale


def power_of_two_above(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x)  # mantissa in [0.5, 1)
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).int())


def _bfloat16_above(x: Tensor) -> Tensor:
    return ((x.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)


def quantize_stack(module: nn.Module, projection: str, weight: str, input_scale: float | None) -> Stack:
    """A projection of 16-bit experts in FP8. input_scale: of static activations."""
    layout = layout_of(module)
    values, bias = matrices(module, layout, projection)
    bias = None if bias is None else layout.separated(bias, projection, dim=1)
    slot = None if input_scale is None else new_slot(input_scale, values.device).repeat(len(values), 1)
    codes, scale = quantize_matrices(values, layout, projection, weight)
    return Stack(codes, scale, bias, slot)


def quantize_matrices(values: Tensor, layout: Layout, projection: str, weight: str) -> tuple[Tensor, Tensor]:
    """Codes and multipliers of (experts, out, in). Each expert's gate and up are quantised by themselves, as
    checkpoints have them."""
    parts = layout.parts(projection)
    codes = torch.empty(values.shape, dtype=E4M3, device=values.device)
    size = stack_scale_shape(weight, values.shape, parts)
    scale = torch.empty(size, dtype=torch.float32, device=values.device)
    for e, rows in enumerate(values):
        quantised = [quantize_weight(part, weight) for part in layout.separated(rows, projection).chunk(parts)]
        codes[e] = torch.cat([codes for codes, _ in quantised])
        scale[e] = torch.cat([scales for _, scales in quantised])
    return codes, scale
