"""The three FP8 GEMMs of a layer against torch._scaled_mm and against BF16. Writes results/gemm.md and .png.

fprop sums in the tensor core (fast accumulation), dgrad and wgrad promote to float32; output in BF16. "wgrad +=" adds
to a float32 gradient. "heuristic" is the algorithm that cuBLASLt names first, "tuned" what fp8.tune found.
"""

from __future__ import annotations

import os

os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "32768")  # KiB: _scaled_mm gets what torch_fp8 takes
import torch
import torch_fp8 as fp8
from lib.common import SHAPES, gpu_ms, options, scaled, start
from lib.report import bars, header, layer_name, legend, numbers, table, write
from lib.steps import Call, Layer
from torch_fp8.picture import BF16, FP8, SECOND, THIRD

KINDS = {
    "fprop": "Output (fprop)",
    "dgrad": "Gradient of the input (dgrad)",
    "wgrad": "Gradient of the weight (wgrad)",
    "wgrad +=": "Gradient of the weight, added to one in float32 (wgrad +=)",
}
ARMS = {"heuristic": FP8, "tuned": SECOND, "torch._scaled_mm": THIRD, "BF16": BF16}
NAMES = {
    "heuristic": "torch_fp8", "tuned": "torch_fp8 after fp8.tune", "torch._scaled_mm": "PyTorch's FP8 (_scaled_mm)",
    "BF16": "PyTorch's BF16",
}  # fmt: skip


def fp8_gemm(layer: Layer, kind: str) -> Call:
    if kind != "wgrad +=":
        return layer.gemm(kind)
    a, b, a_scale, b_scale, size, fast = layer.operands["wgrad"]
    out = torch.zeros(size, dtype=torch.float32, device=options.device)
    return lambda: torch.ops.torch_fp8.gemm_accumulate_(out, a, b, a_scale, b_scale, fast)


def others(layer: Layer, kind: str) -> dict[str, Call]:
    if kind == "wgrad +=":
        return {}
    a, b, a_scale, b_scale, _, fast = layer.operands[kind]
    x, w, dy = layer.x, layer.w, layer.dy
    left, right = {"fprop": (x, w.t()), "dgrad": (dy, w), "wgrad": (dy.t(), x)}[kind]
    return {
        "torch._scaled_mm": lambda: torch._scaled_mm(
            a, b.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=torch.bfloat16, use_fast_accum=fast
        ),
        "BF16": lambda: left @ right,
    }


def draw(figure, tables) -> None:
    figure.set_figheight(11)
    for axes, (kind, title) in zip(figure.subplots(4, 1, sharey=True), KINDS.items()):
        rows = [row for row in tables[0] if row["GEMM"] == kind]
        speeds = {arm: [x for row in rows for x in numbers(row[f"{arm}, TFLOP/s"])] for arm in ARMS}
        series = {NAMES[arm]: (ARMS[arm], speed) for arm, speed in speeds.items() if speed}
        bars(axes, [layer_name(row["shape"]) for row in rows], series, "%.0f")
        axes.set(title=title, ylabel="TFLOP/s, GPU\nhigher is better")
    legend(figure.axes[0])


def main() -> None:
    start(__doc__)
    layers = [Layer(*scaled(*shape)) for shape in SHAPES]
    calls = {(layer.m, layer.k, layer.n, kind): fp8_gemm(layer, kind) for layer in layers for kind in KINDS}
    ms = {}
    for layer in layers:
        for kind in KINDS:
            problem = (layer.m, layer.k, layer.n, kind)
            ms[problem] = gpu_ms({"heuristic": calls[problem], **others(layer, kind)})

    account = "(Not tuned: this is a dry run.)"
    if not options.dry:
        tuning = fp8.tune([(layer.m, layer.k, layer.n) for layer in layers], rounds=20 if options.quick else 30)
        account = f"fp8.tune's own account, in which the default and what it chose took turns:\n\n```\n{tuning}\n```"
        for problem, call in calls.items():
            if problem[3] != "wgrad +=":  # tune takes shapes to be of layers that do not accumulate
                ms[problem] |= gpu_ms({"tuned": call})
        fp8.forget_tuning()

    speeds = {problem: {arm: 2 * problem[0] * problem[1] * problem[2] / t / 1e9 for arm, t in times.items()}
              for problem, times in ms.items()}  # fmt: skip
    rows = [
        ["M{} K{} N{}".format(*problem), problem[3], f"{ms[problem]['heuristic'] * 1e3:.1f}",
         *(f"{speed[arm]:.0f}" if arm in speed else "–" for arm in ARMS),
         *(f"{max(speed['heuristic'], speed.get('tuned', 0)) / speed[arm]:.2f}" if arm in speed else "–"
           for arm in ("torch._scaled_mm", "BF16"))]
        for problem, speed in speeds.items()
    ]  # fmt: skip
    head = [
        "shape",
        "GEMM",
        "heuristic µs",
        *(f"{arm}, TFLOP/s" for arm in ARMS),
        "best over _scaled_mm",
        "best over BF16",
    ]

    write(
        "gemm",
        header("FP8 GEMMs against torch._scaled_mm and BF16"),
        f"*GPU* regime. {' '.join(__doc__.split(chr(10) * 2)[1].split())}\n",
        table(head, rows),
        account,
        draw=draw,
    )


if __name__ == "__main__":
    main()
