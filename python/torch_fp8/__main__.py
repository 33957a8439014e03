"""``python -m torch_fp8``: quantise a checkpoint, look into one, evaluate one."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

WINDOW, WINDOWS = 512, 128  # tokens that one calibration batch has, and how many are read of a text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m torch_fp8", description=__doc__.split(": ", 1)[1])
    commands = parser.add_subparsers(dest="command", required=True)

    quantize = commands.add_parser("quantize", help="write a 16-bit checkpoint in FP8")
    quantize.add_argument("source", metavar="IN", help="folder of config.json and safetensors")
    quantize.add_argument("target", metavar="OUT", help="folder to write; must not exist")
    quantize.add_argument("--format", default="compressed-tensors", choices=["compressed-tensors", "block", "static"])
    quantize.add_argument("--calibrate", metavar="FILE", type=Path, help="text to calibrate by, for --format static")
    quantize.add_argument("--layers", nargs="+", metavar="PATTERN", help="names of layers; all but the head by default")
    quantize.add_argument("--device", default="cpu")
    quantize.add_argument("--max-shard-size", type=int, default=5 * 10**9, metavar="BYTES")

    inspect = commands.add_parser("inspect", help="list the tensors and scales of a checkpoint")
    inspect.add_argument("folder", metavar="DIR")

    if importlib.util.find_spec("torch_fp8.evaluation"):
        commands.add_parser("evaluate", help="compare an FP8 model with its 16-bit one", add_help=False)

    options, rest = parser.parse_known_args(arguments)
    if options.command == "evaluate":
        from . import evaluation

        return evaluation.main(rest) or 0
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        _run(options)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    from .formats.inspect import describe
    from .formats.quantize import quantize_checkpoint

    if options.command == "inspect":
        print(describe(options.folder))
        return
    quantize_checkpoint(
        options.source,
        options.target,
        options.format,
        batches=None if options.calibrate is None else _batches(options.source, options.calibrate),
        filter=options.layers,
        device=options.device,
        max_shard_size=options.max_shard_size,
    )
    print(f"wrote {options.target}")


def _batches(source: str, text: Path) -> list[Any]:
    """The beginning of a text as windows of token ids, by the tokenizer of the checkpoint."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0, : WINDOW * WINDOWS]
    return [window[None].to(torch.int64) for window in ids.split(WINDOW)]


if __name__ == "__main__":
    sys.exit(main())
