"""Where FP8 begins to pay: layers of many sizes, forward + backward. Writes results/small.md and .png.

This is the measurement behind convert's rule for layers that are too small. fp8.Linear casts its weight in each call;
no bias. The prediction is that of torch_fp8.swap.worth, and knows loops alone.
"""

from __future__ import annotations

import math

import torch_fp8 as fp8
from lib.common import gpu_ms, loop_ms, randn, scaled, start
from lib.report import GPU, LOOP, header, numbers, pair, table, write
from lib.steps import linear, step_of
from torch import nn
from torch_fp8.picture import FAINT, FP8, INK, SECOND
from torch_fp8.swap.worth import speedup

TOKENS = (512, 2048, 8192, 32768)
LAYERS = [(512, 512), (768, 768), (768, 3072), (1024, 1024), (1024, 4096), (2048, 2048), (2048, 8192), (4096, 1024),
          (4096, 4096)]  # fmt: skip


def measure(m: int, k: int, n: int) -> tuple[float, float]:
    """How much faster than BF16, GPU and loop."""
    x, dy = randn(m, k, requires_grad=True), randn(m, n)
    arms = {name: step_of(linear(kind, k, n), x, dy) for name, kind in (("bf16", nn.Linear), ("fp8", fp8.Linear))}
    gpu, loop = gpu_ms(arms, rounds=10), loop_ms(arms, seconds=0.1)
    return gpu["bf16"] / gpu["fp8"], loop["bf16"] / loop["fp8"]


def draw(figure, tables) -> None:
    cells = [(row["layer"], head, numbers(cell)) for row in tables[0] for head, cell in row.items() if head != "layer"]
    flop = [6 * math.prod(numbers(layer)) * numbers(tokens)[0] for layer, tokens, _ in cells]
    gpu, loop, predicted = zip(*(ratios for *_, ratios in cells))
    left, right = figure.subplots(1, 2, sharey=True)
    for ratios, color, label in ((gpu, SECOND, GPU), (loop, FP8, LOOP)):
        left.scatter(flop, ratios, s=28, color=color, label=label, zorder=3)
    left.set(xscale="log", xlabel="work of forward + backward, FLOP", ylabel="times as fast as BF16\nhigher is better",
             title="The larger the layer, the more FP8 gives", ylim=(0, None))  # fmt: skip
    left.legend(loc="lower right")
    right.scatter(predicted, loop, s=28, color=FP8, zorder=3)
    right.set(xlabel="times as fast as BF16, predicted by convert's rule", title="What convert expects, and the loop",
              xlim=(0, None))  # fmt: skip
    right.axline((0, 0), slope=1, color=FAINT, linewidth=1, linestyle="--")
    right.axvline(1, color=INK, linewidth=1)
    for x, words in ((0.25, "convert leaves\nthese in BF16"), (0.75, "convert takes\nthese into FP8")):
        right.text(x, 0.05, words, transform=right.transAxes, ha="center", color=FAINT)
    for axes in (left, right):
        axes.axhline(1, color=INK, linewidth=1)


def main() -> None:
    start(__doc__)
    sizes = [scaled(m, k, n) for k, n in LAYERS for m in TOKENS]
    measured = [measure(*size) for size in sizes]
    predicted = [speedup(*size) for size in sizes]

    def cell(place: int) -> str:
        mark = "**" if measured[place][1] >= 1 else ""
        return f"{mark}{pair(*measured[place])}{mark} ({predicted[place]:.2f})"

    rows = [[f"K{k} N{n}", *(cell(len(TOKENS) * i + j) for j in range(len(TOKENS)))] for i, (k, n) in enumerate(LAYERS)]
    wrong = [place for place, guess in enumerate(predicted) if (guess > 1) != (measured[place][1] > 1)]
    losses = [measured[place][1] for place in wrong if predicted[place] > 1]
    verdict = (
        f"Prediction and loop lie on different sides of 1 for {len(wrong)} of {len(sizes)} sizes; "
        f"{len(losses)} of these would be converted and lose"
        + (f", the worst at {min(losses):.2f}" if losses else "")
        + ".\n"
    )

    write(
        "small",
        header("Small layers: FP8 over BF16, forward + backward"),
        __doc__.split("\n\n")[1],
        "\nFP8 over BF16, GPU / loop (predicted loop); bold where FP8 is not slower in the loop:\n",
        table(["layer", *(f"{tokens} tokens" for tokens in TOKENS)], rows),
        verdict,
        draw=draw,
    )


if __name__ == "__main__":
    main()
