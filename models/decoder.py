"""A Llama as an inference engine runs it: fused qkv and gate-up, a static KV cache, decode steps for a CUDA graph.

What stands between the linear layers is compiled, so that at batch 1 it is a few small kernels and not twenty: what is
compared is the linear layers, at the speed of everything else that a tuned engine has. With ``by_modules`` each layer
runs as the module that it is, as ``torch_fp8.fuse`` makes of it: only positions and cache are compiled then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import check_counts, check_type
from .llama import Shape, rms_norm, rotation_of

Attend = Callable[[Tensor], Tensor]  # of what qkv gives, to (1, heads, tokens, head)


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.qkv = nn.Linear(shape.hidden, (shape.heads + 2 * shape.kv_heads) * shape.head, bias=False)
        self.o = nn.Linear(shape.heads * shape.head, shape.hidden, bias=False)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        return self.o(attend(self.qkv(x)).transpose(1, 2).flatten(2))


class FFN(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_up = nn.Linear(shape.hidden, 2 * shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = Norm(shape.hidden), Norm(shape.hidden)
        self.attention, self.ffn = Attention(shape), FFN(shape)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = x + self.attention(self.attention_norm(x), attend)
        return x + self.ffn(self.ffn_norm(x))


@dataclass
class Cache:
    """Keys and values of all layers, each (1, kv_heads, length, head), and the angles of all positions."""

    k: list[Tensor]
    v: list[Tensor]
    rotation: tuple[Tensor, Tensor]  # (length, head) each


class Decoder(nn.Module):
    """forward(ids (1, tokens)) -> logits (1, 1, vocabulary) of the last token; step() is one token more."""

    def __init__(self, shape: Shape, layers: int, vocabulary: int) -> None:
        super().__init__()
        check_type("shape", shape, Shape)
        check_counts(layers=layers, vocabulary=vocabulary)
        self.shape, self.by_modules = shape, False
        self.embedding = nn.Embedding(vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(layers))
        self.norm = Norm(shape.hidden)
        self.lm_head = nn.Linear(shape.hidden, vocabulary, bias=False)

    def new_cache(self, length: int) -> Cache:
        like, size = self.embedding.weight, (1, self.shape.kv_heads, length, self.shape.head)
        k, v = ([like.new_zeros(size) for _ in self.layers] for _ in range(2))
        cos, sin = rotation_of(length, self.shape.head, like)
        half = self.shape.head // 2
        return Cache(k, v, (cos, torch.cat([-sin[:, :half], sin[:, half:]], dim=1)))

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """A prompt, from position 0 on."""
        tokens = ids.shape[1]
        cache = cache or self.new_cache(tokens)
        positions = torch.arange(tokens, device=ids.device)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = k[:, :, :tokens], v[:, :, :tokens]
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return self._run(ids, positions, cache, attend)

    def step(self, token: Tensor, position: Tensor, cache: Cache) -> Tensor:
        """Logits after one more token (1, 1) at position (1,); nothing here depends on the host, so a graph can hold
        it."""
        group = self.shape.heads // self.shape.kv_heads
        unseen = torch.arange(cache.k[0].shape[2], device=token.device) > position
        mask = torch.zeros_like(unseen, dtype=cache.k[0].dtype).masked_fill(unseen, float("-inf"))
        mask = mask.expand(1, self.shape.kv_heads, group, -1)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # The query heads of a group are rows of one product with their keys: no key is read or copied twice.
            grouped = q.view(1, self.shape.kv_heads, group, self.shape.head)
            return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(q.shape)

        return self._run(token, position, cache, attend)

    def _run(self, ids: Tensor, positions: Tensor, cache: Cache, attend) -> Tensor:
        x, angles = self.embedding(ids), tuple(part[positions] for part in cache.rotation)

        def attend_over(k: Tensor, v: Tensor) -> Attend:
            return lambda qkv: attend(rotate_and_store(qkv, angles, positions, k, v), k, v)

        if self.by_modules:
            for layer, k, v in zip(self.layers, cache.k, cache.v):
                x = layer(x, attend_over(k, v))
            return self.lm_head(self.norm(x[:, -1:]))
        y = self.layers[0].attention_norm(x)
        following = [layer.attention_norm for layer in self.layers[1:]] + [self.norm]
        for layer, k, v, norm in zip(self.layers, cache.k, cache.v, following):
            x, y = add_and_norm(x, layer.attention(y, attend_over(k, v)), layer.ffn_norm.weight)
            x, y = add_and_norm(x, layer.ffn.down(swiglu(layer.ffn.gate_up(y))), norm.weight)
        return self.lm_head(y[:, -1:])


@torch.compile(dynamic=False)
def add_and_norm(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x = x + y
    return x, rms_norm(x, weight)


@torch.compile(dynamic=False)
def best(logits: Tensor) -> Tensor:
    """Which of the vocabulary (..., vocabulary) is largest. In two steps: in one, a single block reads all of it."""
    parts = logits.unflatten(-1, (64, -1))
    largest, place = parts.max(-1)
    part = largest.argmax(-1, keepdim=True)
    return (place.gather(-1, part) + part * parts.shape[-1]).squeeze(-1)


@torch.compile(dynamic=False)
def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@torch.compile(dynamic=False)
def rotate_and_store(
    qkv: Tensor, angles: tuple[Tensor, Tensor], positions: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """The queries (1, heads, tokens, head); keys and values go to their positions in the caches."""
    cos, sin = angles
    kv_heads, head = k_cache.shape[1], k_cache.shape[3]
    heads = qkv.unflatten(-1, (-1, head)).transpose(1, 2)
    qk, v = heads[:, :-kv_heads], heads[:, -kv_heads:]
    first, second = qk.chunk(2, dim=-1)
    qk = qk * cos + torch.cat([second, first], dim=-1) * sin
    k_cache.index_copy_(2, positions, qk[:, -kv_heads:])
    v_cache.index_copy_(2, positions, v)
    return qk[:, :-kv_heads].contiguous()
