"""The layer whose weight is E4M3 for good: for inference, and under adapters that are trained. ``swap/freeze.py`` says
how a model gets it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function

from .. import _C
from ..checks import check_sizes, modules_of
from ..format import BLOCK, E4M3
from .given import codes_for, codes_in_graph

#: How the input is quantised; the index is what the op takes.
ACTIVATIONS = ("none", "static", "tensor", "token")

#: How many elements of the weight share a scale: an output channel, all, or a block of 128 x 128.
WEIGHTS = ("channel", "tensor", "block")


class FrozenState(nn.Module):
    """A module some of whose buffers are FP8 for good: they keep their dtype when the module is cast, and no state of
    another dtype is loaded into them."""

    def fp8_state(self) -> dict[str, torch.dtype]:
        """The dtypes of those buffers, E4M3 or float32; one of them may be None."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenState:
        # Seen as integers codes and scales are moved by .cuda() and left alone by .bfloat16(), to the bit.
        state = {name: self._buffers.pop(name) for name in self.fp8_state()}
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(state)
        for name, old in state.items():
            if old is not None:
                integer = torch.uint8 if old.dtype == E4M3 else torch.int32
                new = fn(old.view(integer))
                if new.dtype != integer:  # Module.type() casts integers too
                    new = old.to(new.device).view(integer)
                self._buffers[name] = new.view(old.dtype)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Pickle, other than torch.save, does not know FP8.
        codes = {name: self.get_buffer(name).view(torch.uint8) for name in self._codes()}
        return {**self.__dict__, "_buffers": {**self._buffers, **codes}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buffers.update({name: self.get_buffer(name).view(E4M3) for name in self._codes()})

    def _codes(self) -> list[str]:
        return [name for name, dtype in self.fp8_state().items() if dtype == E4M3]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool,
        missing: list[str], unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        # A copy would cast what is not FP8, unscaled and without saturation; and codes whose scales do not fit must not
        # take the place of those whose scales stay.
        for name, dtype in self.fp8_state().items():
            value, own = state_dict.get(prefix + name), self._buffers.get(name)
            if isinstance(value, Tensor) and value.dtype != dtype:
                errors.append(
                    f"torch_fp8: {prefix}{name} must be {dtype}, got {value.dtype}; load 16-bit weights before "
                    "torch_fp8.freeze"
                )
                return
            if isinstance(value, Tensor) and own is not None and value.shape != own.shape:
                errors.append(
                    f"torch_fp8: size mismatch for {prefix}{name}: expected {list(own.shape)}, got "
                    f"{list(value.shape)}; freeze the model as the one was that this state is of"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


class FrozenLinear(FrozenState, nn.Linear):
    """``y = x W^T + b`` of an E4M3 weight that is not trained. ``freeze`` and ``load_pretrained`` make these.

    Input (..., in_features), output (..., out_features) of the input's dtype or of the autocast dtype. All state is
    buffers, and all of it is in ``state_dict()``:

    * ``weight`` (out_features, in_features) float8_e4m3fn
    * ``weight_scale`` float32, the multiplier: of 1 element, (out_features, 1), or
      (ceil(out_features / 128), ceil(in_features / 128))
    * ``input_slot`` (1, 4) float32, with static activations only: ``{scale_inv, scale, 0, 0}``, where scale_inv is
      what checkpoints call ``input_scale``
    * ``bias`` (out_features,), or None

    Weight and scales keep their dtype when the module is cast, and move with it; the bias is cast.

    granularity: how many elements of the weight share a scale: "tensor", "channel" or "block".
    activations: how the input is quantised. "token": by each row's own amax or, where the weight has block scales, by
    that of each 128 columns of a row; "tensor": by the whole input's; "static": by ``input_slot``; "none": not at all,
    the weight alone is FP8 (W8A16).
    Inputs of up to 16 rows (8, of layers with more than 8192 outputs) are never quantised, since the time there is that
    of reading the weight. Nor are those of layers with block scales and other activations than "token", or whose
    in_features is no multiple of 128.

    The input gets its gradient, so that adapters (LoRA) train over a frozen model: ``dy W``, by an FP8 GEMM too where
    dy has more than 32 rows and activations is not "none"; each row of dy is scaled by its own amax. Weight, scales
    and bias get none.

    It is an ``nn.Linear`` for code that looks for linear layers, peft among it, though its weight is no Parameter. The
    constructor makes a layer of zeros to load a state into. Raises RuntimeError for an input of a wrong shape, and
    where a gradient is asked of anything but the input, in forward mode or twice (``create_graph=True``).
    """

    #: What peft makes adapters of this layer in; without it that would be the weight's FP8.
    compute_dtype = torch.float32

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None  # type: ignore[assignment]  # nn.Linear's are Parameters
    input_slot: Tensor | None

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
        nn.Module.__init__(self)  # nn.Linear's would make a Parameter
        check_sizes(in_features=in_features, out_features=out_features)
        check_choices(activations, weight)
        codes = torch.zeros(out_features, in_features, device=device, dtype=E4M3)
        scale = torch.ones(scale_shape(weight, out_features, in_features), device=device, dtype=torch.float32)
        slot = new_slot(1.0, codes.device) if activations == "static" else None
        zeros = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self._make_frozen(codes, scale, zeros, slot, activations, weight)

    def _make_frozen(
        self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, input_slot: Tensor | None, activations: str,
        granularity: str,
    ) -> None:  # fmt: skip
        self.out_features, self.in_features = weight.shape
        self.activations = activations
        self.granularity = granularity
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.register_buffer("input_slot", input_slot)

    @property
    def quantises_input(self) -> bool:
        """Whether inputs of many rows are computed with in FP8: what ``activations`` asks for, the weight may not
        allow."""
        return quantises_input(self.activations, self.granularity, self.in_features)

    def fp8_state(self) -> dict[str, torch.dtype]:
        return {"weight": E4M3, "weight_scale": torch.float32, "input_slot": torch.float32}

    def reset_parameters(self) -> None:
        """Raises RuntimeError: the values of codes come from a checkpoint or a 16-bit weight."""
        raise RuntimeError(
            "torch_fp8: a FrozenLinear has no parameters to reset; load a state into it, or reset the 16-bit layer "
            "before torch_fp8.freeze"
        )

    def forward(self, input: Tensor) -> Tensor:
        state = self._state()
        arguments = (input, *state, ACTIVATIONS.index(self.activations), autocast_dtype(input))
        # What takes part in Python (the compiler, a mode, a subclass) is shown Python's op; all others go through the
        # dispatcher too, past half of the host's time.
        if torch.compiler.is_compiling():
            return torch.ops.torch_fp8.frozen_linear(*arguments, *codes_in_graph(input, self))
        if has_torch_function((input, *state)):
            return torch.ops.torch_fp8.frozen_linear(*arguments)
        if codes := codes_for(input, self):
            return torch.ops.torch_fp8.frozen_linear(*arguments, *codes)
        return _C.frozen_linear(*arguments)

    def _state(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        buffers = self._buffers  # not by nn.Module.__getattr__, which would cost a third of the call
        try:
            state = buffers["weight"], buffers["weight_scale"], buffers["bias"], buffers["input_slot"]
            return state  # type: ignore[return-value]  # the first two are never None
        except KeyError:  # one of them was parametrised, or made a Parameter
            return self.weight, self.weight_scale, self.bias, self.input_slot

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "granularity" not in self.__dict__:  # of an older version
            self.granularity = _granularity_of(self.weight_scale, self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"activations={self.activations}, weight={self.granularity}"
        )


def frozen_layers(model: nn.Module) -> dict[str, FrozenLinear]:
    """The frozen layers of a model by name; a layer that occurs twice has its first name."""
    return {name: module for name, module in modules_of(model) if isinstance(module, FrozenLinear)}


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """What autocast asks an output for; None where it asks for nothing."""
    device = input.device.type
    has_autocast = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if has_autocast else None


def _granularity_of(weight_scale: Tensor, out_features: int) -> str:
    """What the scale's shape tells; of one output, a channel's is a block's too."""
    if weight_scale.dim() < 2:
        return "tensor"
    return "channel" if weight_scale.shape == (out_features, 1) else "block"


def scale_shape(weight: str, out_features: int, in_features: int) -> tuple[int, ...]:
    """Of ``weight_scale``."""
    blocks = (-(-out_features // BLOCK), -(-in_features // BLOCK))
    return {"tensor": (1,), "channel": (out_features, 1), "block": blocks}[weight]


def new_slot(input_scale: float, device: torch.device) -> Tensor:
    return torch.tensor([[input_scale, 1 / input_scale, 0, 0]], dtype=torch.float32, device=device)


def quantises_input(activations: str, weight: str, in_features: int) -> bool:
    """Whether inputs are quantised where their rows are many enough; how many outputs there are does not count then."""
    return _C.is_input_quantized(_MANY_ROWS, 1, in_features, weight, activations)


_MANY_ROWS = 1 << 20


def check_pair(activations: str, weight: str) -> None:
    """Raise ValueError for what no layer can be made to compute. Checkpoints of others may hold it, and are read."""
    check_choices(activations, weight)
    if activations != "none" and not quantises_input(activations, weight, BLOCK):
        raise ValueError(
            f'torch_fp8: weight="{weight}" computes with inputs by token or in 16 bits, got '
            f'activations="{activations}", which would leave them in 16 bits; take activations="token" or "none", or '
            'weight="tensor" or "channel"'
        )


def check_choices(activations: str, weight: str) -> None:
    for what, value, choices in (("activations", activations, ACTIVATIONS), ("weight", weight, WEIGHTS)):
        if value not in choices:
            raise ValueError(f"torch_fp8: {what} must be one of {', '.join(choices)}, got {value!r}")
