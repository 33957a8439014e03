"""``Linear``: an ``nn.Linear`` whose three GEMMs run in FP8."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _C
from ..recipe import ConstantScaling, DelayedScaling, Recipe
from . import dtensor as parallel
from . import traced
from .dtensor import is_dtensor

SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROLES = ("input", "weight", "grad_output")

# What an FP8 layer has besides buffers and an nn.Linear's attributes. fp8_has_history: which roles have an amax
# history; torch.compile guards on it, so it is read from the device after updates and not in a forward.
_OPTIONS = ("recipe", "auto_update", "fuse_main_grad", "fp8_enabled", "fp8_has_history")

# Every FP8 layer of the process that is alive: where the optimizer hook looks for layers that recorded something.
layers: weakref.WeakSet[Linear] = weakref.WeakSet()


class Linear(nn.Linear):
    """``y = x W^T + b`` with fprop, dgrad and wgrad in FP8 and everything else as in ``nn.Linear``.

    Input ``(..., in_features)``, output ``(..., out_features)``, both of the parameters' dtype (bfloat16, float16 or
    float32) or of the autocast dtype. Any shape and strides; dimensions that are no multiples of 16 are padded inside.

    The scaling state is two buffers that are not part of ``state_dict()`` (see ``torch_fp8.state_dict``):

    * ``fp8_slots`` (3, 4) float32: ``{scale_inv, scale, amax, cursor}`` of input, weight and output gradient. amax is
      the maximum since the last update, cursor the place in the history that was written last (0: no history yet).
    * ``fp8_history`` (3, length) float32: a ring of the amaxes of earlier updates.

    They stay float32 when the module is cast, and move with it.

    fuse_main_grad: the weight's gradient is not given to autograd but added to ``weight.main_grad`` by the GEMM itself:
    a contiguous float32 or bfloat16 tensor of the weight's shape, which the optimizer side sets before the forward pass
    and clears, as Megatron's does. ``weight.grad`` stays None; but where the weight has the attribute
    ``grad_added_to_main_grad``, that becomes True and autograd receives a gradient without meaning, so that hooks which
    wait for one run.

    Raises TypeError for other dtypes, RuntimeError for shapes or devices that do not fit, all before any kernel runs.
    """

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
        super().__init__(in_features, out_features, bias, device, dtype)
        self._make_fp8(DelayedScaling() if recipe is None else recipe, auto_update, fuse_main_grad)

    def _make_fp8(self, recipe: Recipe, auto_update: bool, fuse_main_grad: bool) -> None:
        """Give this nn.Linear what an FP8 layer has besides its parameters."""
        self.recipe = recipe
        self.auto_update = auto_update
        self.fuse_main_grad = fuse_main_grad
        self.fp8_enabled = True
        device = self.weight.device
        self.register_buffer("fp8_slots", torch.empty(len(ROLES), 4, device=device), persistent=False)
        history = torch.empty(len(ROLES), recipe.history_length, device=device)
        self.register_buffer("fp8_history", history, persistent=False)
        self._join()
        self.reset_scaling()

    def _join(self) -> None:
        self._options = self.recipe.options()
        self._memo = _C.LayerMemo()
        self._amax_reduction = None
        self._alias_slots()
        layers.add(self)

    def _alias_slots(self) -> None:
        """The slots once more, for backward under torch.compile. A tensor of its own over the same memory: AOTAutograd
        refuses one that forward changes, as soon as a second forward has run before the first backward."""
        self._grad_slots = self.fp8_slots if self.fp8_slots.is_meta else torch.from_dlpack(self.fp8_slots)

    def _make_plain(self) -> None:
        """Take away what _make_fp8 gave."""
        layers.discard(self)
        for name in ("fp8_slots", "fp8_history"):
            delattr(self, name)
            self._non_persistent_buffers_set.discard(name)
        for name in (*_OPTIONS, "_options", "_memo", "_grad_slots", "_amax_reduction", "_scaling_was_loaded"):
            delattr(self, name)

    def forward(self, input: Tensor) -> Tensor:
        if not self.fp8_enabled:
            return F.linear(input, self.weight, self.bias)
        if is_dtensor(self.weight):
            return parallel.linear(self, input)
        main_grad = self._main_grad() if self.fuse_main_grad else ()
        if torch.compiler.is_compiling():
            return traced.linear(self, input, *main_grad)
        return _C.linear(
            input, self.weight, self.bias, self.fp8_slots, self._options, self._memo, self.training, *main_grad
        )

    def _main_grad(self) -> tuple[Tensor, bool] | tuple[()]:
        """Where the weight's gradient goes, and whether autograd gets one without meaning; nothing if there is none."""
        weight = self.weight
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

    @property
    def used_roles(self) -> int:
        """The roles that took part in training since the last scaling update, or may have, one bit each."""
        return 0b111 if traced.traced_training() else self._memo.used_roles

    def reset_parameters(self) -> None:
        """``nn.Linear``'s initialisation of weight and bias; the scaling state starts anew."""
        super().reset_parameters()
        if "fp8_slots" in self._buffers:  # nn.Linear's constructor calls this too
            self.reset_scaling()

    def reset_scaling(self) -> None:
        """Forget every amax: the next step is scaled by its own tensors, like the first one."""
        self._scaling_was_loaded = False
        self.fp8_has_history = (False,) * len(ROLES)
        self._memo.forget()
        if self.fp8_slots.is_meta:
            return
        constant = isinstance(self.recipe, ConstantScaling)
        bias = self.recipe.bias if constant else 0
        grad_bias = bias - self.recipe.grad_margin if constant else 0
        with torch.no_grad():
            self.fp8_slots.copy_(_C.new_slots(torch.device("cpu"), bias, grad_bias))
            self.fp8_history.zero_()

    def _apply(self, fn: Any, recurse: bool = True) -> Linear:
        # Seen as integers the state is moved by .cuda() and left alone by .bfloat16(), to the bit.
        parallel.make_state_local(self)
        state = {name: self._buffers.pop(name) for name in ("fp8_slots", "fp8_history")}
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(state)
        for name, old in state.items():
            new = fn(old.view(torch.int32))
            if new.dtype != torch.int32:  # Module.type() casts integers too
                new = old.to(new.device).view(torch.int32)
            self._buffers[name] = new.view(torch.float32)
        self._memo.forget()
        self._alias_slots()
        if state["fp8_slots"].is_meta and not self.fp8_slots.is_meta:
            self.reset_scaling()  # to_empty() left garbage
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight" and "_memo" in self.__dict__:
            self._weight_was_set(value)

    def _weight_was_set(self, weight: Any) -> None:
        """FSDP2 sets the sharded parameter and the gathered one in turn, always the same two objects; the values of the
        second change between two steps, and its version does not. It has moved the buffers, too, past ``_apply``."""
        self._memo.forget_weight()
        if is_dtensor(weight):
            self._memo.set_gathered(True)
        if self._grad_slots.data_ptr() != self.fp8_slots.data_ptr():
            self._alias_slots()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        # Other weights came without their scaling state, so the old state says nothing of them; unless
        # torch_fp8.load_state_dict was called first.
        if prefix + "weight" in state_dict and not self._scaling_was_loaded:
            self.reset_scaling()

    def _replicate_for_data_parallel(self) -> Linear:
        raise RuntimeError(
            "torch_fp8: nn.DataParallel copies the layers in every forward, and what the copies record is lost; use "
            "DistributedDataParallel or fully_shard"
        )

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_options", "_memo", "_grad_slots", "_amax_reduction"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._join()

    def _forget_weight(self) -> None:
        """The weight changed in a way that cannot be seen: cast it again."""
        self._memo.forget_weight()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe}"


def fp8_layers(model: nn.Module) -> dict[str, Linear]:
    """The FP8 layers of a model by name; a layer that occurs twice has its first name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
