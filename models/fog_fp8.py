"""What makes a model of ``fog.py`` FP8: its linear layers but the head, in as few passes as ``fp8.fuse`` finds, and its
attention where that is asked for."""

from __future__ import annotations

from typing import Literal, TypeVar

import torch_fp8 as fp8
from torch import nn
from torch_fp8.layers.rotary import rotary

from .fog import Attention, Block

Model = TypeVar("Model", bound=nn.Module)


def to_fp8(
    model: Model,
    recipe: fp8.Recipe | None = None,
    *,
    attention: str = "16bit",
    attention_recipe: fp8.Recipe | None = None,
    shared_scale: bool = True,
    fuse: Literal["all", "ffn", "none"] = "all",
) -> Model:
    """In place; returns the model. As the paper has it: every linear layer but the head, whatever its size.

    attention: how its products run: "16bit" (the paper's FP8), or "fp8", "fp8_forward", "auto" (its FP8DPA), as
    :class:`torch_fp8.ScaledDotProductAttention` has them, scaled by attention_recipe, or else as the linear layers.
    shared_scale: q, k and v have one scale, as in the paper. fuse: norms, FFNs and blocks in fewer passes, or FFNs
    alone, where a compiler is to fuse the rest."""
    # What this refuses, and a wrong fuse, are refused before the model changes.
    inside = recipe if attention_recipe is None else attention_recipe
    fp8.ScaledDotProductAttention(inside, mode=attention, shared_scale=shared_scale)
    if fuse not in ("all", "ffn", "none"):
        raise ValueError(f"fuse must be one of all, ffn, none, got {fuse!r}")
    fp8.convert(model, recipe, lambda module, name: name != "head")
    for part in model.modules():
        if isinstance(part, Attention):
            part.rotary = rotary if fuse == "all" else part.rotary
            if attention != "16bit":
                attend = fp8.ScaledDotProductAttention(inside, mode=attention, shared_scale=shared_scale)
                attend.follows_layers = attention_recipe is None
                part.attend = attend.goes_with(part.q, part.k, part.v)
        elif isinstance(part, Block) and fuse == "ffn":
            fp8.fuse(part.ffn)
    return fp8.fuse(model) if fuse == "all" else model  # type: ignore[return-value]
