"""Swap a model's ``nn.Linear`` layers to FP8 and back, switch them off for a while, and say what is what."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .. import _C, scaling
from ..layers.linear import SUPPORTED_DTYPES, Linear, fp8_layers
from ..layers.siblings import share_input
from ..recipe import DelayedScaling, Recipe
from .worth import speedup

Filter = Callable[[nn.Module, str], bool]

# Names that output heads have in the published GPT and Llama code bases; only outside of numbered blocks.
_HEAD_NAMES = {"lm_head", "head", "output", "embed_out", "output_head", "unembed", "classifier", "score"}
_TOO_SMALL = "too small for FP8 to be faster at {} tokens"


def convert(
    model: nn.Module,
    recipe: Recipe | None = None,
    filter: Filter | Sequence[str] | None = None,
    *,
    tokens: int | None = 8192,
    auto_update: bool = True,
    fuse_main_grad: bool = False,
) -> nn.Module:
    """Make the ``nn.Linear`` layers of ``model`` FP8 layers, in place; returns the model.

    The layers stay the same objects with the same Parameters, names and hooks: optimizers, tied weights and
    ``state_dict()`` are not affected.

    recipe: how scales are chosen; ``DelayedScaling()`` by default. A layer that is FP8 already takes the new recipe.
    filter: which layers. By default all that FP8 can take, except the output head and what is too small for FP8 to be
        faster. Or a function of (module, name) that returns True for the layers to convert, or a list of names and
        patterns (``"layers.*.mlp.*"``); both choose among layers of any size.
    tokens: for the default filter, how many rows of input (micro-batch x sequence) a forward pass is expected to bring:
        a layer that FP8 would not make faster at that many stays in 16 bits, whatever the device. None: layers of any
        size. A layer that is FP8 already stays so, for somebody chose it; ``revert`` first to choose anew.
    auto_update: let ``optimizer.step()`` update the scales; otherwise call ``torch_fp8.update_scales``.
    fuse_main_grad: add the weights' gradients straight to ``weight.main_grad``; see :class:`Linear`.

    Raises ValueError where nothing would be converted, or a listed name matches no linear layer or one that FP8
    cannot take, or tokens is not positive; TypeError for another type of filter, recipe or tokens; RuntimeError for a
    layer on a GPU that this build cannot run on. The model is then as it was.
    """
    recipe = DelayedScaling() if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise TypeError(
            "torch_fp8: recipe must be a DelayedScaling, CurrentScaling or ConstantScaling, got "
            f"{type(recipe).__name__}"
        )
    _check_tokens(tokens)
    linears = _linears(model)
    left_out = _left_out(model, linears, filter, tokens)
    if all(left_out.values()):
        found = "; ".join(f"{name or '(root)'}: {why}" for name, why in list(left_out.items())[:5])
        mend = "change the filter"
        if _TOO_SMALL.format(tokens) in left_out.values():
            mend = "give tokens if a forward pass brings more, or tokens=None to convert layers of any size"
        raise ValueError(
            f"torch_fp8: no layer of {type(model).__name__} would be converted. It has {len(linears)} linear layers"
            + (f" ({found})" if linears else "")
            + f"; {mend}"
        )
    for device in {module.weight.device for name, module in linears.items() if not left_out[name]}:
        _check_device(device)

    for name, module in linears.items():
        if not left_out[name]:
            if isinstance(module, Linear):
                module._make_plain()
            module.__class__ = Linear
            module._make_fp8(recipe, auto_update, fuse_main_grad)
            module.fp8_state.model = weakref.ref(model)
            module.__dict__.pop("_not_fp8", None)
        elif not isinstance(module, Linear):
            module._not_fp8 = left_out[name]
    _share_inputs(model)
    return model


# Names that layers which read one tensor have in the published GPT and Llama code bases, below one module.
_SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("wq", "wk", "wv"), ("to_q", "to_k", "to_v"),
    ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"), ("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"),
    ("gate", "up"),
)  # fmt: skip


def _share_inputs(model: nn.Module) -> None:
    """Put layers into groups that cast their input once. A name says nothing for certain, and need not: a layer that
    meets another tensor than its siblings casts for itself."""
    for module in model.modules():
        for names in _SIBLINGS:
            children = [child for name in names if isinstance(child := getattr(module, name, None), Linear)]
            alike = {(child.in_features, child.recipe, child.weight.device) for child in children}
            if len(children) > 1 and len(alike) == 1 and all(child.fp8_state.group is None for child in children):
                share_input(children)


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
    from ..layers.frozen import FrozenLinear  # which is built on this file

    rows = Summary()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | FrozenLinear)}
    for name, module in layers.items():
        shape = f"{module.out_features} x {module.in_features}"
        if isinstance(module, FrozenLinear):
            note = f"frozen: activations by {module.activations}, weight by {module.granularity}"
            rows.append(LayerSummary(name, shape, True, note, {}))
        elif isinstance(module, Linear):
            note = str(module.recipe) + ("" if module.fp8_enabled else ", disabled")
            rows.append(LayerSummary(name, shape, True, note, scaling.scales(module)))
        else:
            note = _why_not(module) or getattr(module, "_not_fp8", "not converted")
            rows.append(LayerSummary(name, shape, False, note, {}))
    return rows


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _left_out(
    model: nn.Module, linears: dict[str, nn.Linear], filter: Filter | Sequence[str] | None, tokens: int | None
) -> dict[str, str]:
    """Why each linear layer is not to be converted; "" where it is."""
    cannot = {name: _why_not(module) for name, module in linears.items()}
    if filter is None:
        heads = _output_heads(model, linears)
        left_out = {
            name: "output head" if name in heads else _too_small(module, tokens) for name, module in linears.items()
        }
    elif callable(filter):
        left_out = {
            name: "" if cannot[name] or filter(module, name) else "left out by the filter"
            for name, module in linears.items()
        }
    else:
        chosen = _by_patterns(filter, linears, cannot)
        left_out = {name: "" if name in chosen else "not in the list of names" for name in linears}
    return {name: cannot[name] or left_out[name] for name in linears}


def _too_small(module: nn.Linear, tokens: int | None) -> str:
    """Whether FP8 would not make a layer faster, in words; "" where it would, or where the user has chosen already."""
    if tokens is None or isinstance(module, Linear) or speedup(tokens, module.in_features, module.out_features) > 1:
        return ""
    return _TOO_SMALL.format(tokens)


def _why_not(module: nn.Linear) -> str:
    """Why FP8 cannot take a layer; "" where it can."""
    if type(module) not in (nn.Linear, Linear):
        return f"{type(module).__name__} may compute something else than nn.Linear"
    if not isinstance(module, Linear) and "forward" in module.__dict__:
        return "its forward was replaced on the object, as accelerate's device_map does; convert before that"
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


def _check_tokens(tokens: int | None) -> None:
    mend = "give the rows of input of a forward pass (micro-batch x sequence), or None to convert layers of any size"
    if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool)):
        raise TypeError(f"torch_fp8: tokens must be a positive integer or None, got {tokens!r}; {mend}")
    if tokens is not None and tokens < 1:
        raise ValueError(f"torch_fp8: tokens must be a positive integer or None, got {tokens}; {mend}")


def _check_device(device: torch.device) -> None:
    if device.type == "cuda":
        _C.check_capability(*torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))
    elif device.type not in ("cpu", "meta"):
        raise RuntimeError(f"torch_fp8: layers must be on the CPU or a Hopper GPU, got {device}")
