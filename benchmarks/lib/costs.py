"""What a layer costs besides its time on large tensors: the host's time, memory, kernels. Tables for linear.py."""

from __future__ import annotations

import torch
import torch_fp8 as fp8
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .common import loop_ms, options, randn, scaled
from .report import table
from .steps import forward_of, linear, step_of

KINDS = {"nn.Linear": nn.Linear, "fp8.Linear": fp8.Linear}
HOST_SHAPE = (16, 256, 256)
PROFILED = (8192, 4096, 14336)
PROFILED_STEPS = 10
MIB = 2**20


def host_table() -> str:
    """Wall time of calls whose kernels take next to nothing: the host's share. The weight stays cast."""
    m, k, n = scaled(*HOST_SHAPE)
    x, dy = randn(m, k, requires_grad=True), randn(m, n)

    def forward_without_grad(layer: nn.Linear):
        def forward() -> None:
            with torch.no_grad():
                layer(x)

        return forward

    rows = []
    for bias in (False, True):
        layers = {name: linear(kind, k, n, bias) for name, kind in KINDS.items()}
        steps = {name: step_of(layer, x, dy, recast=False) for name, layer in layers.items()}
        for call, arms in {
            "forward": {name: forward_of(layer, x, recast=False) for name, layer in layers.items()},
            "forward, no_grad": {name: forward_without_grad(layer) for name, layer in layers.items()},
            "forward + backward": steps,
        }.items():
            bf16, ours = (ms * 1e3 for ms in loop_ms(arms).values())
            rows.append([call, "yes" if bias else "no", f"{bf16:.1f}", f"{ours:.1f}", f"{ours / bf16:.2f}"])
    return f"Host time per call at M{m} K{k} N{n}, the weight stays cast and its gradients add up, *loop*:\n\n" + table(
        ["call", "bias", "nn.Linear µs", "fp8.Linear µs", "ratio"], rows
    )


def memory_table(shapes: list[tuple[int, ...]]) -> str:
    rows = []
    for m, k, n in shapes:
        bf16, ours = (_memory(kind, m, k, n) for kind in KINDS.values())
        rows.append([f"M{m} K{k} N{n}", *(f"{mib:.0f}" for mib in (*bf16[:2], *ours))])
    head = ["shape", "BF16 after forward", "BF16 peak in backward", "FP8 after forward", "FP8 peak in backward",
            "FP8 weight, standing"]  # fmt: skip
    return (
        "Memory in MiB beyond x, dy and the BF16 weight, y alive throughout, with one micro-batch a step. Of the FP8 "
        "weight the transpose lives from forward to backward, and nothing stands after it:\n\n" + table(head, rows)
    )


def _memory(kind: type[nn.Linear], m: int, k: int, n: int) -> tuple[float, float, float]:
    """MiB after forward, at most in backward, and of the FP8 weight that is in neither."""
    x, dy, layer = randn(m, k, requires_grad=True), randn(m, n), linear(kind, k, n)
    step_of(layer, x, dy)()  # workspaces are there, and so is the FP8 weight
    before = _allocated()
    y = layer(x)
    after_forward = _allocated() - before
    if not options.dry:
        torch.cuda.reset_peak_memory_stats()
    y.backward(dy)
    peak = (0 if options.dry else torch.cuda.max_memory_allocated()) - before
    del y
    x.grad = layer.weight.grad = None
    if isinstance(layer, fp8.Linear):
        layer.fp8_state.memo.end_step()
    return after_forward / MIB, peak / MIB, (before - _allocated()) / MIB


def _allocated() -> int:
    return 0 if options.dry else torch.cuda.memory_allocated()


def kernel_tables() -> str:
    m, k, n = scaled(*PROFILED)
    x, dy = randn(m, k, requires_grad=True), randn(m, n)
    totals, rows = [], []
    for name, kind in KINDS.items():
        kernels = _kernels(step_of(linear(kind, k, n), x, dy))
        us = dict.fromkeys(("GEMM", "cast", "rest"), 0.0)
        for kernel, count, time in kernels:
            us[_class(kernel)] += time
            rows.append([name, f"`{kernel}`", f"{count:g}", f"{time:.1f}"])
        launches = sum(count for _, count, _ in kernels)
        totals.append([name, *(f"{time:.0f}" for time in us.values()), f"{sum(us.values()):.0f}", f"{launches:g}"])
    return (
        f"Kernels of one forward + backward at M{m} K{k} N{n} with one weight cast, from torch.profiler over "
        f"{PROFILED_STEPS} steps, µs:\n\n"
        + table(["layer", "GEMMs", "casts, amax", "rest", "all", "launches"], totals)
        + "\n"
        + table(["layer", "kernel", "launches", "µs"], rows)
    )


def _kernels(step) -> list[tuple[str, float, float]]:
    """Name, launches and µs in one step of each kernel, the longest first."""
    step()
    activity = ProfilerActivity.CPU if options.dry else ProfilerActivity.CUDA
    with profile(activities=[activity]) as profiler:
        for _ in range(PROFILED_STEPS):
            step()
        if not options.dry:
            torch.cuda.synchronize()
    if options.dry:
        times = [(e.key, e.count, e.self_cpu_time_total) for e in profiler.key_averages()][:5]
    else:
        times = [
            (e.key, e.count, e.self_device_time_total)
            for e in profiler.key_averages()
            if e.device_type == DeviceType.CUDA and e.self_device_time_total > 0
        ]
    kernels = [(_short(key), count / PROFILED_STEPS, us / PROFILED_STEPS) for key, count, us in times]
    return sorted(kernels, key=lambda kernel: -kernel[2])


def _short(name: str) -> str:
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "").replace("|", "/")
    return name if len(name) <= 90 else name[:87] + "..."


def _class(kernel: str) -> str:
    if any(part in kernel for part in ("nvjet", "gemm", "cutlass", "xmma")):
        return "GEMM"
    return "cast" if any(part in kernel for part in ("quantize", "amax", "column_sums")) else "rest"
