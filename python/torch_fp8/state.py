"""The scaling state of one module, and all that is remembered beside it: an object of its own.

It is neither a parameter nor a buffer, so that nothing that fills, casts, averages, broadcasts or assigns those can
reach a scale. It follows its module's tensors: to another device, into shared memory, into copies and pickles.
"""

from __future__ import annotations

import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Container
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from . import _C
from .recipe import DelayedScaling, Recipe

ROLES = ("input", "weight", "grad_output")
_INPUT = ROLES.index("input")


class Role(NamedTuple):
    """What a tensor is to a module."""

    name: str
    cast: _C.Cast
    constant: float = 0.0  # its scale, where that never changes


def role_of(name: str, cast: _C.Cast, bias: int) -> Role:
    """A role that is cast so; by constant scaling with the scale ``2**bias``."""
    return Role(name, cast, 2.0**bias if cast.scaling == _C.Scaling.constant else 0.0)


class State(ABC):
    """The scaling state of a module. Each tensor that it casts has one of its roles, and each role a cast of its own.

    roles: how each is cast; one row of slots and history is that of one role.
    slots: (roles, 4) float32, ``{scale_inv, scale, amax, cursor}`` of each role: amax is the maximum of magnitudes
        since the last update, cursor the place in the history that was written last (0: no history yet).
    history: (roles, length) float32, a ring of the amaxes of earlier updates.
    has_history: which roles have one. torch.compile guards on it, so it is read from the device after updates.
    memo: what the host remembers between calls (csrc/memo.h).
    one_scale: roles that have one scale: each sees the largest of their amaxes.
    group: the layers that cast their input once, together with this one.
    model, optimizer: whose step ends the module's (``_after_optimizer_step`` in scaling.py).
    """

    copied: ClassVar[tuple[str, ...]] = ("recipe", "slots", "history", "has_history", "was_loaded")
    one_scale = slice(0)
    group: InputGroup | None = None

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe = recipe
        self.slots = self.history = torch.empty(0, dtype=torch.float32, device="meta")
        self._join()
        self.renew(device)

    @abstractmethod
    def _make_roles(self) -> list[Role]:
        """By the recipe, and what else the module was told."""

    def _join(self) -> None:
        self.roles = self._make_roles()
        self.casts = [role.cast.packed for role in self.roles]
        self.targets = [role.cast.target for role in self.roles]
        self.powers_of_two = [role.cast.rounding for role in self.roles]
        self.constant_roles = sum((role.constant != 0) << i for i, role in enumerate(self.roles))
        self.is_constant = all(role.constant for role in self.roles)  # there is nothing to update
        self.memo = _C.LayerMemo([(role.name, role.constant) for role in self.roles])
        self.reduction: Any = None
        self.model: weakref.ref[nn.Module] | None = None  # that convert was given
        self.optimizer: weakref.ref[Any] | None = None  # the last whose step found that it holds the weight
        self.passed_over = 0  # steps of other optimizers since
        self.unused_steps = 0  # its optimizer's, in which the module was not called

    def renew(self, device: torch.device | None = None) -> None:
        """Forget every amax: the next step is scaled by its own tensors, like the first one."""
        device = self.slots.device if device is None else device
        scales = [role.constant or 1.0 for role in self.roles]
        rows = [[1 / scale, scale, 0, 0] for scale in scales]  # powers of two
        fresh = torch.tensor(rows, dtype=torch.float32, device="cpu")
        with torch.no_grad():
            if device == self.slots.device and not self.slots.is_meta:
                self.slots.copy_(fresh)
                self.history.zero_()
            else:
                length = self.recipe.history_length
                history = torch.zeros(len(rows), length, dtype=torch.float32, device=device)
                self._hold(fresh.to(device), history)
        self.has_history = (False,) * len(rows)
        self.was_loaded = False
        self.memo.forget()

    def _hold(self, slots: Tensor, history: Tensor) -> None:
        self.slots, self.history = slots, history
        # For backward under torch.compile, a tensor of its own over the same memory: AOTAutograd refuses one that
        # forward changes, as soon as a second forward has run before the first backward.
        self.grad_slots = slots if slots.is_meta else torch.from_dlpack(slots)
        for tensor in (self.slots, self.grad_slots):
            # What torch._dynamo.mark_static_address sets: a graph of mode="reduce-overhead" may write here.
            tensor._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]

    def follow(self, tensor: Tensor) -> None:
        """Go where the module's tensors are, of which this is one. On the meta device there are no values, and whoever
        comes from there begins anew."""
        device = tensor.device
        if hasattr(tensor, "fake_mode"):
            return  # only a trace sees this one, and it has no device of its own
        if device != self.slots.device:
            if device.type == "meta" or self.slots.is_meta:
                self.renew(device)
            else:
                self._hold(self.slots.to(device), self.history.to(device))
                self.memo.forget()
        if device.type == "cpu" and tensor.is_shared() and not self.slots.is_shared():
            self.slots.share_memory_(), self.history.share_memory_()
            self._hold(self.slots, self.history)

    def read_history(self, rows: list[list[float]]) -> None:
        """Take note of slots that were read from the device."""
        self.has_history = tuple(row[3] > 0 and not role.constant for row, role in zip(rows, self.roles))
        self.memo.set_history(self.known_roles())

    def known_roles(self) -> int:
        """Which roles have a history, one bit each, as the ops take it."""
        return sum(known << role for role, known in enumerate(self.has_history))

    def why_not(self, slots: Tensor, history: Tensor) -> str:
        """Why these cannot be the state's tensors, which are sound and of the right shape; or nothing."""
        for role, row, ring in zip(self.roles, slots.tolist(), history.tolist()):
            if role.constant and (row[1] != role.constant or row[3] > 0 or any(ring)):
                saved = "one with a history" if row[3] > 0 or any(ring) else f"{row[1]:g}"
                return f"{role.name} has the constant scale {role.constant:g}, the saved state {saved}"
        rows = torch.cat([slots[:, [0, 1, 3]], history], 1)[self.one_scale]
        if any(not torch.equal(row, rows[0]) for row in rows):
            names = ", ".join(role.name for role in self.roles[self.one_scale])
            return f"{names} have one scale, in the saved state several"
        for role, row, ring in zip(self.roles, slots.tolist(), history.tolist()):
            largest, reached = torch.finfo(role.cast.dtype).max, row[1] * max(ring)
            if reached > 2 * largest:  # which no recipe of this format makes of a history
                return f"{role.name} has a format up to {largest:g}, the saved scale is of one up to {reached:g}"
        return ""

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.copied}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._hold(self.slots, self.history)
        self._join()

    def __copy__(self) -> State:
        """Two modules that write one state would each undo what the other records."""
        state = self.__getstate__()
        new = object.__new__(type(self))
        new.__setstate__({**state, "slots": self.slots.clone(), "history": self.history.clone(), "group": None})
        return new


class LayerState(State):
    """The scaling state of a linear layer.

    place: which of ``group``'s members the layer is.
    recompute: backward makes the codes of the weight again instead of keeping them from the forward on, and those of
        the input, where a norm or an activation made them.
    """

    copied = (*State.copied, "group", "member", "recompute")
    recompute = False
    member = 0

    def _make_roles(self) -> list[Role]:
        self.options = self.recipe.options()
        biases = self.recipe.biases
        return [role_of(name, self.options.cast(i), biases[i]) for i, name in enumerate(ROLES)]

    def _join(self) -> None:
        super()._join()
        self.fp8_gemms, self.fast_accum = list(self.options.fp8_gemms), list(self.options.fast_accum)
        self.place = _C.Place()
        self.is_sharded = False  # the weight is gathered for each forward
        self._set_gathered()
        if self.group is not None:
            self.group.join(self)

    def renew(self, device: torch.device | None = None) -> None:
        super().renew(device)
        if self.group is not None:
            self.group.part(self)

    def keep_codes(self, keep: bool) -> None:
        """Whether codes are kept between forward and backward (``recompute``)."""
        self.recompute = not keep
        self._set_gathered()

    def was_sharded(self) -> None:
        self.is_sharded = True
        self._set_gathered()

    def _set_gathered(self) -> None:
        """Whether codes of the weight end with the call that made them."""
        self.gathered = self.is_sharded or self.recompute  # as the memo knows it, where torch.compile can see it
        self.memo.set_gathered(self.is_sharded)
        self.memo.set_recompute(self.recompute)


_numbers = itertools.count()

# The groups that are alive.
groups: weakref.WeakValueDictionary[int, InputGroup] = weakref.WeakValueDictionary()


class InputGroup:
    """What the states of layers have in common that read one tensor, which is cast once for all of them.

    The first layer that meets the tensor casts it; the others take what it made if they meet the same object in the
    same version, and would have made the same codes. csrc/siblings.h has the rules. So there is one cast and one
    transpose for all, and in eager mode one gradient of the tensor, to which their GEMMs add.

    follows: for each member, whose row of the scaling state is equal to its own; -1: nobody's.
    reads_apart: a step was traced in which a member that follows another read something else.
    reads_norms: whether the members read what a norm casts in the place of one of them. Once that one read something
        else, no norm casts for them any more.
    offered: in a trace: the member in whose place a norm has cast, and that has not read it yet; or -1.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._begin([-1] * size)

    def _begin(self, follows: list[int]) -> None:
        self.number = next(_numbers)  # by which a trace can speak of the group
        groups[self.number] = self
        self.reads_apart = False
        self.reads_norms, self.offered = True, -1
        self._unread: set[int] = set()
        self._states: dict[int, weakref.ref[LayerState]] = {}
        self._siblings = _C.Siblings(self.size)
        self.follows = follows
        self._siblings.set_follows(follows)

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

    def end_step(self) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
        """Before an update: pairs of amaxes of a taker and of the one whose codes it took; and, apart, of those that
        may have taken codes in a compiled step."""
        states = self.states()
        amaxes = {member: state.slots[_INPUT, 2] for member, state in states.items()}
        *steps, unread = self._siblings.end_step()
        took, may_have_taken = (
            [(amaxes[i], amaxes[s]) for i, s in pairs if i in states and s in states] for pairs in steps
        )
        for member in self._unread.union(unread) & amaxes.keys():
            amaxes[member].zero_()  # the scale stays for this once
            self.reads_norms = False
        self._unread.clear()
        self.follows = self._siblings.follows()
        if self.reads_apart:
            self._set_follows([-1] * self.size)
        return took, may_have_taken

    def note_unread(self, member: int) -> None:
        """In a trace: a norm cast in the place of this member, which reads something else."""
        self.offered = -1
        self._unread.add(member)

    def part_unless(self, states: Container[State]) -> None:
        """After an update of these states alone: those of a group that were not all among them have parted."""
        if any(state not in states for state in self.states().values()):
            self._set_follows([-1] * self.size)

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
            self.follows = follows
        self._siblings.set_follows(follows)

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
