"""A checkpoint into a model: FP8 weights go straight into FrozenLinear layers."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import progress
from ..format import E4M3
from ..layers.frozen import new_slot, scale_shape
from ..swap.freeze import become_frozen
from ..swap.select import check_device
from .config import read as read_json
from .errors import CheckpointError
from .folder import CONFIG, Folder
from .scheme import Scheme
from .shard import Entry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXTRA = "fp8_extra"  # attribute of a loaded model: the tensors that it has no place for, {name: Entry}
SOURCE = "fp8_source"  # attribute of a loaded model: the folder it came from

# What dialects call the two scales; all of them are multipliers, weight_scale_inv too.
WEIGHT_SCALES = ("weight_scale", "weight_scale_inv", "qscale_weight")
INPUT_SCALES = ("input_scale", "activation_scale", "act_scale", "qscale_act")
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)


def load_pretrained(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    activations: str | None = None,
) -> PreTrainedModel:
    """The causal language model of transformers in a folder, in eval mode and without gradients.

    Layers whose weights are FP8 become :class:`FrozenLinear`, the others stay in 16 bits; so a plain BF16 checkpoint
    loads too. No 16-bit copy of an FP8 weight is ever made, and tensors are read one by one. Read are vLLM's and
    AutoFP8's ``fp8``, compressed-tensors ``float-quantized``, transformers' fine-grained ``fp8`` with blocks or one
    scale, FBGEMM and ModelOpt.

    dtype: of everything but the FP8 weights; the config's unless given.
    activations: instead of the checkpoint's.

    Tensors without a place in the model, KV-cache scales among them, are kept aside for :func:`save_pretrained`; where
    weights are among them, a warning says so.

    Raises CheckpointError (a ValueError), which names file and tensor, before any weight is read where headers tell;
    RuntimeError for a GPU that FP8 layers cannot run on.
    """
    folder = Folder(path)
    scheme = folder.scheme()
    model = empty_model(folder, dtype)
    plan = _Plan(model, folder, scheme, activations)
    device = torch.device(device)
    if plan.layers:
        check_device(device)
    _fill_computed_buffers(model, device)

    for layer in progress.bar(plan.layers, desc="FP8 layers", unit="layer"):
        become_frozen(layer.module, *layer.read(device))
    for name, entry in plan.others.items():
        _assign(model, name, entry.read().to(device))
    model.tie_weights()
    unused = [name for name in plan.extra if name.endswith(".weight")]
    if unused:
        warnings.warn(
            f"torch_fp8: {len(unused)} weights of {folder.path} have no place in {type(model).__name__} and are not "
            f"used: {', '.join(unused[:3])}...",
            stacklevel=2,
        )
    setattr(model, EXTRA, plan.extra)
    setattr(model, SOURCE, folder.path)
    return model.requires_grad_(False).eval()


@dataclass
class _Layer:
    """An FP8 layer to be read."""

    module: nn.Module
    weight: Entry
    scale: Entry
    granularity: str
    input_scale: Entry | None
    activations: str

    def read(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None, str, str]:
        scale = read_scale(self.scale).view(scale_shape(self.granularity, *self.weight.shape)).to(device)
        slot = None
        if self.activations == "static":
            slot = new_slot(read_scale(self.input_scale).item(), device)
        return self.weight.read().to(device), scale, slot, self.activations, self.granularity


class _Plan:
    """Which tensor goes where; everything that the headers tell is checked here.

    layers: the FP8 ones; others: all other tensors of the model, by name; extra: what it has no place for.
    """

    def __init__(self, model: PreTrainedModel, folder: Folder, scheme: Scheme | None, activations: str | None) -> None:
        self.folder, self.scheme = folder, scheme
        self.extra = dict(folder.entries)
        self.prefix = model.base_model_prefix + "."
        self.layers: list[_Layer] = []
        self.others: dict[str, Entry] = {}
        modules = dict(model.named_modules())
        frozen = {name: m for name, m in modules.items() if type(m) is nn.Linear and self._is_fp8(f"{name}.weight")}
        for name, module in frozen.items():
            self.layers.append(self._layer(name, module, activations))
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        for name, tensor in model.state_dict().items():
            if name.rpartition(".")[0] in frozen and name.endswith(".weight"):
                continue
            entry = self._take(name)
            if entry is not None:
                self._check(entry, tensor)
                self.others[name] = entry
            elif name not in tied:
                raise CheckpointError(folder.path, f"has no tensor {name}, which its config asks for")

    def _find(self, name: str) -> Entry | None:
        # Old files leave out the name of the model around the head.
        entries = self.folder.entries
        return entries.get(name) or entries.get(name.removeprefix(self.prefix))

    def _take(self, name: str) -> Entry | None:
        entry = self._find(name)
        if entry is not None:
            self.extra.pop(entry.name, None)
        return entry

    def _is_fp8(self, name: str) -> bool:
        entry = self._find(name)
        return entry is not None and entry.dtype == E4M3

    def _layer(self, name: str, module: nn.Linear, activations: str | None) -> _Layer:
        weight = self._take(f"{name}.weight")
        if self.scheme is None:
            raise CheckpointError(weight.path, f"{weight.name} is FP8, but {CONFIG} has no quantization_config")
        if weight.shape != tuple(module.weight.shape):
            raise CheckpointError(
                weight.path, f"{weight.name} has shape {list(weight.shape)}, expected {list(module.weight.shape)}"
            )
        activations = activations or self.scheme.activations
        scale = self._scale(name, WEIGHT_SCALES)
        if scale is None:
            raise CheckpointError(weight.path, f"{weight.name} is FP8 and has no scale ({', '.join(WEIGHT_SCALES)})")
        input_scale = self._scale(name, INPUT_SCALES)
        if activations == "static":
            if input_scale is None:
                raise CheckpointError(weight.path, f"{weight.name} has static activations but no input_scale")
            if input_scale.nbytes != input_scale.dtype.itemsize:
                raise CheckpointError(
                    input_scale.path, f"{input_scale.name} has shape {list(input_scale.shape)}, expected one element"
                )
        self._take(f"{name}.weight_zero_point")  # of symmetric weights: zeros
        granularity = self._granularity(scale, *weight.shape)
        return _Layer(module, weight, scale, granularity, input_scale, activations)

    def _scale(self, name: str, names: tuple[str, ...]) -> Entry | None:
        found = [entry for entry in (self._take(f"{name}.{suffix}") for suffix in names) if entry is not None]
        if len(found) > 1:
            raise CheckpointError(found[0].path, f"{name} has two scales, {found[0].name} and {found[1].name}")
        if found and found[0].dtype not in _SCALE_DTYPES:
            raise CheckpointError(found[0].path, f"{found[0].name} is {found[0].dtype}, which no scale is")
        return found[0] if found else None

    def _granularity(self, scale: Entry, n: int, k: int) -> str:
        """What shares a scale in FrozenLinear's weight_scale. A vector is a column of channels or a row or column of
        blocks that somebody squeezed: the config decides which, and then its length must fit."""
        for kind in self.scheme.weights:
            shape = scale_shape(kind, n, k)
            squeezed = tuple(size for size in shape if size != 1)
            same = tuple(size for size in scale.shape if size != 1) == squeezed
            if scale.shape == shape or (same and (len(scale.shape) <= 1 or not squeezed)):
                return kind
        expected = " or ".join(f"{list(scale_shape(kind, n, k))} ({kind})" for kind in self.scheme.weights)
        raise CheckpointError(scale.path, f"{scale.name} has shape {list(scale.shape)}, expected {expected}")

    def _check(self, entry: Entry, tensor: Tensor) -> None:
        if entry.shape != tuple(tensor.shape):
            raise CheckpointError(
                entry.path, f"{entry.name} has shape {list(entry.shape)}, expected {list(tensor.shape)}"
            )
        floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        if tensor.dtype.is_floating_point and entry.dtype not in floats:
            raise CheckpointError(
                entry.path, f"{entry.name} is {entry.dtype}; FP8 is read as E4M3 weights of linear layers only"
            )


def read_scale(entry: Entry) -> Tensor:
    scale = entry.read().float()
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise CheckpointError(entry.path, f"{entry.name} holds scales that are not positive and finite")
    return scale


def empty_model(folder: Folder, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model of config.json on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    path = folder.path / CONFIG
    # Whose code computes is decided here and not by a file.
    ours = {"quantization_config", "compression_config", "model_type", "auto_map", "attn_implementation",
            "experts_implementation"}  # fmt: skip
    values = {key: v for key, v in folder.config.items() if key not in ours and not key.startswith("_")}
    model_type = folder.config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(path, "has no model_type")
    try:
        config = AutoConfig.for_model(model_type, **values)
        layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
        if not 0 <= layers <= len(folder.entries):
            raise ValueError(f"num_hidden_layers is {layers}, but there are {len(folder.entries)} tensors")
        dtype = dtype or getattr(config, "dtype", None) or torch.bfloat16
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if folder.has("generation_config.json"):
            path = folder.file("generation_config.json")
            model.generation_config = GenerationConfig.from_dict(read_json(path))
    except CheckpointError:
        raise
    except Exception as error:  # whatever transformers raises for values that nobody has checked
        raise CheckpointError(path, f"describes no causal language model that transformers builds: {error}") from error
    return model


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in the place of one on the meta device, in its dtype."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, key)
    value = value.to(old.dtype)
    if key in module._parameters:
        module._parameters[key] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[key] = value


def _fill_computed_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Buffers that no file holds (rotary frequencies, masks), as transformers initialises them. The parameters are on
    the meta device still, where initialising does nothing."""
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None:
                module._buffers[name] = torch.zeros_like(buffer, device=device)
        if module._non_persistent_buffers_set:
            model._init_weights(module)
