"""JSON from files that nobody vouches for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .errors import CheckpointError

MAX_BYTES = 16 * 2**20  # ten times the largest header or index of a published model


def read(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError for anything else."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
    return parse(text, path)


def parse(text: bytes, where: object) -> dict[str, Any]:
    """As json.loads, of one object; no duplicate keys, no NaN, bounded in size and depth. Infinity is none of JSON's
    values either, but published configs have it."""
    if len(text) > MAX_BYTES:
        raise CheckpointError(where, f"has more than {MAX_BYTES} bytes of JSON")
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise CheckpointError(where, "has JSON nested too deeply") from error
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, and ours below
        raise CheckpointError(where, f"is no sound JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(where, f"must hold a JSON object, got {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in result if names.count(name) > 1)
        raise ValueError(f"the key {twice[:200]!r} stands twice")
    return result


def _no_constant(name: str) -> float:
    if name != "NaN":
        return float(name)
    raise ValueError(f"{name} is no JSON value")


def text(value: dict[str, Any]) -> str:
    """A config as JSON, infinite numbers as transformers writes them."""
    return json.dumps(_without_infinity(value), indent=2, allow_nan=False) + "\n"


def _without_infinity(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinity(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinity(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return {"__float__": "Infinity" if value > 0 else "-Infinity"}
    return value
