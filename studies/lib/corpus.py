"""A text as token ids in one file, so that it is tokenised once for all trainings, on any machine.

    {"vocab": 50257, "source": "...", "train": N, "val": M, "fingerprint": "...", "check": "..."}    one line of JSON
    N + M token ids, two bytes each, little-endian

The fingerprint is of the ids, wherever they are split; ``check`` is of what else is in the line. A name that ends in
``.xz`` is compressed.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch_fp8.files import replacing

from examples.gpt.errors import UserError
from examples.gpt.text import read_documents
from examples.gpt.tokens import Codec, Corpus, check_splits, fingerprint, make_corpus


def make_tokens(data: Path | None, codec: Codec, of: str, val_share: float) -> Corpus:
    """Tokenise ``data`` (by default the running Python's standard library) and keep the last ``val_share`` of the
    documents for validation. of: what the tokens are, in words."""
    if codec.vocab > 1 << 16:
        raise UserError(f"a token must fit into two bytes, and this vocabulary has {codec.vocab:,}")
    documents, source = read_documents(data)
    corpus = make_corpus(documents, f"{Path(source).name if data else source}, {of}", codec, val_share=val_share)
    check_splits(corpus, 2, "give more text or another --val-share")  # a token and the one that follows
    return corpus


def text_of(corpus: Corpus) -> dict[str, str | int]:
    """What a spec has of its text: the digest of all tokens, and how many of them are for training."""
    return {"data": corpus.fingerprint, "split": corpus.train.numel()}


def save_corpus(path: Path, corpus: Corpus) -> None:
    head = {
        "vocab": corpus.vocab,
        "source": corpus.source,
        "train": corpus.train.numel(),
        "val": corpus.val.numel(),
        "fingerprint": corpus.fingerprint,
    }
    ids = torch.cat([corpus.train, corpus.val])
    content = json.dumps({**head, "check": _check(head)}).encode() + b"\n" + ids.numpy().astype("<u2").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(lzma.compress(content, preset=2) if path.suffix == ".xz" else content)


def read_corpus(path: Path) -> Corpus:
    """UserError where the file is missing, damaged or something else."""
    expected = "--tokens must be a file that the command `tokens` wrote"
    try:
        content = path.read_bytes()
        content = lzma.decompress(content) if path.suffix == ".xz" else content
        line, _, ids = content.partition(b"\n")
        head = json.loads(line)
        if "check" not in head:
            raise ValueError("it is of an older version, whose first line has no check")
        if head.pop("check") != _check(head):
            raise ValueError("its first line is not the one that was written")
        train, val = _ids(ids).split([head["train"], head["val"]])
        corpus = Corpus(train, val, head["vocab"], head["source"], head["fingerprint"])
    except OSError as error:
        raise UserError(f"{expected}, {path}: {error.strerror}") from error
    except (lzma.LZMAError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{expected}, {path} is none, or damaged ({error}); write it anew") from error
    if fingerprint(train, val) != corpus.fingerprint:
        raise UserError(f"{path} is damaged: its tokens are not those that were written; write it anew")
    return corpus


def _check(head: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(head).encode(), digest_size=8).hexdigest()


def _ids(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.int16).int().bitwise_and_(0xFFFF)
