"""A frozen model into a checkpoint that vLLM, SGLang, TensorRT-LLM or transformers read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..files import check_free
from ..format import BLOCK, E4M3
from ..layers.experts import FrozenExperts, frozen_experts, stack_scale_shape
from ..layers.frozen import WEIGHTS, FrozenLinear, frozen_layers, scale_shape
from . import folder, scheme
from .errors import need_transformers
from .folder import Folder
from .load import EXTRA, SOURCE, check_readable
from .model import dtype_of
from .shard import Item

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .names import Names


def save_pretrained(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    format: str = "compressed-tensors",
    *,
    max_shard_size: int = 5 * 10**9,
    files_from: str | os.PathLike[str] | None = None,
) -> None:
    """Write a model of transformers that was frozen or loaded, under a name that does not exist yet, or not at all.

    format: "compressed-tensors" (any layers; what ``freeze`` makes by default is its FP8_DYNAMIC), "block"
        (transformers' fine-grained fp8: weight="block"), or "static" (vLLM's fp8: weight="tensor",
        activations="static"). Codes and scales are written as they are.
    max_shard_size: bytes; a larger checkpoint becomes several files and an index.
    files_from: the folder that the tokenizer and other files are copied from; that of ``load_pretrained`` by default.
        Tensors that were put aside then are written too.

    Raises ValueError where the format cannot hold the model, or it is none of transformers; FileExistsError where
    ``path`` is taken.
    """
    need_transformers()
    from .names import written_names

    state = state_to_write(model, format)
    check_free(path)
    groups = [[as_is(name, tensor)] for name, tensor in written_names(model, state, format).items()]
    config = {
        **json.loads(model.config.to_json_string()),
        "architectures": [type(model).__name__],
        "dtype": str(dtype_of(model)).removeprefix("torch."),
        "quantization_config": scheme.written(format, [kind_of(model)], ()),
    }
    plan = check_readable(config, [item for group in groups for item in group], path, like=model)
    config["quantization_config"] = scheme.written(format, [kind_of(model)], in_files(plan.names, ignored_names(model)))
    for name, entry in getattr(model, EXTRA, {}).items():
        groups.append([Item(name, entry.dtype, entry.shape, entry.read)])
    files_from = getattr(model, SOURCE, None) if files_from is None else files_from
    others = [] if files_from is None else Folder(files_from).others()
    texts = {}
    if getattr(model, "generation_config", None) is not None:
        texts["generation_config.json"] = model.generation_config.to_json_string()
        others = [other for other in others if other.name not in texts]
    folder.write(path, config, groups, others, texts, max_shard_size)


def state_to_write(model: PreTrainedModel, format: str) -> dict[str, Tensor]:
    """The state of a model with its FP8 layers as a format has them, by the names that it has in the model. Raises
    ValueError where the format cannot hold it."""
    from transformers import PreTrainedModel

    layers, mixtures = frozen_layers(model), frozen_experts(model)
    if not layers and not mixtures:
        raise ValueError(f"torch_fp8: {type(model).__name__} has no FrozenLinear layer; torch_fp8.freeze it first")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            "torch_fp8: a checkpoint holds a model of transformers, without wrappers, got "
            f"{type(model).__name__}; save another model's state_dict(), and freeze alike what it is loaded into"
        )
    weight, activations = kind_of(model)
    scheme.check_writable(format, weight, activations)
    state = dict(model.state_dict())
    for name, layer in layers.items():
        if hasattr(layer, "nf"):
            raise ValueError(
                f"torch_fp8: {name} was a Conv1D, whose transposed weight no FP8 format "
                "holds; keep the 16-bit checkpoint, and torch_fp8.freeze the model that is loaded from it"
            )
        check_sizes(format, weight, name, layer.out_features, layer.in_features)
        scale, slot = state.pop(f"{name}.weight_scale"), state.pop(f"{name}.input_slot", None)
        dtype = scale_dtype(format, dtype_of(model), [scale] if slot is None else [scale, slot[0, :1]])
        shape = () if format == "static" else (1,)
        size = scale_shape(weight, layer.out_features, layer.in_features) if format != "static" else ()
        state[f"{name}.{scheme.scale_name(format)}"] = scale.reshape(size).to(dtype)
        if slot is not None:
            state[f"{name}.input_scale"] = slot[0, 0].reshape(shape).to(dtype)
    for name, module in mixtures.items():
        for projection in module.projections():
            codes, scale, _, slot = module.stack(projection)
            _, n, k = codes.shape
            check_sizes(format, weight, f"{name}.{projection}", n // module.layout.parts(projection), k)
            dtype = scale_dtype(format, dtype_of(model), [scale] if slot is None else [scale, slot[:, :1]])
            state[f"{name}.{projection}_scale"] = scale.to(dtype)
    return state


def layer_items(
    format: str,
    name: str,
    shape: tuple[int, ...],
    weight: str,
    make: Callable[[], tuple[Tensor, Tensor]],
    input_scale: float | None,
    dtype: torch.dtype,
) -> list[Item]:
    """The tensors of an FP8 layer of (N, K) weights as a format names and shapes them. make: gives codes and scales,
    once, when the codes are written; the scales are kept until their turn. dtype: of the scales."""
    scales: list[Tensor] = []
    size = scale_shape(weight, *shape) if format != "static" else ()

    def codes() -> Tensor:
        weight, scale = make()
        scales.append(scale.reshape(size).to(dtype))
        return weight

    items = [
        Item(f"{name}.weight", E4M3, shape, codes),
        Item(f"{name}.{scheme.scale_name(format)}", dtype, size, scales.pop),
    ]
    if input_scale is not None:
        value = (
            torch.tensor(input_scale, dtype=torch.float32, device="cpu")
            .reshape(() if format == "static" else (1,))
            .to(dtype)
        )
        items.append(as_is(f"{name}.input_scale", value))
    return items


def as_is(name: str, tensor: Tensor) -> Item:
    return Item(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def scale_dtype(format: str, dtype: torch.dtype, scales: list[Tensor]) -> torch.dtype:
    """compressed-tensors wants scales in the model's dtype; they stay float32 where they would change by it."""
    exact = all(torch.equal(scale.to(dtype).float(), scale) for scale in scales)
    return dtype if format == "compressed-tensors" and exact else torch.float32


def check_sizes(format: str, weight: str, name: str, n: int, k: int) -> None:
    """Raise ValueError for a ragged grid of blocks that the format's readers do not take."""
    if weight == "block" and (k % BLOCK or (n % BLOCK and format == "block")):
        raise ValueError(
            f"torch_fp8: {name} is {n} x {k}; readers of blocks of {BLOCK} x {BLOCK} want them to divide it; "
            'leave the layer out by freeze\'s filter, or freeze with weight="channel"'
        )


def kind_of(model: nn.Module) -> tuple[str, str]:
    """weight and activations of all layers. Of small layers one word may stand for another: an only block is a whole
    tensor, and an only channel too."""
    layers: list[FrozenLinear | FrozenExperts] = [*frozen_layers(model).values(), *frozen_experts(model).values()]
    activations = {layer.activations for layer in layers}
    words = {layer.granularity for layer in layers}
    weights = list(words) if len(words) == 1 else [kind for kind in WEIGHTS if all(_is_also(m, kind) for m in layers)]
    if len(activations) > 1 or not weights:
        raise ValueError(
            "torch_fp8: a checkpoint holds FP8 layers of one kind, but these were frozen with activations "
            f"{sorted(activations)} and weights by {sorted(words)}"
        )
    return weights[0], activations.pop()


def _is_also(layer: FrozenLinear | FrozenExperts, kind: str) -> bool:
    """Whether scales of that kind would be as many as the layer has."""
    if isinstance(layer, FrozenLinear):
        return math.prod(scale_shape(kind, layer.out_features, layer.in_features)) == layer.weight_scale.numel()
    stacks = [(layer.stack(projection), layer.layout.parts(projection)) for projection in layer.projections()]
    return all(math.prod(stack_scale_shape(kind, s.codes.shape, parts)) == s.scale.numel() for s, parts in stacks)


def ignored_names(model: nn.Module) -> list[str]:
    """Modules with weights that a reader might take for FP8 and that are not: linear layers, routers, experts."""
    frozen = [f"{name}." for name in frozen_layers(model)]
    return sorted(
        name
        for name, module in model.named_modules()
        if _looks_linear(module) and not any(layer.startswith(f"{name}.") for layer in frozen)
    )


def _looks_linear(module: nn.Module) -> bool:
    if isinstance(module, FrozenLinear | nn.Embedding | nn.EmbeddingBag | nn.modules.conv._ConvNd):
        return False
    matrices = {key: p.dim() for key, p in module._parameters.items() if p is not None and p.dim() > 1}
    return isinstance(module, nn.Linear) or matrices.get("weight") == 2 or 3 in matrices.values()


def in_files(names: Names, modules: Sequence[str]) -> list[str]:
    """Modules by their own names, and by those that their weights have in files."""
    stems = {
        name.removesuffix(".weight")
        for name, targets in names.targets.items()
        if len(names.entries[name].shape) > 1 and any(target.rpartition(".")[0] in modules for target in targets)
    }
    return sorted(stems | set(modules))
