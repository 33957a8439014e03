"""What stands between the projections and the attention: a norm of each head, and rotary positions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

NORMS = {None: 0, "rms": 1, "tanh": 2}


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    rotary_dims: int | None = None,
    interleaved: bool = False,
    heads_first: bool = False,
    norm: Literal["rms", "tanh"] | None = None,
    q_gain: Tensor | None = None,
    k_gain: Tensor | None = None,
    eps: float = 1e-6,
    gain_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """q (batch, tokens, heads, dims) and k, which may have fewer heads, each head normalised and then turned by the
    angles of its token, in one launch, in float32, rounded once. Differentiable in q, k and the gains.

    Args:
        cos, sin: ([batch or 1,] tokens, width), as transformers gives them: one column for each element. What scales
            angles (Llama 3's, YaRN's) is in them. Without them nothing is turned.
        rotary_dims: The elements of a head, its first, that are turned; the width of the tables where it is not given.
            Tables with one column for each pair are half as wide, and then it must be.
        interleaved: A pair is two neighbours (GPT-J, GLM, Cohere); else element i of the first half and of the second.
            GLM's tables have a column for each pair in their first half: ``cos[..., :rotary_dims // 2]``.
        heads_first: q and k are (batch, heads, tokens, dims), and so are the results. In memory these are always
            (batch, tokens, heads, dims).
        norm: "rms": x / sqrt(mean(x^2) + eps) * (gain + gain_offset), with gains (dims) or none;
            "tanh": tanh(gain * x), with gains of one element (arXiv 2505.20524).
    """
    if rotary_dims is None:
        rotary_dims = 0 if cos is None else cos.shape[-1]
    if norm not in NORMS:
        raise ValueError(f'torch_fp8: norm must be None, "rms" or "tanh", got {norm!r}')
    return torch.ops.torch_fp8.rotary(
        q, k, cos, sin, rotary_dims, interleaved, heads_first, NORMS[norm], q_gain, k_gain, eps, gain_offset
    )
