"""Inference: layers whose weights are E4M3 for good, and how a model gets them.

fp8.freeze(model)                            # in place; the 16-bit weights are gone

fp8.calibrate(model, batches)                # or with one scale a layer for the inputs, from some typical ones
fp8.freeze(model, activations="static", weight="tensor")
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _C
from ..observe.emulate import ACTIVATIONS, BLOCK, E4M3, E4M3_MAX, quantize
from ..swap.convert import Filter, _by_patterns, _check_device, _output_heads
from .linear import SUPPORTED_DTYPES, Linear

#: How many elements of the weight share a scale: an output channel, all, or a block of 128 x 128.
WEIGHTS = ("channel", "tensor", "block")

_AMAX = "_fp8_input_amax"  # what calibrate leaves on a layer for freeze: a float


class FrozenLinear(nn.Module):
    """``y = x W^T + b`` of an E4M3 weight, for inference. ``freeze`` and ``load_pretrained`` make these.

    Input (..., in_features), output (..., out_features) of the input's dtype or of the autocast dtype. All state is
    buffers, and all of it is in ``state_dict()``:

    * ``weight`` (out_features, in_features) float8_e4m3fn
    * ``weight_scale`` float32, the multiplier: of 1 element, (out_features, 1), or
      (ceil(out_features / 128), ceil(in_features / 128))
    * ``input_slot`` (1, 4) float32, with static activations only: ``{scale_inv, scale, 0, 0}``, where scale_inv is
      what checkpoints call ``input_scale``
    * ``bias`` (out_features,), or None

    Weight and scales keep their dtype when the module is cast, and move with it; the bias is cast.

    activations: how the input is quantised. "token": by each row's own amax or, where the weight has block scales, by
    that of each 128 columns of a row; "tensor": by the whole input's; "static": by ``input_slot``; "none": not at all,
    the weight alone is FP8 (W8A16).
    Inputs of up to 16 rows (8, of layers with more than 8192 outputs) are never quantised, since the time there is that
    of reading the weight. Nor are those of layers with block scales and other activations than "token", or whose
    in_features is no multiple of 128.

    The constructor makes a layer of zeros to load a state into. There is no gradient: where one is wanted for the
    input, forward raises RuntimeError, as it does for an input of a wrong shape.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activations: str = "token",
        weight: str = "channel",
    ) -> None:
        super().__init__()
        _check_choices(activations, weight)
        codes = torch.zeros(out_features, in_features, device=device, dtype=E4M3)
        scale = torch.ones(scale_shape(weight, out_features, in_features), device=device)
        slot = new_slot(1.0, codes.device) if activations == "static" else None
        zeros = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self._make_frozen(codes, scale, zeros, slot, activations)

    def _make_frozen(
        self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, input_slot: Tensor | None, activations: str
    ) -> None:
        self.out_features, self.in_features = weight.shape
        self.activations = activations
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.register_buffer("input_slot", input_slot)

    def forward(self, input: Tensor) -> Tensor:
        if input.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "torch_fp8: a FrozenLinear computes no gradient, but its input requires one; run inference under "
                "torch.no_grad() or torch.inference_mode(), and train with fp8.Linear (torch_fp8.convert)"
            )
        device = input.device.type
        op = torch.ops.torch_fp8.frozen_linear if torch.compiler.is_compiling() else _C.frozen_linear
        return op(
            input, self.weight, self.weight_scale, self.bias, self.input_slot, ACTIVATIONS.index(self.activations),
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        )  # fmt: skip

    @property
    def granularity(self) -> str:
        """How many elements of the weight share a scale: "tensor", "channel" or "block"."""
        if self.weight_scale.numel() == 1:
            return "tensor"
        return "channel" if self.weight_scale.shape == (self.out_features, 1) else "block"

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenLinear:
        # Seen as integers weight and scales are moved by .cuda() and left alone by .bfloat16(), to the bit.
        seen_as = {"weight": torch.uint8, "weight_scale": torch.int32, "input_slot": torch.int32}
        state = {name: self._buffers.pop(name) for name in seen_as}
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(state)
        for name, integer in seen_as.items():
            old = state[name]
            if old is not None:
                new = fn(old.view(integer))
                if new.dtype != integer:  # Module.type() casts integers too
                    new = old.to(new.device).view(integer)
                self._buffers[name] = new.view(old.dtype)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Pickle, other than torch.save, does not know FP8.
        return {**self.__dict__, "_buffers": {**self._buffers, "weight": self.weight.view(torch.uint8)}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buffers["weight"] = self._buffers["weight"].view(E4M3)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool,
        missing: list[str], unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        # A copy would cast what is not FP8, unscaled and without saturation.
        for name, dtype in (("weight", E4M3), ("weight_scale", torch.float32), ("input_slot", torch.float32)):
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.dtype != dtype:
                errors.append(
                    f"torch_fp8: {prefix}{name} must be {dtype}, got {value.dtype}; load 16-bit weights before "
                    "torch_fp8.freeze"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"activations={self.activations}, weight={self.granularity}"
        )


def freeze(
    model: nn.Module,
    activations: str = "token",
    weight: str = "channel",
    filter: Filter | Sequence[str] | None = None,
) -> nn.Module:
    """Make the linear layers of ``model`` FrozenLinear layers, in place; returns the model, for inference only.

    Takes ``nn.Linear``, ``fp8.Linear`` and transformers' ``Conv1D`` (GPT-2). They stay the same objects under the same
    names; their weights are quantised once and the 16-bit ones let go. The output head, embeddings and norms stay as
    they are. No parameter of the model requires a gradient afterwards.

    activations: how inputs are quantised, see :class:`FrozenLinear`. "static" takes twice the largest input that
        :func:`calibrate` saw or, where it did not run, that is in an ``fp8.Linear``'s history, and rounds that scale
        up to a power of two: a scale too large costs nothing, one too small saturates.
    weight: "channel": a scale for each output; "tensor"; or "block", one for each 128 x 128.
    filter: which layers: by default all but the output head; otherwise as in :func:`torch_fp8.convert`.

    Raises ValueError, with the model as it was, where no layer would be frozen or a listed name matches none; a weight
    holds Inf or NaN or is on the meta device; or a static scale has nothing to come from.
    """
    _check_choices(activations, weight)
    layers = _chosen(model, filter)
    weights = {name: _weight_of(layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        _check_device(weights[name].device)
        _check_weight(name, weights[name])
        if activations == "static":
            static_scale(name, layer)

    shared: dict[int, tuple[Tensor, Tensor]] = {}  # of layers that share a weight
    for name, layer in layers.items():
        slot = new_slot(static_scale(name, layer), weights[name].device) if activations == "static" else None
        parameter = layer.weight
        if id(parameter) not in shared:
            shared[id(parameter)] = quantize_weight(weights[name], weight)
        _become_frozen(layer, *shared[id(parameter)], slot, activations)
        del weights[name], parameter  # and with them the last 16-bit copy
    return model.requires_grad_(False)


def calibrate(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Run ``model`` over some typical inputs and note the largest magnitude that each linear layer's input has, for
    ``freeze(model, activations="static")``; returns the model.

    batches: what ``model`` takes: tensors, tuples or lists (positional arguments), or dicts (keyword arguments). They
    are moved to the model's device. A second call starts anew. Of the model only those amaxes change: it runs in eval
    mode without gradients, and is put back.

    Raises ValueError where the model has no linear layer, there was no batch, or a layer saw Inf or NaN.
    """
    from tqdm.auto import tqdm

    layers = _linears(model)
    if not layers:
        raise ValueError(f"torch_fp8: {type(model).__name__} has no linear layer to calibrate")
    seen: dict[str, Tensor] = {}

    def note(name: str):
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("input", kwargs.get("x"))
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
        stack.callback(lambda: [setattr(module, "training", mode) for module, mode in training.items()])
        model.eval()
        with torch.no_grad():
            for batch in tqdm(batches, desc="calibrate", unit="batch"):
                args, kwargs = _arguments(batch, device)
                model(*args, **kwargs)
                count += 1
    if not count:
        raise ValueError("torch_fp8: calibrate got no batch; give it some inputs of the model")
    amaxes = {name: amax.item() for name, amax in seen.items()}
    for name, amax in amaxes.items():
        if not torch.tensor(amax).isfinite():
            raise ValueError(f"torch_fp8: the input of {name or '(root)'} has Inf or NaN: nothing to calibrate by")
    for name, layer in layers.items():
        layer.__dict__.pop(_AMAX, None)
        if name in amaxes:
            setattr(layer, _AMAX, amaxes[name])
    return model


def frozen_layers(model: nn.Module) -> dict[str, FrozenLinear]:
    """The frozen layers of a model by name; a layer that occurs twice has its first name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FrozenLinear)}


def scale_shape(weight: str, out_features: int, in_features: int) -> tuple[int, ...]:
    """Of ``weight_scale``."""
    blocks = (-(-out_features // BLOCK), -(-in_features // BLOCK))
    return {"tensor": (1,), "channel": (out_features, 1), "block": blocks}[weight]


def new_slot(input_scale: float, device: torch.device) -> Tensor:
    return torch.tensor([[input_scale, 1 / input_scale, 0, 0]], dtype=torch.float32, device=device)


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


def _become_frozen(
    layer: nn.Module, weight: Tensor, weight_scale: Tensor, input_slot: Tensor | None, activations: str
) -> None:
    """Change the class of a linear layer in place, as convert does: the object, its name and its hooks stay."""
    if isinstance(layer, Linear):
        layer._make_plain()
    bias = layer.bias
    del layer.weight, layer.bias
    for name in (_AMAX, "_not_fp8"):
        layer.__dict__.pop(name, None)
    layer.__class__ = FrozenLinear
    layer._make_frozen(weight, weight_scale, None if bias is None else bias.detach(), input_slot, activations)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, without importing transformers: a linear layer whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if type(m) in (nn.Linear, Linear) or is_conv1d(m)}


def _weight_of(layer: nn.Module) -> Tensor:
    """(out, in)"""
    return layer.weight.detach().t() if is_conv1d(layer) else layer.weight.detach()


def _chosen(model: nn.Module, filter: Filter | Sequence[str] | None) -> dict[str, nn.Module]:
    layers = _linears(model)
    cannot = {name: _why_not(layer) for name, layer in layers.items()}
    if filter is None:
        left_out = _output_heads(model, layers)
        chosen = {name for name in layers if name not in left_out}
    elif callable(filter):
        chosen = {name for name, layer in layers.items() if filter(layer, name)}
    else:
        chosen = _by_patterns(filter, layers, cannot)
    chosen = {name: layer for name, layer in layers.items() if name in chosen and not cannot[name]}
    if not chosen:
        raise ValueError(
            f"torch_fp8: no layer of {type(model).__name__} would be frozen. It has {len(layers)} linear layers in 16 "
            f"or 32 bits and {len(frozen_layers(model))} frozen ones; change the filter"
        )
    return chosen


def _why_not(layer: nn.Module) -> str:
    if layer.weight.dtype not in SUPPORTED_DTYPES:
        return f"{layer.weight.dtype} parameters"
    return "" if layer.weight.numel() else "empty"


def _check_weight(name: str, weight: Tensor) -> None:
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
    if amax is None and isinstance(layer, Linear) and not layer.fp8_slots.is_meta:
        amax = max(layer.fp8_history[0].max().item(), layer.fp8_slots[0, 2].item())
        amax = amax if amax > 0 else None
    if amax is None or not torch.tensor(amax).isfinite():
        raise ValueError(
            f"torch_fp8: no input of {name or '(root)'} was seen, so it has no static scale; run torch_fp8.calibrate "
            'on typical inputs first, or freeze with activations="token"'
        )
    return _power_of_two_above(torch.tensor(2 * amax / E4M3_MAX)).clamp(min=2.0**-126).item() if amax > 0 else 1.0


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


def _check_choices(activations: str, weight: str) -> None:
    for what, value, choices in (("activations", activations, ACTIVATIONS), ("weight", weight, WEIGHTS)):
        if value not in choices:
            raise ValueError(f"torch_fp8: {what} must be one of {', '.join(choices)}, got {value!r}")
