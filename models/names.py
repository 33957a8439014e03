"""Models by name: published ones, and small ones of the same shape for studies."""

from __future__ import annotations

import difflib
from typing import NamedTuple

import torch
from torch import nn

from . import gpt, llama
from .checks import check_counts, check_type


class Named(NamedTuple):
    """A model that can be built: ``layers`` of ``shape`` with this vocabulary, for sequences of up to ``context``."""

    shape: gpt.Shape | llama.Shape
    layers: int
    vocabulary: int
    context: int
    tied: bool = False  # the head's weight is the embedding's

    def build(self, vocabulary: int | None = None, context: int | None = None) -> nn.Module:
        """Random weights to train from, on the default device. Both families pad their vocabulary to a multiple of 64;
        ``model(tokens)`` gives logits (batch, time, padded vocabulary). None: as published."""
        vocabulary = self.vocabulary if vocabulary is None else vocabulary
        context = self.context if context is None else context
        check_counts(vocabulary=vocabulary, context=context)
        if isinstance(self.shape, gpt.Shape):
            return gpt.GPT(self.shape, vocab=vocabulary, context=context)
        model = llama.Llama(self.shape, self.layers, -(-vocabulary // 64) * 64)
        model.begin_training()
        if self.tied:
            model.head.weight = model.embedding.weight
        return model


def _gpt(shape: gpt.Shape, context: int = 2048) -> Named:
    return Named(shape, shape.n_layer, 50_257, context, tied=True)


def _small_llama(shape: llama.Shape, layers: int) -> Named:
    return Named(shape, layers, 50_257, 2048, tied=True)


MODELS = {
    "gpt-tiny": _gpt(gpt.Shape(2, 2, 64)),
    "gpt-31M": _gpt(gpt.Shape(6, 6, 384)),
    "gpt-73M": _gpt(gpt.Shape(8, 10, 640)),
    "gpt-124M": _gpt(gpt.Shape(12, 12, 768), 1024),  # GPT-2
    **{f"cerebras-gpt-{name}": _gpt(shape) for name, shape in gpt.CEREBRAS.items()},
    "llama-tiny": _small_llama(llama.Shape(64, 128, 4, 2), 2),
    "llama-49M": _small_llama(llama.Shape(512, 1408, 8, 4), 8),
    "llama-127M": _small_llama(llama.Shape(768, 2048, 12, 4), 14),
    **{f"llama-2-{name}": Named(*llama.SIZES[name], 4096) for name in ("7B", "13B", "70B")},
    "llama-3-8B": Named(*llama.SIZES["8B"], 8192),
}


def named(name: str) -> Named:
    """ValueError with the near ones where there is no such model."""
    return MODELS[as_written(name)]


def as_written(name: str) -> str:
    """The name in MODELS of a model that was typed in capitals, as ``named`` takes it too."""
    check_type("a model's name", name, str)
    lower = {known.lower(): known for known in MODELS}
    if name.lower() in lower:
        return lower[name.lower()]
    near = [lower[match] for match in difflib.get_close_matches(name.lower(), lower, n=4, cutoff=0.5)]
    raise ValueError(
        f"no model is called {name!r}; {'near it are' if near else 'there are'} {', '.join(near or MODELS)}"
    )


def parameter_count(model: Named) -> int:
    """Of the model as published, whose vocabulary is not padded."""
    check_type("model", model, Named)
    with torch.device("meta"):
        built = model.build()
    width = model.shape.n_embd if isinstance(model.shape, gpt.Shape) else model.shape.hidden
    padding = -model.vocabulary % 64
    return sum(p.numel() for p in built.parameters()) - padding * width * (1 if model.tied else 2)
