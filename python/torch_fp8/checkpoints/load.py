"""Which tensor of a checkpoint goes where in a model, and how it gets there: by transformers' own loading."""

from __future__ import annotations

import contextlib
import copy
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..format import E4M3
from ..layers.experts import frozen_experts
from ..layers.frozen import frozen_layers
from . import scheme
from .errors import CheckpointError
from .folder import CONFIG
from .model import bounded, dtype_of, empty_model
from .shard import DTYPES, Entry, Item

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .names import Names

EXTRA = "fp8_extra"  # attribute of a loaded model: the tensors that it has no place for, {name: Entry}
SOURCE = "fp8_source"  # attribute of a loaded model: the folder it came from


class Plan:
    """Which tensor of a checkpoint goes where in an empty model, whose FP8 layers become frozen ones; everything that
    the headers tell is checked here.

    extra: the tensors that the model has no place for.
    """

    def __init__(
        self, model: PreTrainedModel, entries: Mapping[str, Entry], found: scheme.Scheme | None, path: Path,
        activations: str | None = None,
    ) -> None:  # fmt: skip
        self.model, self.path = model, path
        try:
            self._fit(entries, found, activations)
        except CheckpointError:
            raise
        except Exception as error:  # whatever transformers raises for names and values that nobody has checked
            raise CheckpointError(path / CONFIG, f"does not fit its tensors: {error}") from error

    def _fit(self, entries: Mapping[str, Entry], found: scheme.Scheme | None, activations: str | None) -> None:
        from .experts import freeze_as_stored
        from .names import Names
        from .stored import untie

        self.names = Names(self.model, entries)
        check_dtypes(self.names)
        scales = freeze_as_stored(self.model, self.names, found, self.path / CONFIG, activations)
        untie(self.model)
        state = self.model.state_dict()
        self.extra = {
            name: entry
            for name, entry in entries.items()
            if name not in scales and not any(target in state for target in self.names.targets[name])
        }
        self._load({name: Lazy(entry, meta=True) for name, entry in entries.items() if name not in self.extra}, "meta")

    def fill(self, device: torch.device) -> None:
        tensors = {name: Lazy(entry) for name, entry in self.names.entries.items() if name not in self.extra}
        info, how = self._load(tensors, device)
        self.model._finalize_model_loading(self.model, how, info)  # ties, and buffers that no file holds

    def _load(self, tensors: dict[str, Lazy], device: Any) -> tuple[Any, Any]:
        """Into the model, by transformers' own way; what it tells of that, and how it was done."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        from .reader import Reader

        model, dtype = self.model, dtype_of(self.model)
        quantizer = Reader(None) if frozen_layers(model) or frozen_experts(model) else None
        how = LoadStateDictConfig(
            device_map={"": device},
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            hf_quantizer=quantizer,
            weight_mapping=get_model_conversion_mapping(model, None, quantizer),
        )
        with _without_bars() if device == "meta" else contextlib.nullcontext():
            info, _ = convert_and_load_state_dict_in_model(model, tensors, how)
        for name, text in info.conversion_errors.items():
            what = text.rpartition("\nError: ")[0].rpartition("\n")[2]
            raise self._error(name, what)
        for name, shape, expected in info.mismatched_keys:
            raise self._error(name, f"has shape {list(shape)}, expected {list(expected)}")
        for name in sorted(info.missing_keys):
            if not self._may_be_missing(name, info.missing_keys):
                raise CheckpointError(self.path, f"has no tensor {name}, which its config asks for")
        return info, how

    def _may_be_missing(self, name: str, missing: set[str]) -> bool:
        """Whether a tensor is tied to one that is there, or is one that the class makes by itself."""
        tied = self.model.all_tied_weights_keys
        source = tied.get(name, name)
        together = {source} | {target for target, of in tied.items() if of == source}
        own = self.model._keys_to_ignore_on_load_missing or ()
        return not together <= missing or any(re.search(pattern, name) for pattern in own)

    def _error(self, target: str, what: str) -> CheckpointError:
        """Of a tensor of the model, with the one in the files that it comes from."""
        path, _, key = target.rpartition(".")
        keys = {"weight_scale": scheme.WEIGHT_SCALES, "input_slot": scheme.INPUT_SCALES}.get(key, (key,))
        sources = [entry for key in keys for entry in self.names.sources.get(f"{path}.{key}", ())]
        if sources:
            return CheckpointError(sources[0].path, f"{sources[0].name} {what}")
        return CheckpointError(self.path, f"{target} {what}")


#: What a file may hold as values.
VALUES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_dtypes(names: Names) -> None:
    """Numbers go where numbers are, FP8 where ``freeze_as_stored`` finds linear layers for it, and no codes of another
    kind anywhere."""
    for name, targets in names.targets.items():
        entry = names.entries[name]
        for place in [names.state[target] for target in targets if target in names.state]:
            if place.dtype.is_floating_point != (entry.dtype in (*VALUES, E4M3)):
                raise CheckpointError(entry.path, f"{entry.name} is {entry.dtype}, expected {place.dtype} or the like")


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Nothing is loaded that one would wait for."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class Lazy:
    """A tensor of a file as transformers reads it: when it is indexed."""

    def __init__(self, entry: Entry, meta: bool = False) -> None:
        self.entry, self.meta = entry, meta

    def get_dtype(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype == self.entry.dtype)

    def get_shape(self) -> list[int]:
        return list(self.entry.shape)

    def __getitem__(self, index: Any) -> Tensor:
        if self.meta:
            return torch.empty(self.entry.shape, dtype=self.entry.dtype, device="meta")[index]
        return self.entry.read()[index]


def check_readable(
    config: Mapping[str, Any], items: Iterable[Item], path: str | os.PathLike[str], like: PreTrainedModel | None = None
) -> Plan:
    """Raise CheckpointError unless a checkpoint that is about to be written can be read, by what its headers will say.
    like: a model of the class that will read it."""
    path = Path(path)
    entries = {item.name: Entry(path, item.name, item.dtype, item.shape, 0, item.nbytes) for item in items}
    if like is None:
        model = empty_model(path, config, entries, None)
    else:
        own = copy.deepcopy(like.config)
        own.__dict__.pop("quantization_config", None)
        with bounded(len(entries)), torch.device("meta"):
            model = type(like)._from_config(own, dtype=dtype_of(like))
    return Plan(model, entries, scheme.read(dict(config), None, path / CONFIG), path)
