"""Text from a file, a folder or the running Python's standard library, as a list of documents."""

from __future__ import annotations

import lzma
import random
import re
import sysconfig
from pathlib import Path

from .errors import UserError

_SEPARATOR = re.compile(r"^<\|endoftext\|>\r?$\n?", re.MULTILINE)
_STDLIB_BYTES = 16_000_000
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def read_documents(data: Path | None) -> tuple[list[str], str]:
    """The documents, none of them empty, and what they are in words."""
    if data is None:
        return _stdlib(), f"the Python {sysconfig.get_python_version()} standard library"
    try:
        if data.is_dir():
            texts = _folder(data)
        elif data.is_file():
            texts = [_decode(_read(data), data)]
        elif data.exists():
            raise UserError(f"--data must be a text file or a folder of them, {data} is neither")
        else:
            raise UserError(f"--data must be a text file or a folder of them, {data} does not exist")
    except OSError as error:
        raise UserError(f"--data must be readable, {error.filename or data}: {error.strerror or error}") from error
    documents = [part for text in texts for part in _SEPARATOR.split(text) if part.strip()]
    if not documents:
        raise UserError(f"--data must hold text, {data} is empty")
    return documents, str(data)


def _stdlib() -> list[str]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in root.rglob("*.py") if not _NOT_STDLIB.intersection(path.relative_to(root).parts))
    # Neighbours resemble each other: shuffled, always the same way, the validation split is like the training split.
    random.Random(0).shuffle(paths)
    documents, size = [], 0
    for path in paths:
        document = path.read_text(encoding="utf-8", errors="replace")
        size += len(document)
        if size > _STDLIB_BYTES:
            break
        if document.strip():
            documents.append(document)
    if not documents:
        raise UserError(f"this Python has no source of its standard library in {root}; name a text with --data")
    return documents


def _folder(root: Path) -> list[str]:
    paths = sorted(path for path in root.rglob("*") if path.is_file() and not _hidden(path.relative_to(root)))
    contents = {path: _read(path) for path in paths}
    texts = [_decode(content, path) for path, content in contents.items() if b"\0" not in content[:8192]]
    if len(texts) < len(paths):
        print(f"data: {len(paths) - len(texts)} of {len(paths)} files in {root} left out as binary")
    return texts


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read(path: Path) -> bytes:
    if path.suffix != ".xz":
        return path.read_bytes()
    try:
        return lzma.decompress(path.read_bytes())
    except lzma.LZMAError as error:
        raise UserError(f"--data: {path} must be an .xz file, but does not decompress: {error}") from error


def _decode(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--data must be UTF-8 text, {path} has the byte 0x{content[error.start]:02x} at offset {error.start}; "
            "convert it, e.g. with iconv"
        ) from error
