"""The modules of a transformer block that are FP8 from the start: norms that make the codes of what they give, an MLP
in one piece, and the block of the two and an attention."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checks import check_bools, check_sizes
from ..recipe import Recipe
from .attend import Attends, QkNorm
from .linear import Layer, Linear
from .mlp import NAMES, has_hooks, mlp, result_dtype, xielu_alphas
from .norm import Norm, can_norm, feed, norm
from .siblings import share_input


def _check_dim(dim: Any) -> None:
    check_sizes(dim=dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim)  # as PyTorch's norms take it


class _Norm(nn.Module):
    """A norm that hands the codes of its result to the layers that read it."""

    weight: Any
    eps: Any
    _layer_norm = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.readers: tuple[nn.Module, ...] = ()

    def feeds(self, *layers: Layer) -> None:
        """Say which FP8 layers read the result: they take its codes, which the norm makes in its own pass, wherever
        they are given the very tensor that it returned. Several of them share their input (``share_input``)."""
        groups = {layer.fp8_state.group for layer in layers}
        if len(layers) > 1 and (len(groups) > 1 or None in groups):
            share_input(layers)
        feed(layers)
        self.readers = layers

    def with_sum(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The norm of residual + x, and that sum, with which a block goes on."""
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        bias = getattr(self, "bias", None)  # nn.RMSNorm has none
        if can_norm(x, residual, self.weight, bias):
            return norm(x, self.weight, bias, Norm(eps, self._layer_norm), residual, self.readers)
        total = x if residual is None else residual + x
        return super().forward(total), total


class RMSNorm(_Norm, nn.RMSNorm):
    """``nn.RMSNorm`` over the last dimension in one pass, computed in float32 and rounded once:
    x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467).

    x (..., dim) bfloat16, float16 or float32. ``forward(x)`` gives the norm; ``forward(x, residual)`` gives the norm of
    residual + x and that sum, both in one pass. ``feeds`` says which FP8 layers take the codes of the result."""

    def __init__(
        self,
        dim: int,
        eps: float | None = 1e-5,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_dim(dim)
        super().__init__(dim, eps, elementwise_affine, device, dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        y, total = self.with_sum(x, residual)
        return y if residual is None else (y, total)


class LayerNorm(_Norm, nn.LayerNorm):
    """``nn.LayerNorm`` over the last dimension in one pass, computed in float32 and rounded once:
    (x - mean) / sqrt(variance + eps) * weight + bias (arXiv 1607.06450). As :class:`RMSNorm` otherwise."""

    _layer_norm = True

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_dim(dim)
        super().__init__(dim, eps, elementwise_affine, bias, device, dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        y, total = self.with_sum(x, residual)
        return y if residual is None else (y, total)


_BETA = 0.5  # xielu's slope at 0


class MLP(nn.Module):
    """``down_proj(f(gate_proj(x)) * up_proj(x))``, or ``down_proj(f(up_proj(x)))`` with gated=False, over FP8 layers
    and in one piece: neither the product nor the gradients of gate and up are ever written in 16 bits.

    x (..., hidden_size), result of the same shape and dtype. activation: "silu", "gelu", "gelu_tanh", "relu_squared" or
    "xielu" (arXiv 2411.13010), whose factors are trained as the parameters alpha_p and alpha_n. residual (...,
    hidden_size), where it is given, is added by the last GEMM. Where one of the three layers has hooks, or another
    recipe, they run one after the other.

    recompute: keep less between forward and backward: the codes of the weights and, in eager mode, of the product are
    made again in backward. For one micro-batch a step: with several, each casts the weights anew."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        recipe: Recipe | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(hidden_size=hidden_size, intermediate_size=intermediate_size)
        check_bools(gated=gated, recompute=recompute)
        if activation not in NAMES:
            raise ValueError(f"torch_fp8: activation must be one of {', '.join(NAMES)}, got {activation!r}")
        self.activation = activation
        if gated:
            self.gate_proj = Linear(hidden_size, intermediate_size, bias, device, dtype, recipe=recipe)
        self.up_proj = Linear(hidden_size, intermediate_size, bias, device, dtype, recipe=recipe)
        self.down_proj = Linear(intermediate_size, hidden_size, bias, device, dtype, recipe=recipe)
        if activation == "xielu":
            self.alpha_p, self.alpha_n = (
                nn.Parameter(torch.tensor([math.log(math.expm1(factor))], device=device, dtype=dtype))
                for factor in (0.8, 0.8 - _BETA)  # softplus gives them back: both factors begin at 0.8
            )
        if gated:
            share_input([self.gate_proj, self.up_proj])
        if recompute:
            for layer in (*self.readers, self.down_proj):
                layer.fp8_state.keep_codes(False)

    @property
    def readers(self) -> tuple[Layer, ...]:
        """The layers that read x."""
        gate = getattr(self, "gate_proj", None)
        return (self.up_proj,) if gate is None else (gate, self.up_proj)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        gate = getattr(self, "gate_proj", None)
        alphas = xielu_alphas(self.alpha_p, self.alpha_n, _BETA) if self.activation == "xielu" else None
        return mlp(x, gate, self.up_proj, self.down_proj, self.activation, residual, alphas=alphas, beta=_BETA)


class TransformerBlock(Attends):
    """A decoder block of Llama's or GPT's kind with every linear layer in FP8, its norms, MLP and residuals in as few
    passes as there can be; the attention's products in 16 bits unless ``attention`` says more.

    x (batch, tokens, hidden_size), result of the same shape and dtype.

    num_kv_heads: fewer than num_heads for grouped queries. head_dim: hidden_size / num_heads unless given.
    norm: "rms" or "layer". norm_first: the norms are of what attention and MLP are given (Llama, GPT); else of what
        they make, before it is added (OLMo 2).
    qk_norm, attention, attention_scale: ``qk_norm``, ``mode`` and ``scale`` of an :class:`Attention`.
    activation, gated: of the :class:`MLP`. bias: of all linear layers. recompute: as of the :class:`MLP`, of all.

    ``forward(x, cos, sin)`` turns q and k by the tables of rotary positions, ([batch or 1,] tokens, head_dim) or the
    width that is turned, halves as in Llama; without tables they are not turned. mask: what
    ``scaled_dot_product_attention`` takes; causal without one."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        norm: Literal["rms", "layer"] = "rms",
        norm_first: bool = True,
        eps: float = 1e-5,
        qk_norm: QkNorm = False,
        attention: str = "16bit",
        attention_scale: float | None = None,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        recipe: Recipe | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if norm not in ("rms", "layer"):
            raise ValueError(f'torch_fp8: norm must be "rms" or "layer", got {norm!r}')
        check_bools(norm_first=norm_first)
        self.norm_first = norm_first
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        of_layer: dict[str, Any] = {**made, "bias": bias, "recipe": recipe}
        self._make_attention(
            hidden_size, num_heads, num_kv_heads, head_dim, qk_norm, attention, attention_scale, of_layer
        )
        self.mlp = MLP(
            hidden_size, intermediate_size, activation=activation, gated=gated, recompute=recompute, **of_layer
        )  # fmt: skip
        if recompute:
            for layer in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
                layer.fp8_state.keep_codes(False)
        self._make_qk_norms(eps, of_layer)
        new_norm = RMSNorm if norm == "rms" else LayerNorm
        self.attention_norm: Any = new_norm(hidden_size, eps, **made)
        self.mlp_norm: Any = new_norm(hidden_size, eps, **made)
        if norm_first:
            self.attention_norm.feeds(self.q_proj, self.k_proj, self.v_proj)
            self.mlp_norm.feeds(*self.mlp.readers)

    def forward(
        self, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        if not self.norm_first:
            h = x + self.attention_norm(self.attention(x, cos, sin, mask)).to(x.dtype)
            return h + self.mlp_norm(self.mlp(h)).to(x.dtype)
        if has_hooks(self.attention_norm):
            normalised = self.attention_norm(x)
        else:
            normalised, x = self.attention_norm.with_sum(x)
        attended = self.attention(normalised, cos, sin, mask)
        y, h = self.mlp_norm(attended.to(x.dtype), x)  # autocast leaves what residuals add up to in x's dtype
        return self.mlp(y, h) if result_dtype(y) == h.dtype else h + self.mlp(y).to(h.dtype)
