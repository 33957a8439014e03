"""``Attention``: projections in and out, a norm of each head, rotary positions, and the attention between them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_sizes
from ..recipe import Recipe
from .attention import ScaledDotProductAttention
from .linear import Linear
from .rotary import rotary
from .siblings import share_input

QkNorm = bool | Literal["rms", "rms_no_gain", "tanh"]
_QK_NORMS = (False, True, "rms", "rms_no_gain", "tanh")


class TanhNorm(nn.Module):
    """tanh(weight * x) with one trainable weight: what FOG has in the place of a norm of q and k (arXiv 2505.20524)."""

    def __init__(self, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.weight * x)


class Attends(nn.Module):
    """What an attention has, for ``Attention`` and for a block around it."""

    def _make_attention(
        self, hidden_size: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None,
        qk_norm: QkNorm, mode: str, scale: float | None, of_layer: dict[str, Any],
    ) -> None:  # fmt: skip
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_sizes(hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=kv_heads)
        check_sizes(head_dim=0 if head_dim is None else head_dim)
        if num_heads < 1 or kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"torch_fp8: num_kv_heads must divide num_heads, got {kv_heads} and {num_heads}")
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(f"torch_fp8: num_heads must divide hidden_size, got {num_heads} and {hidden_size}")
        if qk_norm not in _QK_NORMS:
            raise ValueError(f"torch_fp8: qk_norm must be one of {_QK_NORMS}, got {qk_norm!r}")
        self.num_heads, self.num_kv_heads = num_heads, kv_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.scale = scale
        self.qk_norm = "rms" if qk_norm is True else qk_norm
        self.q_proj = Linear(hidden_size, num_heads * self.head_dim, **of_layer)
        self.k_proj = Linear(hidden_size, kv_heads * self.head_dim, **of_layer)
        self.v_proj = Linear(hidden_size, kv_heads * self.head_dim, **of_layer)
        self.o_proj = Linear(num_heads * self.head_dim, hidden_size, **of_layer)
        share_input([self.q_proj, self.k_proj, self.v_proj])
        self.sdpa = None
        if mode != "16bit":
            self.sdpa = ScaledDotProductAttention(of_layer["recipe"], mode=mode)
            self.sdpa.goes_with(self.q_proj, self.k_proj, self.v_proj)
            self.sdpa.follows_layers = True  # the recipe was given for all of this module

    def _make_qk_norms(self, eps: float, of_layer: dict[str, Any]) -> None:
        made = {"device": of_layer["device"], "dtype": of_layer["dtype"]}

        def new_norm() -> nn.Module | None:
            if self.qk_norm == "tanh":
                return TanhNorm(**made)
            return nn.RMSNorm(self.head_dim, eps, self.qk_norm == "rms", **made) if self.qk_norm else None

        self.q_norm, self.k_norm = new_norm(), new_norm()

    def attention(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, mask: Tensor | None) -> Tensor:
        """What the attention alone makes of x."""
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )  # fmt: skip
        if cos is not None or self.q_norm is not None:
            gains: list[Any] = [None if n is None else n.weight for n in (self.q_norm, self.k_norm)]
            eps = getattr(self.q_norm, "eps", None) or 1e-6
            kind: Any = self.qk_norm and self.qk_norm.removesuffix("_no_gain")
            q, k = rotary(q, k, cos, sin, norm=kind or None, q_gain=gains[0], k_gain=gains[1], eps=eps)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        grouped = self.num_kv_heads != self.num_heads
        attend = F.scaled_dot_product_attention if self.sdpa is None else self.sdpa
        made = attend(q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=grouped)
        return self.o_proj(made.transpose(1, 2).flatten(-2))


class Attention(Attends):
    """Self-attention of Llama's or GPT's kind with its linear layers in FP8, and its two products too where that is
    faster (``mode``).

    x (batch, tokens, hidden_size), result of the same shape and dtype.

    num_kv_heads: fewer than num_heads for grouped queries. head_dim: hidden_size / num_heads unless given.
    qk_norm: each head of q and k is normalised: True or "rms" by RMS with a gain of its own (Qwen 3), "rms_no_gain"
        without, "tanh" by tanh of it times one trained number (arXiv 2505.20524).
    mode: "16bit", "fp8_forward", "fp8" or "auto", as :class:`ScaledDotProductAttention` has them. scale: of the
        softmax's argument; 1 / sqrt(head_dim) unless given. bias: of all linear layers.

    ``forward(x, cos, sin)`` turns q and k by the tables of rotary positions, ([batch or 1,] tokens, head_dim) or the
    width that is turned, halves as in Llama; without tables they are not turned. mask: what
    ``scaled_dot_product_attention`` takes; causal without one."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        eps: float = 1e-5,
        qk_norm: QkNorm = False,
        mode: str = "auto",
        scale: float | None = None,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__()
        of_layer: dict[str, Any] = {"device": device, "dtype": dtype, "bias": bias, "recipe": recipe}
        self._make_attention(hidden_size, num_heads, num_kv_heads, head_dim, qk_norm, mode, scale, of_layer)
        self._make_qk_norms(eps, of_layer)

    def forward(
        self, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        return self.attention(x, cos, sin, mask)
