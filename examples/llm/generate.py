"""Greedy generation with a static KV cache, timed. On a GPU a decode step is one CUDA graph."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, StaticCache


@dataclass
class Generation:
    tokens: list[int]
    seconds: float  # of all decode steps, one a token but the first, which the prompt gives


def prefill_seconds(model: PreTrainedModel, ids: list[int]) -> float:
    """Wall time to read a prompt; the second time, when all kernels are loaded."""
    prompt, cache = torch.tensor([ids], device=model.device), _new_cache(model, len(ids))
    for _ in range(2):
        _rewind(cache, 0)
        _wait(model)
        began = time.perf_counter()
        model(prompt, past_key_values=cache, logits_to_keep=1)
        _wait(model)
    return time.perf_counter() - began


def generate(model: PreTrainedModel, ids: list[int], new: int) -> Generation:
    """The new tokens after a prompt, all greedy; an end-of-text token ends nothing."""
    device, length = model.device, len(ids) + new
    cache = _new_cache(model, length)
    first = model(torch.tensor([ids], device=device), past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    token, position = first.clone(), torch.tensor([[len(ids)]], device=device)

    def step() -> None:
        # The mask is made here, of what lies on the device: left alone, transformers may ask the host for it.
        seen = (torch.arange(length, device=device) <= position)[:, None, None]
        logits = model(token, attention_mask=seen, position_ids=position, past_key_values=cache).logits
        token.copy_(logits.argmax(-1))
        position.add_(1)

    replay = step
    if device.type == "cuda":
        step()  # loads the kernels, which a capture cannot do
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replay = graph.replay
        token.copy_(first)
        position.fill_(len(ids))
        _rewind(cache, len(ids))

    produced: list[Tensor] = [token.clone()]
    _wait(model)
    began = time.perf_counter()
    for _ in range(new - 1):
        replay()
        produced.append(token.clone())
    _wait(model)
    seconds = time.perf_counter() - began
    return Generation(torch.cat(produced)[:, 0].tolist(), seconds)


def _new_cache(model: PreTrainedModel, length: int) -> StaticCache:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=length)


def _rewind(cache: StaticCache, length: int) -> None:
    for layer in cache.layers:
        layer.cumulative_length.fill_(length)


def _wait(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
