"""Files that are whole or not there, and what is said when they cannot be written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can mend; the message is one line that says how."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to. Takes the place of ``path`` at the end of the block, in one step
    that a kill or a power cut leaves either not begun or complete; an error in the block leaves ``path`` as it was."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name is in the folder, which is a file of its own
    finally:
        os.close(folder)
