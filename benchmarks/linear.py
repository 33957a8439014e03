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
from lib.report import GPU, LOOP, bars, header, layer_name, legend, level, numbers, pair, table, write
from lib.steps import Layer, converted, forward_of, linear, step_of
from torch import nn
from torch_fp8.picture import FP8, SECOND

SMALL = (512, 1024, 1024)
ARMS = {  # column -> what it is, colour
    "FP8 over BF16, GPU / loop": ("weight cast in every call", FP8),
    "weight cached: over BF16": ("weight cast once for many calls", SECOND),
}
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


def row(shape: tuple[int, ...], times: Times, peers: Sequence[str] = ()) -> list[str]:
    gpu, loop = times["gpu"], times["loop"]

    def over_bf16(arm: str) -> str:
        return pair(gpu["bf16"] / gpu[arm], loop["bf16"] / loop[arm]) if arm in gpu else "–"

    return [
        "M{} K{} N{}".format(*shape),
        pair(gpu["bf16"], loop["bf16"], 3),
        pair(gpu["fp8"], loop["fp8"], 3),
        f"**{over_bf16('fp8')}**",
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
            "converted over BF16, GPU / loop"]  # fmt: skip
    return (
        f"The last of these shapes as `fp8.convert(nn.Sequential(nn.Linear({k}, {n})), tokens={m})` leaves it, forward "
        "+ backward:\n\n" + table(head, [cells])
    )


def draw(figure, tables) -> None:
    figure.set_figheight(7.5)
    rows = tables[0]
    for i, (axes, regime) in enumerate(zip(figure.subplots(2, 1, sharey=True), (GPU, LOOP))):
        series = {label: (color, [numbers(row[column])[i] for row in rows]) for column, (label, color) in ARMS.items()}
        bars(axes, [layer_name(row["shape"]) for row in rows], series, "%.2f")
        level(axes, "BF16")
        axes.set(title=f"Forward + backward, {regime}", ylabel="times as fast as BF16\nhigher is better")
    legend(figure.axes[0])


def main() -> None:
    start(__doc__)
    sizes = [scaled(*shape) for shape in SHAPES]
    times = [measure(*size) for size in sizes]
    head = ["shape", "BF16 ms, GPU / loop", "FP8 ms, GPU / loop", "FP8 over BF16, GPU / loop", "floor ms",
            "FP8 / floor", "weight cached: over BF16", "/ floor"]  # fmt: skip
    peers = [name for name in ADAPTERS if name in times[0][1]["gpu"]]

    write(
        "linear",
        header("One linear layer: torch_fp8 against nn.Linear in BF16"),
        __doc__.split("\n\n")[1],
        "\nForward + backward with both gradients:\n",
        table(
            [*head, *(f"{name}, over BF16" for name in peers)],
            [row(size, both[1], peers) for size, both in zip(sizes, times)],
        ),
        "Forward, saving for backward:\n",
        table(head, [row(size, both[0]) for size, both in zip(sizes, times)]),
        small_table(),
        host_table(),
        memory_table(sizes),
        kernel_tables(),
        draw=draw,
    )


if __name__ == "__main__":
    main()
