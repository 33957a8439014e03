"""FP8 experts in files: a matrix each, under the names that vLLM, compressed-tensors and transformers use
(``...experts.3.w1.weight``, ``.weight_scale``); in models they are stacks.

What transformers calls the matrices of a model's experts is taken from its conversions. Models whose 16-bit files hold
stacks too (gpt-oss, Llama 4, Granite) have none for matrices; their FP8 experts are ``N.gate_proj``, ``N.up_proj`` and
``N.down_proj``, as llm-compressor writes them.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter

from ..format import E4M3
from ..layers.experts import (
    SUFFIXES,
    FrozenExperts,
    Layout,
    Stack,
    become_frozen_experts,
    experts_in,
    find_layout,
    frozen_experts,
    layout_of,
    matrices,
    stack_scale_shape,
    stacks,
    why_not_experts,
)
from ..layers.frozen import new_slot
from ..observe.emulate import dequantize
from .errors import CheckpointError
from .scheme import Scheme, scale_name
from .shard import Entry
from .stored import check_scale, stored_layer
from .stored import freeze_as_stored as freeze_linears_as_stored

if TYPE_CHECKING:
    from .names import Names

_STANDARD = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}


@dataclass(frozen=True)
class Matrices:
    """What the matrices of a stack are called: ``{before}.{expert}.{key}.weight`` for each part, where the model has
    ``{stack}``. Both are the ends of names."""

    before: str
    keys: tuple[str, ...]
    stack: str

    def of(self, name: str, expert: int, part: int) -> str:
        """The stem of a matrix of the stack with that name."""
        return f"{name.removesuffix(self.stack)}{self.before}.{expert}.{self.keys[part]}"


def _from_transformers(conversions: Iterable[Any]) -> Iterator[Matrices]:
    for conversion in conversions:
        kinds = [type(op) for op in getattr(conversion, "operations", ())]
        if kinds not in ([MergeModulelist], [MergeModulelist, Concatenate]) or len(conversion.target_patterns) != 1:
            continue
        sources = [_plain(source) for source in conversion._original_source_patterns]
        halves = [source.removesuffix(".weight").split(".*.") for source in sources]
        if all(len(half) == 2 and half[0] == halves[0][0] for half in halves):
            keys = tuple(key for _, key in halves)
            yield Matrices(halves[0][0], keys, _plain(conversion.target_patterns[0]))


def _plain(pattern: str) -> str:
    return pattern.replace("\\.", ".")


def known_matrices(model: nn.Module, conversions: Iterable[Any]) -> dict[str, Matrices]:
    """For each stack of a model's experts, frozen or not, by its name in the model."""
    given = list(_from_transformers(conversions))
    result: dict[str, Matrices] = {}
    for name, module in {**experts_in(model), **frozen_experts(model)}.items():
        layout = module.layout if isinstance(module, FrozenExperts) else find_layout(module)
        if layout is None:
            continue
        for projection in (layout.up, "down_proj"):
            stack, end = f"{name}.{projection}", name.rpartition(".")[2]
            standard = Matrices(f".{end}", _STANDARD[projection], f".{end}.{projection}")
            fits = (m for m in given if stack.endswith(m.stack) and len(m.keys) == layout.parts(projection))
            result[stack] = next(fits, standard)
    return result


# ---- reading --------------------------------------------------------------------------------------------------------


def converters(model: nn.Module, conversions: Iterable[Any], scales: bool = True) -> list[Any]:
    """Rules that make stacks of matrices: of scales, and of the weights where transformers has no rule of its own.
    They come before the rules for scales of linear layers, which would take those of experts too."""
    conversions = list(conversions)
    given = set(_from_transformers(conversions))
    result: list[Any] = []
    for known in dict.fromkeys(known_matrices(model, conversions).values()):
        kinds = [] if known in given else [("weight", ""), ("bias", "_bias")]
        kinds += [("weight_scale", "_scale"), ("input_slot", "_slot")] if scales else []
        for suffix, place in kinds:
            before = known.before if known in given else re.escape(known.before)
            sources = [rf"{before}\.\d+\.{key}\.{suffix}" for key in known.keys]
            result.append(WeightConverter(sources, known.stack + place, [Stacked()]))
    return result


class Stacked(ConversionOps):
    """Matrices, biases, scales or input scales of experts, expert by expert, as their stack."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **more: Any
    ) -> dict[str, Any]:
        name, model = more["full_layer_name"], more["model"]
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        if not isinstance(module, FrozenExperts):
            raise ValueError("is a matrix of one expert, but not in FP8: 16-bit experts of this model are stacks")
        place = getattr(module, key)
        columns = [self._column(key, place, input_dict[source], len(source_patterns)) for source in source_patterns]
        if key.endswith("_slot"):
            if not all(torch.equal(column, columns[0]) for column in columns if not column.is_meta):
                raise ValueError("gate and up of one expert have different input scales, which read one input")
            return {target_patterns[0]: columns[0]}
        return {target_patterns[0]: torch.cat(columns, 1)}

    def _column(self, key: str, place: Tensor, tensors: list[Tensor], parts: int) -> Tensor:
        """One part of all experts."""
        if len(tensors) != place.shape[0]:
            raise ValueError(f"has {len(tensors)} experts, expected {place.shape[0]}")
        if key.endswith("_slot"):
            return torch.cat([self._slot(tensor) for tensor in tensors])
        if key.endswith("_scale"):
            shape = (place.shape[1] // parts, *place.shape[2:])
            stack = torch.stack([tensor.float().reshape(shape) for tensor in tensors])
            if not stack.is_meta:
                check_scale(stack)
            return stack
        return torch.stack(tensors)

    def _slot(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return torch.empty(1, 4, dtype=torch.float32, device="meta")
        scale = tensor.flatten()[0]
        check_scale(scale, 2.0**-126, 2.0**126)
        return new_slot(scale.item(), tensor.device)

    @property
    def reverse_op(self) -> ConversionOps:
        return self


def is_ours(conversion: Any) -> bool:
    """Whether a rule is one of ``converters``, which only reading needs: ``to_write`` takes stacks apart itself."""
    return any(isinstance(op, Stacked) for op in getattr(conversion, "operations", ()))


def freeze_as_stored(
    model: nn.Module, names: Names, scheme: Scheme | None, path: Path, activations: str | None = None
) -> set[str]:
    """Make frozen experts and frozen layers, on the meta device, of those whose matrices are E4M3; return the names of
    their tensors in the files. path: of the config. Raises CheckpointError for what the headers show to be none: for
    experts, in FP8 or not, that are not all there or do not fit each other, too."""
    used: set[str] = set()
    known = known_matrices(model, names.conversions)
    for name, module in experts_in(model).items():
        if why_not_experts(module):
            continue
        layout = layout_of(module)
        sources: list[Entry] = []
        for projection in (layout.up, "down_proj"):
            stack = f"{name}.{projection}"
            entries = [entry for entry in names.sources.get(stack, []) if entry.name != stack]
            if len(names.sources.get(stack, [])) > 1 or any(entry.dtype == E4M3 for entry in entries):
                _check_numbers(names, known[stack], stack, getattr(module, projection).shape[0])
            sources += names.sources.get(stack, [])
        if not any(entry.dtype == E4M3 for entry in sources):
            continue
        if odd := [entry for entry in sources if entry.dtype != E4M3]:
            fp8 = next(entry for entry in sources if entry.dtype == E4M3)
            raise CheckpointError(
                odd[0].path, f"{odd[0].name} is {odd[0].dtype}, but {fp8.name} of the same experts is FP8"
            )
        used |= _freeze(module, layout, name, names, known, scheme, path, activations)
    return freeze_linears_as_stored(model, names, scheme, path, activations, used)


def _check_numbers(names: Names, known: Matrices, stack: str, experts: int) -> None:
    """Every expert once, and nothing else, in each part of a stack."""
    found: dict[str, list[str]] = {key: [] for key in known.keys}
    for entry in names.sources[stack]:
        number, key = entry.name.removesuffix(".weight").split(".")[-2:]
        if not number.isdecimal() or key not in found or str(int(number)) != number:
            raise CheckpointError(
                entry.path, f"{entry.name} is no matrix of an expert; expected {stack}'s as 0 to {experts - 1}, each "
                f"with {', '.join(known.keys)}"
            )  # fmt: skip
        found[key].append(number)
    path = names.sources[stack][0].path
    for key, numbers in found.items():
        if missing := sorted(set(map(str, range(experts))) - set(numbers), key=int):
            raise CheckpointError(
                path, f"has no {known.of(stack, int(missing[0]), known.keys.index(key))}.weight: expected {experts} "
                f"experts as the config says, found {len(numbers)}"
            )  # fmt: skip
        if len(numbers) > experts:
            most = max(numbers, key=int)
            name = next(e.name for e in names.sources[stack] if e.name.split(".")[-3] == most)
            raise CheckpointError(path, f"{name} is one too many: expected {experts} experts, found {len(numbers)}")


def _freeze(
    module: nn.Module, layout: Layout, name: str, names: Names, known: Mapping[str, Matrices], scheme: Scheme | None,
    path: Path, activations: str | None,
) -> set[str]:  # fmt: skip
    used: set[str] = set()
    kinds: dict[tuple[str, str], str] = {}
    shapes = {projection: matrices(module, layout, projection)[0].shape for projection in (layout.up, "down_proj")}
    for projection, (experts, n, k) in shapes.items():
        expected = [n // layout.parts(projection), k]
        for entry in names.sources[f"{name}.{projection}"]:
            if list(entry.shape) != expected:
                raise CheckpointError(entry.path, f"{entry.name} has shape {list(entry.shape)}, expected {expected}")
            kind, tensors = stored_layer(names.entries, scheme, entry, path, activations)
            kinds.setdefault(kind, entry.name)
            used |= tensors
            if len(kinds) > 1:
                (one, its_name), (other, _) = kinds.items()
                raise CheckpointError(
                    entry.path, f"{entry.name} has activations by {other[0]} and weights by {other[1]}, expected "
                    f"{one[0]} and {one[1]} as {its_name} of the same experts has"
                )  # fmt: skip
        if layout.has_bias:
            stack = f"{name}.{projection}"
            stems = [
                known[stack].of(stack, e, part) for e in range(experts) for part in range(layout.parts(projection))
            ]
            biases = names.sources.get(f"{stack}_bias", [])
            if len(biases) != len(stems):
                what = f"has {len(biases)} biases for {stack}, expected {len(stems)}, such as {stems[0]}.bias"
                raise CheckpointError(names.sources[stack][0].path, what)
    (how, granularity), _ = next(iter(kinds.items()))
    freeze_empty(module, how, granularity)
    return used


def freeze_empty(module: nn.Module, activations: str, granularity: str) -> None:
    """Frozen experts on the meta device, in the place of 16-bit ones."""
    layout = layout_of(module)
    new: list[Stack] = []
    for projection in (layout.up, "down_proj"):
        weight, bias = matrices(module, layout, projection)
        size = stack_scale_shape(granularity, weight.shape, layout.parts(projection))
        slot = torch.empty(weight.shape[0], 4, dtype=torch.float32, device="meta") if activations == "static" else None
        new.append(
            Stack(
                torch.empty(weight.shape, dtype=E4M3, device="meta"),
                torch.empty(size, dtype=torch.float32, device="meta"),
                None if bias is None else torch.empty_like(bias, device="meta"),
                slot,
            )
        )
    up, down = new
    become_frozen_experts(module, up, down, activations, granularity)


def thaw(module: FrozenExperts, dtype: torch.dtype | None) -> None:
    """Make frozen experts the 16-bit ones again, in place; of their weights there is what FP8 left."""
    layout = module.layout
    for projection in module.projections():
        codes, scale, bias, _ = module.stack(projection)
        parts = layout.parts(projection)
        values = torch.stack([
            torch.cat([dequantize(*part) for part in zip(matrix.chunk(parts), scales.chunk(parts), strict=True)])
            for matrix, scales in zip(codes, scale, strict=True)
        ])  # fmt: skip
        values = layout.joined(values, projection, dim=1)
        values = values.transpose(1, 2).contiguous() if layout.is_transposed else values
        for suffix in SUFFIXES:
            del module._buffers[projection + suffix]
        setattr(module, projection, nn.Parameter(values.to(dtype or values.dtype), requires_grad=False))
        if bias is not None:
            bias = layout.joined(bias, projection, dim=1)
            setattr(module, f"{projection}_bias", nn.Parameter(bias.to(dtype or bias.dtype), requires_grad=False))
    plain: Any = module
    plain.__class__ = module.made_of
    del plain.layout, plain.made_of, plain.activations, plain.granularity


# ---- writing --------------------------------------------------------------------------------------------------------


def taken_apart(
    model: nn.Module, conversions: Iterable[Any], state: dict[str, Tensor], format: str
) -> dict[str, Tensor]:
    """A state with the stacks of frozen experts as matrices, which are views."""
    state, known, is_static = dict(state), known_matrices(model, conversions), format == "static"
    for name, module in frozen_experts(model).items():
        for projection in module.projections():
            stack, parts = f"{name}.{projection}", module.layout.parts(projection)
            codes, scale, bias, slot = (state.pop(stack + suffix, None) for suffix in SUFFIXES)
            assert codes is not None and scale is not None
            for e, part in itertools.product(range(codes.shape[0]), range(parts)):
                stem, own = known[stack].of(stack, e, part), scale[e].chunk(parts)[part]
                state[f"{stem}.weight"] = codes[e].chunk(parts)[part]
                state[f"{stem}.{scale_name(format)}"] = own.reshape(()) if is_static else own
                if bias is not None:
                    state[f"{stem}.bias"] = bias[e].chunk(parts)[part]
                if slot is not None:
                    one = slot[e, :1].to(own.dtype)
                    state[f"{stem}.input_scale"] = one.reshape(()) if is_static else one
    return state


# ---- quantising tensor by tensor ------------------------------------------------------------------------------------


def as_matrices(
    model: nn.Module, names: Names, mixtures: Mapping[str, nn.Module], in_files: Callable[[list[str]], list[str]]
) -> dict[str, list[tuple[str, Entry, str]]]:
    """For each tensor of a 16-bit checkpoint that holds experts: the matrices and biases in it, by the stems of their
    names, and whose stack they are. in_files: gives names of the model as files have them. Raises ValueError where
    transformers does more to a tensor than to give it another name, or to stack matrices."""
    known = known_matrices(model, names.conversions)
    result: dict[str, list[tuple[str, Entry, str]]] = {}
    for name, module in mixtures.items():
        layout = layout_of(module)
        for projection in stacks(module):
            stack = f"{name}.{projection}"
            for place in (stack, f"{stack}_bias") if layout.has_bias else (stack,):
                for entry in names.sources.get(place, []):
                    if len(entry.shape) == 2 and place == stack:
                        result[entry.name] = [(entry.name.removesuffix(".weight"), entry, stack)]
                        continue
                    if entry.shape != tuple(names.state[place].shape) or names.is_converted(entry.name):
                        raise ValueError(
                            f"torch_fp8: {entry.name} holds experts in a form that is not quantised tensor by tensor; "
                            "load the model in 16 bits, torch_fp8.freeze it, and save it"
                        )
                    result[entry.name] = [
                        (stem, _Part.of(entry, layout, projection, e, part), stack)
                        for e in range(entry.shape[0])
                        for part in range(layout.parts(projection))
                        for stem in [known[stack].of(stack, e, part)]
                    ]
    ours = {f"{stem}.weight": stem for found in result.values() for stem, entry, _ in found if isinstance(entry, _Part)}
    written = in_files(list(ours))
    renamed = {stem: name.removesuffix(".weight") for stem, name in zip(ours.values(), written, strict=True)}
    return {
        name: [(renamed.get(stem, stem), entry, stack) for stem, entry, stack in parts]
        for name, parts in result.items()
    }


@dataclass(frozen=True)
class _Part(Entry):
    """One expert's matrix in a stack of a file, or its bias, as if it lay there by itself."""

    stack: Entry
    layout: Layout
    projection: str
    expert: int
    part: int

    @classmethod
    def of(cls, stack: Entry, layout: Layout, projection: str, expert: int, part: int) -> _Part:
        shape = stack.shape[:0:-1] if layout.is_transposed else stack.shape[1:]
        shape = (shape[0] // layout.parts(projection), *shape[1:])
        nbytes = math.prod(shape) * stack.dtype.itemsize
        return cls(stack.path, stack.name, stack.dtype, shape, stack.begin, nbytes, stack, layout, projection, expert,
                   part)  # fmt: skip

    def read(self) -> Tensor:
        stack, size = self.stack, self.stack.nbytes // self.stack.shape[0]
        one = Entry(stack.path, stack.name, stack.dtype, stack.shape[1:], stack.begin + self.expert * size, size).read()
        rows = one.t() if one.dim() == 2 and self.layout.is_transposed else one
        rows = self.layout.separated(rows, self.projection)
        return rows.chunk(self.layout.parts(self.projection))[self.part].contiguous()
