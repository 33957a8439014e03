"""What sizes and shapes of models must be; anything else is a ValueError in words, before a weight is made."""

from __future__ import annotations


def check_type(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        of = f"{kind.__module__}.{kind.__name__}".removeprefix("builtins.")
        raise ValueError(f"{name} must be of the type {of}, got {value!r}")


def check_counts(**counts: object) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
