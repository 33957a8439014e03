"""The FP8 arms of an evaluation, and their emulated twins."""

from __future__ import annotations

import copy

import torch_fp8 as fp8
from torch import Tensor, nn
from torch_fp8.layers.frozen import ACTIVATIONS, frozen_layers
from torch_fp8.observe.emulate import emulated_linear
from torch_fp8.observe.evaluation import shared_copy

ARMS = {  # what fp8.freeze is told
    "W8A16": {"activations": "none", "weight": "channel"},
    "W8A16 block": {"activations": "none", "weight": "block"},  # the weight alone
    "W8A8 static": {"activations": "static", "weight": "tensor"},
    "W8A8 tensor": {"activations": "tensor", "weight": "tensor"},
    "W8A8 token": {"activations": "token", "weight": "channel"},
    "W8A8 block": {"activations": "token", "weight": "block"},  # the weight alone where 128 does not divide in_features
}


def build(model: nn.Module, arm: dict[str, str], calibration: list[Tensor]) -> nn.Module:
    """A frozen copy; it shares with the model all that is not in FP8."""
    model = shared_copy(model)
    if arm["activations"] == "static":
        fp8.calibrate(model, calibration)
    return fp8.freeze(model, **arm)


class Emulated(nn.Module):
    """A frozen layer's codes and scales, multiplied in float32."""

    def __init__(self, layer: fp8.FrozenLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        kind = ACTIVATIONS.index(layer.activations)
        return emulated_linear(x, layer.weight, layer.weight_scale, layer.bias, layer.input_slot, kind)


def emulated(model: nn.Module) -> nn.Module:
    twin = shared_copy(model)
    for name, layer in frozen_layers(model).items():
        twin.set_submodule(name, Emulated(layer))
    return twin


def full(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).float()
