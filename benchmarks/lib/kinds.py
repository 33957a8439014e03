"""Where the time of a step goes, by the profiler's clock: launches and microseconds by kind of kernel."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from .common import options

KINDS = {  # of kernels, by the first pattern that their names match
    "attention": "cudnn|fmha|flash", "GEMMs": "nvjet|gemm|cutlass", "norms": "norm|moments|add_column_sums",
    "activation": "activate", "rotary": "rotary", "casts": "torch_fp8", "all else": "",
}  # fmt: skip


def profiled(step: Callable[[], object]) -> dict[str, tuple[int, float]]:
    """Launches and microseconds of a step by kind of kernel, memsets and copies among them."""
    kinds = dict.fromkeys(KINDS, (0, 0.0))
    if options.dry:
        return kinds
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    step()
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, event.name))
            count, us = kinds[kind]
            kinds[kind] = count + 1, us + event.device_time
    return kinds
