"""What is what: every linear layer of a model, in FP8 or not, and why not."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..layers.frozen import FrozenLinear
from ..layers.linear import Linear
from ..scaling import scales
from ..table import plain
from .select import why_not


@dataclass(frozen=True)
class LayerSummary:
    name: str
    shape: str  # "out x in"
    fp8: bool
    note: str  # the recipe, or why the layer is not in FP8
    scales: dict[str, float]  # by role; NaN without history; empty where not in FP8


class Summary(list[LayerSummary]):
    """One row for each linear layer; prints as a table."""

    def __str__(self) -> str:
        header = ("layer", "out x in", "FP8", "scale: input", "weight", "grad_output", "recipe, or why not")
        rows = [
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
        count = sum(row.fp8 for row in self)
        return f"{plain(header, rows)}\n{count} of {len(self)} linear layers in FP8"


def summary(model: nn.Module) -> Summary:
    """Every linear layer of ``model``: in FP8 or not, why not, its recipe and its current scales. ``print`` it."""
    rows = Summary()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, module in layers.items():
        shape = f"{module.out_features} x {module.in_features}"
        if isinstance(module, FrozenLinear):
            note = f"frozen: activations by {module.activations}, weight by {module.granularity}"
            rows.append(LayerSummary(name, shape, True, note, {}))
        elif isinstance(module, Linear):
            note = str(module.recipe) + ("" if module.fp8_enabled else ", disabled")
            rows.append(LayerSummary(name, shape, True, note, scales(module)))
        else:
            note = why_not(module) or getattr(module, "_not_fp8", "not converted")
            rows.append(LayerSummary(name, shape, False, note, {}))
    return rows
