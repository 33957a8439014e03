"""The names that tensors have in files, and in models.

transformers renames, merges and splits what files of a model hold; its rules are asked here, none is repeated. What
they do to a weight's rows is done to its scales too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    PrefixChange,
    Split,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from ..format import BLOCK
from ..layers.frozen import FrozenLinear, new_slot
from . import experts
from .errors import CheckpointError
from .scheme import INPUT_SCALES, WEIGHT_SCALES
from .shard import Entry
from .stored import check_scale

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Of a frozen layer in a model, beside its weight; and as they are written.
SCALE, SLOT = "weight_scale", "input_slot"
_OF_WEIGHTS, _OF_INPUTS = (SCALE, "weight_scale_inv"), (SLOT, "input_scale")


class Names:
    """What becomes of the tensors of a file in a model, by their names.

    entries: the tensors of the file; state: those of the model; conversions: the rules; targets: where each of the
    file's goes, one name, or several that it is split into; sources: what each target is made of; patterns: by which
    a converter takes a tensor of the file, where one does. A target need not be in the model.
    """

    def __init__(self, model: PreTrainedModel, entries: Mapping[str, Entry]) -> None:
        given = get_model_conversion_mapping(model)
        self.conversions = given + experts.converters(model, given, scales=False)
        renamings = [entry for entry in self.conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self.conversions if isinstance(entry, WeightConverter)]
        self.entries = entries
        self.state: dict[str, Tensor] = model.state_dict()
        self.targets: dict[str, list[str]] = {}
        self.sources: dict[str, list[Entry]] = {}
        self.patterns: dict[str, str] = {}
        for name, entry in entries.items():
            renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, self.state)
            if renamed not in self.state and name in self.state:
                renamed, pattern = name, None
            targets = [renamed]
            if pattern is not None:
                patterns = next(c for c in converters if pattern in c.source_patterns).target_patterns
                targets = [renamed.replace(patterns[0], other) for other in patterns]
            elif renamed in self.sources and renamed in self.state:
                raise CheckpointError(entry.path, f"{name} and {self.sources[renamed][0].name} are both {renamed}")
            self.targets[name] = targets
            if pattern is not None:
                self.patterns[name] = pattern
            for target in targets:
                self.sources.setdefault(target, []).append(entry)


def with_scales(conversions: Iterable[Any], shaped: bool = False) -> list[Any]:
    """transformers' rules of a model, and what follows of them for the scales of its frozen layers. shaped: the scales
    become what those layers hold."""
    result: list[Any] = []
    for conversion in conversions:
        sources, targets = conversion._original_source_patterns, conversion._original_target_patterns
        rows = isinstance(conversion, WeightConverter) and not any(
            type(op).__name__ in ("MergeModulelist", "SplitModulelist") for op in conversion.operations
        )
        if rows:
            operations = [op.op if isinstance(op, Rows) else op for op in conversion.operations]
            conversion = conversion.copy(sources, targets, operations=[Rows(op, shaped) for op in operations])
        result.append(conversion)
        # A pattern that ends with "weight" meets no "weight_scale"; others do.
        if (rows or type(conversion) is WeightRenaming) and all(name.endswith("weight") for name in sources + targets):
            for suffix in (*_OF_WEIGHTS, *_OF_INPUTS):
                more = {"operations": conversion.operations} if rows else {}
                result.append(
                    conversion.copy(*([n[:-6] + suffix for n in names] for names in (sources, targets)), **more)
                )
    return result


def reading() -> list[Any]:
    """Rules for what dialects call the scales, and how they shape them."""
    renamings = [WeightRenaming(rf"\.{name}", f".{SCALE}") for name in WEIGHT_SCALES if name != SCALE]
    renamings += [WeightRenaming(rf"\.{name}", f".{SLOT}") for name in INPUT_SCALES if name != SLOT]
    return renamings


def shaping() -> list[Any]:
    return [WeightConverter(rf"\.{name}", f".{name}", [Shaped()]) for name in (SCALE, SLOT)]


def writing(model: PreTrainedModel) -> list[Any]:
    """The rules that transformers reverses to write a model, scales included."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # not loaded: as transformers has it then
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [conversion for conversion in conversions if not isinstance(conversion, PrefixChange)]
    conversions = [c for c in conversions if not _is_reading(c) and not experts.is_ours(c)]
    return with_scales(conversions)


def _is_reading(conversion: Any) -> bool:
    """One of those above: files are written as ``state_to_write`` has it, in whatever dialect they were read."""
    return all(target.endswith((*_OF_WEIGHTS, *_OF_INPUTS)) for target in conversion._original_target_patterns)


def written_names(
    model: PreTrainedModel, state: dict[str, Tensor], format: str, empty: bool = False
) -> dict[str, Tensor]:
    """A state under the names that files of the model have, without what is tied. empty: scales alone have values."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict  # which imports us, see register.py

    ignored = model._keys_to_ignore_on_save or ()
    state = {name: tensor for name, tensor in state.items() if name not in ignored}
    state = remove_tied_weights_from_state_dict(state, model)
    if empty:
        scales = (*_OF_WEIGHTS, *_OF_INPUTS)
        state = {name: tensor if name.endswith(scales) else tensor.to("meta") for name, tensor in state.items()}
    model._weight_conversions = writing(model)
    return revert_weight_conversion(model, taken_apart(model, state, format))


def taken_apart(model: PreTrainedModel, state: dict[str, Tensor], format: str) -> dict[str, Tensor]:
    """A state whose FP8 experts are matrices, by names that ``revert_weight_conversion`` makes those of files of."""
    return experts.taken_apart(model, get_model_conversion_mapping(model, add_legacy=False), state, format)


def file_names(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Names of tensors of the model, of which none is converted, as files have them."""
    places = {name: torch.empty(0, dtype=torch.float32, device="meta") for name in names}
    kept = getattr(model, "_weight_conversions", None)
    model._weight_conversions = writing(model)
    try:
        written = {id(tensor): name for name, tensor in revert_weight_conversion(model, places).items()}
    finally:
        model._weight_conversions = kept
    return [written[id(place)] for place in places.values()]


class Rows(ConversionOps):
    """An operation on the weights of one layer or several, which does to their scales what it does to their rows."""

    def __init__(self, op: ConversionOps, shaped: bool = False) -> None:
        self.op, self.shaped = op, shaped

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **more: Any
    ) -> dict[str, Any]:
        model, name = more["model"], more["full_layer_name"]
        names = {target: name.replace(target_patterns[0], target) for target in target_patterns}
        is_scale = name.endswith((*_OF_WEIGHTS, *_OF_INPUTS))
        if is_scale:
            input_dict = {key: _rows(value) for key, value in input_dict.items()}
            self._check(model, list(names.values()))
        if is_scale and (whole := _one_for_all(name, list(input_dict.values()))):
            parts = dict.fromkeys(target_patterns, whole[0])
        elif isinstance(self.op, Split):  # looks for parameters alone, and a frozen weight is none
            (value,) = input_dict.values()
            tensor = value[0] if isinstance(value, list) else value
            sizes = [model.get_parameter_or_buffer(name).shape[self.op.dim] for name in names.values()]
            split = torch.split(tensor, sizes, dim=self.op.dim)
            parts = {target: part.contiguous() for target, part in zip(target_patterns, split)}
        else:
            patterns = {"source_patterns": source_patterns, "target_patterns": target_patterns}
            parts = self.op.convert(input_dict, **patterns, **more)
        if is_scale and self.shaped:
            return {target: as_held(model, names[target], part) for target, part in parts.items()}
        return parts

    def _check(self, model: PreTrainedModel, names: list[str]) -> None:
        if not isinstance(self.op, Chunk | Split | Concatenate) or self.op.dim != 0:
            raise ValueError(f"the rows of an FP8 weight are not known behind {type(self.op).__name__}")
        for name in names:
            layer = dict(model.named_modules()).get(name.rpartition(".")[0])
            if isinstance(layer, FrozenLinear) and layer.granularity == "block" and layer.out_features % BLOCK:
                raise ValueError(f"{layer.out_features} rows end within a block")

    @property
    def reverse_op(self) -> ConversionOps:
        return Rows(self.op.reverse_op)


def _rows(value: Any) -> Tensor:
    tensor = value[0] if isinstance(value, list) else value
    return tensor[:, None] if tensor.dim() == 1 and tensor.numel() > 1 else tensor


def _one_for_all(name: str, tensors: list[Tensor]) -> list[Tensor]:
    """The scale, where it is one number, of a whole tensor or an input; empty where rows have scales."""
    first = tensors[0]
    if not name.endswith(_OF_INPUTS) and any(tensor.numel() > 1 for tensor in tensors):
        return []
    if not all(tensor.is_meta or torch.equal(tensor.flatten(), first.flatten()) for tensor in tensors):
        raise ValueError("the parts of one FP8 layer have different scales, which one layer cannot hold")
    return [first]


def as_held(model: PreTrainedModel, name: str, scale: Tensor) -> Tensor:
    """A scale as a frozen layer holds it. Raises ValueError for what is none."""
    place = model.get_buffer(name)
    if scale.is_meta:
        return torch.empty_like(place)
    if name.endswith(SCALE):
        check_scale(scale)
        return scale.view(place.shape)
    scale = scale.flatten()[0]  # of a slot too, {scale_inv, scale, 0, 0}
    check_scale(scale, 2.0**-126, 2.0**126)
    return new_slot(scale.item(), scale.device)


class Shaped(ConversionOps):
    """``as_held``."""

    def convert(self, input_dict: dict[str, Any], target_patterns: list[str], **more: Any) -> dict[str, Any]:
        (value,) = input_dict.values()
        tensor = value[0] if isinstance(value, list) else value
        return {target_patterns[0]: as_held(more["model"], more["full_layer_name"], tensor)}

    @property
    def reverse_op(self) -> ConversionOps:
        return self
