"""Safetensors files: u64 header length, JSON header, packed little-endian data.

The header is checked in full before any tensor is touched. Tensors are read, not mapped: a mapped file that somebody
truncates meanwhile kills the process.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import MAX_BYTES, parse
from .errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_RANK = 16
_MAX_NAME = 500


@dataclass(frozen=True)
class Entry:
    """Where a tensor is."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # in the file
    nbytes: int

    def read(self) -> Tensor:
        """The tensor, in memory of its own on the CPU."""
        data = torch.empty(self.nbytes, dtype=torch.uint8, device="cpu")
        try:
            with self.path.open("rb") as file:
                file.seek(self.begin)
                if file.readinto(data.numpy().data) != self.nbytes:
                    raise CheckpointError(self.path, f"{self.name} ends early: the file is truncated")
        except OSError as error:
            raise CheckpointError(self.path, f"{self.name} cannot be read: {error.strerror}") from error
        return data.view(self.dtype).view(self.shape)


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name. Raises CheckpointError unless all of the file is accounted for."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if len(start) < 8 or length > size - 8:
                raise CheckpointError(path, f"has {size} bytes, too few for its header of {length}: it is truncated")
            if length > MAX_BYTES:
                raise CheckpointError(path, f"has a header of {length} bytes, more than {MAX_BYTES}")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
    header = parse(text, path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(path, "__metadata__ must map strings to strings")
    data = 8 + length
    entries = {name: _entry(path, name, value, data, size - data) for name, value in header.items()}
    at = data
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.nbytes)):
        if entry.begin != at:
            what = "overlaps the tensor before it" if entry.begin < at else "leaves a hole before it"
            raise CheckpointError(path, f"{_short(entry.name)} {what}: data_offsets must pack the tensors")
        at += entry.nbytes
    if at != size:
        raise CheckpointError(path, f"has {size} bytes where its header accounts for {at}")
    return entries


def _entry(path: Path, name: str, value: Any, data: int, size: int) -> Entry:
    """Check one line of a header. size: of the data."""

    def check(condition: bool, what: str) -> None:
        if not condition:
            raise CheckpointError(path, f"{_short(name) if name.isprintable() else _short(ascii(name))} {what}")

    check(0 < len(name) <= _MAX_NAME and name.isprintable(), f"is no name: printable, {_MAX_NAME} characters at most")
    check(isinstance(value, dict) and value.keys() == {"dtype", "shape", "data_offsets"},
          "must have dtype, shape and data_offsets")  # fmt: skip
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    check(isinstance(dtype, str) and dtype in DTYPES, f"has dtype {_short(dtype)}; known are {', '.join(DTYPES)}")
    check(isinstance(shape, list) and len(shape) <= _MAX_RANK and all(map(_is_size, shape)),
          f"has shape {_short(shape)}, not a short list of sizes")  # fmt: skip
    check(isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_size, offsets)),
          f"has data_offsets {_short(offsets)}, not two positions")  # fmt: skip
    begin, end = offsets
    check(begin <= end <= size, f"lies at {begin} to {end} of {size} bytes of data: outside of the file")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    check(nbytes == end - begin, f"has {end - begin} bytes; shape {shape} of {dtype} takes {nbytes}")
    return Entry(path, name, DTYPES[dtype], tuple(shape), data + begin, nbytes)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


@dataclass(frozen=True)
class Item:
    """A tensor to be written, made when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write(path: Path, items: Iterable[Item], done: Callable[[int], Any] = lambda nbytes: None) -> None:
    """Write a file; one tensor is in memory at a time. done: is told of each."""
    items = list(items)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for item in items:
        offsets = [at, at + item.nbytes]
        header[item.name] = {"dtype": _NAMES[item.dtype], "shape": list(item.shape), "data_offsets": offsets}
        at += item.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for item in items:
            tensor = item.make()
            if (tensor.dtype, tuple(tensor.shape)) != (item.dtype, item.shape):
                raise RuntimeError(f"torch_fp8: {item.name} became {tensor.dtype} {tuple(tensor.shape)}")
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            done(item.nbytes)
