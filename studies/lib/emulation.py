"""Linear layers in FP8 by any policy and format, emulated: what is multiplied went through FP8, the product is in the
precision that the model runs in. Codes of E4M3 and E5M2 times a power of two are BF16 numbers, so nothing else differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .policies import Format, amax_bias, cast, histogram_bias

Rule = Callable[[Tensor, Format], "Tensor | int"]  # the bias of a tensor


def by_amax(x: Tensor, to: Format) -> Tensor:
    return amax_bias(x.detach().abs().amax(), to)


def by_histogram(x: Tensor, to: Format) -> Tensor:
    return histogram_bias(x, to)


def by_constant(bias: int) -> Rule:
    return lambda x, to: bias


@contextmanager
def emulated(layers: Mapping[str, nn.Linear], rule: Rule, to: Format) -> Iterator[None]:
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
