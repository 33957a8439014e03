"""What makes a model of ``fog.py`` FP8: its linear layers but the head, in as few passes as ``fp8.fuse`` finds, and its
attention where that is asked for."""

from __future__ import annotations

import torch_fp8 as fp8
from torch_fp8.layers.rotary import rotary

from .fog import LM, Attention


def to_fp8(
    model: LM,
    recipe: fp8.Recipe | None = None,
    *,
    attention: str = "16bit",
    attention_recipe: fp8.Recipe | None = None,
    shared_scale: bool = True,
    fuse: bool = True,
) -> LM:
    """In place; returns the model. As the paper has it: every linear layer but the head, whatever its size.

    attention: how its products run: "16bit" (the paper's FP8), or "fp8", "fp8_forward", "auto" (its FP8DPA), as
    :class:`torch_fp8.ScaledDotProductAttention` has them, scaled by attention_recipe, or else as the linear layers.
    shared_scale: q, k and v have one scale, as in the paper. fuse: also norms, FFNs and blocks in fewer passes."""
    fp8.convert(model, recipe, lambda module, name: name != "head")
    for part in model.modules():
        if isinstance(part, Attention):
            part.rotary = rotary
            if attention != "16bit":
                how = attention_recipe or recipe
                attend = fp8.ScaledDotProductAttention(how, mode=attention, shared_scale=shared_scale)
                part.attend = attend.goes_with(part.q, part.k, part.v)
    return fp8.fuse(model) if fuse else model  # type: ignore[return-value]
