"""A 16-bit checkpoint into an FP8 one, tensor by tensor: as much memory as the largest weight takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..files import check_free
from ..layers.experts import is_experts, stacks
from ..swap.freeze import calibrate, layers_to_freeze, static_scale, static_scales
from ..swap.select import Filter
from ..swap.weights import quantize_weight
from . import folder, scheme
from .errors import CheckpointError, need_transformers
from .folder import Folder
from .load import Plan, check_readable
from .model import empty_model
from .pretrained import load_pretrained
from .save import check_sizes, ignored_names, in_files, layer_items
from .shard import Entry, Item

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)

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
    need_transformers()
    scheme.check_writable(format, *KINDS.get(format, ("", "")))
    weight, activations = KINDS[format]
    if (activations == "static") != (batches is not None):
        raise ValueError(f"torch_fp8: format {format!r} " + (
            "needs inputs to calibrate by" if batches is None else "takes no calibration: its activations are dynamic"
        ))  # fmt: skip
    check_free(target)
    opened = Folder(source)
    entries = opened.entries
    if opened.scheme() is not None or any(entry.dtype in _FP8 for entry in entries.values()):
        raise CheckpointError(
            opened.path / folder.CONFIG, "is quantised already; quantising starts from 16-bit weights"
        )
    from .experts import as_matrices  # these import transformers
    from .names import file_names

    model = empty_model(opened.path, opened.config, entries, None)
    plan = Plan(model, entries, None, opened.path)
    layers = layers_to_freeze(model, filter)
    mixtures = {name: layers.pop(name) for name in list(layers) if is_experts(layers[name])}
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"torch_fp8: {name} is a Conv1D, whose transposed weight no FP8 format "
                "holds; keep the 16-bit checkpoint, and torch_fp8.freeze the model that is loaded from it"
            )
        if f"{name}.weight" not in plan.names.sources:
            raise CheckpointError(opened.path, f"has no tensor {name}.weight of its own: it is tied to another")
    of_experts = as_matrices(model, plan.names, mixtures, lambda names: file_names(model, names))
    input_scales: dict[str, float] = {}
    if batches is not None:
        loaded = calibrate(load_pretrained(source, device), batches)
        input_scales = {name: static_scale(name, loaded.get_submodule(name)) for name in layers}
        for name, module in mixtures.items():
            scales = static_scales(name, loaded.get_submodule(name))
            input_scales |= {f"{name}.{stack}": scale for stack, scale in zip(stacks(module), scales, strict=True)}
        del loaded

    groups: list[list[Item]] = []

    def add_layer(stem: str, entry: Entry, parts: Sequence[str]) -> None:
        _check_scales(stem, entry, entries)
        check_sizes(format, weight, stem, *entry.shape)
        dtype = entry.dtype if format == "compressed-tensors" and entry.dtype == torch.bfloat16 else torch.float32
        input_scale = max((input_scales[part] for part in parts), default=None) if input_scales else None
        make = _quantized(entry, weight, device)
        groups.append(layer_items(format, stem, entry.shape, weight, make, input_scale, dtype))

    for name, entry in entries.items():
        parts = [target.removesuffix(".weight") for target in plan.names.targets[name] if target.endswith(".weight")]
        if name in of_experts:
            for stem, matrix, stack in of_experts[name]:
                if len(matrix.shape) == 2:
                    add_layer(stem, matrix, [stack])
                else:
                    groups.append([Item(f"{stem}.bias", matrix.dtype, matrix.shape, matrix.read)])
        elif any(part in layers for part in parts):
            add_layer(_check_layer(name, entry, parts, layers), entry, parts)
        else:
            groups.append([Item(name, entry.dtype, entry.shape, entry.read)])
    left = [name for name in ignored_names(model) if name not in layers and name not in mixtures]
    config = {**opened.config}
    config["quantization_config"] = scheme.written(format, [KINDS[format]], in_files(plan.names, left))
    check_readable(config, [item for group in groups for item in group], opened.path)
    folder.write(target, config, groups, opened.others(), max_shard_size=max_shard_size)


def _check_layer(name: str, entry: Entry, parts: Sequence[str], layers: Mapping[str, nn.Module]) -> str:
    """The name of an FP8 layer in the file, for one weight. parts: the layers of the model that it is."""
    stem, _, key = name.rpartition(".")
    if left_out := [part for part in parts if part not in layers]:
        raise ValueError(
            f"torch_fp8: {name} is the weight of {', '.join(parts)} at once, and the filter leaves {left_out[0]} out; "
            "take all of them or none"
        )
    if key != "weight" or len(entry.shape) != 2:
        raise CheckpointError(entry.path, f"{name} {list(entry.shape)} is no weight that can be FP8 under its name")
    return stem


def _check_scales(stem: str, entry: Entry, entries: Mapping[str, Entry]) -> None:
    for scale in (*scheme.WEIGHT_SCALES, *scheme.INPUT_SCALES):
        if f"{stem}.{scale}" in entries:
            raise CheckpointError(entry.path, f"has {stem}.{scale}, a scale of {entry.name}, which is not FP8")


def _quantized(entry: Entry, weight: str, device: str | torch.device) -> Callable[[], Any]:
    def make() -> tuple[torch.Tensor, torch.Tensor]:
        values = entry.read().to(device)
        if not values.abs().amax().isfinite():
            raise CheckpointError(entry.path, f"{entry.name} has Inf or NaN, which FP8 cannot carry")
        return quantize_weight(values, weight)

    return make
