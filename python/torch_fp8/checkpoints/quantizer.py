"""torch_fp8 as a quantiser of transformers: it makes frozen layers while weights arrive, and writes them again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..layers.experts import FrozenExperts, frozen_experts, is_experts
from ..layers.frozen import FrozenLinear, check_pair, frozen_layers
from ..observe.emulate import dequantize
from ..swap.freeze import check_weight, layers_to_freeze
from ..swap.select import Filter, check_device
from ..swap.weights import quantize_matrices, quantize_weight
from . import experts, scheme, tables
from .errors import CheckpointError
from .load import VALUES, check_dtypes, check_readable
from .names import Names, taken_apart, with_scales, written_names
from .reader import Reader
from .save import as_is, ignored_names, in_files, state_to_write
from .shard import read_header
from .stored import freeze_empty, untie

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class QuantizationConfig(QuantizationConfigMixin):
    """``torch_fp8.QuantizationConfig`` makes these; its docstring says what for."""

    def __init__(
        self, activations: str = "token", weight: str = "channel", filter: Filter | Sequence[str] | None = None
    ) -> None:
        check_pair(activations, weight)
        self.quant_method = scheme.METHOD
        self.activations, self.weight, self.filter = activations, weight, filter
        self.scheme: scheme.Scheme | None = None  # of the checkpoint, if that is FP8 already
        self.kinds = [(weight, activations)]  # of the model's layers
        self.ignored: list[str] = []

    @classmethod
    def from_dict(cls, values: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        found = scheme.read({"quantization_config": values}, None, Path("config.json"))
        assert found is not None
        config = cls()
        # Not by the constructor: others' checkpoints may pair what it refuses, and are read.
        config.activations, config.weight = found.activations, found.weights[0]
        config.scheme, config.kinds = found, [(weight, found.activations) for weight in found.weights]
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return scheme.written("compressed-tensors", self.kinds, self.ignored)


class Quantizer(Reader):
    """Of a model that has frozen layers, or is about to get them."""

    quantization_config: QuantizationConfig
    is_compileable = True
    quantized_element_size = 1

    # Reading: transformers asks, in this order.

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized and self.quantization_config.activations == "static":
            raise ValueError(
                'torch_fp8: activations="static" needs typical inputs: load the model in 16 bits, run '
                "torch_fp8.calibrate, then torch_fp8.freeze"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        self._make_empty(model, checkpoint_files)
        for module in [*frozen_layers(model).values(), *frozen_experts(model).values()]:
            # A model's class draws what is missing at random, which codes cannot be: here it is an error, below.
            module._is_hf_initialized = True  # type: ignore[assignment]

    def _make_empty(self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None) -> None:
        config, files = self.quantization_config, [Path(file) for file in checkpoint_files or ()]
        if not self.pre_quantized:
            check_values(file for file in files if file.suffix == ".safetensors")
            layers = layers_to_freeze(model, config.filter)
            tied = {name.rpartition(".")[0] for pair in model.all_tied_weights_keys.items() for name in pair}
            if shared := sorted(tied & layers.keys()):
                raise ValueError(
                    f"torch_fp8: {shared[0]} shares its weight with another module; load the model in 16 bits and "
                    "torch_fp8.freeze it, or leave the layer out by the filter"
                )
            for layer in layers.values():
                empty = experts.freeze_empty if is_experts(layer) else freeze_empty
                empty(layer, config.activations, config.weight)
            return
        if not files or not all(file.suffix == ".safetensors" for file in files):
            raise ValueError("torch_fp8: an FP8 model is read from a folder of safetensors files")
        entries = {name: entry for file in files for name, entry in read_header(file).items()}
        names = Names(model, entries)
        check_dtypes(names)
        experts.freeze_as_stored(model, names, config.scheme, files[0].with_name("config.json"))
        untie(model)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        path, _, key = param_name.rpartition(".")
        layer = model.get_submodule(path)
        of_layer = key == "weight" and isinstance(layer, FrozenLinear)
        of_experts = isinstance(layer, FrozenExperts) and key.removesuffix("_bias") in layer.projections()
        return not self.pre_quantized and (of_layer or of_experts)

    def get_quantize_ops(self) -> ConversionOps:
        return Quantize()

    def update_weight_conversions(self, conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        return super().update_weight_conversions(conversions, model) if self.pre_quantized else with_scales(conversions)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, module in [*frozen_layers(model).items(), *frozen_experts(model).items()]:
            for key, tensor in module.named_buffers(recurse=False):
                if not getattr(tensor, "_is_hf_initialized", False):
                    raise CheckpointError(model.config.name_or_path, f"has no tensor {name}.{key}")
                check_device(tensor.device)
        declare(model)
        # Frozen layers look after themselves: half(), Trainer, and forwards that take another way for quantised models,
        # need not.
        model.is_quantized = False
        for module in model.modules():
            getattr(module, "config", self).__dict__.pop("_is_quantized", None)
        return model.requires_grad_(False)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        layers = frozen_layers(model)
        if conv1d := [name for name, layer in layers.items() if hasattr(layer, "nf")]:
            raise ValueError(f"torch_fp8: {conv1d[0]} was a Conv1D; load the 16-bit checkpoint instead")
        for layer in layers.values():
            thaw(layer, dtype)
        for module in frozen_experts(model).values():
            experts.thaw(module, dtype)
        return model

    # Writing.

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state that transformers then renames, splits and writes. Raises ValueError, with nothing written, where
        the format cannot hold the model."""
        if model._hf_peft_config_loaded:
            return model.state_dict(), {}  # of which the adapters alone are written
        declare(model)
        state = state_to_write(model, "compressed-tensors")
        config = self.quantization_config
        written = written_names(model, state, "compressed-tensors", empty=True)
        items = [as_is(name, tensor) for name, tensor in written.items()]
        plan = check_readable({"quantization_config": config.to_dict()}, items, type(model).__name__, like=model)
        config.ignored = in_files(plan.names, ignored_names(model))
        return taken_apart(model, state, "compressed-tensors"), {}


class Quantize(ConversionOps):
    """A 16-bit weight, when it arrives, into codes and scales."""

    def convert(self, input_dict: dict[str, Any], **more: Any) -> dict[str, Tensor]:
        model: PreTrainedModel = more["model"]
        result: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            path = name.rpartition(".")[0]
            layer = model.get_submodule(path)
            if isinstance(layer, FrozenExperts):
                result |= _quantized_stack(name, layer, tensor)
                continue
            if not isinstance(layer, FrozenLinear):
                result[name] = tensor
                continue
            tensor = tensor.t() if hasattr(layer, "nf") else tensor
            expected = layer.get_buffer("weight").shape
            if tensor.shape != expected or tensor.dtype not in VALUES:
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {list(expected)}")
            check_weight(path, tensor)
            result[name], result[f"{path}.weight_scale"] = quantize_weight(tensor, layer.granularity)
        if more.get("missing_keys") is not None:
            more["missing_keys"].difference_update(result)
        return result


def _quantized_stack(name: str, module: FrozenExperts, tensor: Tensor) -> dict[str, Tensor]:
    """A 16-bit stack of experts, or its bias, as the frozen module has it."""
    path, _, key = name.rpartition(".")
    projection, layout = key.removesuffix("_bias"), module.layout
    rows = tensor.transpose(1, 2) if layout.is_transposed and key == projection else tensor
    if rows.shape != getattr(module, key).shape or tensor.dtype not in VALUES:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, which is not what the config says")
    if key != projection:
        return {name: layout.separated(rows, projection, dim=1)}
    check_weight(name, tensor)
    codes, scale = quantize_matrices(rows, layout, projection, module.granularity)
    return {name: codes, f"{path}.{projection}_scale": scale}


def check_values(files: Iterable[Path]) -> None:
    """Raise CheckpointError for a matrix that is no values to quantise: transformers would cast codes to 16 bits."""
    for file in files:
        for name, entry in read_header(file).items():
            is_weight = len(entry.shape) > 1 and (entry.dtype.is_floating_point or name.endswith(".weight"))
            if is_weight and entry.dtype not in VALUES:
                raise CheckpointError(
                    file, f"{name} is {entry.dtype}, which holds no values to quantise; load an FP8 checkpoint with "
                    "torch_fp8.load_pretrained"
                )  # fmt: skip


def thaw(layer: FrozenLinear, dtype: torch.dtype | None) -> None:
    """Make a frozen layer an nn.Linear again, in place; of its weight there is what FP8 left."""
    state = {name: layer.get_buffer(name) for name in ("weight", "weight_scale")}
    weight, bias = dequantize(state["weight"], state["weight_scale"]), layer._buffers["bias"]
    layer._buffers.clear()
    del layer.activations, layer.granularity
    plain = cast("nn.Linear", layer)
    plain.__class__ = nn.Linear
    plain.weight = nn.Parameter(weight.to(dtype or weight.dtype), requires_grad=False)
    plain.register_parameter("bias", None if bias is None else nn.Parameter(bias.to(dtype or bias.dtype), False))


def declare(root: nn.Module) -> None:
    """Let transformers know of the frozen layers of a model, or of models within: by config, quantiser and ties."""
    from transformers import PreTrainedModel

    inner: set[nn.Module] = set()
    for model in root.modules():
        layers: list[FrozenLinear | FrozenExperts] = [*frozen_layers(model).values(), *frozen_experts(model).values()]
        if not isinstance(model, PreTrainedModel) or not layers:
            continue
        quantizer = getattr(model, "hf_quantizer", None)
        if not isinstance(quantizer, Quantizer):
            quantizer = model.hf_quantizer = Quantizer(QuantizationConfig())
        if model in inner:
            continue
        inner |= set(model.modules())
        config = quantizer.quantization_config
        config.kinds = list(dict.fromkeys((layer.granularity, layer.activations) for layer in layers))
        config.ignored = ignored_names(model)
        model.config.quantization_config = config
        untie(model)


tables.enter(QuantizationConfig, Quantizer)
