"""Kurtosis and size of activations while a training goes on, by layer, as ``fp8.activations`` measures them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch_fp8 as fp8
from torch import nn

METRICS = ("kurtosis", "kurtosis_token", "rms")
_NEVER = 1 << 62  # of a sampling that has one step


class Kurtosis:
    """An observer of a training, at the first step and at each so many."""

    def __init__(self, model: nn.Module, every: int) -> None:
        self._model, self._every = model, every
        self._sampling: fp8.Activations | None = None

    def wants(self, step: int) -> bool:
        return step == 1 or step % self._every == 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Samples until the optimizer has stepped; the passes are only its first part."""
        self._sampling = fp8.activations(self._model, _NEVER)
        yield

    def seen(self) -> dict[str, Any]:
        """``{"kurtosis": {"qkv": [of each layer], "ffn": [...], "block": [...]}, "kurtosis_token": ..., "rms": ...}``,
        to four digits; None is not finite."""
        assert self._sampling is not None
        (reading,) = self._sampling.readings
        self._sampling.close()
        found: dict[str, dict[str, list[float | None]]] = {metric: {} for metric in METRICS}
        for tag, value in reading.values.items():
            metric, _, point = tag.partition("/")
            if metric in METRICS:
                digits = float(f"{value:.4g}") if math.isfinite(value) else None
                found[metric].setdefault(point.partition("/")[0], []).append(digits)
        return found
