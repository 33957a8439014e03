"""One writer to a folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError


def is_locked(out: Path) -> bool:
    """Whether a process writes to the folder ``out``, which is there."""
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Within, no other run writes to ``out``. The lock goes with the process, however that ends."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out must be a folder, {out} is none")
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"another run is writing to {out}; wait until it has ended, or give another --out") from None
    finally:
        os.close(handle)
