"""Adapters of peft over a frozen layer, merged: the layer gets the codes of its weight plus the adapter's.

peft adds to ``base_layer.weight``, which codes do not take. So an adapter's layer gets another class as soon as a
frozen layer becomes its base: there peft merges into the weight's float32 values, and these are quantised anew.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..format import E4M3, dequantize
from ..layers.frozen import FrozenLinear
from .freeze import quantize_weight


class _Merging:
    """Before a tuner layer of peft in the order of classes. ``_unmerged`` keeps the codes and scales that the base had
    before anything was merged, so that unmerging gives them back to the bit."""

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

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (type(self).__mro__[2],), *state


def _new(peft_class: type) -> Any:
    return _merging(peft_class).__new__(_merging(peft_class))


@functools.cache
def _merging(peft_class: type) -> type:
    names = {"__module__": peft_class.__module__, "__qualname__": peft_class.__qualname__}
    return type(peft_class.__name__, (_Merging, peft_class), names)


def _quantized(layer: FrozenLinear) -> tuple[Tensor, Tensor]:
    if not layer.weight.isfinite().all():
        raise ValueError(
            "torch_fp8: the merged weight has Inf or NaN, which FP8 cannot carry; repair the adapter, or keep it "
            "beside the layer"
        )
    return quantize_weight(layer.weight, layer.granularity)


def _set(layer: FrozenLinear, weight: Tensor, weight_scale: Tensor) -> None:
    layer._buffers["weight"], layer._buffers["weight_scale"] = weight, weight_scale


def _watch(module: nn.Module, name: str, child: nn.Module | None) -> None:
    peft_class = type(module)
    is_base = name == "base_layer" and isinstance(child, FrozenLinear) and hasattr(peft_class, "get_base_layer")
    if is_base and hasattr(peft_class, "merge") and not issubclass(peft_class, _Merging):
        module.__class__ = _merging(peft_class)


register_module_module_registration_hook(_watch)
