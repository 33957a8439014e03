"""Models with weights that somebody trained: a folder or a GGUF file that transformers can read."""

from __future__ import annotations

import hashlib
from array import array
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.gpt.errors import UserError


class Checkpoint:
    """UserError where ``path`` is none. ``name`` is what its runs are called by, ``digest`` is of its weights
    and what is done with them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        if path.suffix == ".gguf" and path.is_file():
            files = [path]
        elif (path / "config.json").is_file():
            weights = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
            if not weights:
                raise UserError(f"--checkpoint: {path} has a config.json and no weights, *.safetensors or *.bin")
            files = [path / "config.json", *weights]
        else:
            raise UserError(f"--checkpoint must be a .gguf file or a folder with a config.json, {path} is neither")
        self.name = (path.stem if path.suffix == ".gguf" else path.resolve().name).replace("_", "-")
        self.digest = _digest(files)

    def model(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """``model(tokens).logits`` is (batch, time, vocabulary). What a GGUF file has quantised is dequantised."""
        transformers = _transformers()
        where, arguments = self._source()
        if arguments:
            arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **arguments)
        model.config.use_cache = False
        return model.to(device)

    def codec(self) -> Codec:
        where, arguments = self._source()
        transformers = _transformers()
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, **arguments)
        except (ValueError, OSError, TypeError, LookupError, ImportError) as error:
            what = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"--checkpoint: {self._path} has no tokenizer that transformers can read; put its tokenizer.json and "
                f"tokenizer_config.json there, or take another checkpoint ({what})"
            ) from error
        return Codec(tokenizer)

    def check_tokens(self, kinds: int) -> None:
        """UserError where its tokenizer has another number of them; without one that can be read nothing is known."""
        try:
            knows = self.codec().vocab
        except UserError:
            return
        if knows != kinds:
            raise self.other_tokens(kinds, knows)

    def other_tokens(self, kinds: int, knows: int) -> UserError:
        return UserError(
            f"the tokens are of {kinds:,} kinds and {self.name} knows {knows:,}: make them with the command tokens "
            "--checkpoint"
        )

    def _source(self) -> tuple[Path, dict[str, Any]]:
        is_file = self._path.is_file()
        return (self._path.parent, {"gguf_file": self._path.name}) if is_file else (self._path, {})


class Codec:
    """A checkpoint's tokenizer, as a codec of texts; documents end with its end of text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.vocab = tokenizer, len(tokenizer)
        if self.vocab > 1 << 16:
            raise UserError(f"a token must fit into two bytes, and this vocabulary has {self.vocab:,}")

    def encode(self, documents: list[str]) -> Tensor:
        ids, end = array("i"), self._tokenizer.eos_token_id
        for document in documents:
            ids.extend(self._tokenizer(document, add_special_tokens=False, verbose=False).input_ids)
            ids.append(end)
        return torch.frombuffer(ids, dtype=torch.int32)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"--checkpoint needs the transformers library; pip install transformers gguf ({error})"
        ) from error
    return transformers


def _digest(files: list[Path]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        with open(file, "rb") as stream:
            while part := stream.read(1 << 24):
                digest.update(part)
    return digest.hexdigest()
