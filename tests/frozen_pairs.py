"""Frozen models of every pair of activations and weight."""

import torch_fp8 as fp8
from torch_fp8.layers.frozen import frozen_layers, new_slot


def freeze(model, activations, weight):
    """As ``fp8.freeze``, and with the pairs that it refuses, which checkpoints of others may hold."""
    is_refused = weight == "block" and activations in ("static", "tensor")
    fp8.freeze(model, "none" if is_refused else activations, weight)
    for layer in frozen_layers(model).values() if is_refused else ():
        layer.activations = activations
        layer.input_slot = new_slot(1.0, layer.weight.device) if activations == "static" else None
    return model
