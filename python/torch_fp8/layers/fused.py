"""Modules of somebody else's model that compute in fewer passes than they say: a norm, an MLP, the block around them.

``torch_fp8.fuse`` finds them and changes their class to one that derives from their own; parameters, children, names
and hooks stay. What a class here needs to know of its module is plain data in ``fp8_fusion``, so that the module can be
copied and pickled. Whatever does not fit in a call is computed by the class that the module had.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..checks import modules_of
from .mlp import has_hooks, mlp, result_dtype, xielu_alphas
from .norm import Norm, can_norm, norm
from .rewired import rewired


class Fused(nn.Module):
    plain_class: ClassVar[type[nn.Module]]
    fp8_fusion: Any


class NormFusion(NamedTuple):
    how: Norm
    gain: str | None  # names of parameters
    bias: str | None


class FusedNorm(Fused):
    """The layers that read the result are in ``fp8_readers``, beside the children."""

    fp8_fusion: NormFusion
    fp8_readers: tuple[nn.Module, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            return super().forward(*args, **kwargs)
        return _norm_of_sum(self, args[0], None)[0]


def _norm_of_sum(module: FusedNorm, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """The norm of residual + x, and the sum."""
    how, *names = module.fp8_fusion
    gain, bias = (None if name is None else getattr(module, name) for name in names)
    if not _is_plain(x, residual, gain, bias):
        total = x if residual is None else residual + x
        return super(FusedNorm, module).forward(total), total
    return norm(x, gain, bias, how, residual, module.fp8_readers)


def _is_plain(x: Tensor, residual: Tensor | None, *parameters: Tensor | None) -> bool:
    """Whether a norm of these gives a result of x's dtype, and our kernels take them."""
    if any(other is not None and other.dtype != x.dtype for other in (residual, *parameters)):
        return False
    if residual is not None and residual.shape != x.shape:
        return False
    if x.dtype != torch.float32 and torch.is_autocast_enabled(x.device.type):
        return False
    return can_norm(x, residual, *parameters)


class Xielu(NamedTuple):
    """A child that computes xielu of trained factors."""

    child: str
    alpha_p: str  # names of its parameters
    alpha_n: str
    beta: float

    def alphas(self, module: nn.Module) -> Tensor:
        child = getattr(module, self.child)
        return xielu_alphas(getattr(child, self.alpha_p), getattr(child, self.alpha_n), self.beta)


class MlpFusion(NamedTuple):
    gate: str | None  # names of children
    up: str
    down: str
    activation: str  # of layers.mlp.NAMES
    xielu: Xielu | None = None
    halves: int = 0  # where up is both: which comes first, as mlp() has it


class FusedMlp(Fused):
    fp8_fusion: MlpFusion

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        fits = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        if not fits or _others_matter(self, self.fp8_fusion[:3]):
            return super().forward(*args, **kwargs)
        return _mlp_added_to(self, args[0], None)


def _mlp_added_to(module: FusedMlp, x: Tensor, residual: Tensor | None) -> Tensor:
    if residual is not None and (residual.dtype != result_dtype(x) or residual.shape != x.shape):
        return residual + _mlp_added_to(module, x, None)  # where dtypes or shapes meet, PyTorch decides
    gate, up, down, activation, xielu, halves = module.fp8_fusion
    of_gate = None if gate is None else getattr(module, gate)
    factors: dict[str, Any] = {} if xielu is None else {"alphas": xielu.alphas(module), "beta": xielu.beta}
    layers = of_gate, getattr(module, up), getattr(module, down)
    return mlp(x, *layers, activation, residual, halves=halves, **factors)


def _others_matter(module: nn.Module, called: Collection[str | None]) -> bool:
    """Whether a child that the fused forward does not call has hooks, or drops something."""
    return any(
        has_hooks(part) or (part.training and getattr(part, "p", 0) != 0)
        for name, child in module._modules.items() if child is not None and name not in called
        for part in child.modules()
    )  # fmt: skip


INPUT = "."  # a value: what the block was given; no child has such a name


class Step(NamedTuple):
    """A call of a child: with a value, or with the sum of two. A value is ``INPUT``, the name of a child, which stands
    for its result, or "a + b"."""

    child: str
    value: str
    addend: str | None
    keyword: str | None  # by which the child takes it; None: it is the first argument
    positional: tuple[str, ...]  # which of the block's parameters the child gets behind it
    passes: tuple[tuple[str, str], ...]  # and by keyword: the child's, the block's
    constants: tuple[tuple[str, Any], ...]  # and what is the same in every call
    rest: bool  # and the keywords that are no parameters of the block
    first: bool  # a tuple that it returns stands for its first element


class BlockFusion(NamedTuple):
    parameters: tuple[str, ...]  # of the block's forward, what is normalised first
    positional: int  # so many of them may be given without their names
    fixed: tuple[str, ...]  # with another value than their defaults it computes something else
    ignored: tuple[str, ...]  # None, True and False make no difference
    renamed: tuple[str, ...]  # keywords that are no parameters, but that a decorator of the forward may know
    steps: tuple[Step, ...]
    result: tuple[str, ...]  # the values whose sum is the result


class FusedBlock(Fused):
    fp8_fusion: BlockFusion
    fp8_defaults: ClassVar[dict[str, Any]]  # of the parameters of the plain class's forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        fusion = self.fp8_fusion
        parameters, steps, result = fusion.parameters, fusion.steps, fusion.result
        given = {**self.fp8_defaults, **dict(zip(parameters, args)), **kwargs}
        rest = {name: value for name, value in kwargs.items() if name not in parameters}
        if not _fits(self, args, given, kwargs, rest):
            return super().forward(*args, **kwargs)
        values: dict[str, Tensor] = {INPUT: given[parameters[0]]}
        last = steps[-1]
        for step in steps:
            child = getattr(self, step.child)
            if isinstance(child, FusedNorm) and not has_hooks(child):
                if step.addend is None:
                    name, x, residual = step.value, values[step.value], None
                else:
                    name = f"{step.value} + {step.addend}"
                    x, residual = values[step.addend], values[step.value]
                # What stood for x goes on behind the norm's node.
                values[step.child], values[name] = _norm_of_sum(child, x, residual)
                continue
            x = values[step.value] if step.addend is None else _sum(values, step.value, step.addend)
            if step is last and step.child in result and _adds(child):
                return _mlp_added_to(child, x, _sum(values, *(value for value in result if value != step.child)))
            keywords = {name: given[of_block] for name, of_block in step.passes}
            keywords.update(step.constants)
            if step.rest:
                keywords.update(rest)
            others = [given[name] for name in step.positional]
            made = child(x, *others, **keywords) if step.keyword is None else child(**{step.keyword: x}, **keywords)
            values[step.child] = made[0] if step.first and isinstance(made, tuple) else made
        return _sum(values, *result)


def _fits(
    block: FusedBlock, args: tuple[Any, ...], given: dict[str, Any], kwargs: dict[str, Any], rest: dict[str, Any]
) -> bool:
    """Whether these arguments are such as the block was seen with."""
    fusion = block.fp8_fusion
    if len(args) > fusion.positional or any(name in kwargs for name in fusion.parameters[: len(args)]):
        return False
    if any(name not in given for name in fusion.parameters) or not isinstance(given[fusion.parameters[0]], Tensor):
        return False
    if any(given[name] is not block.fp8_defaults[name] for name in fusion.fixed):
        return False
    if any(value is not None and not isinstance(value, bool) for value in (given[name] for name in fusion.ignored)):
        return False
    if rest and (any(name in fusion.renamed for name in rest) or not any(step.rest for step in fusion.steps)):
        return False
    return not _others_matter(block, [step.child for step in fusion.steps])


def _adds(child: Any) -> bool:
    """Whether the last child of a block can add the residual itself."""
    return isinstance(child, FusedMlp) and not has_hooks(child) and not _others_matter(child, child.fp8_fusion[:3])


def _sum(values: dict[str, Tensor], *names: str) -> Tensor:
    total = values[names[0]]
    for i, name in enumerate(names[1:], 2):
        key = " + ".join(names[:i])
        if key not in values:
            values[key] = total + values[name]
        total = values[key]
    return total


class FusedAttention(Fused):
    """An attention whose rotary positions are one launch: the forward of each such class is made of its own."""

    fp8_fusion: None


def fused_class(base: type[Fused], plain: Any) -> type[Fused]:
    """One for each class, as long as somebody holds it."""
    for made in plain.__subclasses__():
        if made.__dict__.get("plain_class") is plain and issubclass(made, base) and "fp8_whole" in made.__dict__:
            return made
    namespace: dict[str, Any] = {"plain_class": plain, "__reduce_ex__": _reduce}
    namespace |= {"__module__": __name__, "__doc__": plain.__doc__}
    if base is FusedBlock:
        parameters = inspect.signature(plain.forward).parameters.values()
        namespace["fp8_defaults"] = {p.name: p.default for p in parameters if p.default is not p.empty}
    if base is FusedAttention:
        namespace["forward"] = rewired(plain.forward)
    # accelerate and FSDP's policies find classes by the names that the model's own code gave them.
    namespace["__qualname__"] = plain.__qualname__
    new: Any = type(plain)(plain.__name__, (base, plain), namespace)
    new.fp8_whole = True  # no __init_subclass__ objected
    return cast(type[Fused], new)


def _reduce(module: Fused, protocol: Any) -> tuple[Any, ...]:
    """Pickle would not find a class that was made here by its name, so it gets the plain one."""
    parts = super(Fused, module).__reduce_ex__(protocol)
    base = next(base for base in (FusedNorm, FusedMlp, FusedBlock, FusedAttention) if isinstance(module, base))
    return _new_module, (base, type(module).plain_class), *parts[2:]


def _new_module(base: type[Fused], plain: type[nn.Module]) -> Fused:
    cls = fused_class(base, plain)
    return cls.__new__(cls)


def fused_modules(model: nn.Module) -> dict[str, Fused]:
    return {name: module for name, module in modules_of(model) if isinstance(module, Fused)}
