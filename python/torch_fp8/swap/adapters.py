"""Adapters of peft over a frozen layer: which ones are right there, and how they merge.

An adapter's layer gets another class as soon as a frozen layer becomes its base. Merging adds to ``base_layer.weight``,
which codes do not take: so peft merges into the weight's float32 values, and these are quantised anew. Adapters that
compute with ``base_layer.weight`` would take codes for values, some without an error: they are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..format import E4M3, dequantize
from ..layers.frozen import FrozenLinear, FrozenState
from .freeze import after_freeze, quantize_weight

#: The families of ``peft.tuners`` that use of a base layer what it computes, and not its weight.
_RIGHT = {
    "adalora", "boft", "c3a", "fourierft", "gralora", "ia3", "loha", "lokr", "lora", "miss", "oft", "randlora", "road",
    "vblora", "vera", "waveft",
}  # fmt: skip
_MEND = "use plain LoRA (peft.LoraConfig), or keep the layers in 16 bits, by the filter of torch_fp8.freeze"


_TunerLayer: Any = object  # peft.tuners.tuners_utils.BaseTunerLayer, which is imported by who uses it


class _OverCodes(_TunerLayer):
    """Before a tuner layer of peft in the order of classes. ``_unmerged`` keeps the codes and scales that the base had
    before anything was merged, so that unmerging gives them back to the bit."""

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        config: Any = kwargs.get("config")
        if getattr(config, "bias", "none") != "none" and self.get_base_layer().bias is not None:
            raise ValueError(
                f"torch_fp8: bias={config.bias!r} trains the base's bias, which in a FrozenLinear is no parameter; use "
                'bias="none", or keep the layers in 16 bits, by the filter of torch_fp8.freeze'
            )
        start = getattr(config, "init_lora_weights", True)
        if getattr(config, "use_dora", False) or (isinstance(start, str) and start not in ("gaussian", "eva")):
            what = "use_dora=True" if getattr(config, "use_dora", False) else f"init_lora_weights={start!r}"
            raise ValueError(f"torch_fp8: {what} computes with the base's weight, which is in FP8; {_MEND}")
        super().update_layer(*args, **kwargs)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        layer, count = self.get_base_layer(), len(self.merged_adapters)
        before = layer.weight, layer.weight_scale
        _set(layer, dequantize(*before), before[1])
        try:
            super().merge(*args, **kwargs)
            after = before if len(self.merged_adapters) == count else _quantized(layer)
        except BaseException:
            del self.merged_adapters[count:]
            _set(layer, *before)
            raise
        _set(layer, *after)
        if count == 0 and self.merged_adapters:
            self._unmerged = before[0].view(torch.uint8), before[1]  # pickle does not know FP8

    def unmerge(self) -> None:
        layer = self.get_base_layer()
        if self.merged:
            _set(layer, dequantize(layer.weight, layer.weight_scale), layer.weight_scale)
        super().unmerge()
        if "_unmerged" in self.__dict__:
            weight, scale = (tensor.to(layer.weight.device) for tensor in self.__dict__.pop("_unmerged"))
            _set(layer, weight.view(E4M3), scale)
        elif layer.weight.dtype != E4M3:  # the base was frozen while adapters were merged into it
            _set(layer, *_quantized(layer))

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = object.__reduce_ex__(self, protocol)
        return _new, (type(self).__mro__[2],), *reduced[2:]


def _new(peft_class: type) -> Any:
    made: Any = _over_codes(peft_class)
    return made.__new__(made)


_classes: dict[type, type] = {}


def _over_codes(peft_class: type) -> type:
    if peft_class not in _classes:
        names = {"__module__": peft_class.__module__, "__qualname__": peft_class.__qualname__}
        _classes[peft_class] = type(peft_class.__name__, (_OverCodes, peft_class), names)
    return _classes[peft_class]


def _quantized(layer: FrozenLinear) -> tuple[Tensor, Tensor]:
    if not layer.weight.isfinite().all():
        raise ValueError(
            "torch_fp8: the merged weight has Inf or NaN, which FP8 cannot carry; repair the adapter, or keep it "
            "beside the layer"
        )
    return quantize_weight(layer.weight, layer.granularity)


def _set(layer: FrozenLinear, weight: Tensor, weight_scale: Tensor) -> None:
    layer._buffers["weight"], layer._buffers["weight_scale"] = weight, weight_scale


def _family(layer_class: type) -> str | None:
    """The folder of ``peft.tuners`` that a layer's class comes from, or is derived of."""
    parts = (base.__module__.split(".") for base in layer_class.__mro__ if hasattr(base, "get_base_layer"))
    return next((name[2] for name in parts if name[:2] == ["peft", "tuners"] and len(name) > 3), None)


def _watch(module: nn.Module, name: str, child: nn.Module | None) -> None:
    if name == "original_module" and child is not None and type(module).__module__.startswith("peft."):
        _check_trainable(child)
    if name != "base_layer" or not isinstance(child, FrozenLinear) or isinstance(module, _OverCodes):
        return
    family = _family(type(module))
    if family is None:
        return
    if family not in _RIGHT:
        raise TypeError(
            f"torch_fp8: an adapter of peft's family {family!r} is refused over a FrozenLinear, since it may compute "
            f"with the base's weight, which is in FP8; {_MEND}"
        )
    module.__class__ = _over_codes(type(module))


def _check_trainable(module: nn.Module) -> None:
    """``modules_to_save`` of peft: copies of modules, which are trained whole."""
    if any(isinstance(part, FrozenState) for part in module.modules()):
        raise TypeError(
            f"torch_fp8: modules_to_save names a {type(module).__name__} whose weight is frozen in FP8, so its copy "
            "would never be trained; leave it out of modules_to_save and give it an adapter by target_modules, or keep "
            "it in 16 bits, by the filter of torch_fp8.freeze"
        )


def _watch_all(model: nn.Module) -> None:
    """Of adapters that were there before their bases were frozen."""
    for module in model.modules():
        _watch(module, "base_layer", module._modules.get("base_layer"))


register_module_module_registration_hook(_watch)
after_freeze.append(_watch_all)
