"""What every benchmark here shares: the command line, and how time is taken.

Three regimes, always named. *GPU*: events around one call while a spinning kernel keeps the GPU busy, so that the host
is hidden and the clock is the boost clock. *loop*: wall time of back-to-back calls, host included, at whatever clock
the power limit leaves: what a training step feels. *graph*, for kernels that only move memory: a CUDA graph of
back-to-back launches over rotating buffers, so that neither launches nor the L2 cache are in it. Arms are interleaved,
figures are medians over rounds, data is random.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

SHAPES = [  # M (tokens), K (in), N (out): the layers of Llama-3-8B, fewer tokens, and one too small for FP8
    (8192, 4096, 4096),
    (8192, 4096, 6144),
    (8192, 4096, 14336),
    (8192, 14336, 4096),
    (2048, 4096, 14336),
    (512, 1024, 1024),
]
SPIN, MOST_SPIN = 2_000_000, 64_000_000  # cycles: about 1 ms at first; 32 ms hide the launches of a decoder layer

Arms = Mapping[str, Callable[[], object]]


@dataclass
class Options:
    quick: bool = False
    dry: bool = False
    device: str = "cuda"


options = Options()
clocks: list[int] = []  # MHz, read just after each round of a loop


def start(description: str, **more: dict[str, Any]) -> argparse.Namespace:
    """Read the command line, which may have ``more`` options than all benchmarks."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="half the rounds")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="tiny sizes, each call once, on the CPU: does the script run? The figures mean nothing",
    )
    for name, how in more.items():
        parser.add_argument(f"--{name}", **how)
    args = parser.parse_args()
    options.quick, options.dry = args.quick, args.dry_run
    if args.dry_run:
        options.device = "cpu"
        torch.set_num_threads(1)
        torch.backends.mkldnn.enabled = False  # it has not every FP8 product, and not every virtual machine has its AMX
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("no GPU is visible to PyTorch; --dry-run tries the script without one")
    torch.manual_seed(0)
    return args


def scaled(*sizes: int) -> tuple[int, ...]:
    """Sizes as given; tiny ones in a dry run."""
    return tuple(max(16, size // 128) for size in sizes) if options.dry else sizes


def randn(*size: int, requires_grad: bool = False) -> torch.Tensor:
    return torch.randn(size, device=options.device, dtype=torch.bfloat16, requires_grad=requires_grad)


def gpu_ms(arms: Arms, rounds: int = 30) -> dict[str, float]:
    """Median GPU time of one call of each arm, in ms."""
    if options.dry:
        return _once(arms)
    for call in arms.values():
        for _ in range(3):
            call()
    times: dict[str, list[float]] = {name: [] for name in arms}
    spins = dict.fromkeys(arms, SPIN)
    for _ in range(_fewer(rounds)):
        for name, call in arms.items():
            ms, hidden = _event_ms(call, spins[name])
            while not hidden and spins[name] < MOST_SPIN:
                spins[name] *= 2
                ms, hidden = _event_ms(call, spins[name])
            times[name].append(ms)
    return _medians(times)


def loop_ms(arms: Arms, seconds: float = 0.3, rounds: int = 3) -> dict[str, float]:
    """Median over rounds of the wall time per call in a back-to-back loop, in ms."""
    if options.dry:
        return _once(arms)
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(_fewer(rounds)):
        for name, call in arms.items():
            call()
            torch.cuda.synchronize()
            fence, count, began = None, 0, time.perf_counter()
            while time.perf_counter() - began < seconds or count < 10:
                call()
                count += 1
                if count % 16 == 0:  # the host may run ahead, but not without end; the GPU never runs dry for it
                    if fence is not None:
                        fence.synchronize()
                    fence = torch.cuda.Event()
                    fence.record()
            torch.cuda.synchronize()
            times[name].append((time.perf_counter() - began) / count * 1e3)
            clocks.extend(_sm_clock())
    return _medians(times)


def graph_us(
    arms: Mapping[str, Callable[[int], object]], sets: int, launches: int, rounds: int = 15
) -> dict[str, float]:
    """Median time that one launch adds to a busy stream, in µs. An arm is a function of the number of a buffer set.

    What a captured call returns is kept until ``sets`` further calls were captured: outputs rotate as the inputs do.
    """
    if options.dry:
        return {name: ms * 1e3 for name, ms in _once({n: lambda c=c: c(sets - 1) for n, c in arms.items()}).items()}
    replays = {}
    for name, call in arms.items():
        for i in range(sets):  # loads the kernels, which a capture cannot do; and what stands from now on is known
            call(i)
        graph, alive = torch.cuda.CUDAGraph(), deque(maxlen=sets)
        with torch.cuda.graph(graph):
            for i in range(launches):
                alive.append(call(i % sets))
        replays[name] = graph.replay
    return {name: ms * 1e3 / launches for name, ms in gpu_ms(replays, rounds).items()}


def _event_ms(call: Callable[[], object], spin: int) -> tuple[float, bool]:
    """GPU time of a call in ms, and whether the host was done before the GPU began."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(spin)
    began.record()
    call()
    ended.record()
    hidden = not began.query()
    torch.cuda.synchronize()
    return began.elapsed_time(ended), hidden


def _once(arms: Arms) -> dict[str, float]:
    times = {}
    for name, call in arms.items():
        began = time.perf_counter()
        call()
        times[name] = (time.perf_counter() - began) * 1e3
    return times


def _fewer(rounds: int) -> int:
    return (rounds + 1) // 2 if options.quick else rounds


def _medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def _sm_clock() -> list[int]:
    try:
        return [torch.cuda.clock_rate()]
    except Exception:  # it needs nvidia-ml-py, and a driver that answers
        return []
