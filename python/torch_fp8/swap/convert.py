"""Swap a model's ``nn.Linear`` layers to FP8 and back, and switch them off for a while."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence

from torch import nn

from ..layers.linear import Linear, fp8_layers
from ..layers.siblings import share_input
from ..recipe import DelayedScaling, Recipe
from .select import TOO_SMALL, Filter, check_device, check_tokens, linear_layers, why_left_out


def convert(
    model: nn.Module,
    recipe: Recipe | None = None,
    filter: Filter | Sequence[str] | None = None,
    *,
    tokens: int | None = 8192,
    auto_update: bool = True,
    fuse_main_grad: bool = False,
) -> nn.Module:
    """Make the ``nn.Linear`` layers of ``model`` FP8 layers, in place; returns the model.

    The layers stay the same objects with the same Parameters, names and hooks: optimizers, tied weights and
    ``state_dict()`` are not affected. Layers whose names say that they read one tensor (``q_proj``, ``k_proj``,
    ``v_proj``; ``gate_proj``, ``up_proj``) cast it once where they do; see :func:`share_input`.

    recipe: how scales are chosen; ``DelayedScaling()`` by default. A layer that is FP8 already takes the new recipe.
    filter: which layers. By default all that FP8 can take, except the output head and what is too small for FP8 to be
        faster. Or a function of (module, name) that returns True for the layers to convert, or a list of names and
        patterns (``"layers.*.mlp.*"``); both choose among layers of any size.
    tokens: for the default filter, how many rows of input (micro-batch x sequence) a forward pass is expected to bring:
        a layer that FP8 would not make faster at that many stays in 16 bits, whatever the device. None: layers of any
        size. A layer that is FP8 already stays so, for somebody chose it; ``revert`` first to choose anew.
    auto_update: let ``optimizer.step()`` update the scales; otherwise call ``torch_fp8.update_scales``.
    fuse_main_grad: add the weights' gradients straight to ``weight.main_grad``; see :class:`Linear`.

    Raises ValueError where nothing would be converted, or a listed name matches no linear layer or one that FP8
    cannot take, or tokens is not positive; TypeError for another type of filter, recipe or tokens; RuntimeError for a
    layer on a GPU that this build cannot run on. The model is then as it was.
    """
    recipe = DelayedScaling() if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise TypeError(
            "torch_fp8: recipe must be a DelayedScaling, CurrentScaling or ConstantScaling, got "
            f"{type(recipe).__name__}"
        )
    check_tokens(tokens)
    linears = linear_layers(model)
    left_out = why_left_out(model, linears, filter, tokens)
    if all(left_out.values()):
        found = "; ".join(f"{name or '(root)'}: {why}" for name, why in list(left_out.items())[:5])
        mend = "change the filter"
        if TOO_SMALL.format(tokens) in left_out.values():
            mend = "give tokens if a forward pass brings more, or tokens=None to convert layers of any size"
        raise ValueError(
            f"torch_fp8: no layer of {type(model).__name__} would be converted. It has {len(linears)} linear layers"
            + (f" ({found})" if linears else "")
            + f"; {mend}"
        )
    for device in {module.weight.device for name, module in linears.items() if not left_out[name]}:
        check_device(device)

    for name, module in linears.items():
        if not left_out[name]:
            if isinstance(module, Linear):
                module._make_plain()
            module.__class__ = Linear
            module._make_fp8(recipe, auto_update, fuse_main_grad)
            module.fp8_state.model = weakref.ref(model)
            module.__dict__.pop("_not_fp8", None)
        elif not isinstance(module, Linear):
            module._not_fp8 = left_out[name]
    _share_inputs(model)
    return model


# Names that layers which read one tensor have in the published GPT and Llama code bases, below one module.
_SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("wq", "wk", "wv"), ("to_q", "to_k", "to_v"),
    ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"), ("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"),
    ("gate", "up"),
)  # fmt: skip


def _share_inputs(model: nn.Module) -> None:
    """Put layers into groups that cast their input once. A name says nothing for certain, and need not: a layer that
    meets another tensor than its siblings casts for itself."""
    for module in model.modules():
        for names in _SIBLINGS:
            children = [child for name in names if isinstance(child := getattr(module, name, None), Linear)]
            alike = {(child.in_features, child.recipe, child.weight.device) for child in children}
            if len(children) > 1 and len(alike) == 1 and all(child.fp8_state.group is None for child in children):
                share_input(children)


def revert(model: nn.Module) -> nn.Module:
    """Make every FP8 layer of ``model`` the ``nn.Linear`` it was, in place; returns the model. Scales are forgotten."""
    for layer in fp8_layers(model).values():
        layer._make_plain()
        layer.__class__ = nn.Linear
    return model


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the FP8 layers of ``model`` compute as ``nn.Linear`` does, and record nothing."""
    layers = list(fp8_layers(model).values())
    before = [layer.fp8_enabled for layer in layers]
    for layer in layers:
        layer.fp8_enabled = False
    try:
        yield model
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.fp8_enabled = enabled
