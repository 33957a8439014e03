"""Whether a model can be tried at all, said before anything begins: without it, one that is too large allocates until
the machine ends it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from examples.gpt.errors import UserError

# What each parameter takes at least: in float32 itself, its gradient and AdamW's two moments; or itself in BF16.
TRAINING, INFERENCE = 16, 2

_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # a container's, by either version of cgroups


def check_memory(name: str, build: Callable[[], nn.Module], each: int, smaller: str) -> None:
    """UserError where ``each`` bytes of every parameter are more than there are. Activations are not counted: what
    could fit is not refused. smaller: what the user can give instead, in words."""
    with torch.device("meta"):
        needed = each * sum(parameter.numel() for parameter in build().parameters())
    has = available()
    if needed > has:
        what = "weights, gradients and AdamW's moments" if each == TRAINING else "weights"
        where = "the GPU" if torch.cuda.is_available() else "this machine"
        raise UserError(
            f"{name} needs at least {needed / 2**30:,.1f} GiB for its {what} alone, and {where} has "
            f"{has / 2**30:,.1f}; {smaller}"
        )


def available() -> int:
    """Bytes: of the largest GPU, or without one of the machine, as far as this process may have them."""
    if torch.cuda.is_available():
        return max(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    limits = [path.read_text().strip() for name in _LIMITS if (path := Path("/sys/fs/cgroup", name)).exists()]
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *(int(limit) for limit in limits if limit.isdigit())])
