"""The classes of FP8 layers whose plain class is not nn.Linear itself: made when a model first has such a layer."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .linear import Layer, Linear


class _Transposed(Layer):
    """A layer that holds its weight as (in_features, out_features), as transformers' Conv1D does."""

    is_transposed = True

    @property
    def in_features(self) -> int:  # type: ignore[override]
        return self.weight.shape[0]

    @property
    def out_features(self) -> int:  # type: ignore[override]
        return self.weight.shape[1]

    __repr__ = nn.Module.__repr__  # Conv1D's own does not know extra_repr

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}{super().extra_repr()}"


def conv1d() -> type[nn.Module] | None:
    """transformers' Conv1D, a linear layer whose weight is (in, out); None where nobody has imported it."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def is_conv1d(module: nn.Module) -> bool:
    return (cls := conv1d()) is not None and isinstance(module, cls)


def shape_of(layer: Any) -> tuple[int, int]:
    """(out_features, in_features) of a linear layer of any class."""
    if is_conv1d(layer):
        in_features, out_features = layer.weight.shape
        return out_features, in_features
    return layer.out_features, layer.in_features


def fp8_class_of(layer: nn.Module) -> type[Layer]:
    """The class that makes an FP8 layer of a layer: it derives from the layer's class, and from ``Linear`` where that
    is an ``nn.Linear``."""
    if isinstance(layer, Layer):
        return type(layer)
    if is_parametrized(layer):
        return _rebased(type(layer), _fp8_class(type(layer).__bases__[0]))
    return _fp8_class(type(layer))


def plain_class_of(layer: Layer) -> type[nn.Module] | None:
    """The class that an FP8 layer had; None where somebody has derived another one from the FP8 layer's."""
    cls = type(layer).__bases__[0] if is_parametrized(layer) else type(layer)
    plain: type[nn.Module] | None = cls.__dict__.get("plain_class")
    return _rebased(type(layer), plain) if plain is not None and is_parametrized(layer) else plain


def _rebased(parametrized: Any, base: type[nn.Module]) -> Any:
    """torch.nn.utils.parametrize puts a class of properties over that of a layer; this puts it over another one."""
    own = {name: value for name, value in vars(parametrized).items() if name not in ("__dict__", "__weakref__")}
    return type(parametrized)(f"Parametrized{base.__name__}", (base,), own)


def _fp8_class(plain: Any) -> type[Layer]:
    """One for each class, as long as somebody holds it."""
    if plain is nn.Linear:
        return Linear
    for made in plain.__subclasses__():
        if made.__dict__.get("plain_class") is plain:
            return made
    if plain is conv1d():
        base: type[Layer] = _Transposed
    else:
        linear = (nn.Linear, conv1d() or nn.Linear)
        base = _fp8_class(next(base for base in plain.__bases__ if issubclass(base, linear)))
    namespace = {"plain_class": plain, "__reduce_ex__": _reduce, "__module__": __name__, "__doc__": Linear.__doc__}
    new: type[Layer] = type(plain)(f"FP8{plain.__name__}", (base, plain), namespace)
    return new


def _reduce(layer: Layer, protocol: Any) -> tuple[Any, ...]:
    """Pickle would not find a class that was made here by its name, so it gets the plain one."""
    parts = super(Layer, layer).__reduce_ex__(protocol)
    return _new_layer, (type(layer).plain_class,), *parts[2:]


def _new_layer(plain: type[nn.Module]) -> Layer:
    cls = _fp8_class(plain)
    return cls.__new__(cls)
