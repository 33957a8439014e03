"""Files and folders that are there whole or not at all, whatever a kill or a power cut interrupts."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

StrPath = str | os.PathLike[str]


def as_path(path: StrPath) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"torch_fp8: a path must be a str or an os.PathLike, got {path!r}")
    return Path(path)


@contextlib.contextmanager
def replacing(path: StrPath) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to. It takes the place of ``path`` at the end of the block, once it is
    on the disk, in one step. An error in the block leaves ``path`` as it was. OSError before it where ``path`` can be
    no file."""
    path = as_path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "torch_fp8: its folder does not exist; make it first", str(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "torch_fp8: this is a folder; give the path of a file", str(path))
    # A name of its own for each writer, since several may write one file at once.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # of a disk that takes no writes; the first error says so
            temporary.unlink()
        _name(error, temporary, path)
        raise
    _sync(path.parent)  # the new name is in the folder, which is a file of its own


def remove_leftovers(path: StrPath) -> None:
    """Remove what writers left of ``replacing(path)`` when they were killed. Only for whoever knows that nobody else
    writes ``path`` now."""
    path = as_path(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.tmp"):
        left.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: StrPath) -> Iterator[Path]:
    """A temporary folder beside ``path`` to fill. It takes the name ``path`` at the end of the block, once all of its
    files are on the disk, in one step. An error in the block leaves nothing; an OSError of what was written there names
    ``path``. Raises FileExistsError."""
    path = as_path(path)
    check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        for file in folder.iterdir():
            _sync(file)
        _sync(folder)
        os.rename(folder, path)
        _sync(path.parent)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        _name(error, folder, path)
        raise


def check_free(path: StrPath) -> None:
    """Raise FileExistsError where something would be overwritten, or what is to be a folder above is a file."""
    path = as_path(path)
    there = next((above for above in path.parents if os.path.lexists(above)), path.parent)
    if not there.is_dir():
        raise FileExistsError(f"torch_fp8: {path} cannot be in {there}, which is no folder; choose another name")
    if os.path.lexists(path) and (path.is_symlink() or not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"torch_fp8: {path} exists already; choose another name, or delete it")


def _name(error: BaseException, temporary: Path, path: Path) -> None:
    """Let an OSError name ``path``: that of a full disk names no file, and others one that is gone by now."""
    if isinstance(error, OSError) and error.errno and str(error.filename or temporary).startswith(str(temporary)):
        error.filename = str(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
