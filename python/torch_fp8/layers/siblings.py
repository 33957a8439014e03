"""Layers that read one tensor: q, k and v of an attention, gate and up of an MLP. They share its FP8 codes.

The first layer that meets a tensor casts it; the others take what it made if they meet the same object in the same
version, and would have made the same codes. So nothing changes but time and memory: one cast and one transpose for all,
and in eager mode one gradient of the tensor, to which their GEMMs add. csrc/siblings.h has the rules.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import _C
from ..recipe import DelayedScaling

if TYPE_CHECKING:
    from ..state import LayerState
    from .linear import Linear

_INPUT = 0


class InputGroup:
    """What the states of such layers have in common."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._begin([-1] * size)

    def _begin(self, follows: list[int]) -> None:
        self._states: dict[int, weakref.ref[LayerState]] = {}
        self._siblings = _C.Siblings(self.size)
        self._siblings.follows = self.follows = follows

    def join(self, state: LayerState) -> None:
        self._states[state.member] = weakref.ref(state)
        state.place = _C.Place(self._siblings, state.member)

    def leave(self, state: LayerState) -> None:
        self.part(state)
        self._states.pop(state.member, None)
        state.group, state.place = None, _C.Place()

    def states(self) -> dict[int, LayerState]:
        found = {member: ref() for member, ref in self._states.items()}
        return {member: state for member, state in found.items() if state is not None}

    def part(self, state: LayerState) -> None:
        """The state of this member was made anew: its scales say nothing of the others'."""
        self._set_follows([-1 if state.member in (i, s) else s for i, s in enumerate(self.follows)])

    def end_step(self) -> None:
        """Before an update: who took the codes of another has seen its amax too."""
        states = self.states()
        pairs = [(i, s) for i, s in self._siblings.end_step() if i in states and s in states]
        if pairs:
            amaxes = [[states[member].slots[_INPUT, 2] for member in members] for members in zip(*pairs, strict=True)]
            torch._foreach_maximum_(amaxes[0], amaxes[1])
        self.follows = self._siblings.follows

    def compare(self) -> None:
        """Find out whose row of the scaling state is equal to another's: they may share delayed scales from now on."""
        states = self.states()
        follows = [-1] * self.size
        for i, state in states.items():
            if not isinstance(state.recipe, DelayedScaling) or not state.has_history[_INPUT]:
                continue
            for s, other in states.items():
                if s == i:
                    break  # the first of equals is followed by the others
                if follows[s] < 0 and other.has_history[_INPUT] and _same_row(state, other):
                    follows[i] = s
                    break
        self._set_follows(follows)

    def _set_follows(self, follows: list[int]) -> None:
        if follows != self.follows:
            self._siblings.follows = self.follows = follows

    def __getstate__(self) -> dict[str, Any]:
        return {"size": self.size, "follows": list(self.follows)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.size = state["size"]
        self._begin(state["follows"])


def _same_row(state: LayerState, other: LayerState) -> bool:
    return (
        state.slots.device == other.slots.device
        and torch.equal(state.slots[_INPUT], other.slots[_INPUT])
        and torch.equal(state.history[_INPUT], other.history[_INPUT])
    )


def share_input(layers: Sequence[Linear]) -> None:
    """Tell FP8 layers that they read one tensor, so that it is cast once for all of them.

    ``convert`` finds q, k, v and gate, up by their names; this is for others. A layer that meets another tensor than
    its siblings, or one that was changed in between, casts for itself: nothing but time and memory depends on this.

    layers: two or more :class:`Linear` of one in_features, recipe and device. A layer that is in a group leaves it.

    Raises TypeError for what is no FP8 layer and ValueError where they differ; nothing is changed then.
    """
    from .linear import Linear

    layers = list(layers)
    for layer in layers:
        if not isinstance(layer, Linear):
            raise TypeError(f"torch_fp8: share_input takes FP8 layers, got {type(layer).__name__}; convert it first")
    if len(set(map(id, layers))) != len(layers) or len(layers) < 2:
        raise ValueError(f"torch_fp8: share_input needs two or more different layers, got {len(layers)}")
    for what, values in {
        "in_features": [layer.in_features for layer in layers],
        "recipe": [layer.recipe for layer in layers],
        "device": [layer.weight.device for layer in layers],
    }.items():
        for value in values:
            if value != values[0]:
                raise ValueError(f"torch_fp8: layers that share their input must have one {what}, got {values}")
    for layer in layers:
        if layer.fp8_state.group is not None:
            layer.fp8_state.group.leave(layer.fp8_state)
    group = InputGroup(len(layers))
    for member, layer in enumerate(layers):
        layer.fp8_state.group, layer.fp8_state.member = group, member
        group.join(layer.fp8_state)
    group.compare()
