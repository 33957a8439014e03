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
from ..format import BLOCK, E4M3_MAX, quantize
from ..layers.classes import is_conv1d
from ..layers.frozen import FrozenLinear, check_choices, frozen_layers, new_slot, scale_shape
from ..layers.linear import Layer
from .readers import weights_read
from .select import NOT_FP8, Filter, check_device, check_types, chosen_layers, linear_layers, some, why_not_frozen

#: What is to be done when a model has got frozen layers; transformers' models know of theirs by this.
after_freeze: list[Callable[[nn.Module], None]] = []

_AMAX = "_fp8_input_amax"  # what calibrate leaves on a layer for freeze: a float


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

    Takes what :func:`torch_fp8.convert` takes, and FP8 layers. They stay the same objects under the same
    names; their weights are quantised once and the 16-bit ones let go. The output head, embeddings and norms stay as
    they are. No parameter of the model requires a gradient afterwards; adapters come after that.

    activations: how inputs are quantised, see :class:`FrozenLinear`. "static" takes twice the largest input that
        :func:`calibrate` saw or, where it did not run, that is in an ``fp8.Linear``'s history, and rounds that scale
        up to a power of two: a scale too large costs nothing, one too small saturates.
    weight: "channel": a scale for each output; "tensor"; or "block", one for each 128 x 128.
    filter: which layers: by default all but the output head; otherwise as in :func:`torch_fp8.convert`. A layer whose
        weight other code of the model reads itself, as far as can be seen, is never taken: T5's ``wo``, Mamba's
        ``dt_proj``. ``summary`` says which and why.
    linear_types: subclasses of ``nn.Linear`` to vouch for, as in :func:`torch_fp8.convert`.

    Raises ValueError, with the model as it was, where no layer would be frozen; a listed name matches none, or one that
    cannot be; a weight holds Inf or NaN or is on the meta device; or a static scale has nothing to come from.
    """
    check_choices(activations, weight)
    left_out = why_not_to_freeze(model, filter, linear_types)
    layers = {name: layer for name, layer in linear_layers(model).items() if not left_out[name]}
    weights = {name: weight_of(layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        check_device(weights[name].device)
        check_weight(name, weights[name])
        if activations == "static":
            static_scale(name, layer)

    shared: dict[int, tuple[Tensor, Tensor]] = {}  # of layers that share a weight
    for name, layer in layers.items():
        slot = new_slot(static_scale(name, layer), weights[name].device) if activations == "static" else None
        parameter = layer.weight
        if id(parameter) not in shared:
            shared[id(parameter)] = quantize_weight(weights[name], weight)
        become_frozen(layer, *shared[id(parameter)], slot, activations, weight)
        del weights[name], parameter  # and with them the last 16-bit copy
    for name, layer in linear_layers(model).items():
        setattr(layer, NOT_FP8, left_out[name])
    for tell in after_freeze:
        tell(model)
    for module in model.modules():
        if isinstance(module._modules.get("base_layer"), FrozenLinear):
            module.base_layer = module.base_layer  # of an adapter that was there first: adapters.py sees it now
    return model.requires_grad_(False)


def calibrate(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Run ``model`` over some typical inputs and note the largest magnitude that each linear layer's input has, for
    ``freeze(model, activations="static")``; returns the model.

    batches: what ``model`` takes: tensors, tuples or lists (positional arguments), or dicts (keyword arguments). They
    are moved to the model's device. A second call starts anew. Of the model only those amaxes change: it runs in eval
    mode without gradients, and is put back.

    Raises ValueError where the model has no linear layer, there was no batch, or a layer saw Inf or NaN.
    """
    layers = linear_layers(model)
    if not layers:
        raise ValueError(f"torch_fp8: {type(model).__name__} has no linear layer to calibrate")
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Any = args[0] if args else kwargs.get("input", kwargs.get("x"))
            if x.numel():
                amax = x.detach().abs().amax().float()
                seen[name] = torch.maximum(seen[name], amax) if name in seen else amax

        return hook

    training = {module: module.training for module in model.modules()}
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    count = 0
    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
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
    amaxes = {name: amax.item() for name, amax in seen.items()}
    for name, amax in amaxes.items():
        if not math.isfinite(amax):
            raise ValueError(f"torch_fp8: the input of {name or '(root)'} has Inf or NaN: nothing to calibrate by")
    for name, layer in layers.items():
        layer.__dict__.pop(_AMAX, None)
        if name in amaxes:
            setattr(layer, _AMAX, amaxes[name])
    return model


def quantize_weight(weight: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    """The E4M3 codes of a finite (N, K) weight, and their float32 multipliers.

    Every multiplier is a bfloat16 value, amax / 448 rounded up, so that readers with bfloat16 scales and with float32
    ones see the same number. With one scale a tensor it is a power of two: readers that fuse q, k and v requantise at
    the largest of their scales, and only factors of two lose nothing there. It costs 0.06 dB of 31.56 on Gaussian
    weights; with long tails more (Student's t of 3 degrees: 29.1 for 32.3 dB), for then the largest weights carry the
    signal, and amax / 448 puts them upon a code. So channels and blocks, which nobody requantises, do without.
    """
    n, k = weight.shape
    if granularity == "block":
        grid = scale_shape("block", n, k)
        padded = nn.functional.pad(weight.float(), (0, grid[1] * BLOCK - k, 0, grid[0] * BLOCK - n))
        amax = padded.view(grid[0], BLOCK, grid[1], BLOCK).abs().amax((1, 3))
    elif granularity == "channel":
        amax = weight.abs().amax(1, keepdim=True).float()
    else:
        amax = weight.abs().amax().float().reshape(1)
    scale = (_power_of_two_above if granularity == "tensor" else _bfloat16_above)(amax / E4M3_MAX)
    scale = torch.where(amax > 0, scale, 1.0).clamp(min=2.0**-126)
    inverse = scale.reciprocal()
    if granularity == "block":
        inverse = inverse.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]
    return quantize(weight.float(), inverse).contiguous(), scale


def _power_of_two_above(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x)  # mantissa in [0.5, 1)
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).int())


def _bfloat16_above(x: Tensor) -> Tensor:
    return ((x.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)


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
    left_out = why_not_to_freeze(model, filter)
    return {name: layer for name, layer in linear_layers(model).items() if not left_out[name]}


def why_not_to_freeze(
    model: nn.Module, filter: Filter | Sequence[str] | None, linear_types: Iterable[type[nn.Module]] = ()
) -> dict[str, str]:
    """Why each linear layer is not to be frozen; "" where it is."""
    types = check_types(linear_types)
    layers = linear_layers(model)
    readers = weights_read(model, layers)
    cannot = {
        name: why_not_frozen(layer, types) or (f"{readers[name]} reads its weight itself" if name in readers else "")
        for name, layer in layers.items()
    }
    left_out = chosen_layers(model, layers, filter, cannot)
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
    scale = torch.tensor(2 * amax / E4M3_MAX, dtype=torch.float32, device="cpu")
    return _power_of_two_above(scale).clamp(min=2.0**-126).item() if amax > 0 else 1.0


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
