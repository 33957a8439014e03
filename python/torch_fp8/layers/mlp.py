"""An MLP in one piece: ``down(f(gate(x)) * up(x))`` or ``down(f(up(x)))`` over FP8 layers, with neither the product nor
the gradients of gate and up ever written in 16 bits. Over frozen layers too, where no gradient is wanted.

The three layers stay what they are: their parameters, recipes and scaling states are used as by their own forwards.
Where one of them needs its own forward, since it has a hook or computes in another way, the MLP runs layer by layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook

from .. import _C
from . import traced
from .dtensor import is_dtensor
from .frozen import ACTIVATIONS as FROZEN_ACTIVATIONS
from .frozen import FrozenLinear, autocast_dtype
from .given import casts_rows, codes_for, codes_in_graph
from .linear import Layer, linear_layer
from .transforms import is_transformed

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu_squared": lambda x: F.relu(x).square(),
}
_CODES = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "xielu": 3, "relu_squared": 4}
NAMES = tuple(_CODES)


def xielu(x: Tensor, alphas: Tensor, beta: float) -> Tensor:
    """alphas[0] x^2 + beta x where x > 0, else alphas[1] (e^x - 1 - x) + beta x (arXiv 2411.13010), rounded once."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    below = wide.clamp(max=0)  # beyond it e^x would be Inf, and its gradient NaN
    y = torch.where(wide > 0, alphas[0] * wide * wide, alphas[1] * (torch.expm1(below) - below)) + beta * wide
    return y.to(x.dtype)


def xielu_alphas(alpha_p: Tensor, alpha_n: Tensor, beta: float) -> Tensor:
    """xielu's two factors of what is trained in their place, both of one element; beta bounds the second from below."""
    p, n = (a.reshape(1).to(torch.promote_types(a.dtype, torch.float32)) for a in (alpha_p, alpha_n))
    return torch.cat([F.softplus(p), beta + F.softplus(n)])


def _by_role(gate: nn.Module | None, up: nn.Module, down: nn.Module) -> dict[str, Any]:
    return {"up": up, "down": down} if gate is None else {"gate": gate, "up": up, "down": down}


def why_apart(gate: nn.Module | None, up: nn.Module, down: nn.Module) -> str:
    """Why these layers cannot run in one piece now; empty where they can. Without a gate it is up that is activated."""
    layers = _by_role(gate, up, down)
    for name, layer in layers.items():
        if not isinstance(layer, Layer):
            return f"{name} is not in FP8"
    for name, layer in layers.items():
        if not layer.fp8_enabled:
            return f"{name} is disabled"
        if has_hooks(layer):
            return f"{name} has hooks, or a forward of its own"
        if layer.recipe != layers["up"].recipe:
            return f"{name} has another recipe than up"
        if layer.training != layers["up"].training:
            return f"{name} and up are not both in training"
        if is_dtensor(layer.weight):
            return f"the weight of {name} is a DTensor"
    if not all(layers["up"].fp8_state.fp8_gemms):
        return "the recipe keeps a GEMM in 16 bits"
    if not torch.compiler.is_compiling() and torch.is_anomaly_enabled():
        return "torch.autograd's anomaly detection reads every gradient"
    return ""


def why_apart_frozen(gate: nn.Module | None, up: nn.Module, down: nn.Module, activation: str) -> str:
    """The same of layers of which up is frozen, as far as it does not depend on what they are given."""
    layers = _by_role(gate, up, down)
    for name, layer in layers.items():
        if getattr(type(layer), "forward", None) is not FrozenLinear.forward:
            return f"{name} is not frozen"
        if any(getattr(layer, how) != getattr(up, how) for how in ("activations", "granularity")):
            return f"{name} is frozen in another way than up"
    if up.activations not in ("token", "static"):
        return f"frozen layers make no codes of a product with activations={up.activations!r}"
    if up.granularity == "block":
        return "frozen layers make no codes of a product for weights with block scales"
    if activation == "xielu":
        return "frozen layers make no codes of a product of xielu"
    return ""


def _can_run_frozen(x: Tensor, gate: nn.Module | None, up: nn.Module, down: nn.Module, activation: str) -> bool:
    """Whether frozen layers take this input in one piece: few rows gain nothing, and gradients are of single layers."""
    if x.is_nested or x.layout != torch.strided or x.dim() == 0 or not casts_rows(x):
        return False  # first, since in decoding the host's time counts
    if is_dtensor(x) or why_apart_frozen(gate, up, down, activation):
        return False
    if is_transformed(x) or (not torch.compiler.is_compiling() and torch.jit.is_tracing()):  # it knows no Tensor?[]
        return False
    layers = _by_role(gate, up, down).values()
    tensors = [x, *(t for layer in layers for t in layer._state() if t is not None)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    return not any(has_hooks(layer) or is_dtensor(layer.weight) for layer in layers)


def _product(x: Tensor, gate: Any, up: Any, f: Callable[[Tensor], Tensor], halves: int) -> Tensor:
    if gate is not None:
        return f(gate(x)) * up(x)
    y = up(x)
    if not halves:
        return f(y)
    of_gate, of_up = y.chunk(2, -1) if halves == 1 else reversed(y.chunk(2, -1))
    return f(of_gate) * of_up


def _frozen(x: Tensor, gate: nn.Module | None, up: nn.Module, down: nn.Module, activation: str, halves: int) -> Tensor:
    layers = list(_by_role(gate, up, down).values())
    weights, scales, biases, slots = zip(*(layer._state() for layer in layers), strict=True)
    find = codes_in_graph if torch.compiler.is_compiling() else codes_for
    how = FROZEN_ACTIVATIONS.index(layers[0].activations)
    return torch.ops.torch_fp8.frozen_mlp(
        x, weights, scales, biases, slots, _CODES[activation], how, autocast_dtype(x), *find(x, *layers[:-1]),
        up_first=halves == 2,
    )  # fmt: skip


class Look:
    """A forward pre-hook (with kwargs) that reads what a layer is given, and changes nothing. A layer that has no other
    hook runs fused all the same; who computes the layer's input within a kernel makes it once more for the look."""

    def __init__(self, wants: Callable[[nn.Module], bool], see: Callable[[Tensor], None]) -> None:
        self.wants, self.see = wants, see

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.wants(module) and (given := args or tuple(kwargs.values())):
            self.see(given[0])

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or pickle of the model has a look that sees nothing."""
        return Look, (_never, _never)


def _never(x: Any) -> bool:
    return False


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward, and than to be looked at."""
    hooks = (module._forward_hooks, module._backward_hooks, module._backward_pre_hooks)
    own = "forward" in module.__dict__ or type(module).__call__ is not nn.Module.__call__
    before = module._forward_pre_hooks
    return own or any(hooks) or has_any_global_hook() or any(not isinstance(h, Look) for h in before.values())


def _show(down: nn.Module, product: Callable[[], Tensor]) -> None:
    """To who looks at the last layer, what the fused kernels gave it."""
    looks = [hook for hook in down._forward_pre_hooks.values() if isinstance(hook, Look) and hook.wants(down)]
    if looks:
        with torch.no_grad():
            made = product()
            for look in looks:
                look.see(made)


def mlp(
    x: Tensor, gate: nn.Module | None, up: nn.Module, down: nn.Module, activation: str, residual: Tensor | None = None,
    *, alphas: Tensor | None = None, beta: float = 0.5, halves: int = 0,
) -> Tensor:  # fmt: skip
    """``down(f(gate(x)) * up(x))``, or ``down(f(up(x)))`` without a gate; plus residual, which has the output's shape.

    halves: without a gate 1 where up makes both, the gate's outputs first, and 2 where the up's come first; else 0.
    x (..., K), result (..., K) of x's dtype, or the autocast dtype. activation: one of ``NAMES``; alphas (2) float32
    and beta are those of ``xielu``."""
    f = ACTIVATIONS[activation] if alphas is None else functools.partial(xielu, alphas=alphas, beta=beta)
    if isinstance(up, FrozenLinear):
        if _can_run_frozen(x, gate, up, down, activation):
            y = _frozen(x, gate, up, down, activation, halves)
        else:
            y = down(_product(x, gate, up, f, halves))
        return y if residual is None else residual + y
    if is_dtensor(x) or why_apart(gate, up, down):
        if residual is not None and not is_dtensor(x) and isinstance(down, Layer):
            _check_residual(residual, x, down)
        y = down(_product(x, gate, up, f, halves))
        return y if residual is None else residual + y
    layers = list(_by_role(gate, up, down).values())
    if torch.compiler.is_compiling() and not torch._dynamo.config.compiled_autograd:
        return _traced(x, layers, activation, residual, alphas, beta, halves)
    given = [linear_layer(layer) for layer in layers]
    first, second = given[0], given[1] if gate is not None else None
    recompute = layers[-1].fp8_state.recompute
    y = _C.mlp(x, residual, first, second, given[-1], activation, recompute, alphas, beta, halves)
    if down._forward_pre_hooks:
        _show(down, lambda: _product(x, gate, up, f, halves))
    return y


def result_dtype(x: Tensor) -> torch.dtype:
    """Of what FP8 layers make of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _check_residual(residual: Tensor, x: Tensor, down: Layer) -> None:
    """As csrc/ops/linear.cpp refuses it, where PyTorch would broadcast or promote it."""
    dtype, shape = result_dtype(x), [*x.shape[:-1], down.out_features]
    if residual.dtype != dtype:
        raise TypeError(f"torch_fp8: the residual is {residual.dtype} but the output is {dtype}; cast it")
    if list(residual.shape) != shape:
        raise RuntimeError(f"torch_fp8: the residual must have the output's shape {shape}, got {list(residual.shape)}")


def _traced(
    x: Tensor, layers: list[Any], activation: str, residual: Tensor | None, alphas: Tensor | None, beta: float,
    halves: int,
) -> Tensor:  # fmt: skip
    calls, tensors = [], []
    beyond = x.requires_grad or (alphas is not None and alphas.requires_grad)
    for layer in layers[:-1]:
        call = traced.call_of(layer, x, x.requires_grad)
        beyond = beyond or call.grad_weight or call.grad_bias
        calls.append(call)
    calls.append(traced.call_of(layers[-1], x, beyond))
    for i, layer in enumerate(layers):
        state = layer.fp8_state
        main_grad, dummy = (layer.main_grad() if layer.fuse_main_grad else ()) or (None, False)
        calls[i] = calls[i]._replace(dummy_grad=dummy)
        codes = (None, None, None) if i == len(layers) - 1 else traced.shared_codes(state, x, calls[i])
        tensors += [layer.matrix, layer.bias, state.slots, state.grad_slots, main_grad, *codes]
    return _Mlp.apply(x, residual, alphas, beta, _CODES[activation], halves, calls, *tensors)


_PER_LAYER = 8  # tensors of a layer among _Mlp's arguments


class _Mlp(torch.autograd.Function):
    """As csrc/mlp.cpp computes it, where torch.compile can see it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, alphas: Tensor | None, beta: float, activation: int, halves: int,
        calls: list[traced.Call], *tensors: Any,
    ) -> Tensor:  # fmt: skip
        layers = [tensors[i : i + _PER_LAYER] for i in range(0, len(tensors), _PER_LAYER)]
        outputs, saved, ctx.kept = [], [], []
        for (weight, bias, slots, grad_slots, main_grad, *codes), call in zip(layers[:-1], calls[:-1], strict=True):
            y, kept = traced.forward(x, weight, bias, slots, tuple(codes), call)
            outputs.append(y)
            saved += kept
            ctx.kept.append(traced.kept_of(x, weight, bias, grad_slots, main_grad, call))
        gate, up = outputs[0], outputs[1] if len(outputs) > 1 else None
        weight, bias, slots, grad_slots, main_grad, *_ = layers[-1]
        down = calls[-1]
        product = torch.ops.torch_fp8.activation_cast(
            gate, up, activation, slots, 0, down.casts, down.history, down.training, down.record, True,
            down.grad_weight, alphas, beta, halves,
        )  # fmt: skip
        factor = gate.chunk(2, -1)[0] if halves else gate
        y, kept = traced.forward(factor, weight, bias, slots, product, down, residual)
        ctx.kept.append(traced.kept_of(gate, weight, bias, grad_slots, main_grad, down))
        ctx.save_for_backward(*saved, *kept, gate, up, alphas)
        ctx.activation, ctx.beta, ctx.halves, ctx.has_residual = activation, beta, halves, residual is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *saved, gate, up, alphas = ctx.saved_tensors
        of = [saved[i : i + 6] for i in range(0, len(saved), 6)]
        kept: list[traced.Kept] = ctx.kept
        dproduct, ddown, dbias = traced.backward(dy, [], of[-1], kept[-1])
        dx: Tensor | None = None
        gradients: list[Tensor | None] = []  # of weight and bias, layer by layer
        outputs = [gate] if up is None else [gate, up]
        codes: Any = ()
        if dproduct is not None:
            calls = [k.call for k in kept]
            codes = torch.ops.torch_fp8.activation_backward_cast(
                dproduct, gate, up, ctx.activation, kept[0].slots, None if up is None else kept[1].slots, 2,
                calls[0].casts, [call.history for call in calls[:-1]], calls[0].training, calls[0].record,
                torch.float32 if any(call.grad_bias for call in calls[:-1]) else None, alphas, ctx.beta,
                halves=ctx.halves,
            )  # fmt: skip
        for i, output in reversed(list(enumerate(outputs))):  # in the order of the engine
            made = dweight = of_bias = None
            if dproduct is not None:
                # The bias's gradient was summed with the casts. A GEMM adds to float32 and bfloat16.
                without_bias = kept[i]._replace(call=kept[i].call._replace(grad_bias=False), bias_dtype=None)
                adds = dx is not None and dx.dtype != torch.float16
                made, dweight, _ = traced.backward(
                    output, list(codes[3 * i : 3 * i + 3]), of[i], without_bias, dx if adds else None
                )
                of_bias = codes[6 + i].to(kept[i].bias_dtype) if kept[i].call.grad_bias else None
            if made is not None:
                dx = made if dx is None else dx + made
            gradients = [dweight, of_bias, *[None] * (_PER_LAYER - 2), *gradients]
        gradients += [ddown, dbias, *[None] * (_PER_LAYER - 2)]
        dalphas = None if alphas is None or dproduct is None else codes[8]
        return (dx, dy if ctx.has_residual else None, dalphas, None, None, None, None, *gradients)
