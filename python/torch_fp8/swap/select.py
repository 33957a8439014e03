"""Which layers of a model a swap takes, and why not the others: the one rule of ``convert`` and ``freeze``."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .. import _C
from ..checks import modules_of
from ..layers.classes import conv1d, is_conv1d, shape_of
from ..layers.dtensor import is_dtensor
from ..layers.experts import is_experts
from ..layers.frozen import FrozenLinear
from ..layers.linear import SUPPORTED_DTYPES, Layer
from .worth import speedup

Filter = Callable[[nn.Module, str], bool]

NOT_FP8 = "_not_fp8"  # on a layer that was left out: why
TOO_SMALL = "too small for FP8 to be faster at {} tokens"

# Names that output heads have in the published GPT and Llama code bases; only outside of numbered blocks.
_HEAD_NAMES = {
    "lm_head", "lm_heads", "head", "heads", "output_head", "out_head", "output", "embed_out", "unembed", "unembedding",
    "classifier", "score", "logits", "to_logits", "logits_proj", "generator", "output_projection", "vocab_proj",
}  # fmt: skip


_PLAIN = (torch.Tensor, nn.Parameter, nn.parameter.Buffer)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer in 16 or 32 bits and every ``Layer``, by name."""
    modules = {name: m for name, m in modules_of(model) if isinstance(m, nn.Linear) or is_conv1d(m)}
    return {name: module for name, module in modules.items() if not isinstance(module, FrozenLinear)}


def check_types(types: Iterable[type[nn.Module]]) -> tuple[type[nn.Module], ...]:
    """What the user vouches for, as a tuple."""
    if isinstance(types, type) or not isinstance(types, Iterable):
        raise TypeError(f"torch_fp8: linear_types must be a list of classes, got {types!r}; write [MyLinear]")
    types = tuple(types)
    for cls in types:
        if not isinstance(cls, type) or not issubclass(cls, nn.Linear):
            raise TypeError(
                f"torch_fp8: linear_types takes subclasses of nn.Linear, got {cls!r}; FP8 layers keep an nn.Linear's "
                "weight and bias"
            )
    return types


def why_not(module: nn.Module, types: Sequence[type[nn.Module]] = ()) -> str:
    """Why a linear layer cannot be an FP8 layer; "" where it can. types: classes that the user vouches for."""
    if isinstance(module, Layer):  # it is one already
        return _why_not_weight(module)
    return _why_not_forward(module, types) or _why_not_weight(module)


def why_not_frozen(module: nn.Module, types: Sequence[type[nn.Module]] = ()) -> str:
    """Why the weight of a linear layer cannot be quantised for good; "" where it can."""
    if not {"weight", "bias"} <= module._parameters.keys():
        return (
            "its parameters are computed anew in each forward, as parametrize, weight_norm and pruning do; make them "
            "permanent before (remove_parametrizations, remove_weight_norm, prune.remove)"
        )
    if is_dtensor(module.weight):
        return "its weight is a DTensor; freeze the whole model before it is sharded"
    if not _can_become(type(module), FrozenLinear):
        return f"Python cannot make a FrozenLinear of a {type(module).__name__}, which has __slots__ or the like"
    return _why_not_forward(module, types) or _why_not_weight(module)


def _can_become(cls: type, other: type) -> bool:
    """Whether an object's class can be exchanged: Python asks for one layout in memory."""
    try:
        object.__setattr__(object.__new__(cls), "__class__", other)
    except TypeError:
        return False
    return True


def _why_not_forward(module: nn.Module, types: Sequence[type[nn.Module]]) -> str:
    if "forward" in module.__dict__:
        return "its forward was replaced on the object, as accelerate's device_map does; convert or freeze before that"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear) and type(module) not in types:
        return "nn.MultiheadAttention multiplies by its weight itself, and never calls it"
    known: list[type[nn.Module]] = [nn.Linear, Layer, *types, *filter(None, [conv1d()])]
    if type(module).forward not in [cls.forward for cls in known]:
        return (
            f"{type(module).__name__} has a forward of its own; if it computes what nn.Linear does, say so: "
            f"linear_types=[{type(module).__name__}]"
        )
    return ""


def _why_not_weight(module: Any) -> str:
    weight = module.weight
    if nn.parameter.is_lazy(weight):
        return "not initialised yet; run the model once before"
    if not (type(weight) in _PLAIN or is_dtensor(weight)):
        return f"its weight is a {type(weight).__name__}, which may be more than a matrix of numbers"
    if weight.dtype not in SUPPORTED_DTYPES:
        return f"{weight.dtype} parameters"
    return "" if all(shape_of(module)) else "empty"


def chosen_layers(
    model: nn.Module,
    layers: dict[str, nn.Module],
    filter: Filter | Sequence[str] | None,
    cannot: dict[str, str],
    by_default: Callable[[nn.Module], str] = lambda module: "",
) -> dict[str, str]:
    """Why each layer is not to be taken; "" where it is. cannot: why it must not be, which a list of names may not
    overrule; by_default: why the default filter leaves it out, besides output heads."""
    if filter is None:
        heads = output_heads(model, layers)
        left_out = {name: "output head" if name in heads else by_default(m) for name, m in layers.items()}
    elif callable(filter):
        left_out = {
            name: "" if cannot[name] or filter(module, name) else "left out by the filter"
            for name, module in layers.items()
        }
    else:
        chosen = by_patterns(filter, layers, cannot)
        left_out = {name: "" if name in chosen else "not in the list of names" for name in layers}
    return {name: cannot[name] or left_out[name] for name in layers}


def too_small(module: nn.Module, tokens: int | None) -> str:
    """Whether FP8 would not make a layer faster, in words; "" where it would, or where the user has chosen already."""
    if tokens is None or isinstance(module, Layer) or speedup(tokens, *reversed(shape_of(module))) > 1:
        return ""
    return TOO_SMALL.format(tokens)


def output_heads(model: nn.Module, layers: dict[str, nn.Module]) -> set[str]:
    """Layers that make the logits. A layer in none of the numbered blocks is one if it or a module around it is named
    like a head, or if it has an output for each entry of an embedding. Any layer is one if its weight is an
    embedding's, or if it belongs to what a module declares as its output embeddings, as transformers' models do."""
    modules = list(model.modules())
    embeddings = [module for module in modules if isinstance(module, nn.Embedding)]
    tied = {id(embedding.weight) for embedding in embeddings}
    vocabularies = {embedding.num_embeddings for embedding in embeddings}
    declared = {id(module) for head in map(_declared_head, modules) if head is not None for module in head.modules()}

    def is_head(name: str, module: nn.Module) -> bool:
        if id(module) in declared or id(module.weight) in tied:
            return True
        parts = name.split(".")
        before_blocks = parts[: next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))]
        if not _HEAD_NAMES.isdisjoint(before_blocks):
            return True
        return before_blocks == parts and shape_of(module)[0] in vocabularies

    return {name for name, module in layers.items() if not is_experts(module) and is_head(name, module)}


def _declared_head(module: nn.Module) -> nn.Module | None:
    get_output = getattr(module, "get_output_embeddings", None)
    try:
        head = get_output() if callable(get_output) else None
    except (AttributeError, NotImplementedError):  # of a model without one
        return None
    return head if isinstance(head, nn.Module) else None


def by_patterns(patterns: Sequence[str], layers: dict[str, nn.Module], cannot: dict[str, str]) -> set[str]:
    is_list = isinstance(patterns, Iterable) and not isinstance(patterns, str)
    names = list(patterns) if is_list else []
    if not is_list or not all(isinstance(name, str) for name in names):
        raise TypeError(f"torch_fp8: filter must be a function of (module, name) or a list of names, got {patterns!r}")
    chosen: set[str] = set()
    for pattern in names:
        matches = [name for name in layers if fnmatch.fnmatchcase(name, pattern)]
        if not matches:
            close = difflib.get_close_matches(pattern, layers, n=3, cutoff=0.3)
            raise ValueError(
                f"torch_fp8: {pattern!r} matches none of the {len(layers)} linear layers"
                + (f"; did you mean {', '.join(close)}?" if close else "")
            )
        for name in matches:
            if cannot[name]:
                raise ValueError(f"torch_fp8: {name} (matched by {pattern!r}) cannot be FP8: {cannot[name]}")
        chosen.update(matches)
    return chosen


def some(reasons: dict[str, str]) -> str:
    """The first few layers that are left out, each with its reason."""
    found = "; ".join(f"{name or '(root)'}: {why}" for name, why in list(reasons.items())[:5])
    return f" ({found})" if found else ""


def check_tokens(tokens: int | None) -> None:
    mend = "give the rows of input of a forward pass (micro-batch x sequence), or None to convert layers of any size"
    if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool)):
        raise TypeError(f"torch_fp8: tokens must be a positive integer or None, got {tokens!r}; {mend}")
    if tokens is not None and tokens < 1:
        raise ValueError(f"torch_fp8: tokens must be a positive integer or None, got {tokens}; {mend}")


def check_device(device: torch.device) -> None:
    if device.type == "cuda":
        _C.check_capability(*torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))
    elif device.type not in ("cpu", "meta"):
        raise RuntimeError(f"torch_fp8: layers must be on the CPU or a Hopper GPU, got {device}")
