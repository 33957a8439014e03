"""Where the activations of a decoder are looked at: q, k and v, the input of an FFN's second projection, a layer's
output. They are found by the names that modules have in published code bases, or are named by the user."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from ..checks import modules_of
from ..layers.siblings import SIBLINGS

# Modules below one parent whose outputs are q, k and v; then those that give all three.
_QKV = (*(names for names in SIBLINGS if len(names) == 3), ("q_attn", "kv_attn"))
_FUSED_QKV = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "qkv_linear", "att_proj", "wqkv")
# The second projection of an FFN, and what stands before it below the same parent.
_FFN = (
    ("down_proj", ("up_proj", "gate_up_proj")), ("down", ("up", "gate_up")), ("c_proj", ("c_fc",)), ("w2", ("w1",)),
    ("fc2", ("fc1",)), ("dense_4h_to_h", ("dense_h_to_4h",)), ("fc_out", ("fc_in",)), ("linear2", ("linear1",)),
    ("wo", ("wi", "wi_0")), ("Wo", ("Wi",)), ("lin2", ("lin1",)), ("w3", ("w12",)), ("ff_out", ("ff_proj",)),
)  # fmt: skip
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

Points = Mapping[str, str | Sequence[str]]


class Point(NamedTuple):
    """Some modules whose outputs together, side by side in the last dimension, are one activation; or whose input."""

    kind: str  # "qkv", "ffn", "block", or the user's
    layer: str  # the name of what it is a part of
    modules: tuple[nn.Module, ...]
    is_input: bool

    @property
    def tag(self) -> str:
        return f"{self.kind}/{self.layer or '(root)'}"


def clean(name: str) -> str:
    """A module's name without what compilers and parallel wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within compilers' and parallel wrappers."""
    while True:
        inner = next((model._modules[name] for name in _WRAPPERS if name in model._modules), None)
        if inner is None or len(model._modules) > 1:
            return model
        model = inner


def find_points(model: nn.Module) -> list[Point]:
    """By structure and name. A model may have any of them, or none."""
    found: list[Point] = []
    for name, module in model.named_modules():
        found += _parts_of(clean(name), module)
    blocks = [
        Point("block", clean(name), (module,), False)
        for name, module in _decoder_layers(model)
        if any(True for part, child in module.named_modules() if _parts_of(part, child))
    ]
    return [*found, *blocks]


def _parts_of(name: str, parent: nn.Module) -> list[Point]:
    """Of the modules right below one parent."""
    children = {child: module for child, module in parent._modules.items() if module is not None}
    found = []
    qkv = next((names for names in (*_QKV, *((name,) for name in _FUSED_QKV)) if all(n in children for n in names)), ())
    if qkv and all(_is_projection(children[child]) for child in qkv):
        found.append(Point("qkv", name, tuple(children[child] for child in qkv), False))
    for down, ups in _FFN:
        if down in children and any(up in children for up in ups) and _is_projection(children[down]):
            found.append(Point("ffn", name, (children[down],), True))
            break
    return found


def _is_projection(module: nn.Module) -> bool:
    """A linear layer, whatever wraps it."""
    return any(getattr(getattr(part, "weight", None), "ndim", 0) == 2 for part in module.modules())


def _decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The members of each list of modules that lies in no other. A dict with the keys "0", "1", ... is a list too."""
    lists: list[str] = []
    for name, module in model.named_modules():
        is_list = isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict)
        numbered = is_list and all(key.isdecimal() for key in module._modules)
        if name and numbered and not any(name.startswith(f"{outer}.") for outer in lists):
            lists.append(name)
    if not lists and isinstance(model, nn.Sequential):
        return list(model.named_children())
    return [(f"{name}.{key}", child) for name in lists for key, child in model.get_submodule(name).named_children()]


def named_points(model: nn.Module, points: Points) -> list[Point]:
    """The user's: {kind: pattern or patterns of modules' names}, with ``*`` for any characters. Several patterns of one
    kind match equally many modules, which are taken side by side, first with first. A pattern that ends in ":input"
    means the first argument of its modules, another one their outputs."""
    modules = {clean(name): module for name, module in modules_of(model)}
    found: list[Point] = []
    if not isinstance(points, Mapping):
        raise _not_points(points)
    for kind, given in points.items():
        patterns = [given] if isinstance(given, str) else list(given) if isinstance(given, Sequence) else []
        names = [kind, *patterns]
        if not patterns or not all(isinstance(name, str) for name in names) or not kind or "/" in kind:
            raise _not_points(points)
        is_input = [pattern.endswith(":input") for pattern in patterns]
        matches = [_matching(modules, pattern.removesuffix(":input")) for pattern in patterns]
        if len(set(is_input)) > 1 or len({len(match) for match in matches}) > 1:
            counts = ", ".join(f"{pattern!r}: {len(match)}" for pattern, match in zip(patterns, matches))
            raise ValueError(
                f"torch_fp8: the patterns of points[{kind!r}] must match equally many modules, all their inputs or all "
                f"their outputs, got {counts}; give the parts of one activation in one list, and others another kind"
            )
        for together in zip(*matches, strict=True):
            layer = together[0] if len(together) == 1 else together[0].rpartition(".")[0]
            found.append(Point(kind, layer, tuple(modules[name] for name in together), is_input[0]))
        of_layers = [point.tag for point in found if point.kind == kind]
        if len(set(of_layers)) < len(of_layers):
            raise ValueError(
                f"torch_fp8: points[{kind!r}] gives {len(of_layers)} activations {len(set(of_layers))} names, such as "
                f"{of_layers[0]!r}; give each pattern a kind of its own"
            )
    return found


def _not_points(points: object) -> ValueError:
    return ValueError(f"torch_fp8: points must be {{kind: patterns}} with kinds without '/', got {points!r}")


def _matching(modules: Mapping[str, nn.Module], pattern: str) -> list[str]:
    found = [name for name in modules if name and fnmatch.fnmatchcase(name, pattern)]
    if not found:
        near = difflib.get_close_matches(pattern, modules, 3, 0.3)
        raise ValueError(
            f"torch_fp8: the point {pattern!r} matches no module of the model; {_or_near(near)}see named_modules()"
        )
    return found


def _or_near(near: Sequence[str]) -> str:
    return f"near are {', '.join(near)}; " if near else ""
