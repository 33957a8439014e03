"""Llama 3, OLMo 2, OP and the FOG architectures (arXiv 2505.20524) in plain PyTorch: one block with a config. How one
is made FP8 stands in ``fog_fp8.py``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import check_counts, check_type
from .fog_config import STD, Architecture, Shape, architecture
from .llama import rotate, rotation_of

EPS = 1e-5


class RMSNorm(nn.RMSNorm):
    """In the dtype of its gain: under autocast a branch makes 16 bits, and what it is added to has 32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class XIELU(nn.Module):
    """alpha_p x^2 + beta x above 0, else alpha_n (e^x - 1 - x) + beta x, with alpha_p = softplus(a_p) and
    alpha_n = beta + softplus(a_n) trained, both 0.8 at first (arXiv 2411.13010)."""

    BETA = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.a_p, self.a_n = (
            nn.Parameter(torch.tensor([math.log(math.expm1(alpha))])) for alpha in (0.8, 0.8 - self.BETA)
        )

    def forward(self, x: Tensor) -> Tensor:
        wide = _wide(x)
        alpha_p, alpha_n = F.softplus(_wide(self.a_p)), self.BETA + F.softplus(_wide(self.a_n))
        below = wide.clamp(max=0)  # beyond it e^x would be Inf, and its gradient NaN
        curved = torch.where(wide > 0, alpha_p * wide * wide, alpha_n * (torch.expm1(below) - below))
        return (curved + self.BETA * wide).to(x.dtype)


class FFN(nn.Module):
    """down(f(up(x))), f GELU (erf) or xIELU."""

    def __init__(self, hidden: int, width: int, activation: str) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)
        self.activation = XIELU() if activation == "xielu" else nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class SwiGLU(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, width, bias=False)
        self.up = nn.Linear(hidden, width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class SmoothByToken(SwiGLU):
    """Smooth-SwiGLU as the paper's baseline has it: each token's product is divided by the largest magnitude before
    the gate's activation, and what ``down`` makes of it multiplied by that. The function is SwiGLU's."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        largest = gate.detach().abs().amax(-1, keepdim=True)
        largest = torch.where(largest > 0, largest, torch.ones_like(largest))
        return self.down(F.silu(gate) * (self.up(x) / largest)) * largest


class SmoothByChannel(SwiGLU):
    """Smooth-SwiGLU as arXiv 2409.12517 has it: each channel of the product is multiplied by a number that brings its
    largest magnitude near 1, and the column of ``down`` that reads it is divided by that. The numbers are powers of two
    here, so that nothing is rounded before it is cast. The function is SwiGLU's."""

    def forward(self, x: Tensor) -> Tensor:
        product = F.silu(self.gate(x)) * self.up(x)
        largest = _wide(product.detach()).abs().flatten(0, -2).amax(0)
        exponents = torch.frexp(largest).exponent.to(largest.dtype)
        factors = torch.where(largest > 0, torch.exp2(-exponents), torch.ones_like(largest))
        weight = self.down.weight
        folded = weight / factors.to(weight.dtype)
        return torch.func.functional_call(self.down, {"weight": folded}, (product * factors.to(product.dtype),))


_GATED = {
    "swiglu": SwiGLU,
    "smooth_swiglu_token": SmoothByToken,
    "smooth_swiglu_channel": SmoothByChannel,
}


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, norm: str | None, q_gain: Tensor | None, k_gain: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q (batch, tokens, heads, head) and k, which may have fewer heads, each head normalised ("rms": with its gain or
    without; "tanh": tanh(gain x)) and turned by the angles of its token, cos and sin (tokens, head)."""

    def of(x: Tensor, gain: Tensor | None) -> Tensor:
        y = _wide(x)
        if norm == "tanh":
            assert gain is not None
            y = torch.tanh(_wide(gain) * y)
        elif norm == "rms":
            y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
            y = y if gain is None else y * _wide(gain)
        return rotate(y, (cos[:, None], sin[:, None])).to(x.dtype)

    return of(q, q_gain), of(k, k_gain)


class Attention(nn.Module):
    """Causal, with grouped queries. What stands between the projections are two attributes that fog_fp8.py exchanges:
    ``rotary``, and ``attend``, which takes what ``scaled_dot_product_attention`` takes."""

    def __init__(self, arch: Architecture, shape: Shape) -> None:
        super().__init__()
        self.head, self.scale = shape.head, shape.scale if arch.own_scale else shape.head**-0.5
        self.q = nn.Linear(shape.hidden, shape.heads * shape.head, bias=False)
        self.k = nn.Linear(shape.hidden, shape.kv_heads * shape.head, bias=False)
        self.v = nn.Linear(shape.hidden, shape.kv_heads * shape.head, bias=False)
        self.o = nn.Linear(shape.heads * shape.head, shape.hidden, bias=False)
        self.norm = {"none": None, "rms": "rms", "frozen_rms": "rms", "tanh": "tanh"}[arch.qk]
        gains = {"rms": torch.ones(shape.head), "tanh": torch.full([1], 0.5)}
        for name in ("q_gain", "k_gain"):
            gain = gains.get(arch.qk)
            self.register_parameter(name, None if gain is None else nn.Parameter(gain.clone()))
        self.rotary: Any = rotary
        self.attend: Any = F.scaled_dot_product_attention

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head)) for layer in (self.q, self.k, self.v))
        q, k = self.rotary(q, k, cos, sin, norm=self.norm, q_gain=self.q_gain, k_gain=self.k_gain, eps=EPS)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = self.attend(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x (batch, tokens, hidden) -> the same; cos and sin (tokens, head) float32."""

    def __init__(self, arch: Architecture, shape: Shape) -> None:
        super().__init__()
        hidden, width = shape.hidden, shape.ffn_of(arch)
        self.attention = Attention(arch, shape)
        self.ffn = _GATED[arch.activation](hidden, width) if arch.gated else FFN(hidden, width, arch.activation)
        self.attention_pre, self.ffn_pre = (RMSNorm(hidden, EPS) if arch.pre_norm else nn.Identity() for _ in range(2))
        self.attention_post, self.ffn_post = (_post(arch, shape) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = x + self.attention_post(self.attention(self.attention_pre(x), cos, sin))
        return h + self.ffn_post(self.ffn(self.ffn_pre(h)))


def _post(arch: Architecture, shape: Shape) -> nn.Module:
    if arch.post == "none":
        return nn.Identity()
    post = RMSNorm(shape.hidden, EPS) if arch.post == "rms" else LayerScale(shape.hidden)
    if arch.small_gains:
        nn.init.constant_(post.weight, shape.layers**-0.5)
    return post


class LM(nn.Module):
    """A language model of one of these architectures."""

    def __init__(self, arch: Architecture | str, shape: Shape, *, vocab: int) -> None:
        super().__init__()
        arch = arch if isinstance(arch, Architecture) else architecture(arch)
        check_type("shape", shape, Shape)
        check_counts(vocab=vocab)
        padded = -(-vocab // 64) * 64  # GEMMs like round sizes
        self.shape, self.factor = shape, 1 / STD if arch.unit_input else 1.0
        self.embedding = nn.Embedding(padded, shape.hidden)
        self.blocks = nn.ModuleList(Block(arch, shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, EPS) if arch.final_norm else nn.Identity()
        self.head = nn.Linear(shape.hidden, padded, bias=False)
        if shape.tied:
            self.head.weight = self.embedding.weight
        self._rotations: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = name.endswith(("attention.o.weight", "ffn.down.weight"))
                nn.init.normal_(parameter, std=STD / (2 * shape.layers) ** 0.5 if into_residual else STD)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """The mean cross-entropy, in nats a token, of ``targets`` given ``tokens``, both (batch, time) int64; without
        ``targets`` the logits (batch, time, vocabulary, padded)."""
        x = self.embedding(tokens) * self.factor
        rotation = self.rotation(tokens.shape[1], tokens.device)
        for block in self.blocks:
            x = block(x, *rotation)
        logits = self.head(self.norm(x))
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def rotation(self, time: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of the positions, (time, head) float32 each."""
        if (time, device) not in self._rotations:
            self._rotations[time, device] = rotation_of_positions(time, self.shape, device)
        return self._rotations[time, device]


def rotation_of_positions(time: int, shape: Shape, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """cos and sin, (time, head) float32 each, with Llama 3.1's slow angles."""
    return rotation_of(time, shape.head, torch.empty(0, device=device, dtype=torch.float32), 8.0)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
