"""Who reads a layer's weight past the layer. If weights are FP8 codes, such code does not compute what it did: T5 casts
its activations to the weight's dtype, Mamba multiplies by a weight itself.

It is told from the bytecode of the modules' forwards, and of the methods that these name: a chain of attributes that
ends in ``.weight``. What reaches a weight by other ways (``getattr``, a list of layers) is not seen.
"""

from __future__ import annotations

import dis
import inspect
import re
from collections.abc import Iterator
from types import CodeType

from torch import nn

# What can be asked of FP8 codes as of any matrix.
_HARMLESS = {"device", "shape", "size", "numel", "is_meta", "ndim", "dim", "requires_grad", "is_cuda"}
_ANY = "[]"


def weights_read(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, str]:
    """For each of the layers whose weight other code reads: whose, as Class.method."""
    found: dict[str, str] = {}
    instances: dict[type[nn.Module], list[str]] = {}
    for name, module in model.named_modules():
        instances.setdefault(type(module), []).append(name)
    for cls, reader, root, chain in _reads(list(instances)):
        path = r"\.".join("[^.]+" if name == _ANY else re.escape(name) for name in chain)
        start = "|".join(re.escape(f"{name}." if name else "") for name in instances[cls])
        pattern = re.compile(f"({start}){path}" if root == "self" else rf"(.*\.)?{path}")
        found.update(dict.fromkeys(filter(pattern.fullmatch, layers), reader))
    return found


def _reads(classes: list[type[nn.Module]]) -> Iterator[tuple[type[nn.Module], str, str, list[str]]]:
    """(class, method, the variable that the chain begins at, attributes before .weight)"""
    names, seen = ["forward"], {"forward"}
    while names:
        method = names.pop()
        for cls in classes:
            found = getattr(cls, method, None)
            function = inspect.unwrap((found.fget if isinstance(found, property) else found) or _nothing)
            code = getattr(function, "__code__", None)
            if code is None or function.__module__ == nn.Module.__module__:
                continue
            for part in _codes(code):
                new = [name for name in part.co_names if name not in seen and not name.startswith("__")]
                names += new
                seen.update(new)
                for root, chain in _chains(part):
                    end = next((i for i, name in enumerate(chain) if name == "weight" and i > 0), None)
                    if end is not None and (end + 1 == len(chain) or chain[end + 1] not in _HARMLESS):
                        yield cls, f"{cls.__name__}.{method}", root, chain[:end]


def _nothing() -> None: ...


def _codes(code: CodeType) -> Iterator[CodeType]:
    """With what is defined within: lambdas, comprehensions."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _chains(code: CodeType) -> Iterator[tuple[str, list[str]]]:
    """Every a.b[i].c of the code: the variable, and the attributes; an index is _ANY."""
    root: str = ""
    chain: list[str] = []
    instructions = list(dis.get_instructions(code))
    for instruction, following in zip(instructions, [*instructions[1:], None]):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chain.append(str(instruction.argval))
        elif chain and _is_index(following):
            chain.append(_ANY)
        elif not _is_index(instruction):
            if chain:
                yield root, chain
            # Some instructions load two variables; the chain begins at the second.
            value = instruction.argval
            root, chain = str(value[-1] if isinstance(value, tuple) and value else value), []


def _is_index(instruction: dis.Instruction | None) -> bool:
    return instruction is not None and (
        instruction.opname == "BINARY_SUBSCR" or (instruction.opname == "BINARY_OP" and instruction.argrepr == "[]")
    )
