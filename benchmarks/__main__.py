"""All benchmarks or those named, each in a process of its own: python benchmarks [NAME ...] [--quick | --dry-run]

With --redraw nothing is measured: the pictures are drawn again from the tables in benchmarks/results.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

NAMES = (
    "quantize",
    "producers",
    "rotary",
    "attention",
    "large_scores",
    "gemm",
    "linear",
    "block",
    "compiled",
    "fused",
    "hugging_face",
    "train_step",
    "monitor",
    "small",
    "skinny",
    "prefill",
    "decode",
    "adapters",
    "fog",
)


def main() -> int:
    folder, status, took = Path(__file__).parent, 0, {}
    names = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    options = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    if options == ["--redraw"]:
        return redraw(names or NAMES)
    for name in names or NAMES:
        print(f"== {name}", flush=True)
        began = time.perf_counter()
        code = subprocess.call([sys.executable, folder / f"{name}.py", *options])
        took[name] = f"{name} {time.perf_counter() - began:.0f} s" + (f" FAILED ({code})" if code else "")
        status = status or code
    print("== " + ", ".join(took.values()))
    return 1 if status else 0


def redraw(names: Sequence[str]) -> int:
    from lib import report

    for name in names:
        if draw := getattr(importlib.import_module(name), "draw", None):
            report.redraw(name, draw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
