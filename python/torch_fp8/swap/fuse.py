"""fuse and unfuse: norms, MLPs and the blocks around them computed in fewer passes, in models of any library.

What a module computes is not read off its name: its own forward is run once on a few random numbers, with stubs for its
children, and only where it computes exactly what the fused module computes does that take its place.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..layers.frozen import FrozenLinear, frozen_layers
from ..layers.fused import (
    BlockFusion,
    Fused,
    FusedAttention,
    FusedBlock,
    FusedMlp,
    FusedNorm,
    MlpFusion,
    NormFusion,
    Step,
    fused_class,
    fused_modules,
)  # fmt: skip
from ..layers.linear import Layer, fp8_layers
from ..layers.mlp import ACTIVATIONS, why_apart_frozen
from ..layers.norm import Norm, feed
from ..layers.rewired import why_not_rewired

NOT_FUSED = "_not_fused"  # on a module that fuse looked at and left alone: why


def fuse(model: nn.Module) -> nn.Module:
    """Let the norms, MLPs and blocks of a model compute in fewer passes, in place; returns the model.

    Call it after ``convert`` or ``freeze``. A norm makes the FP8 codes of its result for the layers that read it and
    takes the residual's addition into its pass; an MLP casts its product and the gradients of gate and up as they are
    made; the last GEMM of a block adds the residual; an attention turns queries and keys in one launch. Modules stay
    the same objects with the same parameters, names and hooks; ``state_dict()`` is not affected. Losses and gradients
    differ by rounding: what is cast was never rounded to 16 bits.

    Each module's own forward is run once on a few numbers with stubs for its children, and the module is fused only
    where it computes what the fused one does: pre-norm and post-norm blocks with RMSNorm or LayerNorm, gated and
    plain MLPs with SiLU or GELU. ``summary`` says what was fused, and why the rest was not. A child with hooks or a
    forward of its own keeps it, and what cannot be fused in a call (another dtype, DTensors) is computed as before.

    Raises ValueError where nothing can be fused; the model is then as it was."""
    found: dict[str, tuple[nn.Module, type[Fused], Any]] = {}
    reasons: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, Fused) or not (kind := _fusion_of(module)):
            continue
        base, fusion = kind
        if isinstance(fusion, str):
            reasons[module] = fusion
        else:
            found[name] = module, base, fusion
    if not found and not fused_modules(model):
        why = "; ".join(sorted(set(reasons.values()))[:3])
        raise ValueError(
            f"torch_fp8: nothing of {type(model).__name__} can be fused{': ' if why else ''}{why}; fuse takes norms, "
            "MLPs over FP8 layers (torch_fp8.convert or torch_fp8.freeze comes first) and the blocks around them"
        )
    for module, reason in reasons.items():
        setattr(module, NOT_FUSED, reason)
    for module, base, fusion in found.values():
        module.__class__ = fused_class(base, type(module))
        fused = cast(Any, module)
        fused.fusion = fusion
        if base is FusedNorm:
            fused.readers = ()
        fused.__dict__.pop(NOT_FUSED, None)
    for block in model.modules():
        if isinstance(block, FusedBlock):
            _feed(block)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Give every fused module of ``model`` the class that it had, in place; returns the model."""
    for name, module in fused_modules(model).items():
        if "plain_class" not in type(module).__dict__:
            raise ValueError(
                f"torch_fp8: {name or '(root)'} cannot be unfused: its class {type(module).__name__} was derived from "
                "a fused one; undo that first"
            )
    for module in fused_modules(model).values():
        module.__class__ = cast(Any, type(module).plain_class)
        for attribute in ("fusion", "readers"):
            module.__dict__.pop(attribute, None)
    return model


def _feed(block: FusedBlock) -> None:
    """Tell the norms of a block which layers read what they make: those of the module that gets it."""
    for step in block.fusion.steps:
        norm = getattr(block, step.value, None)
        if step.addend is not None or not isinstance(norm, FusedNorm):
            continue
        readers = _readers(getattr(block, step.child), norm)
        feed(readers)
        norm.readers = tuple(readers)


def _readers(module: nn.Module, norm: nn.Module) -> list[Layer]:
    """The layers of an attention or MLP that take its input: the members of one group, or the one that is named so. A
    wrong guess costs time and no number: a layer takes codes of the very tensor that it was given, or casts."""
    width = next((p.shape[0] for p in norm.parameters(recurse=False)), None)
    layers = {name: child for name, child in module.named_children() if isinstance(child, Layer)}
    for layer in layers.values():
        group = layer.fp8_state.group
        members = [other for other in layers.values() if other.fp8_state.group is group]
        if group is not None and len(members) > 1 and layer.in_features == width:
            return members
    named = [layer for name, layer in layers.items() if name in _FIRST and layer.in_features == width]
    return named[:1]


# Names of layers that take the input of an attention or an MLP alone.
_FIRST = (
    "qkv_proj", "query_key_value", "c_attn", "Wqkv", "in_proj", "qkv", "qkv_linear", "gate_up_proj", "c_fc", "fc1",
    "dense_h_to_4h", "up_proj", "fc_in", "w1",
)  # fmt: skip


# ---- what a module computes ------------------------------------------------------------------------------------------

_Found = tuple[type[Fused], Any]  # the fusion; a string says why there is none


def _fusion_of(module: nn.Module) -> _Found | None:
    """None where the module is of no kind that is ever fused."""
    if "forward" in module.__dict__:
        return None
    if (how := _norm_of(module)) is not None:
        return FusedNorm, how
    if _linear_children(module) and (why := why_not_rewired(type(module))) is not None:
        return FusedAttention, why or None
    if (of_mlp := _mlp_of(module)) is not None:
        return FusedMlp, of_mlp
    if (of_block := _block_of(module)) is not None:
        return FusedBlock, of_block
    return None


class _Stub(nn.Module):
    """A child that notes what it is given and returns what it was told to."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result = result
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.result


def _with(module: nn.Module, children: dict[str, nn.Module], parameters: dict[str, Tensor] | None = None) -> nn.Module:
    """The module as it is, but for these children and parameters; the module itself is not touched."""
    probe = copy.copy(module)
    probe.__dict__ = dict(module.__dict__)
    probe.__dict__["_modules"] = {**module._modules, **children}
    probe.__dict__["_parameters"] = {**module._parameters, **(parameters or {})}
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        probe.__dict__[hooks] = {}
    return probe


def _random(*size: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64, device="cpu").to(dtype)


def _close(a: Any, b: Tensor, tolerance: float = 1e-6) -> bool:
    return isinstance(a, Tensor) and a.shape == b.shape and torch.allclose(a.to(b.dtype), b, tolerance, tolerance)


def _run(probe: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the module's own forward gives; the error where it fails on stubs."""
    try:
        with torch.no_grad():
            return type(probe).forward(probe, *args, **kwargs)
    except Exception as error:  # somebody else's forward, on what it did not expect
        return error


def _norm_of(module: nn.Module) -> NormFusion | None:
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    vectors = all(p.dim() == 1 and p.shape == next(iter(parameters.values())).shape for p in parameters.values())
    if not 1 <= len(parameters) <= 2 or not vectors or module._modules or module._buffers:
        return None
    eps = _eps_of(module)
    if eps is None:
        return None
    width = next(iter(parameters.values())).shape[0]
    values = {name: _random(width, seed=i, dtype=torch.float32) for i, name in enumerate(parameters)}
    names = list(parameters)
    probe = _with(module, {}, values)
    # Small numbers, too, where eps decides.
    inputs = [scale * _random(4, width, seed=7, dtype=torch.float32) + shift for scale, shift in ((1, 0.5), (1e-3, 0))]
    outputs = [_run(probe, x) for x in inputs]
    gain, bias = names[0], names[1] if len(names) == 2 else None
    for how in (Norm(eps), Norm(eps, gain_offset=1.0), Norm(eps, layer_norm=True), Norm(eps, True, 1.0)):
        expected = [_norm(x, values[gain], None if bias is None else values[bias], how) for x in inputs]
        if all(_close(got, right, 1e-4) for got, right in zip(outputs, expected, strict=True)):
            return NormFusion(how, gain, bias)
    return None


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


def _linear_children(module: nn.Module) -> dict[str, Any]:
    return {name: child for name, child in module.named_children() if hasattr(child, "weight") and _is_linear(child)}


def _is_linear(child: nn.Module) -> bool:
    return isinstance(child, nn.Linear | Layer)


def _mlp_of(module: nn.Module) -> MlpFusion | str | None:
    layers = _linear_children(module)
    if len(layers) not in (2, 3) or len(list(module.parameters(recurse=False))):
        return None
    if not any(isinstance(layer, Layer | FrozenLinear) for layer in layers.values()):
        return None
    down = list(layers)[-1]
    into = list(layers)[:-1]
    if any(layers[name].out_features != layers[down].in_features for name in into):
        return None
    for name, layer in layers.items():
        if not isinstance(layer, Layer | FrozenLinear):
            return f"{name} is not in FP8"
    width, inner = layers[into[0]].in_features, layers[down].in_features
    x, result = _random(3, width, seed=0), _random(3, layers[down].out_features, seed=1)
    made = {name: _random(3, inner, seed=2 + i) for i, name in enumerate(into)}
    stubs = {name: _Stub(value) for name, value in made.items()}
    stubs[down] = _Stub(result)
    output = _run(_with(module, cast(Any, stubs)), x)
    if isinstance(output, Exception):
        return f"its forward does not run on its own ({type(output).__name__})"
    once = all(len(stub.calls) == 1 and len(stub.calls[0][0]) == 1 and not stub.calls[0][1] for stub in stubs.values())
    if not once or any(stubs[name].calls[0][0][0] is not x for name in into):
        return "its layers do not read one input once"
    if output is not result:
        return "its result is not that of its last layer" + (", but of a dropout" if _drops(module) else "")
    product = stubs[down].calls[0][0][0]
    for activation, f in ACTIVATIONS.items():
        for gate, up in _roles(into):
            value = f(made[up]) if gate is None else f(made[gate]) * made[up]
            if _close(product, value):
                of_gate = None if gate is None else layers[gate]
                frozen = isinstance(layers[up], FrozenLinear)
                why = why_apart_frozen(of_gate, layers[up], layers[down]) if frozen else ""
                return why or MlpFusion(gate, up, down, activation)
    return f"what stands between its layers is none of {', '.join(ACTIVATIONS)}"


def _roles(into: Sequence[str]) -> Iterator[tuple[str | None, str]]:
    if len(into) == 1:
        yield None, into[0]
    else:
        yield into[0], into[1]
        yield into[1], into[0]


def _drops(module: nn.Module) -> bool:
    return module.training and any(isinstance(child, nn.Dropout) and child.p > 0 for child in module.modules())


def _block_of(module: nn.Module) -> BlockFusion | str | None:
    """A module that adds what two of its children make to what it was given, with norms of its own around them."""
    children = dict(module.named_children())
    norms = [name for name, child in children.items() if isinstance(child, FusedNorm) or _norm_of(child) is not None]
    others = [
        name for name, child in children.items()
        if name not in norms and (fp8_layers(child) or frozen_layers(child)) and not _is_linear(child)
    ]  # fmt: skip
    if not norms or len(others) != 2 or list(module.parameters(recurse=False)):
        return None
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        return None
    width = next(children[norms[0]].parameters()).shape[0]
    reason: str = ""
    for keep_none in (False, True):
        found = _wiring(module, norms, others, width, keep_none)
        if isinstance(found, BlockFusion):
            return found
        reason = reason or found
    return reason


def _wiring(module: nn.Module, norms: list[str], others: list[str], width: int, keep_none: bool) -> BlockFusion | str:
    """How the block connects its children: found by running it on stubs that tell which value they were given."""
    try:
        signature = inspect.signature(type(module).forward)
    except (TypeError, ValueError):
        return "its forward has no signature"
    parameters = [
        p for p in list(signature.parameters.values())[1:]
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]  # fmt: skip
    takes_rest = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    if not parameters:
        return "its forward takes nothing"
    x = _random(1, 3, width, seed=0)
    made = {name: _random(1, 3, width, seed=1 + i) for i, name in enumerate([*norms, *others])}
    for results in ("tensors", "first is a tuple"):
        stubs = {name: _Stub(value) for name, value in made.items()}
        if results == "first is a tuple":
            stubs[others[0]].result = (made[others[0]], None)
        passed = {
            p.name: _Passed() for p in parameters[1:]
            if not (keep_none and p.default is None and p.name not in _PASSED)
        }  # fmt: skip
        extra = {"_of_a_caller": _Passed()} if takes_rest else {}
        order: list[str] = []
        for name, stub in stubs.items():
            stub.register_forward_pre_hook(_noting(order, name))
        output = _run(_with(module, cast(Any, stubs)), x, **passed, **extra)
        if not isinstance(output, Exception):
            break
    if isinstance(output, Exception):
        return f"its forward does not run on stubs ({type(output).__name__}: {str(output)[:80]})"
    if not isinstance(output, Tensor):
        return "it returns more than one tensor"
    if sorted(order) != sorted(made):
        return "it does not call each of its children once"
    return _steps([p.name for p in parameters], stubs, order, x, made, output, passed, extra)


_PASSED = ("attention_mask", "position_ids", "position_embeddings", "cache", "past_key_values", "layer_past")


class _Passed:
    """An argument of a block, of which nothing is known but to whom it is passed on."""


def _noting(order: list[str], name: str) -> Callable[..., None]:
    return lambda *_: order.append(name)


def _steps(
    parameters: list[str], stubs: dict[str, _Stub], order: list[str], x: Tensor, made: dict[str, Tensor],
    output: Tensor, passed: dict[str, _Passed], extra: dict[str, _Passed],
) -> BlockFusion | str:  # fmt: skip
    values: dict[str, Tensor] = {"x": x}

    def parts_of(t: Any) -> tuple[str, str | None] | None:
        for name, value in values.items():
            if t is value or _close(t, value, 1e-12):
                return name, None
        for a in values:
            for b in values:
                if a != b and _close(t, values[a] + values[b], 1e-12):
                    return a, b
        return None

    steps = []
    for name in order:
        args, kwargs = stubs[name].calls[0]
        tensors: list[tuple[str | None, Tensor]] = [(None, t) for t in args if isinstance(t, Tensor)]
        tensors += [(keyword, t) for keyword, t in kwargs.items() if isinstance(t, Tensor)]
        if len(tensors) != 1 or len(args) > 1:
            return f"{name} takes other arguments than one tensor"
        keyword, given = tensors[0]
        parts = parts_of(given)
        if parts is None:
            return f"what {name} takes is no sum of what the block has"
        passes, rest = [], False
        for key, value in kwargs.items():
            if key == keyword:
                continue
            source = next((of_block for of_block, passed_on in passed.items() if passed_on is value), None)
            if key in extra and value is extra[key]:
                rest = True
            elif source is not None:
                passes.append((key, source))
            elif value is not None:
                return f"{name} gets {key}, which is not what the block was given"
        steps.append(Step(name, *parts, keyword, tuple(passes), rest, isinstance(stubs[name].result, tuple)))
        if parts[1] is not None:
            values[f"{parts[0]} + {parts[1]}"] = given
        values[name] = made[name]
    for count in (2, 3):
        for result in itertools.combinations(values, count):
            if _close(output, torch.stack([values[name] for name in result]).sum(0), 1e-12):
                return BlockFusion(tuple(parameters), tuple(steps), result)
    return "its result is not the sum of the residual and what it computed"
