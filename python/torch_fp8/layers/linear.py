"""``Linear``: an ``nn.Linear`` whose three GEMMs run in FP8; and ``Layer``, what every such layer has besides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import _C
from ..checks import check_bools, check_sizes, modules_of
from ..recipe import Recipe, recipe_of
from ..state import LayerState
from . import dtensor, traced
from .dtensor import is_dtensor
from .scaled import Scaled

SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# What an FP8 layer has besides an nn.Linear's attributes.
_OPTIONS = ("fp8_state", "auto_update", "fuse_main_grad", "fp8_enabled")


class Layer(Scaled):
    """What an FP8 layer has besides the parameters of the class that stands beside this one among its bases: the
    scaling state, and a forward of three GEMMs in FP8. ``Linear`` says what it does; classes.py makes such classes."""

    fp8_state: LayerState
    weight: Tensor
    bias: Tensor | None
    in_features: int
    out_features: int
    is_transposed: ClassVar[bool] = False  # the weight lies as (in_features, out_features)
    plain_class: ClassVar[type[nn.Module]]  # what revert makes of the layer; each class's own, not inherited

    def _make_fp8(self, recipe: Recipe, auto_update: bool, fuse_main_grad: bool) -> None:
        """Give this layer, whose class was changed, what an FP8 layer has besides its parameters."""
        self.auto_update = auto_update
        self.fuse_main_grad = fuse_main_grad
        self.fp8_enabled = True
        self.fp8_state = LayerState(recipe, self.weight.device)
        self._register()

    def _make_plain(self) -> None:
        """Take away what _make_fp8 gave."""
        self._unregister()
        if self.fp8_state.group is not None:
            self.fp8_state.group.leave(self.fp8_state)
        for name in _OPTIONS:
            delattr(self, name)

    def owners(self) -> Sequence[Tensor]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def is_trained(self) -> bool:
        return self.weight.requires_grad

    def cast_weight(self) -> Tensor:
        return self.weight

    def settle(self) -> None:
        self.fp8_state.follow(self.weight)

    @property
    def matrix(self) -> Tensor:
        """The weight as (out_features, in_features)."""
        return self.weight.t() if self.is_transposed else self.weight

    def forward(self, input: Tensor) -> Tensor:
        if not self.fp8_enabled:
            return super().forward(input)
        weight = self.matrix
        if is_dtensor(weight):
            return dtensor.linear(self, input)
        main_grad = self.main_grad() if self.fuse_main_grad else ()
        # Compiled autograd hands no tensor that a backward changes to what it traces: there the layer stays eager.
        if torch.compiler.is_compiling() and not torch._dynamo.config.compiled_autograd:
            return traced.linear(self, input, *main_grad)
        return self._linear(input, weight, self.bias, *(main_grad or _NO_MAIN_GRAD))

    def _linear(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, main_grad: Tensor | None = None, dummy: bool = False
    ) -> Tensor:
        state = self.fp8_state
        try:
            return _C.linear(
                input, weight, bias, state.slots, state.options, state.memo, self.training, main_grad, dummy,
                state.place,
            )  # fmt: skip
        except TypeError:
            if isinstance(input, Tensor):
                raise
            raise TypeError(f"torch_fp8: the input must be a tensor, got {type(input).__name__}") from None
        except RuntimeError as error:
            if torch.jit.is_tracing():
                raise RuntimeError(
                    "torch_fp8: torch.jit.trace cannot record an FP8 layer that is being trained; trace the model "
                    "frozen (torch_fp8.freeze), or in 16 bits (with torch_fp8.disabled(model))"
                ) from error
            if state.slots.device == weight.device:
                raise
        state.follow(weight)  # it was moved past every method of a module
        return self._linear(input, weight, bias, main_grad, dummy)

    def main_grad(self) -> tuple[Tensor, bool] | tuple[()]:
        """Where the weight's gradient goes, and whether autograd gets one without meaning; nothing if there is none."""
        weight: Any = self.weight
        if not (weight.requires_grad and torch.is_grad_enabled()):
            return ()
        main_grad = getattr(weight, "main_grad", None)
        if not isinstance(main_grad, Tensor):
            raise RuntimeError(
                "torch_fp8: a layer with fuse_main_grad needs a tensor weight.main_grad before its forward pass, got "
                f"{type(main_grad).__name__}; set it to torch.zeros_like(weight, dtype=torch.float32)"
            )
        hooked = hasattr(weight, "grad_added_to_main_grad")
        if hooked:
            weight.grad_added_to_main_grad = True
        return main_grad, hooked

    def forget_weight(self) -> None:
        """Say that the weight changed in a way that cannot be seen, such as a write through ``.data`` between two
        micro-batches of one step: it is cast again."""
        self.fp8_state.memo.forget_weight()

    def _apply(self, fn: Any, recurse: bool = True) -> Layer:
        super()._apply(fn, recurse)
        self.fp8_state.memo.forget()
        self.fp8_state.follow(self.weight)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight" and "fp8_state" in self.__dict__:
            self._weight_was_set(value)

    def _weight_was_set(self, weight: Any) -> None:
        """FSDP2 sets the sharded parameter and the gathered one in turn, always the same two objects; the values of the
        second change between two steps, and its version does not."""
        state = self.fp8_state
        state.memo.forget_weight()
        if is_dtensor(weight):
            state.was_sharded()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool,
        missing: list[str], unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        weight = state_dict.get(prefix + "weight")
        if isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype.itemsize == 1:
            # A copy would take the codes for values.
            errors.append(
                f"torch_fp8: {prefix}weight must be 16-bit or float32, got {weight.dtype}, codes of a frozen layer; "
                "load them into a model that was frozen alike"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        # Other weights came without their scaling state, so the old state says nothing of them; unless
        # torch_fp8.load_state_dict was called first.
        if prefix + "weight" in state_dict and not self.fp8_state.was_loaded:
            self.reset_scaling()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe}"


class Linear(Layer, nn.Linear):  # type: ignore[misc]  # nn.Linear's stubs take bias for a Tensor
    """``y = x W^T + b`` with fprop, dgrad and wgrad in FP8 and everything else as in ``nn.Linear``.

    Input ``(..., in_features)``, output ``(..., out_features)``, both of the parameters' dtype (bfloat16, float16 or
    float32) or of the autocast dtype; float32 parameters take 16-bit input too, and have float32 gradients. Any shape
    and strides; dimensions that are no multiples of 16 are padded inside.

    The scaling state (see ``torch_fp8.state_dict``) is an object of its own, ``fp8_state``; neither a parameter nor a
    buffer, so that only the library writes to it. It stays float32, follows the weight, and can be looked at:

    * ``fp8_slots`` (3, 4) float32: ``{scale_inv, scale, amax, cursor}`` of input, weight and output gradient. amax is
      the maximum since the last update, cursor the place in the history that was written last (0: no history yet).
    * ``fp8_history`` (3, length) float32: a ring of the amaxes of earlier updates.

    fuse_main_grad: the weight's gradient is not given to autograd but added to ``weight.main_grad`` by the GEMM itself:
    a contiguous float32 or bfloat16 tensor of the weight's shape, which the optimizer side sets before the forward pass
    and clears, as Megatron's does. ``weight.grad`` stays None; but where the weight has the attribute
    ``grad_added_to_main_grad``, that becomes True and autograd receives a gradient without meaning, so that hooks which
    wait for one run.

    Raises TypeError for other dtypes, RuntimeError for shapes or devices that do not fit, all before any kernel runs;
    the constructor ValueError for what is no size or bool, TypeError for what is no recipe.
    """

    plain_class = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: Recipe | None = None,
        auto_update: bool = True,
        fuse_main_grad: bool = False,
    ) -> None:
        check_sizes(in_features=in_features, out_features=out_features)
        check_bools(auto_update=auto_update, fuse_main_grad=fuse_main_grad)
        recipe = recipe_of(recipe)
        super().__init__(in_features, out_features, bias, device, dtype)
        self._make_fp8(recipe, auto_update, fuse_main_grad)

    def reset_parameters(self) -> None:
        """``nn.Linear``'s initialisation of weight and bias; the scaling state starts anew."""
        super().reset_parameters()
        if "fp8_state" in self.__dict__:  # nn.Linear's constructor calls this too
            self.reset_scaling()


_NO_MAIN_GRAD = (None, False)


def linear_layer(layer: Layer) -> _C.LinearLayer:
    """The layer as C++ takes it where it computes with more than one."""
    state = layer.fp8_state
    if state.slots.device != layer.weight.device:
        state.follow(layer.weight)
    main_grad, dummy = (layer.main_grad() if layer.fuse_main_grad else ()) or _NO_MAIN_GRAD
    return _C.LinearLayer(
        layer.matrix, layer.bias, state.slots, state.options, state.memo, layer.training, main_grad, dummy, state.place
    )


def fp8_layers(model: nn.Module) -> dict[str, Layer]:
    """The FP8 layers of a model by name; a layer that occurs twice has its first name."""
    return {name: module for name, module in modules_of(model) if isinstance(module, Layer)}
