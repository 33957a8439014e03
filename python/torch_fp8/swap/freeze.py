"""How a model gets layers whose weights are E4M3 for good.

fp8.freeze(model)                            # in place; the 16-bit weights are gone

fp8.calibrate(model, batches)                # or with one scale a layer for the inputs, from some typical ones
fp8.freeze(model, activations="static", weight="tensor")
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import progress
from ..format import E4M3_MAX
from ..layers.classes import is_conv1d
from ..layers.experts import (
    become_frozen_experts,
    experts_in,
    input_amaxes,
    layout_of,
    routers,
    stacks,
    why_not_experts,
)
from ..layers.frozen import FrozenLinear, check_pair, frozen_layers, new_slot
from ..layers.linear import Layer
from .readers import weights_read
from .select import NOT_FP8, Filter, check_device, check_types, chosen_layers, linear_layers, some, why_not_frozen
from .weights import power_of_two_above, quantize_stack, quantize_weight

#: What is to be done when a model has got frozen layers; transformers' models know of theirs by this.
after_freeze: list[Callable[[nn.Module], None]] = []

_AMAX = "_fp8_input_amax"  # what calibrate leaves on a layer for freeze: a float, or of experts a list of two


def freeze(
    model: nn.Module,
    activations: str = "token",
    weight: str = "channel",
    filter: Filter | Sequence[str] | None = None,
    *,
    linear_types: Iterable[type[nn.Module]] = (),
) -> nn.Module:
    """Make the linear layers of ``model`` FrozenLinear layers, in place; returns the model, for inference or as a base
    of adapters (LoRA).

    Takes what :func:`torch_fp8.convert` takes, FP8 layers, and transformers' experts (Mixtral, Qwen-MoE, DeepSeek,
    gpt-oss, Llama 4...), which become FrozenExperts. They stay the same objects under the same names; their weights are
    quantised once and the 16-bit ones let go. The output head, routers, embeddings and norms stay as they are, and so
    do experts that are not understood; ``summary`` names them. No parameter of the model requires a gradient
    afterwards; adapters come after that.

    activations: how inputs are quantised, see :class:`FrozenLinear`. "static" takes twice the largest input that
        :func:`calibrate` saw or, where it did not run, that is in an ``fp8.Linear``'s history, and rounds that scale
        up to a power of two: a scale too large costs nothing, one too small saturates.
    weight: "channel": a scale for each output; "tensor"; or "block", one for each 128 x 128, which takes activations
        "token" or "none". By token, layers whose in_features is no multiple of 128 compute with inputs in 16 bits
        then; ``summary`` says which.
    filter: which layers: by default all but the output head and routers; otherwise as in :func:`torch_fp8.convert`,
        where the experts of a layer count as one. A layer whose weight other code of the model reads itself, as far as
        can be seen, is never taken: T5's ``wo``, Mamba's ``dt_proj``. ``summary`` says which and why.
    linear_types: subclasses of ``nn.Linear`` to vouch for, as in :func:`torch_fp8.convert`.

    Raises ValueError, with the model as it was, where no layer would be frozen; a listed name matches none, or one that
    cannot be; a weight holds Inf or NaN or is on the meta device; a static scale has nothing to come from; or
    activations and weight do not go together.
    """
    check_pair(activations, weight)
    left_out = why_not_to_freeze(model, filter, linear_types)
    layers = {name: layer for name, layer in linear_layers(model).items() if not left_out[name]}
    mixtures = {name: module for name, module in experts_in(model).items() if not left_out[name]}
    weights = {name: weight_of(layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        check_device(weights[name].device)
        check_weight(name, weights[name])
        if activations == "static":
            static_scale(name, layer)
    for name, module in mixtures.items():
        for projection, stack in stacks(module).items():
            check_device(stack.device)
            check_weight(f"{name}.{projection}", stack)
        if activations == "static":
            static_scales(name, module)

    shared: dict[int, tuple[Tensor, Tensor]] = {}  # of layers that share a weight
    for name, layer in layers.items():
        slot = new_slot(static_scale(name, layer), weights[name].device) if activations == "static" else None
        parameter = layer.weight
        if id(parameter) not in shared:
            shared[id(parameter)] = quantize_weight(weights[name], weight)
        become_frozen(layer, *shared[id(parameter)], slot, activations, weight)
        del weights[name], parameter  # and with them the last 16-bit copy
    for name, module in mixtures.items():
        up_scale, down_scale = static_scales(name, module) if activations == "static" else (None, None)
        up = quantize_stack(module, layout_of(module).up, weight, up_scale)
        down = quantize_stack(module, "down_proj", weight, down_scale)
        for key in (_AMAX, NOT_FP8):
            module.__dict__.pop(key, None)
        become_frozen_experts(module, up, down, activations, weight)
    for name, layer in {**linear_layers(model), **experts_in(model)}.items():
        setattr(layer, NOT_FP8, left_out[name])
    for tell in after_freeze:
        tell(model)
    return model.requires_grad_(False)


def calibrate(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Run ``model`` over some typical inputs and note the largest magnitude that each linear layer's input has, for
    ``freeze(model, activations="static")``; returns the model.

    batches: what ``model`` takes: tensors, tuples or lists (positional arguments), or dicts (keyword arguments). They
    are moved to the model's device. A second call starts anew. Of the model only those amaxes change: it runs in eval
    mode without gradients, and is put back.

    Raises ValueError where the model has no linear layer, there was no batch, or a layer saw Inf or NaN; TypeError for
    what are no batches.
    """
    layers = linear_layers(model)
    mixtures = {name: module for name, module in experts_in(model).items() if not why_not_experts(module)}
    if not layers and not mixtures:
        raise ValueError(f"torch_fp8: {type(model).__name__} has no linear layer to calibrate")
    if not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):  # a dataset may have the second alone
        raise TypeError(
            f"torch_fp8: batches must be inputs of the model, one after the other, got {type(batches).__name__}; give "
            "a list of them, or a loader"
        )
    seen: dict[str, Tensor] = {}  # for experts the amaxes of both projections' inputs

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name in mixtures:
                amax = input_amaxes(module, *args, *kwargs.values())
            else:
                x: Any = args[0] if args else kwargs.get("input", kwargs.get("x"))
                if not x.numel():
                    return
                amax = x.detach().abs().amax().float()
            seen[name] = torch.maximum(seen[name], amax) if name in seen else amax

        return hook

    training = {module: module.training for module in model.modules()}
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    count = 0
    with contextlib.ExitStack() as stack:
        for name, layer in {**layers, **mixtures}.items():
            stack.callback(layer.register_forward_pre_hook(note(name), with_kwargs=True).remove)
        for module, mode in training.items():
            stack.callback(setattr, module, "training", mode)
        model.eval()
        with torch.no_grad():
            for batch in progress.bar(batches, desc="calibrate", unit="batch"):
                args, kwargs = _arguments(batch, device)
                model(*args, **kwargs)
                count += 1
    if not count:
        raise ValueError("torch_fp8: calibrate got no batch; give it some inputs of the model")
    amaxes = {name: amax.tolist() for name, amax in seen.items()}
    for name in amaxes:
        if not seen[name].isfinite().all():
            raise ValueError(f"torch_fp8: the input of {name or '(root)'} has Inf or NaN: nothing to calibrate by")
    for name, layer in {**layers, **mixtures}.items():
        layer.__dict__.pop(_AMAX, None)
        if name in amaxes:
            setattr(layer, _AMAX, amaxes[name])
    return model


def become_frozen(
    layer: Any, weight: Tensor, weight_scale: Tensor, input_slot: Tensor | None, activations: str,
    granularity: str,
) -> None:  # fmt: skip
    """Change the class of a linear layer in place, as convert does: the object, its name and its hooks stay."""
    if isinstance(layer, Layer):
        layer._make_plain()
    bias = layer.bias
    del layer.weight, layer.bias
    for name in (_AMAX, NOT_FP8):
        layer.__dict__.pop(name, None)
    layer.__class__ = FrozenLinear
    layer._make_frozen(
        weight, weight_scale, None if bias is None else bias.detach(), input_slot, activations, granularity
    )


def weight_of(layer: Any) -> Tensor:
    """(out, in)"""
    weight: Tensor = layer.weight.detach()
    return weight.t() if is_conv1d(layer) else weight


def layers_to_freeze(model: nn.Module, filter: Filter | Sequence[str] | None) -> dict[str, nn.Module]:
    """The linear layers and the experts that are to be frozen."""
    left_out = why_not_to_freeze(model, filter)
    return {name: layer for name, layer in {**linear_layers(model), **experts_in(model)}.items() if not left_out[name]}


def why_not_to_freeze(
    model: nn.Module, filter: Filter | Sequence[str] | None, linear_types: Iterable[type[nn.Module]] = ()
) -> dict[str, str]:
    """Why each linear layer, or the experts of a layer, are not to be frozen; "" where they are."""
    types = check_types(linear_types)
    layers, mixtures = linear_layers(model), experts_in(model)
    readers = weights_read(model, layers)
    cannot = {
        name: why_not_frozen(layer, types) or (f"{readers[name]} reads its weight itself" if name in readers else "")
        for name, layer in layers.items()
    }
    cannot |= {name: why_not_experts(module) for name, module in mixtures.items()}
    choosing = {layers[name] for name in routers(model, layers)}
    left_out = chosen_layers(
        model, {**layers, **mixtures}, filter, cannot, lambda layer: "router" if layer in choosing else ""
    )
    if all(left_out.values()):
        raise ValueError(
            f"torch_fp8: no layer of {type(model).__name__} would be frozen. It has {len(layers)} linear layers in 16 "
            f"or 32 bits{some(left_out)} and {len(frozen_layers(model))} frozen ones; change the filter"
        )
    return left_out


def check_weight(name: str, weight: Tensor) -> None:
    if weight.is_meta:
        raise ValueError(f"torch_fp8: {name or '(root)'} is on the meta device; load its weights before freezing it")
    if not weight.abs().amax().isfinite():
        raise ValueError(
            f"torch_fp8: the weight of {name or '(root)'} has Inf or NaN, which FP8 cannot carry; repair the "
            "checkpoint, or leave the layer out by the filter"
        )


def static_scale(name: str, layer: nn.Module) -> float:
    """Twice the amax that was seen, over 448, rounded up to a power of two."""
    amax = getattr(layer, _AMAX, None)
    if amax is None and isinstance(layer, Layer) and not layer.fp8_slots.is_meta:
        amax = max(layer.fp8_history[0].max().item(), layer.fp8_slots[0, 2].item())
        amax = amax if amax > 0 else None
    if amax is None or not math.isfinite(amax):
        raise ValueError(
            f"torch_fp8: no input of {name or '(root)'} was seen, so it has no static scale; run torch_fp8.calibrate "
            'on typical inputs first, or freeze with activations="token"'
        )
    return _static_scale(amax)


def static_scales(name: str, module: nn.Module) -> tuple[float, float]:
    """The same of experts: of the input of either projection, one for all of them, since one that was given no token
    has seen nothing."""
    amaxes = getattr(module, _AMAX, None)
    if amaxes is None:
        raise ValueError(
            f"torch_fp8: no input of {name or '(root)'} was seen, so it has no static scale; run torch_fp8.calibrate "
            'on typical inputs first, or freeze with activations="token"'
        )
    return _static_scale(amaxes[0]), _static_scale(amaxes[1])


def _static_scale(amax: float) -> float:
    scale = torch.tensor(2 * amax / E4M3_MAX, dtype=torch.float32, device="cpu")
    return power_of_two_above(scale).clamp(min=2.0**-126).item() if amax > 0 else 1.0


def _arguments(batch: Any, device: torch.device) -> tuple[list[Any], dict[str, Any]]:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Tensor):
        return [move(batch)], {}
    if isinstance(batch, Mapping):
        return [], {key: move(value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [move(value) for value in batch], {}
    raise TypeError(f"torch_fp8: a batch must be a tensor, a tuple or a dict, got {type(batch).__name__}")
