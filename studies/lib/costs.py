"""What FP8 saves in a model of any size: memory and FLOPs, counted on the meta device, where nothing is allocated."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch_fp8.table import markdown

from models.gpt import Shape as GPTShape
from models.names import MODELS, Named, parameter_count

from .arms import inner_layers


class Costs(NamedTuple):
    """Of one model, whose linear layers but the head are in FP8.

    weights: elements of those layers' weights. all: of every parameter, with the vocabulary as it is padded.
    inputs: elements, a token, of what those layers read and keep for backward; what several read is kept once.
    linear, head, attention: FLOPs of a forward, a token: of those layers, of the head, and of QKᵀ and PV, causal, as
        the mean over a sequence of the model's context. Backward has twice as many.
    """

    parameters: int  # as published
    all: int
    weights: int
    inputs: int
    linear: int
    head: int
    attention: int

    @property
    def bytes_16(self) -> int:
        return 2 * self.all

    @property
    def bytes_fp8(self) -> int:
        """One scale a tensor is not counted."""
        return 2 * self.all - self.weights

    @property
    def share(self) -> float:
        """Of all FLOPs in FP8."""
        return self.linear / (self.linear + self.head + self.attention)


def costs(size: Named) -> Costs:
    with torch.device("meta"):
        model = size.build()
        layers = inner_layers(model)
        read = _read(model, layers)
    weights = sum(layer.weight.numel() for layer in layers.values())
    shape = size.shape
    width = shape.n_embd if isinstance(shape, GPTShape) else shape.heads * shape.head
    return Costs(
        parameters=parameter_count(size),
        all=sum(parameter.numel() for parameter in model.parameters()),
        weights=weights,
        inputs=sum(x.shape[-1] for x in read),
        linear=2 * weights,
        head=2 * model.head.weight.numel(),
        attention=size.layers * 2 * width * (size.context + 1),  # half of the pairs, and a query sees itself
    )


def _read(model: nn.Module, layers: dict[str, nn.Module]) -> Iterable[Tensor]:
    """The distinct inputs of layers, of one token."""
    read: dict[int, Tensor] = {}  # which holds them, so that no other tensor has the id of one that is gone

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        read[id(inputs[0])] = inputs[0]

    handles = [layer.register_forward_pre_hook(keep) for layer in layers.values()]
    model(torch.zeros(1, 1, dtype=torch.int64, device="meta"))
    for handle in handles:
        handle.remove()
    return read.values()


@functools.cache
def costs_table() -> str:
    """Of every model by name, in Markdown."""
    head = [
        "model",
        "parameters",
        "of them in FP8",
        "weights, GiB, BF16 → FP8",
        "inputs kept for backward, KiB a token",
    ]
    head += ["GFLOPs a token, forward", "of them in FP8"]
    rows = []
    for name, size in MODELS.items():
        of = costs(size)
        rows.append(
            [
                name,
                f"{of.parameters:,}",
                f"{of.weights / of.all:.0%}".replace("%", " %"),
                f"{of.bytes_16 / 2**30:.2f} → {of.bytes_fp8 / 2**30:.2f}",
                f"{2 * of.inputs / 1024:.0f} → {of.inputs / 1024:.0f}",
                f"{(of.linear + of.head + of.attention) / 1e9:.2f}",
                f"{of.share:.0%}".replace("%", " %"),
            ]
        )
    return markdown(head, rows)
