"""Documents to token ids, split into training and validation, and the batches drawn from them."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .errors import UserError

_VAL_SHARE = 0.02
_END_OF_TEXT = "<|endoftext|>"


class Codec(Protocol):
    vocab: int

    def encode(self, documents: list[str]) -> Tensor:
        """The token ids of all documents, (n,) int32, each document followed by the end of text."""


class Bytes:
    """A token is a byte of UTF-8, and a byte 0 ends a document."""

    vocab = 256

    def encode(self, documents: list[str]) -> Tensor:
        content = bytearray().join(document.encode() + b"\0" for document in documents)
        return torch.frombuffer(content, dtype=torch.uint8).int()


class GPT2:
    """GPT-2's byte-level BPE, from a folder with its ``encoder.json`` and ``vocab.bpe``."""

    _PIECE = 1 << 16  # characters: small enough that all cores get some, in a text of one document too
    _BATCH = 256  # pieces: the tokenizer's answer is some 50 times larger than the ids in it
    # Where GPT-2's splitting begins a new word whatever follows, so that a cut there changes no token.
    _CUT = re.compile(r"(?<=\S\n)(?=\S)")

    def __init__(self, folder: Path) -> None:
        files = [folder / "encoder.json", folder / "vocab.bpe"]
        for file in files:
            if not file.is_file():
                raise UserError(f"--tokenizer must be a folder with encoder.json and vocab.bpe, {file} is not there")
        try:
            from tokenizers import ByteLevelBPETokenizer
        except ImportError as error:
            raise UserError("--tokenizer needs the tokenizers library; pip install tokenizers") from error
        try:
            self._tokenizer = ByteLevelBPETokenizer(*map(str, files))
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"--tokenizer: {folder} holds no GPT-2 tokenizer: {error}") from error
        self.vocab = max(self._tokenizer.get_vocab().values(), default=0) + 1  # some ids may be of no token
        self._end = self._tokenizer.token_to_id(_END_OF_TEXT)
        if self._end is None:
            raise UserError(f"--tokenizer: {files[0]} must have the token {_END_OF_TEXT}, and has not")

    def encode(self, documents: list[str]) -> Tensor:
        pieces = [piece for document in documents for piece in self._pieces(document)]
        ids = array("i")
        for start in range(0, len(pieces), self._BATCH):
            batch = pieces[start : start + self._BATCH]
            for (_, last), encoding in zip(batch, self._tokenizer.encode_batch([text for text, _ in batch])):
                ids.extend(encoding.ids)
                if last:
                    ids.append(self._end)
        return torch.frombuffer(ids, dtype=torch.int32)

    def _pieces(self, document: str) -> Iterator[tuple[str, bool]]:
        """The document cut into pieces, each with whether it is the last one."""
        start = 0
        while cut := self._CUT.search(document, start + self._PIECE):
            yield document[start : cut.start()], False
            start = cut.start()
        yield document[start:], True


@dataclass(frozen=True)
class Corpus:
    train: Tensor  # (n,) int32
    val: Tensor  # (n,) int32
    vocab: int
    source: str
    fingerprint: str  # of every token: a resumed run must go on with the same text

    def __str__(self) -> str:
        counts = f"{self.train.numel():,} training and {self.val.numel():,} validation tokens"
        return f"{counts} of {self.vocab:,} kinds, from {self.source}"


def make_corpus(documents: list[str], source: str, codec: Codec, *, val_share: float = _VAL_SHARE) -> Corpus:
    """The last 2 % (``val_share``) of the documents are the validation split, at least one and not all; of a single
    document, of its tokens."""
    if len(documents) > 1:
        count = min(max(1, round(val_share * len(documents))), len(documents) - 1)
        train, val = codec.encode(documents[:-count]), codec.encode(documents[-count:])
    else:
        tokens = codec.encode(documents)
        train, val = tokens.tensor_split([tokens.numel() - round(val_share * tokens.numel())])
    return Corpus(train, val, codec.vocab, source, fingerprint(train, val))


def check_splits(corpus: Corpus, least: int, mend: str) -> None:
    """UserError where a split has fewer tokens than ``least``. mend: what the user can give instead, in words."""
    if min(corpus.train.numel(), corpus.val.numel()) < least:
        raise UserError(
            f"the text is too short: each split needs {least} tokens, but it gives {corpus.train.numel()} for training "
            f"and {corpus.val.numel()} for validation; {mend}"
        )


def fingerprint(train: Tensor, val: Tensor) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for split in (train, val):
        digest.update(split.numpy())
    return digest.hexdigest()


def random_starts(tokens: Tensor, count: int, context: int, generator: torch.Generator) -> Tensor:
    return torch.randint(tokens.numel() - context, (count,), generator=generator)


def even_starts(tokens: Tensor, count: int, context: int) -> Tensor:
    """Places spread evenly over the text, the same ones each time."""
    return torch.linspace(0, tokens.numel() - context - 1, count, dtype=torch.float64).long()


def windows(tokens: Tensor, starts: Tensor, context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (len(starts), context) int64 each; the target is the next token."""
    window = tokens[starts[:, None] + torch.arange(context + 1)].long()
    if device.type == "cuda":
        window = window.pin_memory().to(device, non_blocking=True)
    return window[:, :-1], window[:, 1:]
