"""Which layers of a model a checkpoint holds in FP8: they become frozen layers, empty still."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..format import E4M3
from ..layers.frozen import FrozenLinear, frozen_layers, scale_shape
from ..swap.freeze import become_frozen, weight_of
from ..swap.select import why_not_frozen
from .errors import CheckpointError
from .scheme import INPUT_SCALES, WEIGHT_SCALES, Scheme
from .shard import Entry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .names import Names

_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)


def freeze_as_stored(
    model: nn.Module, names: Names, scheme: Scheme | None, path: Path, activations: str | None, taken: set[str]
) -> set[str]:
    """Make frozen layers, on the meta device, of the linear layers whose weights are E4M3; return the names of their
    tensors in the files, and of those taken already. path: of the config. Raises CheckpointError for what the headers
    show to be none."""
    used = set(taken)
    modules = dict(model.named_modules())
    layers: dict[str, tuple[nn.Module, str, str]] = {}
    for entry in [entry for entry in names.entries.values() if entry.dtype == E4M3 and entry.name not in used]:
        targets = names.targets[entry.name]
        if not all(_is_linear(modules, name) for name in targets):
            if any(name in names.state for name in targets):
                raise CheckpointError(
                    entry.path,
                    f"{entry.name} is {E4M3}; FP8 is read as E4M3 weights of linear layers and of experts only",
                )
            continue  # it has no place in the model
        for name in targets:
            parts = names.sources[name]
            expected = list(names.state[name].shape)
            if len(parts) == len(targets) == 1 and list(entry.shape) != expected:
                raise CheckpointError(entry.path, f"{entry.name} has shape {list(entry.shape)}, expected {expected}")
            if odd := [part.name for part in parts if part.dtype != E4M3]:
                raise CheckpointError(entry.path, f"{entry.name} is FP8, {odd[0]}, a part of the same layer, is not")
        if len(entry.shape) != 2:
            raise CheckpointError(entry.path, f"{entry.name} has shape {list(entry.shape)}, expected a matrix")
        (how, granularity), its = stored_layer(names.entries, scheme, entry, path, activations)
        layers |= {name: (modules[name.rpartition(".")[0]], how, granularity) for name in targets}
        used |= its
    for stem, _, key in (name.rpartition(".") for name in names.entries):
        if scheme is not None and key in WEIGHT_SCALES and f"{stem}.weight" not in names.entries:
            raise CheckpointError(
                names.entries[f"{stem}.{key}"].path, f"has {stem}.{key}, but has no tensor {stem}.weight"
            )
    for layer, how, granularity in layers.values():
        freeze_empty(layer, how, granularity)
    return used


def stored_layer(
    entries: Mapping[str, Entry], scheme: Scheme | None, entry: Entry, path: Path, activations: str | None
) -> tuple[tuple[str, str], set[str]]:
    """Of an E4M3 matrix in a file: how its inputs are quantised and what shares a scale, and the names of its tensors.
    Raises CheckpointError where they do not make a layer."""
    if scheme is None:
        raise CheckpointError(entry.path, f"{entry.name} is FP8, but {path.name} has no quantization_config")
    stem, how = entry.name.rpartition(".")[0], activations or scheme.activations
    scale = _scale(entries, stem, WEIGHT_SCALES)
    if scale is None:
        raise CheckpointError(entry.path, f"{entry.name} is FP8 and has no scale ({', '.join(WEIGHT_SCALES)})")
    input_scale = _scale(entries, stem, INPUT_SCALES)
    if how == "static":
        if input_scale is None:
            raise CheckpointError(entry.path, f"{entry.name} has static activations but no input_scale")
        one = 4 if input_scale.name.endswith("input_slot") else 1
        if input_scale.nbytes != one * input_scale.dtype.itemsize:
            raise CheckpointError(
                input_scale.path, f"{input_scale.name} has shape {list(input_scale.shape)}, expected one element"
            )
    used = {entry.name, scale.name, f"{stem}.weight_zero_point"}  # a symmetric weight's zero points are zeros
    used |= {input_scale.name} if input_scale else set()
    return (how, _granularity(scheme, scale, *entry.shape)), used


def freeze_empty(layer: nn.Module, activations: str, granularity: str) -> None:
    """A frozen layer on the meta device, in the place of a linear one."""
    n, k = weight_of(layer).shape
    codes = torch.empty(n, k, dtype=E4M3, device="meta")
    scale = torch.empty(scale_shape(granularity, n, k), dtype=torch.float32, device="meta")
    slot = torch.empty(1, 4, dtype=torch.float32, device="meta") if activations == "static" else None
    become_frozen(layer, codes, scale, slot, activations, granularity)


def _is_linear(modules: Mapping[str, nn.Module], name: str) -> bool:
    path, _, key = name.rpartition(".")
    module = modules.get(path)
    return key == "weight" and isinstance(module, nn.Linear) and not why_not_frozen(module)


def _scale(entries: Mapping[str, Entry], stem: str, names: tuple[str, ...]) -> Entry | None:
    found = [entries[f"{stem}.{name}"] for name in names if f"{stem}.{name}" in entries]
    if len(found) > 1:
        raise CheckpointError(found[0].path, f"{stem} has two scales, {found[0].name} and {found[1].name}")
    if found and found[0].dtype not in _SCALE_DTYPES:
        raise CheckpointError(found[0].path, f"{found[0].name} is {found[0].dtype}, which no scale is")
    return found[0] if found else None


def _granularity(scheme: Scheme, scale: Entry, n: int, k: int) -> str:
    """What shares a scale in FrozenLinear's weight_scale. A vector is a column of channels or a row or column of
    blocks that somebody squeezed: the config decides which, and then its length must fit."""
    for kind in scheme.weights:
        shape = scale_shape(kind, n, k)
        squeezed = tuple(size for size in shape if size != 1)
        same = tuple(size for size in scale.shape if size != 1) == squeezed
        if scale.shape == shape or (same and (len(scale.shape) <= 1 or not squeezed)):
            return kind
    expected = " or ".join(f"{list(scale_shape(kind, n, k))} ({kind})" for kind in scheme.weights)
    raise CheckpointError(scale.path, f"{scale.name} has shape {list(scale.shape)}, expected {expected}")


def untie(model: PreTrainedModel) -> None:
    """A frozen layer has a weight of its own: what was tied to it is no longer."""
    layers, tied = frozen_layers(model), model.all_tied_weights_keys
    if gone := [pair for pair in tied.items() if any(name.rpartition(".")[0] in layers for name in pair)]:
        for target, _ in gone:
            del tied[target]
        head = model.get_output_embeddings()
        if isinstance(head, FrozenLinear):
            for config in (model.config, model.config.get_text_config()):
                config.tie_word_embeddings = False


def check_scale(scale: Tensor, least: float = 0, most: float = math.inf) -> None:
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise ValueError("holds scales that are not positive and finite")
    if bool(((scale < least) | (scale > most)).any()):
        raise ValueError(f"holds {scale.item():.4g}; a scale of inputs must be within 2^-126 ... 2^126")
