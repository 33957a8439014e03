"""What is what: every linear layer and all experts of a model, in FP8 or not, and why not; and how much of it is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from types import MappingProxyType

from torch import Tensor, nn

from ..format import BLOCK
from ..layers.attention import ScaledDotProductAttention, attentions
from ..layers.classes import is_conv1d, shape_of
from ..layers.experts import FrozenExperts, is_experts, stacks, why_not_experts
from ..layers.frozen import FrozenLinear, FrozenState, quantises_input
from ..layers.fused import fused_modules
from ..layers.linear import Layer, fp8_layers
from ..layers.traced import traced_training
from ..recipe import ConstantScaling
from ..scaling import scales
from ..state import ROLES
from ..table import html, plain
from .attention import why_idle
from .fuse import NOT_FUSED
from .select import NOT_FP8, why_not


@dataclass(frozen=True)
class LayerSummary:
    name: str
    shape: str  # "out x in", of experts that of each projection
    fp8: bool
    note: str  # the recipe, or why the layer is not in FP8
    scales: dict[str, float]  # by role; NaN without history; empty where not in FP8


@dataclass(frozen=True)
class AttentionSummary:
    name: str
    mode: str  # that was asked for
    last: str  # that the last call ran in; empty before the first
    note: str  # why it ran so, and the recipe
    scales: dict[str, float]  # by role; NaN without history


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
    """One row for each linear layer, where the experts of a layer count as one; prints as a table, and is one in a
    notebook. ``attentions`` has one for each attention; ``parameters`` counts the weights; ``fused`` counts the modules
    that ``torch_fp8.fuse`` changed, by class, and ``not_fused`` says of those that it left alone why, by name with
    numbers as ``*``."""

    attentions: Sequence[AttentionSummary] = ()
    parameters: Parameters = Parameters()
    fused: Mapping[str, int] = MappingProxyType({})
    not_fused: Mapping[str, str] = MappingProxyType({})

    def __str__(self) -> str:
        lines = [plain(_HEAD, self._cells()), self._count(), *self._others(), *self._fusions()]
        if self.attentions:
            lines.append("\n" + plain(_ATTENTION_HEAD, self._attention_cells()))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        lines = [self._count(), *self._others(), *self._fusions()]
        table = html(_ATTENTION_HEAD, self._attention_cells()) if self.attentions else ""
        return html(_HEAD, self._cells()) + "".join(f"<p>{escape(line)}</p>" for line in lines) + table

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                row.name or "(root)",
                row.shape,
                "yes" if row.fp8 else "no",
                *map(_scale, row.scales.values()),
                *("",) * (3 - len(row.scales)),
                row.note,
            )
            for row in self
        ]

    def _attention_cells(self) -> list[tuple[str, ...]]:
        return [
            (
                row.name or "(root)",
                row.mode,
                row.last or "not called",
                ", ".join(f"{role} {_scale(scale)}" for role, scale in row.scales.items()),
                row.note,
            )
            for row in self.attentions
        ]

    def _count(self) -> str:
        share = f"{100 * self.parameters.share:.3g} % of the parameters"
        return f"{sum(row.fp8 for row in self)} of {len(self)} linear layers in FP8, {share}"

    def _others(self) -> list[str]:
        others = self.parameters.others
        most = [f"{name or '(root)'} {numel:,}" for name, numel in others.most_common(_NAMED)]
        rest = others.total() - sum(numel for _, numel in others.most_common(_NAMED))
        return [f"not in FP8: {', '.join(most)}" + (f", all others {rest:,}" if rest else "")] if most else []

    def _fusions(self) -> list[str]:
        fused = ", ".join(f"{count} {name}" for name, count in self.fused.items())
        return ([f"fused: {fused}"] if fused else []) + [f"not fused: {n}: {why}" for n, why in self.not_fused.items()]


_NAMED = 8  # of the modules that are not in FP8


_HEAD = ("layer", "out x in", "FP8", "scale: input", "weight", "grad_output", "recipe, or why not")
_ATTENTION_HEAD = ("attention", "mode", "ran last in", "scales", "why, and the recipe")


def _scale(scale: float) -> str:
    return f"{scale:.4g}" if scale == scale else "own amax"


def summary(model: nn.Module) -> Summary:
    """Every linear layer of ``model``, and the experts of every layer that has some: in FP8 or not, why not, its recipe
    and its current scales; of every attention what it ran in last, and why; what share of the parameters is in FP8, and
    where the others are. ``print`` it.

    After training steps the note of a layer says so if it was never called in training: the model computes without it
    then, and what multiplies by its weight itself does so in 16 bits; or the training was in eval()."""
    rows = Summary()
    rows.attentions = [
        _of_attention(name, module, model.get_submodule(name.rpartition(".")[0]))
        for name, module in attentions(model).items()
    ]
    rows.parameters = _parameters(model)
    rows.fused = Counter(fused.plain_class.__name__ for fused in fused_modules(model).values())
    rows.not_fused = {
        _starred(name): getattr(module, NOT_FUSED)
        for name, module in model.named_modules() if hasattr(module, NOT_FUSED)
    }  # fmt: skip
    steps = max((_steps(layer) for layer in fp8_layers(model).values()), default=0)
    for name, module in model.named_modules():
        if isinstance(module, FrozenExperts) or is_experts(module):
            rows.append(_of_experts(name, module))
        if not (isinstance(module, nn.Linear | FrozenLinear) or is_conv1d(module)):
            continue
        shape = "{} x {}".format(*shape_of(module))
        if isinstance(module, FrozenLinear):
            note = f"frozen: activations {_inputs(module, module.in_features)}, weight by {module.granularity}"
            rows.append(LayerSummary(name, shape, True, note, {}))
        elif isinstance(module, Layer):
            note = str(module.recipe) + ("" if module.fp8_enabled else ", disabled")
            if steps and not _was_called(module):
                note += f"; never called in {steps} training steps: does other code read its weight?"
                note += "" if module.training else " Or was it in eval(), as it is now?"
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


def _of_attention(name: str, attention: ScaledDotProductAttention, parent: nn.Module) -> AttentionSummary:
    last, why = attention.last or ("", "")
    if idle := why_idle(parent):
        last, why = "16bit", idle
    disabled = "" if attention.fp8_enabled else ", disabled"
    note = "; ".join(part for part in (why, f"{attention.recipe}{disabled}") if part)
    return AttentionSummary(name, attention.mode, last, note, scales(attention))


def _of_experts(name: str, module: nn.Module) -> LayerSummary:
    if isinstance(module, FrozenExperts):
        shapes = [getattr(module, projection).shape for projection in module.projections()]
        inputs = {name: _inputs(module, shape[-1]) for name, shape in zip(module.projections(), shapes, strict=True)}
        alike = len(set(inputs.values())) == 1
        how = inputs["down_proj"] if alike else ", ".join(f"of {name} {words}" for name, words in inputs.items())
        note = f"frozen: activations {how}, weight by {module.granularity}"
    else:
        shapes = [stack.shape for stack in stacks(module).values()]
        note = why_not_experts(module) or getattr(module, NOT_FP8, "") or _TRAINED
    shape = ", ".join(" x ".join(map(str, size)) for size in shapes)
    return LayerSummary(name, shape, isinstance(module, FrozenExperts), note, {})


def _inputs(module: FrozenLinear | FrozenExperts, in_features: int) -> str:
    """How inputs are computed with, and why not as was asked for."""
    asked, weight = module.activations, module.granularity
    if quantises_input(asked, weight, in_features):
        return f"by {asked}"
    if asked == "none":
        return "in 16 bits"
    fits = quantises_input(asked, weight, BLOCK)
    why = f"in_features is no multiple of {BLOCK}" if fits else f"a weight by {weight} computes so"
    return f"in 16 bits (not by {asked}: {why})"


_TRAINED = "experts train in 16 bits; torch_fp8.freeze takes them"


def _starred(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", name)


def _parameters(model: nn.Module) -> Parameters:
    fp8, others, seen = 0, Counter[str](), set[int]()
    for name, module in model.named_modules():
        owned: dict[str, Tensor | None] = {**module._parameters}
        in_fp8 = {"weight"} if isinstance(module, Layer) else set()
        if isinstance(module, FrozenState):
            owned = {key: tensor for key, tensor in module._buffers.items() if not key.endswith(("_scale", "_slot"))}
            in_fp8 = set(module.fp8_state())
        for key, tensor in owned.items():
            if tensor is None or id(tensor) in seen or nn.parameter.is_lazy(tensor):
                continue
            seen.add(id(tensor))
            if key in in_fp8:
                fp8 += tensor.numel()
            else:
                others[_starred(name)] += tensor.numel()
    return Parameters(fp8, others)
