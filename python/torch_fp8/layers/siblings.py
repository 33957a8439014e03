"""Layers that read one tensor: q, k and v of an attention, gate and up of an MLP. They share its FP8 codes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..state import InputGroup
from .linear import Layer

# Names that layers which read one tensor have in the published GPT and Llama code bases, below one module.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("wq", "wk", "wv"), ("to_q", "to_k", "to_v"),
    ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"), ("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"),
    ("gate", "up"),
)  # fmt: skip


def share_input(layers: Sequence[Layer]) -> None:
    """Tell FP8 layers that they read one tensor, so that it is cast once for all of them.

    ``convert`` finds q, k, v and gate, up by their names; this is for others. A layer that meets another tensor than
    its siblings, or one that was changed in between, casts for itself: nothing but time and memory depends on this. A
    write between two siblings' calls that PyTorch does not count (through ``.data``, or numpy) is not seen.

    layers: two or more FP8 layers of one in_features, recipe and device. A layer that is in a group leaves it.

    Raises TypeError for what is no FP8 layer and ValueError where they differ; nothing is changed then.
    """
    layers = list(layers) if isinstance(layers, Iterable) else [layers]
    for layer in layers:
        if not isinstance(layer, Layer):
            raise TypeError(f"torch_fp8: share_input takes FP8 layers, got {type(layer).__name__}; convert it first")
    if len(set(map(id, layers))) != len(layers) or len(layers) < 2:
        raise ValueError(f"torch_fp8: share_input needs two or more different layers, got {len(layers)}")
    alike: dict[str, list[Any]] = {
        "in_features": [layer.in_features for layer in layers],
        "recipe": [layer.recipe for layer in layers],
        "device": [layer.weight.device for layer in layers],
    }
    for what, values in alike.items():
        for value in values:
            if value != values[0]:
                raise ValueError(f"torch_fp8: layers that share their input must have one {what}, got {values}")
    for layer in layers:
        if layer.fp8_state.group is not None:
            layer.fp8_state.group.leave(layer.fp8_state)
    group = InputGroup(len(layers))
    for member, layer in enumerate(layers):
        layer.fp8_state.group, layer.fp8_state.member = group, member
        group.join(layer.fp8_state)
    group.compare()
