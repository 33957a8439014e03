"""What layers cast and multiply, by the names that profiles show."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def count_casts() -> Iterator[Counter[str]]:
    """Counts, after the block, of ``cast_input``, ``cast_weight``, ``cast_grad_output``, ``fprop``, ``dgrad`` and
    ``wgrad`` in all threads."""
    counts: Counter[str] = Counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        yield counts
    for event in profile.key_averages():
        if event.key.startswith("torch_fp8::"):
            counts[event.key.removeprefix("torch_fp8::")] += event.count
