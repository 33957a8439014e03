"""What looks at a model in one optimizer step of many: hooks that hang on its modules in that step alone.

Steps are those of the first optimizer that is seen with parameters of the model, as long as it steps. The model is held
by weak references only; what samples it lives as long as the model, also where nobody else holds it.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..checks import check, is_int

S = TypeVar("S", bound="Sampled")
_of_models: weakref.WeakKeyDictionary[nn.Module, list[Sampled]] = weakref.WeakKeyDictionary()


class Sampled:
    """A kind of sampling says which hooks hang in a sampled step (``_hang``), and what is done at its end."""

    def __init__(self, model: nn.Module, every: int) -> None:
        check(is_int(every, 1, 2**62), "every", "a positive number of optimizer steps", every)
        self._check(model)
        self.every, self.step = every, 0
        this = weakref.ref(self)
        self._model = weakref.ref(model, lambda _: _end_of(this))
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None  # the one whose steps count
        self._others: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()  # stepped since it did
        self._hooks: list[Any] = []
        self._is_sampling = self._has_seen_gradients = False
        _of_models.setdefault(model, []).append(self)
        self._on_steps = [
            register_optimizer_step_pre_hook(_weakly(self, "_at_optimizer_step")),
            register_optimizer_step_post_hook(_weakly(self, "_after_optimizer_step")),
        ]
        self._begin()

    def close(self) -> None:
        """Sample no more."""
        self._end()
        for hook in self._on_steps:
            hook.remove()
        if (model := self._model()) is not None and self in _of_models.get(model, ()):
            _of_models[model].remove(self)

    def __del__(self) -> None:
        # A model that goes in a sampled step leaves compiled ones as they were.
        if self.__dict__.get("_is_sampling") and not sys.is_finalizing():
            _Eager.leave()

    def __enter__(self: S) -> S:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- what a kind of sampling says --------------------------------------------------------------------------------

    def _check(self, model: nn.Module) -> None:
        """What else must hold before a hook hangs."""

    def _hang(self, model: nn.Module) -> Iterable[Any]:
        """The handles of the hooks that hang in a sampled step."""
        raise NotImplementedError

    def _before_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """At the end of a sampled step, the hooks gone, before the optimizer changes a parameter or a gradient."""

    def _after_sample(self) -> None:
        """At its end, once the parameters were changed and the hooks are gone."""

    def _after_step(self) -> None:
        """At the end of every step, sampled or not, before ``step`` becomes the next one."""

    def _or_give_up(self, name: str, write: Callable[[], None]) -> None:
        """A full disk does not end a training: what the attribute ``name`` writes to is given up, in words."""
        try:
            write()
        except OSError as error:
            setattr(self, name, None)
            warnings.warn(
                f"torch_fp8: the {name.strip('_')} cannot be written, from step {self.step} on nothing is: {error}; "
                "training goes on",
                stacklevel=2,
            )

    # ---- when --------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        if (model := self._model()) is None:
            return
        self._hooks.extend(self._hang(model))
        self._is_sampling, self._has_seen_gradients = True, False
        _Eager.enter()

    def _unhang(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _end(self) -> None:
        self._unhang()
        if self._is_sampling:
            self._is_sampling = False
            _Eager.leave()

    def _at_optimizer_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        """Gradients are there now, or once the first call of a closure returns: forward and backward may be in it."""
        if not (self._is_sampling and self._counts_steps(optimizer)):
            return None
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._seen_after(kwargs["closure"], optimizer)}
        if len(args) > 1 and callable(args[1]):  # args[0] is the optimizer
            return (args[0], self._seen_after(args[1], optimizer), *args[2:]), kwargs
        self._see_gradients(optimizer)
        return None

    def _seen_after(self, closure: Callable[[], Any], optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        def seen() -> Any:
            result = closure()
            self._see_gradients(optimizer)
            return result

        return seen

    def _see_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Once a sample. What follows is no part of it: LBFGS calls its closure again."""
        if not self._has_seen_gradients and (model := self._model()) is not None:
            self._unhang()
            self._before_step(model, optimizer)
            self._has_seen_gradients = True

    def _after_optimizer_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._counts_steps(optimizer):
            self._others.clear()
            self._count_step(optimizer)
        elif optimizer in self._others:  # it steps again, and the first one did not
            self._optimizer = weakref.ref(optimizer)
            self._others.clear()
            self._end()  # what was sampled is of two steps
            self._count_step(optimizer)
            self._end()
            self._count_step(optimizer)
        elif self._has_parameters_of_ours(optimizer):
            self._others.add(optimizer)

    def _count_step(self, optimizer: torch.optim.Optimizer) -> None:
        sampled = self._is_sampling
        if sampled:
            self._see_gradients(optimizer)  # where a closure was given and not called
        self._end()
        try:
            if sampled:
                self._after_sample()
        finally:  # also where a writer of the user's raises
            self._after_step()
            self.step += 1
            if self.step % self.every == 0:
                self._begin()

    def _counts_steps(self, optimizer: torch.optim.Optimizer) -> bool:
        """The first optimizer seen with parameters of the model; a second one (Muon beside AdamW) does not count,
        unless it has stepped twice with none of the first between."""
        if self._optimizer is None or self._optimizer() is None:
            if not self._has_parameters_of_ours(optimizer):
                return False
            self._optimizer = weakref.ref(optimizer)
        return self._optimizer() is optimizer

    def _has_parameters_of_ours(self, optimizer: torch.optim.Optimizer) -> bool:
        model = self._model()
        ours = {id(p) for p in model.parameters()} if model is not None else set()
        return any(id(p) in ours for group in optimizer.param_groups for p in group["params"])


def check_writer(writer: Any) -> None:
    is_one = callable(getattr(writer, "add_scalar", None))
    check(writer is None or is_one, "writer", "what has add_scalar(tag, value, step)", writer)


class Hook:
    """A hook that hangs in a sampled step. A copy or pickle of the model, made meanwhile, has one that does nothing."""

    def __init__(self, see: Callable[..., None]) -> None:
        self._see = see

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self._see(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (_nothing,)


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _end_of(ref: weakref.ref[Sampled]) -> None:
    """The model is gone, perhaps in a sampled step, which will have no end."""
    if (sampled := ref()) is not None and not sys.is_finalizing():
        sampled._end()


def _weakly(sampled: Sampled, method: str) -> Callable[..., None]:
    """For a list of the process, which lives for ever."""
    ref = weakref.ref(sampled)

    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        return None if (sampled := ref()) is None else getattr(sampled, method)(optimizer, args, kwargs)

    return torch.compiler.disable(hook)  # it may run within a compiled optimizer.step()


class _Eager:
    """While anything samples, compiled code runs eagerly: it does not look for hooks, and would keep those that hang
    while it is traced. The user's own stance comes back after."""

    _count = 0
    _stance: Any = None

    @classmethod
    def enter(cls) -> None:
        if cls._stance is None:
            cls._stance = torch.compiler.set_stance("force_eager")
        cls._count += 1

    @classmethod
    def leave(cls) -> None:
        cls._count -= 1
        if cls._count == 0:
            cls._stance.__exit__(None, None, None)
            cls._stance = None
