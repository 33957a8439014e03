"""All benchmarks or those named, each in a process of its own: python benchmarks [NAME ...] [--quick | --dry-run]"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

NAMES = (
    "quantize",
    "producers",
    "gemm",
    "linear",
    "block",
    "compiled",
    "monitor",
    "small",
    "skinny",
    "prefill",
    "decode",
)


def main() -> int:
    folder, status, took = Path(__file__).parent, 0, {}
    names = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    options = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    for name in names or NAMES:
        print(f"== {name}", flush=True)
        began = time.perf_counter()
        code = subprocess.call([sys.executable, folder / f"{name}.py", *options])
        took[name] = f"{name} {time.perf_counter() - began:.0f} s" + (f" FAILED ({code})" if code else "")
        status = status or code
    print("== " + ", ".join(took.values()))
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main())
