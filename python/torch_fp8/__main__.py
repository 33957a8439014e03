"""``python -m torch_fp8``: quantise a checkpoint, look into one, measure what it lost."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from pathlib import Path
from typing import Any

from . import build_info

WINDOW, WINDOWS = 512, 128  # tokens that one calibration batch has, and how many are read of a text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m torch_fp8", description=__doc__.split(": ", 1)[1])
    built = build_info()
    backends = f"CUDA {built['cuda']}" if built["cuda"] else "the CPU alone"
    version = f"torch_fp8 {built['version']} for PyTorch {built['torch']}, {backends}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True)

    quantize = commands.add_parser("quantize", help="write a 16-bit checkpoint in FP8")
    quantize.add_argument("source", metavar="IN", help="folder of config.json and safetensors")
    quantize.add_argument("target", metavar="OUT", help="folder to write; must not exist")
    quantize.add_argument("--format", default="compressed-tensors", choices=["compressed-tensors", "block", "static"])
    quantize.add_argument(
        "--calibrate",
        metavar="FILE",
        type=Path,
        help="text to calibrate by, for --format static; runs the 16-bit model",
    )
    quantize.add_argument("--layers", nargs="+", metavar="PATTERN", help="names of layers; all but the head by default")
    quantize.add_argument("--device", default="cpu")
    quantize.add_argument("--max-shard-size", type=int, default=5 * 10**9, metavar="BYTES")

    inspect = commands.add_parser("inspect", help="list the tensors and scales of a checkpoint")
    inspect.add_argument("folder", metavar="DIR")

    evaluate = commands.add_parser("evaluate", help="perplexity and divergence of a checkpoint from another")
    evaluate.add_argument("baseline", metavar="BASELINE", help="folder of the 16-bit checkpoint, with its tokenizer")
    evaluate.add_argument("folder", metavar="DIR", help="folder of the FP8 checkpoint")
    evaluate.add_argument("--text", metavar="FILE", type=Path, required=True, help="held-out text")
    evaluate.add_argument("--tokens", type=int, default=WINDOW * WINDOWS, help="how many of them, from its beginning")
    evaluate.add_argument("--device", default="cpu")

    options = parser.parse_args(arguments)
    try:
        _run(options)
    except (ValueError, OSError, ImportError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    from .checkpoints.inspect import describe
    from .checkpoints.quantize import quantize_checkpoint

    if options.command == "inspect":
        print(describe(options.folder))
        return
    if options.command == "evaluate":
        _evaluate(options)
        return
    quantize_checkpoint(
        options.source,
        options.target,
        options.format,
        batches=None if options.calibrate is None else _batches(options.source, options.calibrate, WINDOW * WINDOWS),
        filter=options.layers,
        device=options.device,
        max_shard_size=options.max_shard_size,
    )
    print(f"wrote {options.target}")


def _evaluate(options: argparse.Namespace) -> None:
    import torch

    from . import progress
    from .checkpoints import load_pretrained
    from .observe.evaluation import Report, compare

    windows = [ids for ids in _batches(options.baseline, options.text, options.tokens) if ids.numel() > 1]
    if not windows:
        raise ValueError(f"torch_fp8: {options.text} has no two tokens to predict one from the other")
    models = [load_pretrained(path, options.device) for path in (options.baseline, options.folder)]
    pairs = []
    with torch.inference_mode():
        for ids in progress.bar(windows, desc="evaluate", unit="window"):
            baseline, other = (model(ids.to(options.device)).logits[0] for model in models)
            pairs.append(compare(baseline, other, ids[0].to(options.device)))
    report = Report.of(pairs, range(len(pairs)))  # every window counts as a document
    for field in dataclasses.fields(report):
        print(f"{field.name:24} {getattr(report, field.name):.6g}")


def _batches(source: str, text: Path, tokens: int) -> list[Any]:
    """The beginning of a text as windows of token ids, by the tokenizer of the checkpoint."""
    from .checkpoints.errors import need_transformers

    need_transformers()
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0, :tokens]
    return [window[None].to(torch.int64) for window in ids.split(WINDOW)]


if __name__ == "__main__":
    for asked in (signal.SIGINT, signal.SIGTERM):  # ends in one way that leaves nothing half behind, and no traceback
        signal.signal(asked, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
