"""Checks of arguments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, SupportsIndex

from torch import nn


def check(condition: bool, field: str, expected: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"torch_fp8: {field} must be {expected}, got {value!r}")


def check_model(model: Any) -> None:
    check(isinstance(model, nn.Module), "model", "an nn.Module", model)


def modules_of(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """With their names. ValueError where it is no model: what looks for modules does so before it changes any."""
    check_model(model)
    return model.named_modules()


def check_bools(**options: Any) -> None:
    """A string would be true, "False" too. What nn.Linear has, bias, is taken as it takes it."""
    for name, value in options.items():
        check(isinstance(value, bool), name, "a bool", value)


def check_sizes(**sizes: Any) -> None:
    """What PyTorch takes as one: a number of numpy's too, and 0."""
    for name, value in sizes.items():
        is_whole = isinstance(value, SupportsIndex) and not isinstance(value, bool)
        check(is_whole and value >= 0, name, "a whole number of at least 0", value)


def is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_count(value: Any) -> bool:
    """Of steps or tokens."""
    return is_int(value, 0, 2**62)
