"""The cast kernels against a device copy that moves as many bytes. Writes results/quantize.md and .png."""

from __future__ import annotations

import math

import torch
from lib.common import graph_us, options, randn, scaled, start
from lib.report import bars, header, legend, level, numbers, table, write
from lib.steps import E4M3, quantize
from torch_fp8.picture import FP8, SECOND

SHAPES = [(2048, 2048), (4096, 4096), (8192, 4096), (14336, 4096), (8192, 14336)]
BEYOND_L2 = 0.6e9  # bytes of all buffers of an arm: ten times the L2
REPLAY = 5e9  # bytes of a replay: 1 ms or more on any Hopper GPU
OF = ("GB/s", "share of copy", "dbias")
ARMS = {"cast + transpose": FP8, "cast": SECOND}
NOTE = f"""*graph* regime: what a launch adds to a replay of {REPLAY / 1e9:.0f} GB or more, over buffers of
{BEYOND_L2 / 1e9} GB or more. Cast + transpose reads 2 bytes an element and writes 1 + 1: its copy is one of 2 bytes an
element. Cast only writes 1: a copy of 1.5. dbias is all that it adds, up to the finished gradient. The own amax pass
(current scaling) is all that `own_amax` adds to cast + transpose, small launches included, against reading 2 bytes an
element at the speed of the copy of 2.
"""


def measure(rows: int, cols: int) -> dict[str, float]:
    """µs of each arm."""
    elements = rows * cols
    moved = 3 * elements  # by the arm that moves least
    sets = max(2, math.ceil(BEYOND_L2 / moved)) if not options.dry else 2
    launches = max(sets, math.ceil(REPLAY / moved))
    xs = [randn(rows, cols) for _ in range(sets)]
    targets = [torch.empty_like(x) for x in xs]
    slots = torch.tensor([[1 / 64, 64.0, 0.0, 1.0]], device=options.device)  # scale_inv, scale, amax, cursor

    def cast(columnwise: bool, **kwargs: object):
        return lambda i: quantize(xs[i], slots, 0, E4M3, columnwise=columnwise, **kwargs)

    def copy(share: float):
        pairs = [[t.view(-1)[: int(elements * share)] for t in pair] for pair in zip(targets, xs)]
        return lambda i: pairs[i][0].copy_(pairs[i][1])

    arms = {
        "copy of 2": copy(1),
        "cast + transpose": cast(True),
        "cast + transpose, dbias": cast(True, dbias=torch.bfloat16),
        "cast + transpose, own amax": cast(True, own_amax=True),
        "copy of 1.5": copy(0.75),
        "cast": cast(False),
        "cast, dbias": cast(False, dbias=torch.bfloat16),
    }
    return graph_us(arms, sets, launches)


def cells(us: dict[str, float], name: str, copy: str, bytes_moved: int) -> list[str]:
    share, extra = us[copy] / us[name], us[f"{name}, dbias"] / us[name] - 1
    return [f"{us[copy]:.2f}", f"{us[name]:.2f}", f"{bytes_moved / us[name] / 1e3:.0f}", f"**{share:.1%}**",
            f"{extra:+.1%}"]  # fmt: skip


def draw(figure, tables) -> None:
    (rows,) = tables
    axes = figure.subplots()
    series = {
        f"{name} + amax": (color, [numbers(row[f"{name}: share of copy"])[0] for row in rows])
        for name, color in ARMS.items()
    }
    bars(axes, [row["BF16 matrix"].replace("x", "×") for row in rows], series, "%.0f %%")
    level(axes, "copy", 100)
    axes.set(ylabel="% of the copy's speed\nhigher is better", xlabel="matrix in BF16",
             title="Time per launch, graph")  # fmt: skip
    legend(axes)


def main() -> None:
    start(__doc__)
    rows = []
    for shape in SHAPES:
        size = scaled(*shape)
        us, elements = measure(*size), math.prod(size)
        own = us["cast + transpose, own amax"] - us["cast + transpose"]
        rows.append([
            "{} x {}".format(*size),
            *cells(us, "cast + transpose", "copy of 2", 4 * elements),
            *cells(us, "cast", "copy of 1.5", 3 * elements),
            f"{own:.2f}",
            f"{us['copy of 2'] / 2 / own:.0%}",
        ])  # fmt: skip

    head = ["BF16 matrix",
            "copy of 2 B, µs", "cast + transpose + amax, µs", *(f"cast + transpose: {what}" for what in OF),
            "copy of 1.5 B, µs", "cast + amax, µs", *(f"cast: {what}" for what in OF),
            "own amax pass, µs", "share of reading at copy speed"]  # fmt: skip

    write("quantize", header("Casts to E4M3 against a device copy"), NOTE, table(head, rows), draw=draw)


if __name__ == "__main__":
    main()
