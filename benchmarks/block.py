"""A SwiGLU FFN and a whole decoder layer of Llama-3-8B, forward + backward, eager. Writes results/block.md and .png.

The modules are plain PyTorch; the FP8 arm is a copy that fp8.convert changed. Each FP8 weight is cast once a step, as
without gradient accumulation. Norms, rotary positions, attention, SwiGLU's product and the residuals run in BF16 in
both arms and set the limit to what FP8 can give.
"""

from __future__ import annotations

import torch
import torch_fp8 as fp8
from lib.common import gpu_ms, loop_ms, options, randn, scaled, start
from lib.report import BF16, FP8, OTHER, bars, header, legend, pair, plot, table, write
from lib.steps import converted, llama, step_of

from models.llama import FFN, DecoderLayer

TOKENS = 8192
CASES = [  # name, module, sequences, targets over BF16: GPU, loop
    ("SwiGLU FFN, 8192 tokens", FFN, 1, (1.60, 1.62)),
    ("decoder layer, 4 x 2048 tokens", DecoderLayer, 4, (None, 1.30)),
    ("decoder layer, 1 x 8192 tokens", DecoderLayer, 1, (None, 1.30)),
]


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


def main() -> None:
    start(__doc__)
    rows, ratios = [], {"GPU": [], "loop": []}
    for name, kind, sequences, target in CASES:
        gpu, loop, in_fp8 = measure(kind, sequences)
        for regime, ms in (("GPU", gpu), ("loop", loop)):
            ratios[regime].append(ms["bf16"] / ms["fp8"])
        rows.append([
            name,
            pair(gpu["bf16"], loop["bf16"]),
            pair(gpu["fp8"], loop["fp8"]),
            f"**{pair(ratios['GPU'][-1], ratios['loop'][-1])}**",
            " / ".join(f"{aim:.2f}" if aim else "–" for aim in target),
            in_fp8,
        ])  # fmt: skip
    head = ["module", "BF16 ms, GPU / loop", "FP8 ms, GPU / loop", "FP8 over BF16, GPU / loop", "target",
            "linear layers in FP8"]  # fmt: skip

    def draw(figure) -> None:
        axes = figure.subplots()
        names = [name.replace(", ", "\n") for name, *_ in CASES]
        series = {regime: (color, ratios[regime]) for regime, color in (("GPU", OTHER), ("loop", FP8))}
        bars(axes, names, series, [target[1] for *_, target in CASES])
        axes.axhline(1, color=BF16, linewidth=1)
        axes.set(ylabel="forward + backward over BF16", title="Blocks of Llama-3-8B (target: loop)")
        legend(figure)

    write(
        "block",
        header("Blocks of Llama-3-8B: torch_fp8 against BF16"),
        __doc__.split("\n\n")[1],
        table(head, rows),
        plot("block", draw),
    )


if __name__ == "__main__":
    main()
