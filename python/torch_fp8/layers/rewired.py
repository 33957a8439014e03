"""An attention of somebody else's that turns its queries and keys in one launch: its own forward, in which the global
function that does it is ours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from .dtensor import is_dtensor
from .rotary import rotary
from .transforms import is_transformed

# Names that this function has: of q, k (batch, heads, tokens, dims), cos and sin ([batch,] tokens, width).
_NAMES = ("apply_rotary_pos_emb",)


def why_not_rewired(attention: type[nn.Module]) -> str | None:
    """Why the forward of such a module cannot be rewired; "" where it can, None where it turns nothing."""
    forward = attention.forward
    plain: Any = _innermost(forward)
    name = _name_in(plain)
    if name is None:
        return None
    if _interleaved(plain.__globals__[name]) is None:
        return f"its {name} is not one that is known"
    return "" if _rewired(forward, plain, plain) is not None else "its forward is decorated in a way that is not known"


def rewired(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of the forward whose global function is ours."""
    plain: Any = _innermost(forward)
    name = _name_in(plain)
    assert name is not None
    theirs = plain.__globals__[name]
    interleaved = _interleaved(theirs)
    assert interleaved is not None
    code = plain.__code__
    globals_ = {**plain.__globals__, name: _ours(theirs, interleaved)}
    globals_.pop("__name__", None)  # by it torch.compile would look the function up in their module
    new = FunctionType(code, globals_, plain.__name__, plain.__defaults__, plain.__closure__)
    new.__kwdefaults__ = plain.__kwdefaults__
    made = _rewired(forward, plain, functools.update_wrapper(new, plain, updated=()))
    assert made is not None
    return made


def _innermost(function: Any) -> Any:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def _name_in(function: Any) -> str | None:
    names = function.__code__.co_names if isinstance(function, FunctionType) else ()
    return next((name for name in _NAMES if name in names and callable(function.__globals__.get(name))), None)


def _rewired(function: Any, old: Any, new: Any) -> Any:
    """The function with new in the place of old, which its decorators close over; None where they do not."""
    if function is old:
        return new
    cells = getattr(function, "__closure__", None)
    if not isinstance(function, FunctionType) or not cells:
        return None
    inner = _rewired(function.__wrapped__, old, new)  # type: ignore[attr-defined]
    found = [cell.cell_contents is function.__wrapped__ for cell in cells]  # type: ignore[attr-defined]
    if inner is None or not any(found):
        return None
    closure = tuple(CellType(inner) if it else cell for it, cell in zip(found, cells, strict=True))
    made = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(function.__dict__)
    made.__wrapped__ = inner  # type: ignore[attr-defined]
    return made


@functools.lru_cache
def _interleaved(theirs: Callable[..., Any]) -> bool | None:
    """Whether pairs are neighbours; None where the function computes something else than ours."""
    generator = torch.Generator("cpu").manual_seed(0)
    q, k, half = (
        torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")
        for size in ((2, 4, 5, 8), (2, 2, 5, 8), (2, 5, 4))
    )
    for interleaved in (False, True):
        angles = half.repeat_interleave(2, -1) if interleaved else torch.cat([half, half], -1)
        cos, sin = angles.cos(), angles.sin()
        try:
            got = theirs(q, k, cos, sin)
        except Exception:  # somebody else's function, on what it did not expect
            return None
        right = rotary(q, k, cos, sin, interleaved=interleaved, heads_first=True)
        if all(torch.allclose(a, b, 1e-5, 1e-5) for a, b in zip(got, right, strict=True)):
            return interleaved
    return None


def _ours(theirs: Callable[..., Any], interleaved: bool) -> Callable[..., Any]:
    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        tensors = (q, k, cos, sin)
        fits = (
            not args and not kwargs and q.dim() == k.dim() == 4 and cos.dim() == sin.dim() == 3
            and cos.shape[-1] == q.shape[-1] and cos.shape[-2] == q.shape[-2] and q.dtype in _DTYPES
            and all(t.dtype == q.dtype and t.device == q.device and not is_dtensor(t) for t in tensors)
        )  # fmt: skip
        if not fits or is_transformed(*tensors):
            return theirs(*tensors, *args, **kwargs)
        return rotary(q, k, cos, sin, interleaved=interleaved, heads_first=True)

    return turn


_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
