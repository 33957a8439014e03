"""In which mode an attention runs: what FP8 takes, and where it is faster.

``attention_times.json`` has the times of each mode at measured sizes, casts included, written by
``benchmarks/attention.py``. A call goes as the measured size goes that is nearest to it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from .dtensor import is_dtensor
from .transforms import is_transformed

MODES = ("auto", "16bit", "fp8_forward", "fp8")
DIMS, BACKWARD_DIMS = 256, 128  # kAttentionDims, kAttentionBackwardDims of attention.h
_ALIGNMENT = 16
_MOST_KEYS = 2**16  # P * 256 of equal probabilities is then 2 of E4M3's smallest numbers
_WORTH = 0.99  # of the time in 16 bits: what another mode may take to be chosen


class Choice(NamedTuple):
    mode: str  # not "auto"
    why: str
    expand: bool = False  # each query head with keys and values of its own, in backward


def choose(
    mode: str, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, causal: bool,
    enable_gqa: bool, grads: bool, scale: float | None = None,
) -> Choice:  # fmt: skip
    """The mode of a call. What was asked for and cannot be is a ValueError that names the modes that can; "auto" goes
    to 16 bits then, and says why."""
    if mode not in MODES:
        raise ValueError(f"torch_fp8: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "16bit":
        return Choice(mode, "asked for")
    forward = why_not(query, key, value, attn_mask, dropout_p, enable_gqa, scale)
    backward = "" if forward or not grads else why_no_gradient(query, key)
    if mode != "auto":
        no = forward or (backward if mode == "fp8" else "")
        if no:
            can = "16bit" if forward else "fp8_forward or 16bit"
            raise ValueError(f"torch_fp8: an attention cannot run with mode={mode!r}: {no}; what can is {can}")
        best = fastest(query, key, causal, grads, ("fp8",)) if mode == "fp8" and grads else None
        return Choice(mode, "asked for", best is None or best.expand)
    missing = "" if forward else _missing(query.device.type)
    if forward or missing:
        return Choice("16bit", forward or missing)
    found = fastest(query, key, causal, grads, ("16bit", "fp8_forward") if backward else MODES)
    return found if found and found.mode != "16bit" else Choice("16bit", "faster at this size, or not measured")


def why_not(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, enable_gqa: bool,
    scale: float | None,
) -> str:  # fmt: skip
    """What keeps the two products from running in FP8; empty where nothing does."""
    if attn_mask is not None:
        return "it has a mask"
    if dropout_p > 0:
        return "it has dropout"
    if scale is not None and not 0 < scale < math.inf:  # of a negative one cuDNN's gradients are NaN
        return f"scale is {scale:g}, and FP8 takes one that is positive and finite"
    if any(is_dtensor(t) for t in (query, key, value)):
        lie = ", ".join(str(getattr(t, "placements", "nowhere")) for t in (query, key, value))
        return (
            f"query, key and value are DTensors that lie as {lie}, not all alike and sharded by whole heads or samples"
        )
    if is_transformed(query, key, value):
        return "it runs under a transform of torch.func (vmap, grad, ...) or in forward mode"
    if any(t.is_nested or t.layout != torch.strided or t.dim() != 4 for t in (query, key, value)):
        return "query, key and value are not all dense (batch, heads, tokens, head_dim)"
    if not query.dtype == key.dtype == value.dtype or query.dtype not in (torch.bfloat16, torch.float16):
        dtypes = f"{query.dtype}, {key.dtype} and {value.dtype}"
        return f"query, key and value are not all bfloat16 or all float16, but {dtypes}"
    if not query.device == key.device == value.device:
        return f"query, key and value are on {query.device}, {key.device} and {value.device}"
    if key.shape != value.shape or query.shape[0] != key.shape[0] or query.shape[-1] != key.shape[-1]:
        return f"shapes {list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
    heads, kv_heads, dims = query.shape[1], key.shape[1], query.shape[-1]
    if kv_heads == 0 or heads % kv_heads:
        return f"{kv_heads} heads of keys do not divide {heads} of queries"
    if heads != kv_heads and not enable_gqa:
        return f"{heads} heads of queries and {kv_heads} of keys without enable_gqa=True"
    if dims % _ALIGNMENT or not 0 < dims <= DIMS:
        return f"head_dim {dims}, and FP8 takes multiples of {_ALIGNMENT} up to {DIMS}"
    if query.shape[2] == 0 or key.shape[2] == 0:
        return "a sequence is empty"
    if query.shape[2] == 1:
        return "there is one query"
    return ""


def why_no_gradient(query: Tensor, key: Tensor) -> str:
    """What keeps the gradient's products from running in FP8."""
    if query.shape[-1] != BACKWARD_DIMS:
        return f"head_dim {query.shape[-1]}, and FP8's backward pass takes {BACKWARD_DIMS} alone"
    if key.shape[2] > _MOST_KEYS:
        return f"{key.shape[2]} keys, of so many of which a probability is 0 in FP8"
    return ""


_found: dict[str, str] = {}


def _missing(device: str) -> str:
    """Why FP8 attention cannot run on such a device at all."""
    if device not in _found:
        try:
            _C.check_attention(device == "cuda")
            _found[device] = ""
        except RuntimeError as error:
            _found[device] = str(error).splitlines()[0].removeprefix("torch_fp8: ")
    return _found[device]


# Runs when a step is traced, as what is constant there.
_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Cell(NamedTuple):
    """A measured size, and the microseconds of each mode: forward alone, and with backward."""

    causal: bool
    dims: int
    grouped: bool
    tokens: int
    load: int  # batch * heads
    us: dict[str, Sequence[float]]


def _cells(data: dict[str, Any]) -> list[Cell]:
    return [
        Cell(c["causal"], c["dims"], c["heads"] > c["kv_heads"], c["tokens"], c["batch"] * c["heads"], c["us"])
        for c in data["cells"]
    ]


CELLS = _cells(json.loads((Path(__file__).parent / "attention_times.json").read_text()))


def fastest(query: Tensor, key: Tensor, causal: bool, grads: bool, modes: Sequence[str]) -> Choice | None:
    """What is fastest of these modes, where they were measured."""
    batch, heads, tokens, dims = query.shape
    grouped = bool(heads != key.shape[1])  # while jit traces, sizes are tensors
    cells = [c for c in CELLS if c.causal == causal and c.dims == dims and c.grouped == grouped]
    if not cells:
        return None
    tokens = _nearest(sorted({c.tokens for c in cells}), tokens)
    cells = [c for c in cells if c.tokens == tokens]
    load = _nearest(sorted({c.load for c in cells}), batch * heads)
    us = next(c.us for c in cells if c.load == load)
    which = 1 if grads else 0
    took = {name: us[name][which] for name in us if name.partition(" ")[0] in modes}
    if not took:
        return None
    if "16bit" in took:
        took["16bit"] *= _WORTH
    name = min(took, key=lambda name: took[name])
    mode, _, expanded = name.partition(" ")
    return Choice(mode, "fastest at this size", bool(expanded))


def _nearest(measured: list[int], x: int) -> int:
    """By ratio. It only compares, so that a trace of any size is guarded by a range."""
    for low, high in pairwise(measured):
        if x <= math.isqrt(low * high - 1):
            return low
    return measured[-1]
