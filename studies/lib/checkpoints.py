"""Models with weights that somebody trained: a folder or a GGUF file that transformers can read."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.gpt.errors import UserError
from examples.llm.quantised import quantised

_WHOLE = "bring its files back whole"
_VOCABULARIES = ("tokenizer.*", "vocab*", "*.model", "*.tiktoken")  # of tokenizers; each has one of these


DITHER = 2.0**-9  # of a weight: at most half of what lies between two numbers of BF16


def dither_(model: nn.Module, most: float, seed: int) -> None:
    """Moves each weight by a random share of itself, at most ``most``: the same of a seed, on any device. Weights of a
    checkpoint are numbers of BF16 or of fewer bits, and many lie exactly between two numbers of a format that they are
    cast to. The first step would tip all of these its way, however small it is, and by far more than its learning rate
    says; by how much the loss gains by that, and in which formats, would look like a difference of recipes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            share = torch.rand(weight.shape, generator=generator, dtype=torch.float32)
            weight.mul_((1 + most * (2 * share - 1)).to(weight.device))


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
        with self._read("model", _WHOLE):
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                where, dtype=dtype, output_loading_info=True, **arguments
            )
        if missing := sorted(info["missing_keys"]):  # of which the library makes random ones
            raise UserError(
                f"--checkpoint: {self._path} lacks {len(missing)} of its model's weights, {missing[0]} among them; "
                f"{_WHOLE}, or take another checkpoint"
            )
        model.config.use_cache = False
        return model.to(device)

    def check_bits(self) -> None:
        """UserError where its weights are quantised; those of a GGUF file are dequantised."""
        if self._path.is_file():
            return
        with self._read("model", _WHOLE):
            found = quantised(self._path)
        if found:
            raise UserError(
                f"--checkpoint must be in 16 bits, which FP8 is held to, but {self._path} is quantised: {found}; give "
                "the checkpoint that it was made from"
            )

    def codec(self) -> Codec:
        where, arguments = self._source()
        transformers = _transformers()
        lost = "put its tokenizer.json and tokenizer_config.json there"
        with self._read("tokenizer", lost if self._path.is_dir() else _WHOLE):
            if self._path.is_dir() and not any(any(self._path.glob(name)) for name in _VOCABULARIES):
                raise FileNotFoundError("there is none")  # for which the library may give one of no words
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, **arguments)
        if tokenizer.eos_token_id is None:
            raise UserError(f"--checkpoint: the tokenizer of {self._path} must have an end of text, and has none")
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

    @contextmanager
    def _read(self, what: str, mend: str) -> Iterator[None]:
        """Around what transformers reads of it, and nothing else: a damaged file has errors of any type, of the many
        libraries that read the formats. UserError of all of them."""
        try:
            yield
        except Exception as error:
            said = (str(error).splitlines() or [""])[0]
            raise UserError(
                f"--checkpoint: {self._path} has no {what} that transformers can read; {mend}, or take another "
                f"checkpoint ({type(error).__name__}: {said:.200})"
            ) from error

    def _source(self) -> tuple[Path, dict[str, Any]]:
        is_file = self._path.is_file()
        return (self._path.parent, {"gguf_file": self._path.name}) if is_file else (self._path, {})


class Codec:
    """A checkpoint's tokenizer, as a codec of texts; documents end with its end of text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.vocab = max(tokenizer.get_vocab().values()) + 1  # some ids may be of no token

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
