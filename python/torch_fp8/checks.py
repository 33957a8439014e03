"""Checks of arguments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def check(condition: bool, field: str, expected: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"torch_fp8: {field} must be {expected}, got {value!r}")


def modules_of(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """With their names. ValueError where it is no model: what looks for modules does so before it changes any."""
    check(isinstance(model, nn.Module), "model", "an nn.Module", model)
    return model.named_modules()


def is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
