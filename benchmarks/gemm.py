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
from lib.report import BF16, FOURTH, FP8, OTHER, bars, header, legend, plot, table, write
from lib.steps import Call, Layer

KINDS = ("fprop", "dgrad", "wgrad", "wgrad +=")
ARMS = {"heuristic": FP8, "tuned": FOURTH, "torch._scaled_mm": OTHER, "BF16": BF16}


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

    def draw(figure) -> None:
        for axes, kind in zip(figure.subplots(2, 2, sharey=True).flat, KINDS):
            of_kind = {problem[:3]: speed for problem, speed in speeds.items() if problem[3] == kind}
            arms = [arm for arm in ARMS if all(arm in speed for speed in of_kind.values())]
            groups = ["M{}\nK{}\nN{}".format(*size) for size in of_kind]
            bars(axes, groups, {arm: (ARMS[arm], [speed[arm] for speed in of_kind.values()]) for arm in arms})
            axes.set(title=kind, ylabel="TFLOP/s")
        legend(figure)

    write(
        "gemm",
        header("FP8 GEMMs against torch._scaled_mm and BF16"),
        f"*GPU* regime. {' '.join(__doc__.split(chr(10) * 2)[1].split())}\n",
        table(head, rows),
        plot("gemm", draw, height=8),
        account,
    )


if __name__ == "__main__":
    main()
