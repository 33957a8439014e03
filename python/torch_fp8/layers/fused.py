"""Modules of somebody else's model that compute in fewer passes than they say: a norm, an MLP, the block around them.

``torch_fp8.fuse`` finds them and changes their class to one that derives from their own; parameters, children, names
and hooks stay. What a class here needs to know of its module is plain data in ``fusion``, so that the module can be
copied and pickled. Whatever does not fit in a call is computed by the class that the module had.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .mlp import has_hooks, mlp
from .norm import Norm, can_norm, norm
from .rewired import rewired


class Fused(nn.Module):
    plain_class: ClassVar[type[nn.Module]]
    fusion: Any


class NormFusion(NamedTuple):
    how: Norm
    gain: str | None  # names of parameters
    bias: str | None


class FusedNorm(Fused):
    """The layers that read the result are in ``readers``, beside the children."""

    fusion: NormFusion
    readers: tuple[nn.Module, ...]

    def forward(self, x: Tensor) -> Tensor:
        return self.of_sum(x, None)[0]

    def of_sum(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of residual + x, and the sum."""
        how, *names = self.fusion
        gain, bias = (None if name is None else getattr(self, name) for name in names)
        if not _is_plain(x, residual, gain, bias):
            total = x if residual is None else residual + x
            return super().forward(total), total
        return norm(x, gain, bias, how, residual, self.readers)


def _is_plain(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a norm of these gives a result of x's dtype, and our kernels take them."""
    if any(other is not None and other.dtype != x.dtype for other in others):
        return False
    if x.dtype != torch.float32 and torch.is_autocast_enabled(x.device.type):
        return False
    return can_norm(x, *others)


class MlpFusion(NamedTuple):
    gate: str | None  # names of children
    up: str
    down: str
    activation: str  # of layers.mlp.ACTIVATIONS


class FusedMlp(Fused):
    fusion: MlpFusion

    def forward(self, x: Tensor) -> Tensor:
        return self.add_to(x, None)

    def add_to(self, x: Tensor, residual: Tensor | None) -> Tensor:
        gate, up, down, activation = self.fusion
        of_gate = None if gate is None else getattr(self, gate)
        return mlp(x, of_gate, getattr(self, up), getattr(self, down), activation, residual)


class Step(NamedTuple):
    """A call of a child: with a value, or with the sum of two. A value is "x", what the block was given, the name of a
    child, which stands for its result, or "a + b"."""

    child: str
    value: str
    addend: str | None
    keyword: str | None  # by which the child takes it; None: it is the first argument
    passes: tuple[tuple[str, str], ...]  # what else the child gets: its keyword, the block's parameter
    rest: bool  # and the keywords that are no parameters of the block
    first: bool  # its result is the first of what it returns


class BlockFusion(NamedTuple):
    parameters: tuple[str, ...]  # of the block's forward, what is normalised first
    steps: tuple[Step, ...]
    result: tuple[str, ...]  # the values whose sum is the result


class FusedBlock(Fused):
    fusion: BlockFusion

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        parameters, steps, result = self.fusion
        given = dict(zip(parameters, args))
        given.update(kwargs)
        known = {name for step in steps for _, name in step.passes}
        rest = {name: value for name, value in given.items() if name not in parameters}
        unknown = [given[name] for name in parameters[1:] if name in given and name not in known]
        takes_rest = any(step.rest for step in steps)
        if len(args) > len(parameters) or any(_says(value) for value in unknown) or (rest and not takes_rest):
            return super().forward(*args, **kwargs)
        values: dict[str, Tensor] = {"x": given[parameters[0]]}
        last = steps[-1]
        for step in steps:
            child = getattr(self, step.child)
            if isinstance(child, FusedNorm) and not has_hooks(child):
                if step.addend is None:
                    y, total = child.of_sum(values[step.value], None)
                else:
                    y, total = child.of_sum(values[step.addend], values[step.value])
                name = step.value if step.addend is None else f"{step.value} + {step.addend}"
                values[step.child], values[name] = y, total  # what stood for x goes on behind the norm's node
                continue
            x = values[step.value] if step.addend is None else self._sum(values, step.value, step.addend)
            if step is last and step.child in result and isinstance(child, FusedMlp) and not has_hooks(child):
                return child.add_to(x, self._sum(values, *(value for value in result if value != step.child)))
            keywords = {name: given[of_block] for name, of_block in step.passes if of_block in given}
            if step.rest:
                keywords.update(rest)
            made = child(x, **keywords) if step.keyword is None else child(**{step.keyword: x}, **keywords)
            values[step.child] = made[0] if step.first else made
        return self._sum(values, *result)

    @staticmethod
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

    fusion: None


def _says(value: Any) -> bool:
    """Whether an argument that the block passes to no child may still mean something to it."""
    return value is not None and value is not False


def fused_class(base: type[Fused], plain: Any) -> type[Fused]:
    """One for each class, as long as somebody holds it."""
    for made in plain.__subclasses__():
        if made.__dict__.get("plain_class") is plain and issubclass(made, base):
            return made
    namespace: dict[str, Any] = {"plain_class": plain, "__reduce_ex__": _reduce}
    namespace |= {"__module__": __name__, "__doc__": plain.__doc__}
    if base is FusedAttention:
        namespace["forward"] = rewired(plain.forward)
    new: type[Fused] = type(plain)(f"Fused{plain.__name__}", (base, plain), namespace)
    return new


def _reduce(module: Fused, protocol: Any) -> tuple[Any, ...]:
    """Pickle would not find a class that was made here by its name, so it gets the plain one."""
    parts = super(Fused, module).__reduce_ex__(protocol)
    base = next(base for base in (FusedNorm, FusedMlp, FusedBlock, FusedAttention) if isinstance(module, base))
    return _new_module, (base, type(module).plain_class), *parts[2:]


def _new_module(base: type[Fused], plain: type[nn.Module]) -> Fused:
    cls = fused_class(base, plain)
    return cls.__new__(cls)


def fused_modules(model: nn.Module) -> dict[str, Fused]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Fused)}
