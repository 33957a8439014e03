"""What the texts of a study are, by the digest of their tokens: in words, and whether one who has no copy of the tokens
can make them again. Runs on a text that nobody can make again are closed: what they lack stays missing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from examples.gpt.errors import UserError

from .lines import POSITIVE, TEXT, check_type


class Text(NamedTuple):
    words: str
    can_be_made: bool
    train_tokens: int  # a training of more meets the text again


def read_texts(path: Path) -> dict[str, Text]:
    """None where there is no such file."""
    if not path.exists():
        return {}
    try:
        found = {of: Text(**entry) for of, entry in json.loads(path.read_text(encoding="utf-8")).items()}
        if not all(isinstance(text.can_be_made, bool) for text in found.values()):
            raise ValueError("can_be_made must be true or false")
        for text in found.values():
            check_type("words", text.words, TEXT)
            check_type("train_tokens", text.train_tokens, POSITIVE)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f'{path} must have {{"words": ..., "can_be_made": true or false, "train_tokens": ...}} of each text, but '
            f"has not: {error}"
        ) from error
    return found


def is_closed(digest: str, texts: Mapping[str, Text]) -> bool:
    """A text that has no entry may still be made."""
    return digest in texts and not texts[digest].can_be_made
