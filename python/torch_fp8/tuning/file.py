"""The file of a tuning: JSON that says where its algorithms mean something, taken whole or refused whole.

    {"format": "torch_fp8 tuning", "version": 2, "cublaslt": 130100, "gpu": "NVIDIA H200", "capability": "9.0",
     "entries": [{"m": ..., "algorithm": "<hexadecimal>"}, ...], "digest": "<SHA-256>"}

The digest is of everything else, as JSON with sorted keys. It is against accidents (a cut off copy, an edit), not
against malice. The functions here know JSON only; ``tuning.py`` gives it its meaning.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from typing import Any, NoReturn

from ..checks import is_int
from ..files import StrPath, as_path, replacing

_HEAD = {"format": "torch_fp8 tuning", "version": 2}
_OPERANDS = ("float8_e4m3fn", "float8_e5m2")
_OUTPUTS = ("bfloat16", "float16", "float32")
_SCALES = ("one", "rows", "blocks")
_ALGORITHM_BYTES = 72


def write(path: StrPath, place: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    body = {**_HEAD, **place, "entries": entries}
    text = json.dumps({**body, "digest": _digest(body)}, indent=1) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read(path: StrPath, place: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a file that was made in this place, each with all of its fields and the right types."""
    try:
        file = json.loads(as_path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        refuse(path, "a whole JSON file", f"one that does not parse ({error})", error)
    if not isinstance(file, dict):
        refuse(path, "a JSON object", file)
    _expect(path, file, _HEAD)
    digest = _digest({key: value for key, value in file.items() if key != "digest"})
    if file.get("digest") != digest:
        refuse(path, f"the digest {digest} of its contents", f"{file.get('digest')}: they changed since it was saved")
    _expect(path, file, place)
    entries = file.get("entries")
    if not isinstance(entries, list):
        refuse(path, "a list of entries", entries)
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict) or entry.keys() != _ENTRY.keys():
            refuse(path, f"entry {i} to have the fields {', '.join(_ENTRY)}", entry)
        for key, (words, is_right) in _ENTRY.items():
            if not is_right(entry[key]):
                refuse(path, f"{key} of entry {i} to be {words}", entry[key])
    return entries


def refuse(path: StrPath, expected: str, got: Any, cause: Exception | None = None) -> NoReturn:
    got = got if isinstance(got, str) else json.dumps(got)
    raise ValueError(
        f"torch_fp8: {os.fspath(path)}: expected {expected}, got {got[:300]}; none of it is used: tune again with "
        "torch_fp8.tune and save that"
    ) from cause


def _expect(path: StrPath, file: dict[str, Any], head: dict[str, Any]) -> None:
    for key, value in head.items():
        if file.get(key) != value:
            refuse(path, f"a file of {key} {value}", file.get(key))


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _is_size(value: Any) -> bool:
    return is_int(value, 1, 2**31 - 1)


def _is_padded(value: Any) -> bool:
    return _is_size(value) and value % 16 == 0


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_time(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value > 0


def _is_algorithm(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{2 * _ALGORITHM_BYTES}}}", value) is not None


# Each field of an entry: what it must be, in words and as a check.
_ENTRY: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "m": ("an integer from 1 to 2**31 - 1", _is_size),
    "n": ("a positive multiple of 16", _is_padded),
    "k": ("a positive multiple of 16", _is_padded),
    "a_dtype": (f"one of {_OPERANDS}", lambda value: value in _OPERANDS),
    "b_dtype": (f"one of {_OPERANDS}", lambda value: value in _OPERANDS),
    "out_dtype": (f"one of {_OUTPUTS}", lambda value: value in _OUTPUTS),
    "bias": ("true or false", _is_bool),
    "accumulate": ("true or false", _is_bool),
    "fast_accum": ("true or false", _is_bool),
    "scales": (f"one of {_SCALES}", lambda value: value in _SCALES),
    "default_us": ("a time in microseconds", _is_time),
    "chosen_us": ("a time in microseconds", _is_time),
    "candidate": ("an integer from 0", lambda value: is_int(value, 0, 2**31 - 1)),
    "algorithm": (f"{_ALGORITHM_BYTES} bytes in hexadecimal", _is_algorithm),
}
