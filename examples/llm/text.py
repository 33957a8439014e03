"""Held-out text as windows of tokens, and multiple-choice items made from it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from gpt.errors import UserError
from gpt.text import read_documents
from torch import Tensor

_ARTICLE = re.compile(r"^(?= = [^=].* = $)", re.MULTILINE)  # WikiText's line before each article
CONTEXT, CONTINUATION, CHOICES = 96, 16, 4


@dataclass
class Text:
    name: str
    digest: str  # of the file
    documents: list[Tensor]  # token ids, int64
    window: int

    @property
    def windows(self) -> list[tuple[int, Tensor]]:
        """(document, token ids): non-overlapping, none crosses from one document to the next. The first token of each
        is given and not predicted; no token is added."""
        return [
            (i, ids) for i, document in enumerate(self.documents) for ids in document.split(self.window) if len(ids) > 1
        ]


def load(path: Path, encode: Callable[[str], list[int]], tokens: int, window: int) -> Text:
    """The first so many tokens of a file. Its documents are parted by <|endoftext|> or by WikiText's titles."""
    documents, name = read_documents(path)
    if len(documents) == 1:
        documents = [part for part in _ARTICLE.split(documents[0]) if part.strip()]
    kept, left = [], tokens
    for document in documents:
        ids = torch.tensor(encode(document)[:left])
        kept.append(ids)
        left -= len(ids)
        if left <= 0:
            break
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else "–"
    text = Text(Path(name).name, digest, kept, window)
    if not text.windows:
        raise UserError(f"{path} must hold more than one token of text")
    return text


def choices(text: Text, items: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Which of four continuations is the true one? Ids (items, 4, context + continuation) and answers (items,). The
    other three stand elsewhere in the same text."""
    stream, generator = torch.cat(text.documents), torch.Generator().manual_seed(seed)
    length = CONTEXT + CONTINUATION
    if len(stream) < 2 * length:
        return torch.empty(0, CHOICES, length, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    starts = torch.randint(len(stream) - length + 1, (items, CHOICES), generator=generator)
    pieces = stream[starts[..., None] + torch.arange(length)]
    answers = torch.randint(CHOICES, (items,), generator=generator)
    contexts = pieces[torch.arange(items), answers, :CONTEXT]
    return torch.cat([contexts[:, None].expand(-1, CHOICES, -1), pieces[..., CONTEXT:]], dim=-1), answers
