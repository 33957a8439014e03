"""What is what: every linear layer and all experts of a model, in FP8 or not, and why not; and how much of it is."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from ..layers.experts import FrozenExperts, is_experts, stacks, why_not_experts
from ..layers.frozen import FrozenLinear, FrozenState
from ..layers.linear import Linear
from ..scaling import scales
from ..table import plain
from .select import why_not


@dataclass(frozen=True)
class LayerSummary:
    name: str
    shape: str  # "out x in", of experts that of each projection
    fp8: bool
    note: str  # the recipe, or why the layer is not in FP8
    scales: dict[str, float]  # by role; NaN without history; empty where not in FP8


@dataclass(frozen=True)
class Parameters:
    """How many elements the weights of a model have."""

    fp8: int = 0  # that GEMMs read in FP8, also where training keeps them in 16 bits besides
    others: Counter[str] = field(default_factory=Counter)  # of the others, by module; numbers in names are *

    @property
    def share(self) -> float:
        """What of all is in FP8."""
        return self.fp8 / max(1, self.fp8 + self.others.total())


class Summary(list[LayerSummary]):
    """One row for each linear layer, where the experts of a layer count as one; prints as a table. ``parameters``
    counts the weights."""

    parameters: Parameters = Parameters()

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
        count, others = sum(row.fp8 for row in self), self.parameters.others
        share = f"{100 * self.parameters.share:.3g} % of the parameters"
        lines = [plain(header, rows), f"{count} of {len(self)} linear layers in FP8, {share}"]
        if others:
            most = [f"{name or '(root)'} {numel:,}" for name, numel in others.most_common(_NAMED)]
            rest = others.total() - sum(numel for _, numel in others.most_common(_NAMED))
            lines.append(f"not in FP8: {', '.join(most)}" + (f", all others {rest:,}" if rest else ""))
        return "\n".join(lines)


_NAMED = 8  # of the modules that are not in FP8


def summary(model: nn.Module) -> Summary:
    """Every linear layer of ``model``, and the experts of every layer that has some: in FP8 or not, why not, its recipe
    and its current scales; what share of the parameters is in FP8, and where the others are. ``print`` it."""
    rows = Summary()
    rows.parameters = _parameters(model)
    kinds = nn.Linear | FrozenLinear | FrozenExperts
    layers = {name: m for name, m in model.named_modules() if isinstance(m, kinds) or is_experts(m)}
    for name, module in layers.items():
        if not isinstance(module, nn.Linear | FrozenLinear):
            rows.append(_of_experts(name, module))
            continue
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


def _of_experts(name: str, module: nn.Module) -> LayerSummary:
    if isinstance(module, FrozenExperts):
        shapes = [getattr(module, projection).shape for projection in module.projections()]
        note = f"frozen: activations by {module.activations}, weight by {module.granularity}"
    else:
        shapes = [stack.shape for stack in stacks(module).values()]
        note = why_not_experts(module) or "experts train in 16 bits; torch_fp8.freeze takes them"
    shape = ", ".join(" x ".join(map(str, size)) for size in shapes)
    return LayerSummary(name, shape, isinstance(module, FrozenExperts), note, {})


def _parameters(model: nn.Module) -> Parameters:
    fp8, others, seen = 0, Counter[str](), set[int]()
    for name, module in model.named_modules():
        owned, in_fp8 = dict(module._parameters), {"weight"} if isinstance(module, Linear) else set()
        if isinstance(module, FrozenState):
            owned = {key: tensor for key, tensor in module._buffers.items() if not key.endswith(("_scale", "_slot"))}
            in_fp8 = module.fp8_state().keys()
        for key, tensor in owned.items():
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if key in in_fp8:
                fp8 += tensor.numel()
            else:
                others[re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", name)] += tensor.numel()
    return Parameters(fp8, others)
