"""What every benchmark here shares: how time is taken, and the head of a results file.

Two regimes. *GPU*: events around one call while a spinning kernel keeps the GPU busy, so that the host is hidden and
the clock is the boost clock. *loop*: wall time of back-to-back calls, host included, at whatever clock the power limit
leaves: what a training step feels. Arms are interleaved, figures are medians over rounds, data is random.
"""

from __future__ import annotations

import datetime
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch_fp8 as fp8

RESULTS = Path(__file__).parent / "results"
_SPIN_CYCLES = 2_000_000  # about 1 ms: longer than any call here needs to be queued

Arms = Mapping[str, Callable[[], object]]


def gpu_ms(arms: Arms, rounds: int = 30) -> dict[str, float]:
    """Median GPU time of one call of each arm, in ms."""
    for call in arms.values():
        for _ in range(3):
            call()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, call in arms.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(_SPIN_CYCLES)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def loop_ms(arms: Arms, seconds: float = 0.3, rounds: int = 3) -> dict[str, float]:
    """Median over rounds of the wall time per call in a back-to-back loop, in ms."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, call in arms.items():
            call()
            torch.cuda.synchronize()
            count, start = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - start) < seconds or count < 10:
                call()
                count += 1
                if count % 64 == 0:
                    torch.cuda.synchronize()  # the host may run ahead, but not without end
            torch.cuda.synchronize()
            elapsed = time.perf_counter() - start
            times[name].append(elapsed / count * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def header(title: str) -> str:
    """Command, GPU, versions and date."""
    info = fp8.build_info()
    smi = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit", "--format=csv,noheader"],
        capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    command = " ".join(["python", *(str(Path(a).name) if i == 0 else a for i, a in enumerate(sys.argv))])
    return f"""# {title}

* command: `{command.replace("python ", "python benchmarks/", 1)}`
* GPU: {torch.cuda.get_device_name()}; driver, SM clock now, SM clock at most, power limit: {smi}
* PyTorch {torch.__version__}, CUDA {torch.version.cuda}, cuBLASLt {info["cublaslt"]}, torch_fp8 {info["version"]}
* date: {datetime.date.today()}
* random data; medians; arms interleaved in one run. *GPU*: events, host hidden, boost clock. *loop*: back-to-back wall
  time, host included, sustained clock.
"""


def table(head: list[str], rows: list[list[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def write(name: str, text: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(text.rstrip() + "\n")
    print(text)
