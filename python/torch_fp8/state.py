"""The scaling state of one layer, and all that is remembered beside it: an object of its own.

It is neither a parameter nor a buffer, so that nothing that fills, casts, averages, broadcasts or assigns those can
reach a scale. It follows its layer's weight: to another device, into shared memory, into copies and pickles.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import _C
from .recipe import ConstantScaling, Recipe

if TYPE_CHECKING:
    from .layers.siblings import InputGroup

ROLES = ("input", "weight", "grad_output")

_COPIED = ("recipe", "slots", "history", "has_history", "was_loaded", "group", "member")


class LayerState:
    """The scaling state of a layer with the roles ``ROLES``.

    slots: (roles, 4) float32, ``{scale_inv, scale, amax, cursor}`` of each role: amax is the maximum of magnitudes
        since the last update, cursor the place in the history that was written last (0: no history yet).
    history: (roles, length) float32, a ring of the amaxes of earlier updates.
    has_history: which roles have one. torch.compile guards on it, so it is read from the device after updates.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe = recipe
        self.group: InputGroup | None = None
        self.member = 0
        self.slots = self.history = torch.empty(0, dtype=torch.float32, device="meta")
        self._join()
        self.renew(device)

    def _join(self) -> None:
        self.options = self.recipe.options()
        self.casts = [self.options.cast(role).packed for role in range(len(ROLES))]
        self.fp8_gemms, self.fast_accum = list(self.options.fp8_gemms), list(self.options.fast_accum)
        self.memo = _C.LayerMemo()
        self.place = _C.Place()
        self.gathered = False  # as the memo knows it, where torch.compile can see it
        self.reduction: Any = None
        self.model: weakref.ref[nn.Module] | None = None  # that convert was given
        self.optimizer: weakref.ref[Any] | None = None  # the last whose step found that it holds the weight
        if self.group is not None:
            self.group.join(self)

    def renew(self, device: torch.device | None = None) -> None:
        """Forget every amax: the next step is scaled by its own tensors, like the first one."""
        device = self.slots.device if device is None else device
        constant = isinstance(self.recipe, ConstantScaling)
        bias = self.recipe.bias if constant else 0
        grad_bias = bias - self.recipe.grad_margin if constant else 0
        fresh = _C.new_slots(torch.device("cpu"), bias, grad_bias)
        with torch.no_grad():
            if device == self.slots.device and not self.slots.is_meta:
                self.slots.copy_(fresh)
                self.history.zero_()
            else:
                length = self.recipe.history_length
                history = torch.zeros(len(ROLES), length, dtype=torch.float32, device=device)
                self._hold(fresh.to(device), history)
        self.has_history = (False,) * len(ROLES)
        self.was_loaded = False
        self.memo.forget()
        if self.group is not None:
            self.group.part(self)

    def _hold(self, slots: Tensor, history: Tensor) -> None:
        self.slots, self.history = slots, history
        # For backward under torch.compile, a tensor of its own over the same memory: AOTAutograd refuses one that
        # forward changes, as soon as a second forward has run before the first backward.
        self.grad_slots = slots if slots.is_meta else torch.from_dlpack(slots)
        for tensor in (self.slots, self.grad_slots):
            # What torch._dynamo.mark_static_address sets: a graph of mode="reduce-overhead" may write here.
            tensor._dynamo_static_input_type = "unguarded"

    def follow(self, weight: Tensor) -> None:
        """Go where the layer's weight is. On the meta device there are no values, and whoever comes from there begins
        anew."""
        device = weight.device
        if hasattr(weight, "fake_mode"):
            return  # it is nowhere
        if device != self.slots.device:
            if device.type == "meta" or self.slots.is_meta:
                self.renew(device)
            else:
                self._hold(self.slots.to(device), self.history.to(device))
                self.memo.forget()
        if device.type == "cpu" and weight.is_shared() and not self.slots.is_shared():
            self.slots.share_memory_(), self.history.share_memory_()
            self._hold(self.slots, self.history)

    def read_history(self, rows: list[list[float]]) -> None:
        """Take note of slots that were read from the device."""
        self.has_history = tuple(row[3] > 0 for row in rows)
        self.memo.set_history(sum(known << role for role, known in enumerate(self.has_history)))

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._hold(self.slots, self.history)
        self._join()

    def __copy__(self) -> LayerState:
        """Two layers that write one state would each undo what the other records."""
        state = self.__getstate__()
        new = object.__new__(type(self))
        new.__setstate__({**state, "slots": self.slots.clone(), "history": self.history.clone(), "group": None})
        return new
