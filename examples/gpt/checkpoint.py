"""Checkpoints: plain tensors and containers in one file, replaced in one step."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch_fp8.files import replacing

from .errors import UserError

State = dict[str, Any]

_ENTRIES = {"identity", "progress", "model", "optimizer", "fp8", "rng"}
_ANEW = "delete it to start anew"


def save(path: Path, state: State) -> None:
    try:
        with replacing(path) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:  # RuntimeError: what torch.save makes of a full disk
        left = f"only a part of it, with {shutil.disk_usage(path.parent).free} bytes left on the disk"
        reason = error.strerror if isinstance(error, OSError) else left
        raise UserError(f"could not write {path}: {reason}; what was there before is unharmed, so make room and "
                        "go on from there") from error  # fmt: skip


def load(path: Path, identity: dict[str, str | int | float]) -> State | None:
    """The checkpoint, on the CPU, or None where there is none. UserError where it is damaged or of another run."""
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:  # torch.save writes checksums, but torch.load does not look at them
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in too many ways to list
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} must be a checkpoint of this program, but does not load ({reason}); {_ANEW}"
        ) from error
    if not isinstance(state, dict) or state.keys() != _ENTRIES or not isinstance(state["identity"], dict):
        raise UserError(f"{path} must be a checkpoint of this program, but holds something else; {_ANEW}")
    differing = [
        f"{name} (was {state['identity'].get(name)}, is {identity.get(name)})"
        for name in dict.fromkeys([*identity, *state["identity"]])
        if state["identity"].get(name) != identity.get(name)
    ]
    if differing:
        raise UserError(
            f"{path} is of another training, which differs in {', '.join(differing)}; give the same values, or {_ANEW}"
        )
    return state


@contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Around what takes ``load``'s state apart: UserError where something in it is of no such training, which a file
    can be that has every entry."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
        raise UserError(
            f"{path} must be a checkpoint of this program, but what it holds cannot be restored ({reason}); {_ANEW}"
        ) from error
