"""A SwiGLU FFN and a whole decoder layer of Llama-3-8B, forward + backward, eager. Writes results/block.md and .png.

The modules are plain PyTorch; the FP8 arm is a copy that fp8.convert changed. Each FP8 weight is cast once a step, as
without gradient accumulation. Norms, rotary positions, attention, SwiGLU's product and the residuals run in BF16 in
both arms and set the limit to what FP8 can give.
"""

from __future__ import annotations

import torch
import torch_fp8 as fp8
from lib.common import gpu_ms, loop_ms, options, randn, scaled, start
from lib.report import GPU, LOOP, bars, header, legend, level, numbers, pair, table, write
from lib.steps import converted, llama, step_of
from torch_fp8.picture import FP8, SECOND

from models.llama import FFN, DecoderLayer

TOKENS = 8192
CASES = [  # name, module, sequences
    ("SwiGLU FFN, 8192 tokens", FFN, 1),
    ("decoder layer, 4 x 2048 tokens", DecoderLayer, 4),
    ("decoder layer, 1 x 8192 tokens", DecoderLayer, 1),
]
OVER = "FP8 over BF16, GPU / loop"


def measure(kind: type, sequences: int) -> tuple[dict[str, float], dict[str, float], str]:
    """ms of both arms in the two regimes, and how many layers are in FP8."""
    (tokens,) = scaled(TOKENS)
    shape, *_ = llama()
    size = (sequences, tokens // sequences, shape.hidden)
    x, dy = randn(*size, requires_grad=True), randn(*size)
    with torch.device(options.device):
        bf16 = kind(shape).bfloat16()
    ours = converted(bf16, tokens)
    arms = {"bf16": step_of(bf16, x, dy), "fp8": step_of(ours, x, dy)}
    layers = fp8.summary(ours)
    return gpu_ms(arms, rounds=20), loop_ms(arms, seconds=0.5), f"{sum(row.fp8 for row in layers)} of {len(layers)}"


def draw(figure, tables) -> None:
    (rows,) = tables
    gpu, loop = zip(*(numbers(row[OVER]) for row in rows))
    axes = figure.subplots()
    names = [row["module"].replace(", ", "\n") for row in rows]
    bars(axes, names, {GPU: (SECOND, gpu), LOOP: (FP8, loop)}, "%.2f")
    level(axes, "BF16")
    axes.set(ylabel="times as fast as BF16\nhigher is better", title="Forward + backward")
    legend(axes)


def main() -> None:
    start(__doc__)
    rows = []
    for name, kind, sequences in CASES:
        gpu, loop, in_fp8 = measure(kind, sequences)
        rows.append([
            name,
            pair(gpu["bf16"], loop["bf16"]),
            pair(gpu["fp8"], loop["fp8"]),
            f"**{pair(gpu['bf16'] / gpu['fp8'], loop['bf16'] / loop['fp8'])}**",
            in_fp8,
        ])  # fmt: skip
    head = ["module", "BF16 ms, GPU / loop", "FP8 ms, GPU / loop", OVER, "linear layers in FP8"]
    write(
        "block",
        header("Blocks of Llama-3-8B: torch_fp8 against BF16"),
        __doc__.split("\n\n")[1],
        table(head, rows),
        draw=draw,
    )


if __name__ == "__main__":
    main()
