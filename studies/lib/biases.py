"""The integer bias that FP8-AMAX has for every tensor that a linear layer multiplies, by layer and role.

Looked at from outside, by hooks: in FP8 and in 16 bits alike, in training and in inference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .policies import E4M3, E5M2, amax_bias

ROLES = {"x": E4M3, "w": E4M3, "dy": E5M2}  # input, weight, output gradient


class Biases:
    """An observer of a training; or, with ``watch`` alone, of inference.

    every: looks at the first step and at each so many.
    scale: what gradients are multiplied by in training; their biases are told without it.
    """

    def __init__(self, layers: dict[str, nn.Module], every: int = 1, scale: float = 1.0) -> None:
        self._layers, self._every, self._scale = layers, every, scale
        self._amaxes: dict[tuple[str, str], Tensor] = {}

    def wants(self, step: int) -> bool:
        return step == 1 or step % self._every == 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        self._amaxes.clear()
        handles = [layer.register_forward_hook(self._hook(name)) for name, layer in self._layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def seen(self) -> dict[str, Any]:
        """``{"biases": {layer: {role: bias}}}``; None where a tensor was 0 or not finite."""
        found: dict[str, dict[str, int | None]] = {}
        if self._amaxes:
            amaxes = torch.stack(list(self._amaxes.values())).cpu()
            amaxes[[role == "dy" for _, role in self._amaxes]] /= self._scale
            for (name, role), amax in zip(self._amaxes, amaxes):
                usable = bool(amax.isfinite() and amax > 0)
                found.setdefault(name, {})[role] = int(amax_bias(amax, ROLES[role])) if usable else None
        return {"biases": found}

    def _hook(self, name: str) -> Any:
        def after(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._take(name, "x", inputs[0])
            self._take(name, "w", layer.weight)
            if output.requires_grad:
                output.register_hook(lambda gradient: self._take(name, "dy", gradient))

        return after

    def _take(self, name: str, role: str, x: Tensor) -> None:
        with torch.no_grad():
            amax = x.detach().abs().amax().float()
            before = self._amaxes.get((name, role))
            self._amaxes[name, role] = amax if before is None else torch.maximum(before, amax)
