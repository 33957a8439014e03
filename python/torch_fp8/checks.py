"""Checks of arguments."""

from __future__ import annotations

from typing import Any


def check(condition: bool, field: str, expected: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"torch_fp8: {field} must be {expected}, got {value!r}")


def is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
