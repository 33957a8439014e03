"""Llama in plain PyTorch: rotary positions, pre-RMSNorm layers, grouped queries, SwiGLU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .checks import check_counts, check_type


@dataclass(frozen=True)
class Shape:
    hidden: int = 4096  # Llama-3-8B
    ffn: int = 14336
    heads: int = 32
    kv_heads: int = 8

    def __post_init__(self) -> None:
        check_counts(**vars(self))
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads, got {self.kv_heads} and {self.heads}")
        if self.hidden % (2 * self.heads):
            raise ValueError(f"hidden must be heads of an even size, got {self.hidden} and {self.heads} heads")

    @property
    def head(self) -> int:
        return self.hidden // self.heads


SIZES = {  # of the published models: layers' shape, number of layers, vocabulary
    "tiny": (Shape(64, 128, 4, 2), 2, 256),
    "1B": (Shape(2048, 8192, 32, 8), 16, 128_256),  # Llama 3, 3.2: this and the next two
    "3B": (Shape(3072, 8192, 24, 8), 28, 128_256),
    "8B": (Shape(), 32, 128_256),
    "7B": (Shape(4096, 11008, 32, 32), 32, 32_000),  # Llama 2, from here on
    "13B": (Shape(5120, 13824, 40, 40), 40, 32_000),
    "70B": (Shape(8192, 28672, 64, 8), 80, 32_000),
}


class FFN(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.up = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    """Causal, with grouped queries and rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q = nn.Linear(shape.hidden, shape.heads * shape.head, bias=False)
        self.k = nn.Linear(shape.hidden, shape.kv_heads * shape.head, bias=False)
        self.v = nn.Linear(shape.hidden, shape.kv_heads * shape.head, bias=False)
        self.o = nn.Linear(shape.heads * shape.head, shape.hidden, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.shape.head)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        q, k = rotate(q, rotation), rotate(k, rotation)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """x (batch, tokens, hidden) -> the same."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.Parameter(torch.ones(shape.hidden))
        self.ffn_norm = nn.Parameter(torch.ones(shape.hidden))
        self.attention, self.ffn = Attention(shape), FFN(shape)
        self.rotation: dict[int, tuple[Tensor, Tensor]] = {}  # by number of tokens

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        if tokens not in self.rotation:
            self.rotation[tokens] = rotation_of(tokens, self.attention.shape.head, x)
        x = x + self.attention(rms_norm(x, self.attention_norm), self.rotation[tokens])
        return x + self.ffn(rms_norm(x, self.ffn_norm))


class Llama(nn.Module):
    """Tokens (batch, length) -> logits (batch, length, vocabulary)."""

    def __init__(self, shape: Shape, layers: int, vocabulary: int, recompute: bool = False) -> None:
        super().__init__()
        check_type("shape", shape, Shape)
        check_counts(layers=layers, vocabulary=vocabulary)
        self.embedding = nn.Embedding(vocabulary, shape.hidden)
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(layers))
        self.norm = nn.Parameter(torch.ones(shape.hidden))
        self.head = nn.Linear(shape.hidden, vocabulary, bias=False)
        self.recompute = recompute

    def begin_training(self) -> None:
        """Weights to train from: normal with a deviation of 0.02, and less for what adds to the residual stream."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = name.endswith(("attention.o.weight", "ffn.down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * len(self.layers)) ** 0.5 if into_residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        return self.head(rms_norm(x, self.norm))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps=1e-5)


def rotation_of(tokens: int, head: int, like: Tensor, stretch: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin, each (tokens, head), of Llama-3's angles. stretch: the factor by which Llama 3.1 slows angles that
    turn less than once in 8192 tokens; those that turn four times or more stay, and between them it is interpolated."""
    frequencies = 500_000.0 ** (-torch.arange(0, head, 2, device=like.device) / head)
    if stretch != 1:
        turns = 8192 * frequencies / (2 * math.pi)
        kept = ((turns - 1) / (4 - 1)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / stretch)
    angles = torch.outer(torch.arange(tokens, device=like.device), frequencies).repeat(1, 2)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
