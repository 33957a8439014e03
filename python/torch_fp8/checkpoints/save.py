"""A frozen model into a checkpoint that vLLM, SGLang, TensorRT-LLM or transformers read."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..files import check_free
from ..format import BLOCK, E4M3
from ..layers.frozen import WEIGHTS, FrozenLinear, frozen_layers, scale_shape
from ..swap.freeze import is_conv1d
from . import folder, scheme
from .folder import Folder
from .load import EXTRA, SOURCE
from .shard import Item

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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

    Raises ValueError where the format cannot hold the model, FileExistsError where ``path`` is taken.
    """
    layers = frozen_layers(model)
    if not layers:
        raise ValueError(f"torch_fp8: {type(model).__name__} has no FrozenLinear layer; torch_fp8.freeze it first")
    weight, activations = _kind(layers)
    scheme.check_writable(format, weight, activations)
    for name, layer in layers.items():
        if hasattr(layer, "nf"):
            raise ValueError(f"torch_fp8: {name} was a Conv1D, whose transposed weight no FP8 format holds")
        check_sizes(format, weight, name, layer.out_features, layer.in_features)
    check_free(path)

    groups: list[list[Item]] = []
    for name, layer in layers.items():
        slot = layer.input_slot
        input_scale = None if slot is None else slot[0, 0].item()
        shape, scale = (layer.out_features, layer.in_features), layer.weight_scale
        dtype = scale_dtype(format, model.dtype, [scale] if slot is None else [scale, slot[0, :1]])
        make = lambda layer=layer: (layer.weight, layer.weight_scale)  # noqa: E731
        groups.append(layer_items(format, name, shape, weight, make, input_scale, dtype))
    groups += [[as_is(name, tensor)] for name, tensor in _others(model)]
    for name, entry in getattr(model, EXTRA, {}).items():
        groups.append([Item(name, entry.dtype, entry.shape, entry.read)])

    ignored = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) or is_conv1d(module)]
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    config["quantization_config"] = scheme.written(format, weight, activations, ignored)
    files_from = getattr(model, SOURCE, None) if files_from is None else files_from
    others = [] if files_from is None else Folder(files_from).others()
    texts = {}
    if getattr(model, "generation_config", None) is not None:
        texts["generation_config.json"] = model.generation_config.to_json_string()
        others = [other for other in others if other.name not in texts]
    folder.write(path, config, groups, others, texts, max_shard_size)


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

    scale_name = "weight_scale_inv" if format == "block" else "weight_scale"
    items = [
        Item(f"{name}.weight", E4M3, shape, codes),
        Item(f"{name}.{scale_name}", dtype, size, scales.pop),
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


def _kind(layers: dict[str, FrozenLinear]) -> tuple[str, str]:
    """weight and activations of all layers. Of small layers one word may stand for another: an only block is a whole
    tensor, and an only channel too."""
    activations = {layer.activations for layer in layers.values()}
    words = {layer.granularity for layer in layers.values()}
    weights = list(words) if len(words) == 1 else [
        kind
        for kind in WEIGHTS
        if all(math.prod(scale_shape(kind, m.out_features, m.in_features)) == m.weight_scale.numel()
               for m in layers.values())
    ]  # fmt: skip
    if len(activations) > 1 or not weights:
        raise ValueError(
            "torch_fp8: a checkpoint holds FP8 layers of one kind, but these were frozen with activations "
            f"{sorted(activations)} and weights by {sorted(words)}"
        )
    return weights[0], activations.pop()


def _others(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The state that is not in frozen layers but their biases; what is tied, once."""
    frozen = {f"{name}.{key}" for name in frozen_layers(model) for key in ("weight", "weight_scale", "input_slot")}
    seen: set[int] = set()
    result: list[tuple[str, Any]] = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in frozen and id(tensor) not in seen:
            seen.add(id(tensor))
            result.append((name, tensor))
    return result
