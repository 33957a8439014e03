"""A module's own forward, run on stubs and a few numbers, without a trace: the module, its children and every state of
random numbers are afterwards what they were."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Stub:
    """Stands for a child: notes what it is given and returns what it was told to."""

    def __init__(self, result: Any, note: Callable[[], None] = lambda: None) -> None:
        self.result = result
        self.note = note
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.note()
        self.calls.append((args, kwargs))
        return self.result


class _Owner:
    """Stands for a child that has tensors of its own: what it computes is not known."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise _Unknown(f"{self.name} has parameters or buffers")


class _Unknown(Exception):
    pass


class Passed:
    """An argument of which nothing is known but to whom it is passed on. ``touched``: somebody did more with it."""

    def __init__(self) -> None:
        self.touched = False

    def _touch(self, *args: Any) -> Any:
        self.touched = True
        raise TypeError("the argument is used")

    __bool__ = __len__ = __iter__ = __getitem__ = __call__ = __int__ = __float__ = __eq__ = __ne__ = _touch
    __lt__ = __le__ = __gt__ = __ge__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _touch
    __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = __contains__ = _touch
    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        self.touched = True
        raise AttributeError(name)


def numbers(*size: int, seed: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    """Random ones that want a gradient; no state of random numbers moves."""
    generator = torch.Generator("cpu").manual_seed(seed)
    made = scale * torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
    return made.to(dtype).requires_grad_()


class Sample(NamedTuple):
    """Of what size, and how large, the numbers of a run are: batches, single tokens, and what somebody may clamp."""

    sequences: int = 1
    tokens: int = 3
    scale: float = 1.0
    dtype: torch.dtype = torch.float64


SAMPLES = (Sample(), Sample(2, 1, 100.0), Sample(3, 6, 1e6))
IN_HALF = Sample(2, 3, 500.0, torch.float16)  # products and sums overflow


def close(a: Any, b: Tensor, tolerance: float = 1e-6, absolute: float | None = None) -> bool:
    absolute = tolerance if absolute is None else absolute
    return isinstance(a, Tensor) and a.shape == b.shape and torch.allclose(a.to(b.dtype), b, tolerance, absolute)


def gradients(of: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Of the sum of ``of``, weighted so that no two elements count alike."""
    if not of.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    weights = torch.linspace(1, 2, of.numel(), dtype=of.dtype, device="cpu").reshape(of.shape)
    found = torch.autograd.grad(of, leaves, weights, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


class Probe:
    """Runs forwards of the modules of one model."""

    def __init__(self, model: nn.Module) -> None:
        # What a forward may change on a module is copied, but for modules and parameters.
        self._known: dict[int, Any] = {}
        for module in model.modules():
            self._known[id(module)] = module
            self._known |= {id(p): p for p in module._parameters.values() if p is not None}

    def run(
        self, module: nn.Module, children: dict[str, Any], parameters: dict[str, Tensor], training: bool,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """What the module's own forward gives with these children and parameters, in training or not; an exception
        where it fails, and where it draws random numbers."""
        before = _random_states()
        try:
            apart = self._copy(module, training)
            apart.__dict__["_modules"] |= children
            apart.__dict__["_parameters"] |= parameters
            state = _state_of(apart)
            with torch.autocast("cpu", enabled=False), torch.device("cpu"):  # whatever surrounds the call of fuse
                result = type(module).forward(apart, *args, **kwargs)
            if (changed := _changed(state, _state_of(apart))) is not None:
                result = _Unknown(f"it writes to its {changed}")
        except Exception as error:  # somebody else's forward, on what it did not expect
            result = error
        if not all(map(_same, before, _random_states())):
            random.setstate(before[0])
            torch.set_rng_state(before[1])
            if before[2] is not None:
                sys.modules["numpy"].random.set_state(before[2])
            if len(before) > 3:
                torch.cuda.set_rng_state_all(before[3:])
            return _Unknown("it draws random numbers" + (" in training" if training else ""))
        return result

    def _copy(self, module: nn.Module, training: bool) -> nn.Module:
        new: nn.Module = object.__new__(type(module))
        for name, value in module.__dict__.items():
            new.__dict__[name] = value if name in _OF_MODULES else self._copied(value)
        for name in _HOOKS:
            new.__dict__[name] = {}
        new.__dict__["training"] = training
        if new.__dict__.get("gradient_checkpointing"):  # transformers' switch: the same numbers, made twice
            new.__dict__["gradient_checkpointing"] = False
        new.__dict__["_parameters"] = dict(module._parameters)
        new.__dict__["_buffers"] = {name: _other_values(buffer) for name, buffer in module._buffers.items()}
        new.__dict__["_modules"] = {
            name: child if child is None else _Owner(name) if owns(child) else self._copy(child, training)
            for name, child in module._modules.items()
        }
        return new

    def _copied(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str | type):
            return value
        try:
            return copy.deepcopy(value, self._known)
        except Exception:  # a lock, a handle: nothing that a forward would write to
            return value


_OF_MODULES = set(nn.Module().__dict__)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def owns(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None


def _other_values(buffer: Tensor | None) -> Tensor | None:
    """A buffer is no constant: what is computed with it is not what is computed without it, even where it is 1 or 0."""
    if buffer is None or not buffer.is_floating_point():
        return None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu").fill_(1)
    return torch.tensor(1.6180339887, dtype=buffer.dtype, device="cpu").expand(buffer.shape)


def _random_states() -> list[Any]:
    of_numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
    states: list[Any] = [random.getstate(), torch.get_rng_state(), of_numpy]
    return states + (torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else repr(a) == repr(b)


def _state_of(module: nn.Module) -> dict[str, Any]:
    """What a forward may leave on its module."""
    state = {name: value for name, value in module.__dict__.items() if name not in _OF_MODULES}
    state |= {
        f"{name}, {len(value)} long": None for name, value in state.items() if isinstance(value, list | dict | set)
    }
    buffers = {name: b for name, b in module._buffers.items() if b is not None}
    return state | buffers | {f"{name}, version {b._version}": None for name, b in buffers.items()}


def _changed(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """The name of something that is not what it was."""
    names = (name for name in before.keys() | after.keys() if before.get(name, _OF_MODULES) is not after.get(name))
    return min((name.partition(",")[0] for name in names), default=None)
