"""What is what: every linear layer of a model, in FP8 or not, and why not."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..layers.classes import is_conv1d, shape_of
from ..layers.frozen import FrozenLinear
from ..layers.linear import Layer, fp8_layers
from ..layers.traced import traced_training
from ..recipe import ConstantScaling
from ..scaling import scales
from ..state import ROLES
from ..table import html, plain
from .select import NOT_FP8, why_not


@dataclass(frozen=True)
class LayerSummary:
    name: str
    shape: str  # "out x in"
    fp8: bool
    note: str  # the recipe, or why the layer is not in FP8
    scales: dict[str, float]  # by role; NaN without history; empty where not in FP8


class Summary(list[LayerSummary]):
    """One row for each linear layer; prints as a table, and is one in a notebook."""

    def __str__(self) -> str:
        return f"{plain(_HEAD, self._cells())}\n{self._count()}"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return f"{html(_HEAD, self._cells())}<p>{self._count()}</p>"

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                row.name or "(root)",
                row.shape,
                "yes" if row.fp8 else "no",
                *(f"{scale:.4g}" if scale == scale else "own amax" for scale in row.scales.values()),
                *("",) * (3 - len(row.scales)),
                row.note,
            )
            for row in self
        ]

    def _count(self) -> str:
        return f"{sum(row.fp8 for row in self)} of {len(self)} linear layers in FP8"


_HEAD = ("layer", "out x in", "FP8", "scale: input", "weight", "grad_output", "recipe, or why not")


def summary(model: nn.Module) -> Summary:
    """Every linear layer of ``model``: in FP8 or not, why not, its recipe and its current scales. ``print`` it.

    After training steps the note of a layer says so if it was never called: the model computes without it then, and
    what multiplies by its weight itself does so in 16 bits."""
    rows = Summary()
    steps = max((_steps(layer) for layer in fp8_layers(model).values()), default=0)
    for name, module in model.named_modules():
        if not (isinstance(module, nn.Linear | FrozenLinear) or is_conv1d(module)):
            continue
        shape = "{} x {}".format(*shape_of(module))
        if isinstance(module, FrozenLinear):
            note = f"frozen: activations by {module.activations}, weight by {module.granularity}"
            rows.append(LayerSummary(name, shape, True, note, {}))
        elif isinstance(module, Layer):
            note = str(module.recipe) + ("" if module.fp8_enabled else ", disabled")
            if steps and not _was_called(module):
                note += f"; never called in {steps} training steps: does other code read its weight?"
            rows.append(LayerSummary(name, shape, True, note, scales(module)))
        else:
            note = getattr(module, NOT_FP8, "") or why_not(module) or "not converted"
            rows.append(LayerSummary(name, shape, False, note, {}))
    return rows


def _steps(layer: Layer) -> int:
    """How many optimizer's steps it has lived through."""
    return layer.fp8_state.memo.updates + layer.fp8_state.unused_steps


def _was_called(layer: Layer) -> bool:
    """In training, as far as can be known: after compiled steps by what its input left in the history."""
    state = layer.fp8_state
    if not traced_training() or isinstance(state.recipe, ConstantScaling):
        return state.memo.updates > 0 or state.memo.used_roles > 0
    return state.slots.is_meta or bool((state.slots[ROLES.index("input"), 2:] != 0).any())
