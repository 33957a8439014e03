"""What is in a checkpoint, without a model."""

from __future__ import annotations

import os
from collections import Counter

from .errors import CheckpointError
from .folder import Folder
from .load import INPUT_SCALES, WEIGHT_SCALES, read_scale


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
            try:
                scale = read_scale(entry)
                line += f"  {scale.min():.4g} ... {scale.max():.4g}"
            except CheckpointError as error:
                line += f"  BAD: {error}"
        lines.append(line)
    what = f"{found.method}: weights by {' or '.join(found.weights)}, activations {found.activations}" if found else (
        "not quantised"
    )  # fmt: skip
    total = ", ".join(f"{nbytes / 2**20:.1f} MiB {kind}" for kind, nbytes in sizes.most_common())
    return "\n".join([*lines, f"{folder.path}: {what}", f"{len(folder.entries)} tensors: {total}"])
