"""Whether a checkpoint can stand for 16 bits: what is called BF16 beside FP8 must not be FP8 itself."""

from __future__ import annotations

import json
from pathlib import Path

from torch_fp8.checkpoints.shard import read_header


def quantised(folder: Path) -> str | None:
    """What says that the weights in a folder of transformers' are quantised, in words, or None. No weight is read, and
    a damaged file raises what its reader raises."""
    config = json.loads((folder / "config.json").read_text())
    for key in ("quantization_config", "compression_config"):
        if config.get(key) is not None:
            return f"its config.json has a {key}"
    for file in sorted(folder.glob("*.safetensors")):  # a config may say nothing, and scales would be left out
        for name, entry in read_header(file).items():
            if entry.dtype.is_floating_point and entry.dtype.itemsize == 1:
                return f"{name} in {file.name} is in FP8"
    return None
