"""``Scaled``: what the scaling update asks of a module that has a scaling state, linear layer or not."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..checks import modules_of
from ..recipe import Recipe
from ..state import State

# Every module of the process with a scaling state that is alive, by id. A plain dict of weak references: list() of its
# values is one step, which no other thread can disturb.
_alive: dict[int, weakref.ref[Scaled]] = {}


class Scaled(nn.Module):
    """A module with a scaling state. Its step ends with that of an optimizer which holds one of its owners
    (``_after_optimizer_step`` in scaling.py)."""

    fp8_state: State
    auto_update: bool  # the optimizer's step updates the scales
    fp8_enabled: bool  # torch_fp8.disabled takes this away for a while

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        self._register()
        return self

    def _register(self) -> None:
        key = id(self)
        _alive[key] = weakref.ref(self, lambda ref: _alive.pop(key, None))

    def _unregister(self) -> None:
        _alive.pop(id(self), None)

    def owners(self) -> Sequence[Tensor]:
        """The parameters whose optimizer's step ends this module's."""
        return ()

    def is_trained(self) -> bool:
        """Whether an optimizer is to be expected that holds an owner."""
        return any(owner.requires_grad for owner in self.owners())

    def cast_weight(self) -> Tensor | None:
        """The weight whose identity the memo looks at, where there is one."""
        return None

    def settle(self) -> None:
        """Bring the state to where the module is, as far as that is known before a forward."""

    @property
    def recipe(self) -> Recipe:
        """How the scales are chosen."""
        return self.fp8_state.recipe

    @property
    def fp8_slots(self) -> Tensor:
        return self.fp8_state.slots

    @property
    def fp8_history(self) -> Tensor:
        return self.fp8_state.history

    def reset_scaling(self) -> None:
        """Forget every amax: the next step is scaled by its own tensors, like the first one."""
        self.fp8_state.renew()

    def _replicate_for_data_parallel(self) -> Scaled:
        raise RuntimeError(
            "torch_fp8: nn.DataParallel copies the layers in every forward, and what the copies record is lost; use "
            "DistributedDataParallel or fully_shard under torchrun, or let the program see one GPU "
            "(CUDA_VISIBLE_DEVICES=0). transformers' Trainer wraps in nn.DataParallel wherever it sees several"
        )

    def __copy__(self) -> Scaled:
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.__dict__["fp8_state"] = copy.copy(self.fp8_state)
        return new


def alive_modules() -> list[Scaled]:
    """Every module of the process with a scaling state."""
    found = [module for ref in list(_alive.values()) if (module := ref()) is not None]
    return [module for module in found if "fp8_state" in module.__dict__]  # others are being made, by another thread


def scaled_modules(model: nn.Module) -> dict[str, Scaled]:
    """The modules of a model that have a scaling state, by name; one that occurs twice has its first name."""
    return {name: module for name, module in modules_of(model) if isinstance(module, Scaled)}
