"""fp8.Linear against nn.Linear in BF16 and against the floor. Writes results/linear.md and .png.

The floor is what the hardware asks for: the FP8 GEMMs with the algorithms in use, and in place of each cast a device
copy of as many bytes (2 read, 1 + 1 written an element), in one sequence, timed in the same run. No bias, delayed
scaling in its steady state. The weight is cast in each call, as in a step without gradient accumulation, or once.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch_fp8 as fp8
from lib.common import SHAPES, gpu_ms, loop_ms, randn, scaled, start
from lib.costs import host_table, kernel_tables, memory_table
from lib.peers import ADAPTERS, peer_steps
from lib.report import BF16, FP8, OTHER, bars, header, legend, pair, plot, table, write
from lib.steps import Layer, converted, forward_of, linear, step_of
from torch import nn

TARGETS = {  # forward + backward over BF16: GPU, loop
    (8192, 4096, 4096): (1.50, 1.45),
    (8192, 4096, 6144): (1.58, 1.58),
    (8192, 4096, 14336): (1.65, 1.66),
    (8192, 14336, 4096): (1.64, 1.65),
    (2048, 4096, 14336): (1.42, 1.40),
}
SMALL = (512, 1024, 1024)
Times = dict[str, dict[str, float]]  # regime -> arm -> ms


def measure(m: int, k: int, n: int) -> tuple[Times, Times]:
    """Forward, and forward + backward: nn.Linear, fp8.Linear casting its weight or not, and the two floors."""
    x, dy = randn(m, k, requires_grad=True), randn(m, n)
    bf16, ours, layer = linear(nn.Linear, k, n), linear(fp8.Linear, k, n), Layer(m, k, n)
    forward = {
        "bf16": forward_of(bf16, x),
        "fp8": forward_of(ours, x),
        "cached": forward_of(copy.deepcopy(ours), x, recast=False),
    }
    step = {
        "bf16": step_of(bf16, x, dy),
        "fp8": step_of(ours, x, dy),
        "cached": step_of(copy.deepcopy(ours), x, dy, recast=False),
        **peer_steps(bf16, x, dy),
    }
    floors = {
        backward: {"fp8 floor": layer.floor(True, backward), "cached floor": layer.floor(False, backward)}
        for backward in (False, True)
    }
    return (
        {"gpu": gpu_ms({**forward, **floors[False]}), "loop": loop_ms(forward)},
        {"gpu": gpu_ms({**step, **floors[True]}), "loop": loop_ms(step)},
    )


def row(shape: tuple[int, ...], times: Times, target: Sequence[str] = (), peers: Sequence[str] = ()) -> list[str]:
    gpu, loop = times["gpu"], times["loop"]

    def over_bf16(arm: str) -> str:
        return pair(gpu["bf16"] / gpu[arm], loop["bf16"] / loop[arm]) if arm in gpu else "–"

    return [
        "M{} K{} N{}".format(*shape),
        pair(gpu["bf16"], loop["bf16"], 3),
        pair(gpu["fp8"], loop["fp8"], 3),
        f"**{over_bf16('fp8')}**",
        *target,
        f"{gpu['fp8 floor']:.3f}",
        f"{gpu['fp8'] / gpu['fp8 floor']:.3f}",
        over_bf16("cached"),
        f"{gpu['cached'] / gpu['cached floor']:.3f}",
        *(over_bf16(peer) for peer in peers),
    ]


def small_table() -> str:
    """A layer for which FP8 does not pay, as fp8.convert leaves it, against what it was."""
    m, k, n = scaled(*SMALL)
    x, dy = randn(m, k, requires_grad=True), randn(m, n)
    bf16 = nn.Sequential(linear(nn.Linear, k, n))
    left = converted(bf16, tokens=m)
    arms = {"bf16": step_of(bf16, x, dy), "left": step_of(left, x, dy)}
    gpu, loop = gpu_ms(arms), loop_ms(arms)
    what = "in FP8" if isinstance(left[0], fp8.Linear) else "in BF16"
    cells = [f"M{m} K{k} N{n}", what, pair(gpu["bf16"], loop["bf16"], 3), pair(gpu["left"], loop["left"], 3),
             f"**{pair(gpu['bf16'] / gpu['left'], loop['bf16'] / loop['left'])}**", "not below 1"]  # fmt: skip
    head = ["shape", "convert leaves it", "BF16 ms, GPU / loop", "converted ms, GPU / loop",
            "converted over BF16, GPU / loop", "target"]  # fmt: skip
    return (
        f"The last of these shapes as `fp8.convert(nn.Sequential(nn.Linear({k}, {n})), tokens={m})` leaves it, forward "
        "+ backward:\n\n" + table(head, [cells])
    )


def main() -> None:
    start(__doc__)
    sizes = [scaled(*shape) for shape in SHAPES]
    times = [measure(*size) for size in sizes]
    aims = [TARGETS.get(shape) for shape in SHAPES]
    head = ["shape", "BF16 ms, GPU / loop", "FP8 ms, GPU / loop", "FP8 over BF16, GPU / loop", "floor ms",
            "FP8 / floor", "weight cached: over BF16", "/ floor"]  # fmt: skip
    peers = [name for name in ADAPTERS if name in times[0][1]["gpu"]]

    def draw(figure) -> None:
        groups = ["M{}\nK{}\nN{}".format(*size) for size in sizes]
        for i, (axes, title) in enumerate(zip(figure.subplots(1, 2, sharey=True), ("GPU", "loop"))):
            regime = title.lower()
            series = {
                label: (color, [both[1][regime]["bf16"] / both[1][regime][arm] for both in times])
                for label, color, arm in (("weight cast in each call", FP8, "fp8"), ("weight cached", OTHER, "cached"))
            }
            bars(axes, groups, series, [aim[i] if aim else None for aim in aims])
            axes.axhline(1, color=BF16, linewidth=1)
            axes.set(title=title, ylabel="forward + backward over BF16")
        legend(figure)

    write(
        "linear",
        header("One linear layer: torch_fp8 against nn.Linear in BF16"),
        __doc__.split("\n\n")[1],
        "\nForward + backward with both gradients:\n",
        table(
            [*head[:4], "target", *head[4:], *(f"{name}, over BF16" for name in peers)],
            [row(size, both[1], [pair(*aim) if aim else "–"], peers) for size, both, aim in zip(sizes, times, aims)],
        ),
        "Forward, saving for backward:\n",
        table(head, [row(size, both[0]) for size, both in zip(sizes, times)]),
        small_table(),
        host_table(),
        memory_table(sizes),
        kernel_tables(),
        plot("linear", draw),
    )


if __name__ == "__main__":
    main()
