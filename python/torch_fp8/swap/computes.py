"""Whether a module is a norm or an MLP that can be fused: by what its forward computes, and by no name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.frozen import FrozenLinear
from ..layers.fused import MlpFusion, NormFusion, Xielu
from ..layers.linear import Layer
from ..layers.mlp import ACTIVATIONS, NAMES, why_apart_frozen, xielu, xielu_alphas
from ..layers.norm import Norm
from .probe import IN_HALF, SAMPLES, Probe, Sample, Stub, close, gradients, numbers, owns

MODES = (True, False)  # training and evaluation: a module is fused only if it computes the same in both


def norm_of(module: nn.Module, probe: Probe) -> NormFusion | None:
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    vectors = all(p.dim() == 1 and p.shape == next(iter(parameters.values())).shape for p in parameters.values())
    if not 1 <= len(parameters) <= 2 or not vectors or module._modules or module._buffers:
        return None
    eps = _eps_of(module)
    if eps is None:
        return None
    width = next(iter(parameters.values())).shape[0]
    names = list(parameters)
    gain, bias = names[0], names[1] if len(names) == 2 else None
    for how in (Norm(eps), Norm(eps, gain_offset=1.0), Norm(eps, layer_norm=True), Norm(eps, True, 1.0)):
        fusion = NormFusion(how, gain, bias)
        if all(_is_norm(module, probe, fusion, width, training) for training in MODES):
            return fusion
    return None


def _is_norm(module: nn.Module, probe: Probe, fusion: NormFusion, width: int, training: bool) -> bool:
    assert fusion.gain is not None
    names = [fusion.gain] + ([] if fusion.bias is None else [fusion.bias])
    values = {name: numbers(width, seed=i, dtype=torch.float32) for i, name in enumerate(names)}
    # Any number of dimensions; numbers so small that eps decides, and large ones.
    for size, scale, shift in (((4, width), 1, 0.5), ((2, 3, width), 1e-3, 0), ((1, 2, 2, width), 1e3, 0)):
        x = (scale * numbers(*size, seed=7, dtype=torch.float32) + shift).detach()
        x[..., 0] *= 1 if scale == 1 else 1e3  # an element whose norm is large, too
        x.requires_grad_()
        got = probe.run(module, {}, values, training, x)
        right = _norm(x, values[fusion.gain], None if fusion.bias is None else values[fusion.bias], fusion.how)
        if not close(got, right, 1e-4):
            return False
        leaves = [x, *values.values()]
        for a, b in zip(gradients(got, leaves), gradients(right, leaves), strict=True):
            if not torch.allclose(a, b, 1e-3, 1e-3 * b.abs().max().item()):
                return False
    halves = {name: value.bfloat16() for name, value in values.items()}
    got = probe.run(module, {}, halves, training, numbers(4, width, seed=7, dtype=torch.bfloat16))
    return isinstance(got, Tensor) and got.dtype == torch.bfloat16


def _eps_of(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps", "epsilon", "layer_norm_eps", "norm_eps"):
        eps = getattr(module, name, None)
        if isinstance(eps, float) and 0 <= eps < 1 and math.isfinite(eps):
            return eps
    return None


def _norm(x: Tensor, gain: Tensor, bias: Tensor | None, how: Norm) -> Tensor:
    x = x.double()
    if how.layer_norm:
        x = x - x.mean(-1, keepdim=True)
    n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + how.eps)
    y = n * (gain.double() + how.gain_offset)
    return (y if bias is None else y + bias.double()).float()


def linear_children(module: nn.Module) -> dict[str, Any]:
    return {name: child for name, child in module.named_children() if isinstance(child, nn.Linear | Layer)}


def mlp_of(module: nn.Module, probe: Probe) -> MlpFusion | str | None:
    """A string says why it is none; None: it is nothing like it."""
    layers = linear_children(module)
    if any(p is not None for p in module._parameters.values()):
        return None
    if len(layers) not in (2, 3) or not any(isinstance(layer, Layer | FrozenLinear) for layer in layers.values()):
        return None
    owners = {name: child for name, child in module.named_children() if name not in layers and owns(child)}
    factors = _xielu_of(*owners.popitem(), probe) if len(owners) == 1 else None
    reason: str | None = None
    for down in reversed(layers):
        into = [name for name in layers if name != down]
        sizes = {(layers[name].in_features, layers[name].out_features) for name in into}
        inner = layers[down].in_features
        if len(sizes) != 1 or sizes.pop()[1] not in (inner, 2 * inner):
            continue
        first = _mlp_over(module, probe, layers, into, down, factors, True, SAMPLES[0])
        named = [first.activation] if isinstance(first, MlpFusion) else NAMES  # of large numbers several are one
        found = {first} | {
            _mlp_over(module, probe, layers, into, down, factors, False, sample, named)
            for sample in (*SAMPLES, IN_HALF)
        }
        fusions = [fusion for fusion in found if isinstance(fusion, MlpFusion)]
        if len(found) == 1 and fusions:
            return _why_not_over(fusions[0], layers) or fusions[0]
        reason = reason or next((why for why in found if isinstance(why, str)), None)
    return reason


def _why_not_over(fusion: MlpFusion, layers: dict[str, Any]) -> str:
    gate: Any = None if fusion.gate is None else layers[fusion.gate]
    up, down = layers[fusion.up], layers[fusion.down]
    if isinstance(up, FrozenLinear):
        return why_apart_frozen(gate, up, down, fusion.activation)
    not_fp8 = [name for name, layer in layers.items() if not isinstance(layer, Layer)]
    return f"{not_fp8[0]} is not in FP8" if not_fp8 else ""


def _mlp_over(
    module: nn.Module,
    probe: Probe,
    layers: dict[str, Any],
    into: list[str],
    down: str,
    factors: Xielu | None,
    training: bool,
    sample: Sample,
    named: Sequence[str] = NAMES,
) -> MlpFusion | str | None:
    def drawn(features: int, seed: int) -> Tensor:
        return numbers(
            sample.sequences, sample.tokens, features, seed=seed, dtype=sample.dtype, scale=sample.scale
        )  # fmt: skip

    in_half = sample.dtype is not torch.float64
    x, result = (drawn(n, i) for i, n in enumerate((layers[into[0]].in_features, layers[down].out_features)))
    made = {name: drawn(layers[name].out_features, 2 + i) for i, name in enumerate(into)}
    stubs = {name: Stub(value) for name, value in made.items()} | {down: Stub(result)}
    activations, of_factors = dict(ACTIVATIONS), []
    children: dict[str, Any] = dict(stubs)
    if factors is not None:
        of_factors = [numbers(2, seed=9)]
        children[factors.child] = activations["xielu"] = partial(xielu, alphas=of_factors[0], beta=factors.beta)
    output = probe.run(module, children, {}, training, x)
    if isinstance(output, Exception):
        if sum(p.default is p.empty for p in inspect.signature(type(module).forward).parameters.values()) != 2:
            return None  # it takes more than self and an input
        return f"its forward does not run on its own ({type(output).__name__.strip('_')}: {str(output)[:80]})"
    once = all(len(stub.calls) == 1 and len(stub.calls[0][0]) == 1 and not stub.calls[0][1] for stub in stubs.values())
    if not once or any(stubs[name].calls[0][0][0] is not x for name in into):
        return None
    if output is not result:
        return "its result is not that of its last layer"
    product, leaves = stubs[down].calls[0][0][0], [*made.values(), *of_factors]
    makes_both = layers[into[0]].out_features != layers[down].in_features
    if makes_both and len(into) > 1:
        return None
    for activation, f in activations.items():
        for gate, up, halves in _roles(into, makes_both) if activation in named else ():
            value = _product(f, None if gate is None else made[gate], made[up], halves)
            if not close(product, value, 1e-2 if in_half else 1e-6, _OF_HALF if in_half else 1e-6):
                continue
            if in_half or all(map(close, gradients(product, leaves), gradients(value, leaves))):
                return MlpFusion(gate, up, down, activation, factors if activation == "xielu" else None, halves)
            return "its gradient is not that of what it computes"
    return f"what stands between its layers is none of {', '.join(NAMES)}"


_OF_HALF = 50.0  # in float16 it is asked what overflows; what is small was rounded in other places


def _xielu_of(name: str, module: nn.Module, probe: Probe) -> Xielu | None:
    """Of a child: whether it is xielu, whose slope at 0 may be a buffer's value."""
    parameters = {key: p for key, p in module._parameters.items() if p is not None}
    buffers = {key: b for key, b in module._buffers.items() if b is not None}
    tensors = [*parameters.values(), *buffers.values()]
    if len(parameters) != 2 or any(t.numel() != 1 or t.is_meta for t in tensors) or any(map(owns, module.children())):
        return None
    constants = {key: buffer.detach().to("cpu", torch.float64) for key, buffer in buffers.items()}
    given = {key: numbers(*p.shape, seed=i) for i, (key, p) in enumerate(parameters.items())}
    x = (3 * numbers(4, 16, seed=7)).detach().requires_grad_()
    leaves = [x, *given.values()]
    for beta in dict.fromkeys([*(constant.item() for constant in constants.values()), 0.5]):
        for p, n in (tuple(parameters), tuple(parameters)[::-1]):
            right = xielu(x, xielu_alphas(given[p], given[n], beta), beta)
            results = [probe.run(module, {}, {**given, **constants}, training, x) for training in MODES]
            if all(close(got, right) for got in results) and all(
                map(close, gradients(results[0], leaves), gradients(right, leaves))
            ):
                return Xielu(name, p, n, beta)
    return None


def _product(f: Callable[[Tensor], Tensor], gate: Tensor | None, up: Tensor, halves: int) -> Tensor:
    if halves:
        gate, up = up.chunk(2, -1) if halves == 1 else reversed(up.chunk(2, -1))
    return f(up) if gate is None else f(gate) * up


def _roles(into: Sequence[str], makes_both: bool) -> Iterator[tuple[str | None, str, int]]:
    """gate, up and halves, as mlp() has them."""
    if len(into) == 2:
        yield into[0], into[1], 0
        yield into[1], into[0], 0
    else:
        yield from ((None, into[0], halves) for halves in ((1, 2) if makes_both else (0,)))
