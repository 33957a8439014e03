"""What is in a checkpoint, without a model."""

from __future__ import annotations

import os
from collections import Counter

from .folder import Folder
from .scheme import INPUT_SCALES, WEIGHT_SCALES
from .shard import Entry
from .stored import check_scale

MAX_SCALES = 2**26  # bytes of one tensor of scales, ten times those of the largest published one


def describe(path: str | os.PathLike[str]) -> str:
    """A table of a checkpoint's tensors and scales, for people. Raises CheckpointError for a damaged one."""
    folder = Folder(path)
    found = folder.scheme()
    lines: list[str] = []
    sizes: Counter[str] = Counter()
    for name, entry in sorted(folder.entries.items()):
        sizes[str(entry.dtype).removeprefix("torch.")] += entry.nbytes
        kind = str(entry.dtype).removeprefix("torch.")
        line = f"{name}  {kind} {list(entry.shape)}"
        if name.rpartition(".")[2] in (*WEIGHT_SCALES, *INPUT_SCALES):
            line += f"  {_range(entry)}"
        lines.append(line)
    what = f"{found.method}: weights by {' or '.join(found.weights)}, activations {found.activations}" if found else (
        "not quantised"
    )  # fmt: skip
    total = ", ".join(f"{nbytes / 2**20:.1f} MiB {kind}" for kind, nbytes in sizes.most_common())
    return "\n".join([*lines, f"{folder.path}: {what}", f"{len(folder.entries)} tensors: {total}"])


def _range(entry: Entry) -> str:
    """The smallest and largest scale, or what is wrong with them."""
    if not 0 < entry.nbytes <= MAX_SCALES:
        return f"BAD: {entry.nbytes} bytes are no scales"
    scale = entry.read().float()
    try:
        check_scale(scale)
    except ValueError as error:
        return f"BAD: {entry.name} {error}"
    return f"{scale.min():.4g} ... {scale.max():.4g}"
