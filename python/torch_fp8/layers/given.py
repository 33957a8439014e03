"""Codes that a norm makes of its result for the frozen layers that read it. A layer takes them where it is given that
very tensor, unchanged, and would cast in that way; else it casts. Nothing but time depends on whether it does, since
they are the codes that it would make, to the bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import _C
from . import traced

if TYPE_CHECKING:
    from .frozen import FrozenLinear

#: The op of a frozen layer casts the input of more rows than these alone, whatever its sizes (csrc/ops/frozen_route.h).
_FEW_ROWS = 16


def casts_rows(x: Tensor) -> bool:
    """Whether codes of x are worth making elsewhere. Never in a program exported for any number of rows, as it is."""
    if torch.compiler.is_dynamo_compiling() or not torch.compiler.is_exporting():
        return x.shape[:-1].numel() > _FEW_ROWS
    return all(isinstance(size, int) for size in x.shape) and x.shape[:-1].numel() > _FEW_ROWS


class _Offer(NamedTuple):
    state: tuple[Any, ...]  # of the tensor, where and when the codes were made
    q: Tensor
    scale: Tensor | None  # by row; None: by the slot
    slot: Tensor | None
    slot_state: tuple[Any, ...]


def _state_of(t: Tensor) -> tuple[Any, ...]:
    """What a write changes, or another stream or CUDA graph. Of tensors that count no writes the version is -1."""
    version = -1 if t.is_inference() else t._version
    return version, t.data_ptr(), t.shape, t.stride(), _C.stream_of(t)


# By the tensor itself, for as long as it lives. Not on it, where they would be pickled and copied with it.
_offers = WeakTensorKeyDictionary()


def offer(y: Tensor, q: Tensor, scale: Tensor, slot: Tensor | None) -> None:
    """Have ready the codes of a contiguous y: by row, or by that slot."""
    if torch.compiler.is_compiling():
        traced.offer_rows(y, q, scale, slot)
    elif type(y) is Tensor and not y.is_inference():
        by_row = slot is None
        slot_state = () if slot is None else _state_of(slot)
        _offers[y] = _Offer(_state_of(y), q, scale if by_row else None, slot, slot_state)


def codes_for(x: Tensor, *layers: FrozenLinear) -> tuple[Tensor, Tensor | None] | tuple[()]:
    """The codes of x, where every one of these layers takes them: what their ops take last. In eager mode."""
    if not _offers.data:  # in decoding the host's time counts
        return ()
    found: _Offer | None = _offers.get(x)
    if found is None or found.state != _state_of(x):
        return ()
    if found.slot is not None and found.slot_state != _state_of(found.slot):
        return ()
    return (found.q, found.scale) if all(_casts_so(layer, found.scale, found.slot) for layer in layers) else ()


def codes_in_graph(x: Tensor, *layers: FrozenLinear) -> tuple[Tensor, Tensor | None] | tuple[()]:
    """The same of what is being traced."""
    made = traced.rows_of(x)
    takes = made is not None and all(_casts_so(layer, made[1], made[2]) for layer in layers)
    return made[:2] if made is not None and takes else ()


def _casts_so(layer: FrozenLinear, scale: Tensor | None, slot: Tensor | None) -> bool:
    """Whether the layer would make such codes: by row where they have scales, or by a slot."""
    if layer.granularity == "block" or layer.activations != ("static" if scale is None else "token"):
        return False
    if scale is not None or layer.input_slot is slot:
        return True
    # Layers that were calibrated on one tensor have slots of their own with one number.
    if torch.compiler.is_compiling() or layer.input_slot is None or slot is None:
        return False
    number = _number_in(slot)
    return number is not None and number == _number_in(layer.input_slot)


_numbers = WeakTensorKeyDictionary()  # of slots: the state in which they were read, and the number


def _number_in(slot: Tensor) -> float | None:
    """The scale in a slot, for which the host waits once. None where it may not, or could not tell that it changed."""
    if type(slot) is not Tensor or slot.is_inference() or slot.is_meta:
        return None
    # What is recorded now is replayed after the number has changed.
    if torch.jit.is_tracing() or _C.stream_of(slot)[1]:
        return None
    now = slot._version, slot.data_ptr()
    known: tuple[Any, float] = _numbers.get(slot, ((), 0.0))
    if known[0] == now:
        return known[1]
    if torch._C._len_torch_dispatch_stack() > 0:
        return None
    _numbers[slot] = now, float(slot[0, 1])
    return float(_numbers[slot][1])
