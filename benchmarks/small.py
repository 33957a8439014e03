"""Where FP8 begins to pay: layers of many sizes, forward + backward. Writes results/small.md and .png.

This is the measurement behind convert's rule for layers that are too small. fp8.Linear casts its weight in each call;
no bias. The prediction is that of torch_fp8.swap.worth, and knows loops alone.
"""

from __future__ import annotations

import torch_fp8 as fp8
from lib.common import gpu_ms, loop_ms, randn, scaled, start
from lib.report import BF16, FP8, OTHER, header, pair, plot, table, write
from lib.steps import linear, step_of
from torch import nn
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

    def draw(figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        flop = [6 * m * k * n for m, k, n in sizes]
        for place, (regime, color) in enumerate((("GPU", OTHER), ("loop", FP8))):
            left.scatter(flop, [ratios[place] for ratios in measured], s=18, color=color, label=regime)
        left.set(xscale="log", xlabel="FLOP of forward + backward", ylabel="measured, over BF16")
        right.scatter(predicted, [loop for _, loop in measured], s=18, color=FP8, label="loop")
        right.axline((1, 1), slope=1, color=BF16, linewidth=1)
        right.axvline(1, color=BF16, linewidth=1, linestyle="--")
        right.set(xlabel="predicted by torch_fp8.swap.worth", title="above the line: faster than predicted")
        for axes in (left, right):
            axes.axhline(1, color=BF16, linewidth=1, linestyle="--")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)

    write(
        "small",
        header("Small layers: FP8 over BF16, forward + backward"),
        __doc__.split("\n\n")[1],
        "\nFP8 over BF16, GPU / loop (predicted loop); bold where FP8 is not slower in the loop:\n",
        table(["layer", *(f"{tokens} tokens" for tokens in TOKENS)], rows),
        verdict,
        plot("small", draw),
    )


if __name__ == "__main__":
    main()
