"""Which layers of a model a swap takes, and why not the others."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Sequence

import torch
from torch import nn

from .. import _C
from ..layers.frozen import FrozenLinear
from ..layers.linear import SUPPORTED_DTYPES, Linear
from .worth import speedup

Filter = Callable[[nn.Module, str], bool]

TOO_SMALL = "too small for FP8 to be faster at {} tokens"

# Names that output heads have in the published GPT and Llama code bases; only outside of numbered blocks.
_HEAD_NAMES = {"lm_head", "head", "output", "embed_out", "output_head", "unembed", "classifier", "score"}


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Those in 16 or 32 bits, and fp8.Linear."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, FrozenLinear)
    }


def why_left_out(
    model: nn.Module, linears: dict[str, nn.Linear], filter: Filter | Sequence[str] | None, tokens: int | None
) -> dict[str, str]:
    """Why each linear layer is not to be converted; "" where it is."""
    cannot = {name: why_not(module) for name, module in linears.items()}
    if filter is None:
        heads = output_heads(model, linears)
        left_out = {
            name: "output head" if name in heads else _too_small(module, tokens) for name, module in linears.items()
        }
    elif callable(filter):
        left_out = {
            name: "" if cannot[name] or filter(module, name) else "left out by the filter"
            for name, module in linears.items()
        }
    else:
        chosen = by_patterns(filter, linears, cannot)
        left_out = {name: "" if name in chosen else "not in the list of names" for name in linears}
    return {name: cannot[name] or left_out[name] for name in linears}


def _too_small(module: nn.Linear, tokens: int | None) -> str:
    """Whether FP8 would not make a layer faster, in words; "" where it would, or where the user has chosen already."""
    if tokens is None or isinstance(module, Linear) or speedup(tokens, module.in_features, module.out_features) > 1:
        return ""
    return TOO_SMALL.format(tokens)


def why_not(module: nn.Linear) -> str:
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


def output_heads(model: nn.Module, linears: dict[str, nn.Linear]) -> set[str]:
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


def by_patterns(patterns: Sequence[str], linears: dict[str, nn.Linear], cannot: dict[str, str]) -> set[str]:
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
