"""An arm's log: a file of JSON objects, one a line.

    {"step": 1, "loss": ..., "lr": ..., "grad_norm": ..., "tokens": (so far), "seconds": (so far)}
    {"step": 100, "val_loss": ...}
    {"step": 100, "scales": {"blocks.0.attn.qkv": {"input": ..., "weight": ..., "grad_output": ...}, ...}}

null stands for a number that is not finite.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch_fp8.files import replacing

from .errors import UserError

Record = dict[str, Any]


class Journal:
    """Appends to the log at ``path`` as it was at ``step``: what a killed run logged after its checkpoint is cut off,
    since a resumed run comes by there again."""

    def __init__(self, path: Path, step: int) -> None:
        self.records = [record for record in read_journal(path) if record["step"] <= step] if step else []
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(_line(record) for record in self.records)
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (lives as long as this)

    def write(self, **record: Any) -> None:
        self.records.append(record)
        with self._told():
            self._file.write(_line(record))

    def sync(self) -> None:
        """To the disk. A checkpoint is there after a power cut, and goes on from this log: call this before its save,
        and before it is deleted."""
        with self._told():
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = f"could not write {self._file.name}: {error.strerror}"
            raise UserError(f"{what}; make room and go on from there") from error


def read_journal(path: Path, mend: str = "move it elsewhere to go on without it") -> list[Record]:
    """Every whole record; a kill can leave half a line at the end. None where there is no file. mend: what helps where
    it is damaged."""
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            found.append(record_of(line))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path} must hold a JSON object with a step a line, but line {number} does not ({error}); {mend}"
            ) from error
    return found


def record_of(line: bytes) -> Record:
    """ValueError where none was written so: a loss is a finite number or null, else the training that goes on from here
    would be judged by what it never had."""
    record = json.loads(line, parse_constant=not_finite)
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise ValueError(f"it is {str(record)[:40]}")
    for key in ("loss", "val_loss", "grad_norm"):
        value = record.get(key)
        if value is not None and not (type(value) in (int, float) and abs(value) <= sys.float_info.max):
            raise ValueError(f"its {key} is {str(value)[:40]!r}")
    return record


def not_finite(word: str) -> None:
    """For ``json.loads``, which takes what JSON has not."""
    raise ValueError(f"what is not finite must be null, got {word}")


def _line(record: Record) -> str:
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
