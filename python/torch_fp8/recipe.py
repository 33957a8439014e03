"""Recipes: how the scales of a layer are chosen. One frozen object, passed by hand.

All of them quantise as ``q = saturate(round_to_nearest_even(x * scale))`` with one scale for the whole tensor. They
differ in where the scale comes from. Formats, in the field's words: ``"HYBRID"`` is E4M3 for inputs and weights and
E5M2 for output gradients, ``"E4M3"`` is E4M3 for all three.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from . import _C
from .checks import check, check_bools, is_int

_GEMMS = ("fprop", "dgrad", "wgrad")
_MAX_MARGIN = 31


@dataclass(frozen=True, kw_only=True, repr=False)
class Recipe(ABC):
    """What all recipes share; use one of the three below.

    fp8_format: ``"HYBRID"`` or ``"E4M3"``.
    fast_accum: which of the three GEMMs (``"fprop"``, ``"dgrad"``, ``"wgrad"``) sum in the tensor core alone, about
        14 bits on Hopper, instead of promoting partial sums to float32. Faster, less exact; no effect on the CPU.
    fp8_gemms: which of the three GEMMs run in FP8; the others run in 16 bits, on what was not quantised. A ``"wgrad"``
        in 16 bits keeps the input in 16 bits until backward.
    """

    fp8_format: str = "HYBRID"
    fast_accum: tuple[str, ...] = ("fprop",)
    fp8_gemms: tuple[str, ...] = _GEMMS

    def __post_init__(self) -> None:
        check(self.fp8_format in ("HYBRID", "E4M3"), "fp8_format", "'HYBRID' or 'E4M3'", self.fp8_format)
        for name in ("fast_accum", "fp8_gemms"):
            value = getattr(self, name)
            is_list = isinstance(value, Iterable) and not isinstance(value, str)
            check(is_list and set(value) <= set(_GEMMS), name, f"names out of {_GEMMS}", value)
            object.__setattr__(self, name, tuple(gemm for gemm in _GEMMS if gemm in value))
        check(len(self.fp8_gemms) > 0, "fp8_gemms", "at least one GEMM (use nn.Linear for 16 bits)", self.fp8_gemms)

    def __repr__(self) -> str:
        """Only what differs from the defaults, so that a model's layers print in a line each."""
        changed = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"

    @property
    def margins(self) -> tuple[int, int]:
        """Binades left free above an amax: of inputs and weights, and of output gradients."""
        return 0, getattr(self, "grad_margin", 0)

    @property
    def biases(self) -> tuple[int, int, int]:
        """The logarithms of constant scales: of inputs, weights and output gradients."""
        return 0, 0, 0

    def _options(self, scaling: Any, *, power_of_two: bool) -> _C.LinearOptions:
        margin, grad_margin = self.margins
        return _C.LinearOptions(
            scaling=scaling,
            e4m3_gradients=self.fp8_format == "E4M3",
            power_of_two=power_of_two,
            margin=margin,
            grad_margin=grad_margin,
            fast_accum=[gemm in self.fast_accum for gemm in _GEMMS],
            fp8=[gemm in self.fp8_gemms for gemm in _GEMMS],
        )

    @property
    @abstractmethod
    def history_length(self) -> int:
        """How many amaxes the history holds."""

    @abstractmethod
    def options(self) -> _C.LinearOptions:
        """The recipe as the C++ side has it; ``options().cast(role)`` is how a role is cast."""


@dataclass(frozen=True, kw_only=True, repr=False)
class DelayedScaling(Recipe):
    """The scale follows from the amaxes of earlier steps: ``scale = fp8_max / (amax * 2**margin)``.

    amax_history_len: over how many updates (optimizer steps) the maximum is taken.
    amax_compute_algo: ``"max"`` of the history, or the ``"most_recent"`` amax (a history of length 1).
    margin: binades left free above the amax, 0 to 31.
    power_of_two: round each scale down to a power of two within 2**-31 ... 2**31, before the margin and after it.

    A tensor without history (the first step, a new layer, a loaded checkpoint) is scaled by its own amax. An amax of 0,
    Inf or NaN leaves scale and history as they were.
    """

    amax_history_len: int = 1024
    amax_compute_algo: str = "max"
    margin: int = 0
    power_of_two: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            is_int(self.amax_history_len, 1, 2**20),
            "amax_history_len",
            "an integer from 1 to 2**20",
            self.amax_history_len,
        )
        check(
            self.amax_compute_algo in ("max", "most_recent"),
            "amax_compute_algo",
            "'max' or 'most_recent'",
            self.amax_compute_algo,
        )
        check(is_int(self.margin, 0, _MAX_MARGIN), "margin", f"an integer from 0 to {_MAX_MARGIN}", self.margin)
        check_bools(power_of_two=self.power_of_two)

    @property
    def history_length(self) -> int:
        return self.amax_history_len if self.amax_compute_algo == "max" else 1

    @property
    def margins(self) -> tuple[int, int]:
        return self.margin, self.margin

    def options(self) -> _C.LinearOptions:
        return self._options(_C.Scaling.delayed, power_of_two=self.power_of_two)


@dataclass(frozen=True, kw_only=True, repr=False)
class CurrentScaling(Recipe):
    """Each tensor is scaled by its own amax, at the price of reading it twice. FP8-AMAX of arXiv 2309.17224.

    The amax is of all tokens and samples of a call, so each output depends a little on all of them, later tokens too.
    Delayed and constant scales do not do that.

    power_of_two: round each scale down to a power of two within 2**-31 ... 2**31, before the margin and after it, as
        the paper does.
    grad_margin: binades left free above the amax of output gradients, 0 to 31. The paper uses 3, because its GEMMs
        sum in FP16; with float32 sums 0 loses nothing.
    """

    power_of_two: bool = False
    grad_margin: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bools(power_of_two=self.power_of_two)
        check(
            is_int(self.grad_margin, 0, _MAX_MARGIN),
            "grad_margin",
            f"an integer from 0 to {_MAX_MARGIN}",
            self.grad_margin,
        )

    @property
    def history_length(self) -> int:
        return 1

    def options(self) -> _C.LinearOptions:
        return self._options(_C.Scaling.current, power_of_two=self.power_of_two)


@dataclass(frozen=True, kw_only=True, repr=False)
class ConstantScaling(Recipe):
    """One constant power of two for every tensor: ``scale = 2**bias``. FP8-CSCALE of arXiv 2309.17224.

    bias: from -31 to 31. The paper's E4M3 has exponent bias 8 where this hardware's has 7: its value c for inputs and
        weights is c + 1 here.
    grad_margin: output gradients are scaled by ``2**(bias - grad_margin)``; 3 in the paper.
    weight_bias, grad_bias: constants of their own for weights and output gradients, from -31 to 31; None: bias. The
        margin is taken off grad_bias too.

    In attention q, k, v, softmax's numerators and the result are inputs.
    """

    bias: int = 0
    grad_margin: int = 0
    weight_bias: int | None = None
    grad_bias: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check(is_int(self.bias, -31, 31), "bias", "an integer from -31 to 31", self.bias)
        for name in ("weight_bias", "grad_bias"):
            value = getattr(self, name)
            check(value is None or is_int(value, -31, 31), name, "an integer from -31 to 31, or None", value)
        check(
            is_int(self.grad_margin, 0, _MAX_MARGIN),
            "grad_margin",
            f"an integer from 0 to {_MAX_MARGIN}",
            self.grad_margin,
        )

    @property
    def history_length(self) -> int:
        return 1

    @property
    def biases(self) -> tuple[int, int, int]:
        weight = self.bias if self.weight_bias is None else self.weight_bias
        gradient = self.bias if self.grad_bias is None else self.grad_bias
        return self.bias, weight, gradient - self.grad_margin

    def options(self) -> _C.LinearOptions:
        return self._options(_C.Scaling.constant, power_of_two=True)


def recipe_of(recipe: Recipe | None) -> Recipe:
    """What was given, or the default; TypeError for what is no recipe."""
    if recipe is None:
        return DelayedScaling()
    if not isinstance(recipe, Recipe):
        raise TypeError(
            "torch_fp8: recipe must be a DelayedScaling, CurrentScaling or ConstantScaling, got "
            f"{type(recipe).__name__}"
        )
    return recipe
