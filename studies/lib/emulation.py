"""Linear layers in FP8 by any policy and format, emulated: what is multiplied went through FP8, the product is in the
precision that the model runs in. Codes of E4M3 and E5M2 times a power of two are BF16 numbers, so nothing else differs.

``emulated`` is inference, ``emulate`` changes layers for training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fp8.layers.classes import is_conv1d

from .policies import CLIP, E4M3, E5M2, GRAPHCORE_E4M3, GRAPHCORE_E5M2, Format, amax_bias, cast, histogram_bias

FAMILIES = {"ocp": (E4M3, E5M2), "graphcore": (GRAPHCORE_E4M3, GRAPHCORE_E5M2)}  # of activations and weights; gradients

Rule = Callable[[Tensor, Format], "Tensor | int"]  # the bias of a tensor


def by_amax(x: Tensor, to: Format) -> Tensor:
    return amax_bias(x.detach().abs().amax(), to)


def by_histogram(x: Tensor, to: Format) -> Tensor:
    return histogram_bias(x, to)


def by_constant(bias: int) -> Rule:
    return lambda x, to: bias


@contextmanager
def emulated(layers: Mapping[str, Any], rule: Rule, to: Format) -> Iterator[None]:
    """Within, these layers are inference in FP8: inputs are cast in each call, weights once."""

    def cast_input(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = inputs
        return cast(x, rule(x, to), to), *rest

    kept = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    handles = [layer.register_forward_pre_hook(cast_input) for layer in layers.values()]
    try:
        with torch.no_grad():
            for layer in layers.values():
                layer.weight.copy_(cast(layer.weight, rule(layer.weight, to), to))
        yield
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for name, layer in layers.items():
                layer.weight.copy_(kept[name])


@dataclass(frozen=True)
class Emulation:
    """How a layer trains. margin: what is taken off the bias of gradients, clipped before and after."""

    rule: Rule
    family: str
    margin: int

    def forward(self, x: Tensor) -> Tensor:
        to, _ = FAMILIES[self.family]
        return cast(x, self.rule(x, to), to)

    def backward(self, gradient: Tensor) -> Tensor:
        _, to = FAMILIES[self.family]
        bias = torch.as_tensor(self.rule(gradient, to)).clamp(-CLIP, CLIP) - self.margin
        return cast(gradient, bias.clamp(-CLIP, CLIP), to)


class Emulated(nn.Module):
    """In training all three products are of what went through FP8, in evaluation the layer is what it was."""

    weight: Tensor
    bias: Tensor | None
    emulation: Emulation

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        weight = self.weight.t() if is_conv1d(self) else self.weight
        y = _Product.apply(x, weight, self.emulation, dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, emulation: Emulation, dtype: torch.dtype) -> Tensor:
        x, weight = (emulation.forward(tensor).to(dtype) for tensor in (x, weight))  # float32 is rounded once
        ctx.save_for_backward(x, weight)
        ctx.emulation = emulation
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        gradient = ctx.emulation.backward(gradient)
        return gradient @ weight, gradient.flatten(0, -2).t() @ x.flatten(0, -2), None, None


def emulate(layers: Mapping[str, Any], emulation: Emulation) -> None:
    """Of plain nn.Linear and Conv1D layers: they stay where they are, with their parameters."""
    for layer in layers.values():
        layer.__class__ = type(f"Emulated{type(layer).__name__}", (Emulated, type(layer)), {})
        layer.emulation = emulation
