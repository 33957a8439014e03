"""Swap a model's ``nn.Linear`` layers to FP8 and back, switch them off for a while, and say what is what."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from . import _C, scaling
from .linear import SUPPORTED_DTYPES, Linear, fp8_layers
from .recipe import DelayedScaling, Recipe

Filter = Callable[[nn.Module, str], bool]

# Names that output heads have in the published GPT and Llama code bases; only outside of numbered blocks.
_HEAD_NAMES = {"lm_head", "head", "output", "embed_out", "output_head", "unembed", "classifier", "score"}


def convert(
    model: nn.Module,
    recipe: Recipe | None = None,
    filter: Filter | Sequence[str] | None = None,
    *,
    auto_update: bool = True,
) -> nn.Module:
    """Make the ``nn.Linear`` layers of ``model`` FP8 layers, in place; returns the model.

    The layers stay the same objects with the same Parameters, names and hooks: optimizers, tied weights and
    ``state_dict()`` are not affected.

    recipe: how scales are chosen; ``DelayedScaling()`` by default. A layer that is FP8 already takes the new recipe.
    filter: which layers. By default all that FP8 can take, except the output head. A function of (module, name) that
        returns True for the layers to convert, or a list of names and patterns (``"layers.*.mlp.*"``).
    auto_update: let ``optimizer.step()`` update the scales; otherwise call ``torch_fp8.update_scales``.

    Raises ValueError where nothing would be converted, or a listed name matches no linear layer or one that FP8
    cannot take; TypeError for another type of filter or recipe; RuntimeError for a layer on a GPU that this build
    cannot run on. The model is then as it was.
    """
    recipe = DelayedScaling() if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise TypeError(
            "torch_fp8: recipe must be a DelayedScaling, CurrentScaling or ConstantScaling, got "
            f"{type(recipe).__name__}"
        )
    linears = _linears(model)
    cannot = {name: _why_not(module) for name, module in linears.items()}
    if filter is None:
        heads = _output_heads(model, linears)
        chosen = {name for name in linears if not cannot[name] and name not in heads}
        left_out = dict.fromkeys(heads, "output head")
    elif callable(filter):
        chosen = {name for name, module in linears.items() if not cannot[name] and filter(module, name)}
        left_out = dict.fromkeys(linears.keys() - chosen, "left out by the filter")
    else:
        chosen = _by_patterns(filter, linears, cannot)
        left_out = dict.fromkeys(linears.keys() - chosen, "not in the list of names")
    if not chosen:
        found = "; ".join(f"{name or '(root)'}: {cannot[name] or left_out[name]}" for name in list(linears)[:5])
        raise ValueError(
            f"torch_fp8: no layer of {type(model).__name__} would be converted. It has {len(linears)} linear layers"
            + (f" ({found})" if linears else "")
            + "; change the filter"
        )
    for device in {linears[name].weight.device for name in chosen}:
        _check_device(device)

    for name, module in linears.items():
        if name in chosen:
            if isinstance(module, Linear):
                module._make_plain()
            module.__class__ = Linear
            module._make_fp8(recipe, auto_update)
            module.__dict__.pop("_not_fp8", None)
        elif not isinstance(module, Linear):
            module._not_fp8 = cannot[name] or left_out[name]
    return model


def revert(model: nn.Module) -> nn.Module:
    """Make every FP8 layer of ``model`` the ``nn.Linear`` it was, in place; returns the model. Scales are forgotten."""
    for layer in fp8_layers(model).values():
        layer._make_plain()
        layer.__class__ = nn.Linear
    return model


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the FP8 layers of ``model`` compute as ``nn.Linear`` does, and record nothing."""
    layers = list(fp8_layers(model).values())
    before = [layer.fp8_enabled for layer in layers]
    for layer in layers:
        layer.fp8_enabled = False
    try:
        yield model
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.fp8_enabled = enabled


@dataclass(frozen=True)
class LayerSummary:
    name: str
    shape: str  # "out x in"
    fp8: bool
    note: str  # the recipe, or why the layer is not in FP8
    scales: dict[str, float]  # by role; NaN without history; empty where not in FP8


class Summary(list[LayerSummary]):
    """One row for each linear layer; prints as a table."""

    def __str__(self) -> str:
        header = ("layer", "out x in", "FP8", "scale: input", "weight", "grad_output", "recipe, or why not")
        rows = [
            (
                row.name or "(root)",
                row.shape,
                "yes" if row.fp8 else "no",
                *(f"{scale:.4g}" if scale == scale else "own amax" for scale in row.scales.values()),
                *("",) * (3 - len(row.scales)),
                row.note,
            )
            for row in self
        ]
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                 for row in [header, *rows]]  # fmt: skip
        count = sum(row.fp8 for row in self)
        return "\n".join([*lines, f"{count} of {len(self)} linear layers in FP8"])


def summary(model: nn.Module) -> Summary:
    """Every linear layer of ``model``: in FP8 or not, why not, its recipe and its current scales. ``print`` it."""
    rows = Summary()
    for name, module in _linears(model).items():
        shape = f"{module.out_features} x {module.in_features}"
        if isinstance(module, Linear):
            note = str(module.recipe) + ("" if module.fp8_enabled else ", disabled")
            rows.append(LayerSummary(name, shape, True, note, scaling.scales(module)))
        else:
            note = _why_not(module) or getattr(module, "_not_fp8", "not converted")
            rows.append(LayerSummary(name, shape, False, note, {}))
    return rows


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _why_not(module: nn.Linear) -> str:
    """Why FP8 cannot take a layer; "" where it can."""
    if type(module) not in (nn.Linear, Linear):
        return f"{type(module).__name__} may compute something else than nn.Linear"
    if module.weight.dtype not in SUPPORTED_DTYPES:
        return f"{module.weight.dtype} parameters"
    if module.in_features == 0 or module.out_features == 0:
        return "empty"
    return ""


def _output_heads(model: nn.Module, linears: dict[str, nn.Linear]) -> set[str]:
    """Layers that make the logits: what transformers calls the output embeddings, what shares its weight with an
    embedding, or what is named like a head and stands outside of the numbered blocks."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    get_output = getattr(model, "get_output_embeddings", None)
    declared = get_output() if callable(get_output) else None

    def is_head(name: str, module: nn.Linear) -> bool:
        parts = name.split(".")
        named = parts[-1] in _HEAD_NAMES and not any(part.isdigit() for part in parts)
        return named or module is declared or id(module.weight) in embeddings

    return {name for name, module in linears.items() if is_head(name, module)}


def _by_patterns(patterns: Sequence[str], linears: dict[str, nn.Linear], cannot: dict[str, str]) -> set[str]:
    if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"torch_fp8: filter must be a function of (module, name) or a list of names, got {patterns!r}")
    chosen: set[str] = set()
    for pattern in patterns:
        matches = [name for name in linears if fnmatch.fnmatchcase(name, pattern)]
        if not matches:
            close = difflib.get_close_matches(pattern, linears, n=3, cutoff=0.3)
            raise ValueError(
                f"torch_fp8: {pattern!r} matches none of the {len(linears)} linear layers"
                + (f"; did you mean {', '.join(close)}?" if close else "")
            )
        for name in matches:
            if cannot[name]:
                raise ValueError(f"torch_fp8: {name} (matched by {pattern!r}) cannot be FP8: {cannot[name]}")
        chosen.update(matches)
    return chosen


def _check_device(device: torch.device) -> None:
    if device.type == "cuda":
        _C.check_capability(*torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))
    elif device.type not in ("cpu", "meta"):
        raise RuntimeError(f"torch_fp8: layers must be on the CPU or a Hopper GPU, got {device}")
