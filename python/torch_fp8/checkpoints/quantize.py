"""A 16-bit checkpoint into an FP8 one, tensor by tensor: as much memory as the largest weight takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..files import check_free
from ..swap.freeze import calibrate, layers_to_freeze, quantize_weight, static_scale
from ..swap.select import Filter
from . import folder, scheme
from .errors import CheckpointError
from .folder import Folder
from .load import empty_model, load_pretrained
from .save import check_sizes, layer_items
from .shard import Entry, Item

#: The kind of layers that each format is quantised to.
KINDS = {"compressed-tensors": ("channel", "token"), "block": ("block", "token"), "static": ("tensor", "static")}


def quantize_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    format: str = "compressed-tensors",
    *,
    batches: Iterable[Any] | None = None,
    filter: Filter | Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Write what ``freeze`` and ``save_pretrained`` would, to the bit, without the model in memory.

    batches: inputs to calibrate by, for "static" only; that runs the 16-bit model. filter: as in ``freeze``. device:
    where to compute. Raises CheckpointError for a source that is damaged or quantised already, ValueError where the
    format cannot hold it, FileExistsError where the target is taken.
    """
    scheme.check_writable(format, *KINDS.get(format, ("", "")))
    weight, activations = KINDS[format]
    if (activations == "static") != (batches is not None):
        raise ValueError(f"torch_fp8: format {format!r} " + (
            "needs inputs to calibrate by" if batches is None else "takes no calibration: its activations are dynamic"
        ))  # fmt: skip
    check_free(target)
    opened = Folder(source)
    path = opened.path / folder.CONFIG
    if "quantization_config" in opened.config or any(e.dtype.itemsize == 1 for e in opened.entries.values()):
        raise CheckpointError(path, "is quantised already; quantising starts from 16-bit weights")
    model = empty_model(opened, None)
    layers = layers_to_freeze(model, filter)
    entries = dict(opened.entries)
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"torch_fp8: {name} is a Conv1D, whose transposed weight no FP8 format holds")
        check_sizes(format, weight, name, *layer.weight.shape)
        entry = entries.get(f"{name}.weight")
        if entry is None or entry.shape != tuple(layer.weight.shape):
            found = "none" if entry is None else list(entry.shape)
            raise CheckpointError(opened.path, f"{name}.weight must have shape {list(layer.weight.shape)}, got {found}")
    input_scales: dict[str, float] = {}
    if batches is not None:
        loaded = calibrate(load_pretrained(source, device), batches)
        input_scales = {name: static_scale(name, loaded.get_submodule(name)) for name in layers}
        del loaded

    groups: list[list[Item]] = []
    for name in layers:
        entry = entries.pop(f"{name}.weight")
        dtype = entry.dtype if format == "compressed-tensors" and entry.dtype == torch.bfloat16 else torch.float32
        make = _quantized(entry, weight, device)
        groups.append(layer_items(format, name, entry.shape, weight, make, input_scales.get(name), dtype))
    groups += [[Item(name, entry.dtype, entry.shape, entry.read)] for name, entry in entries.items()]
    ignored = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in layers]
    config = {**opened.config, "quantization_config": scheme.written(format, weight, activations, ignored)}
    folder.write(target, config, groups, opened.others(), max_shard_size=max_shard_size)


def _quantized(entry: Entry, weight: str, device: str | torch.device) -> Callable[[], Any]:
    def make() -> tuple[torch.Tensor, torch.Tensor]:
        values = entry.read().to(device)
        if not values.abs().amax().isfinite():
            raise CheckpointError(entry.path, f"{entry.name} has Inf or NaN, which FP8 cannot carry")
        return quantize_weight(values, weight)

    return make
