"""Swap a model's ``nn.Linear`` layers to FP8 and back, and switch them off for a while."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn

from ..checks import check_bools
from ..layers.attention import attentions
from ..layers.classes import fp8_class_of, is_conv1d, plain_class_of
from ..layers.frozen import frozen_layers
from ..layers.linear import Layer, fp8_layers
from ..layers.scaled import scaled_modules
from ..layers.siblings import SIBLINGS, share_input
from ..recipe import Recipe, recipe_of
from ..state import LayerState
from .attention import attach_attentions
from .fuse import feed_blocks
from .select import (
    NOT_FP8,
    TOO_SMALL,
    Filter,
    check_device,
    check_tokens,
    check_types,
    chosen_layers,
    linear_layers,
    some,
    too_small,
    why_not,
)  # fmt: skip


def convert(
    model: nn.Module,
    recipe: Recipe | None = None,
    filter: Filter | Sequence[str] | None = None,
    *,
    tokens: int | None = 8192,
    auto_update: bool = True,
    fuse_main_grad: bool = False,
    linear_types: Iterable[type[nn.Module]] = (),
) -> nn.Module:
    """Make the linear layers of ``model`` FP8 layers, in place; returns the model.

    Takes ``nn.Linear``, subclasses of it that inherit its forward, and transformers' ``Conv1D`` (GPT-2). The layers
    stay the same objects with the same Parameters, names and hooks, and instances of their class: optimizers, tied
    weights and ``state_dict()`` are not affected. An ``nn.Linear`` becomes a :class:`Linear`, a layer of another class
    one of a class that is made of its own. Layers whose names say that they read one tensor (``q_proj``, ``k_proj``,
    ``v_proj``; ``gate_proj``, ``up_proj``) cast it once where they do; see :func:`share_input`.

    FP8 attention of ``fuse``, of transformers' table, of ``fp8.Attention`` and ``fp8.TransformerBlock`` takes recipe
    and auto_update of the first FP8 layer of its module, or of the model where its module has none. Another recipe
    forgets its scales; the same one does not. A ``ScaledDotProductAttention`` of your own keeps what it was made with.

    recipe: how scales are chosen; ``DelayedScaling()`` by default. A layer that is FP8 already takes the new recipe.
    filter: which layers. By default all that FP8 can take, except the output head and what is too small for FP8 to be
        faster. Or a function of (module, name) that returns True for the layers to convert, or a list of names and
        patterns (``"layers.*.mlp.*"``); both choose among layers of any size.
    tokens: for the default filter, how many rows of input (micro-batch x sequence) a forward pass is expected to bring:
        a layer that FP8 would not make faster at that many stays in 16 bits, whatever the device. None: layers of any
        size. A layer that is FP8 already stays so, for somebody chose it; ``revert`` first to choose anew.
    auto_update: let ``optimizer.step()`` update the scales; otherwise call ``torch_fp8.update_scales``.
    fuse_main_grad: add the weights' gradients straight to ``weight.main_grad``; see :class:`Linear`. Not for Conv1D.
    linear_types: subclasses of ``nn.Linear`` with a forward of their own that you vouch for: it computes what
        ``nn.Linear``'s does, but for casts. An FP8 layer's forward takes its place, until ``revert``.

    Raises ValueError where nothing would be converted, a listed name matches no linear layer or one that FP8 cannot
    take, tokens is not positive, or auto_update or fuse_main_grad is no bool; TypeError for another type of filter,
    recipe or tokens, or what is no subclass of ``nn.Linear`` in linear_types; RuntimeError for a layer on a GPU that
    this build cannot run on. The model is then as it was.
    """
    recipe = recipe_of(recipe)
    check_bools(auto_update=auto_update, fuse_main_grad=fuse_main_grad)
    check_tokens(tokens)
    types = check_types(linear_types)
    layers = linear_layers(model)
    cannot = {name: why_not(layer, types) for name, layer in layers.items()}
    left_out = chosen_layers(model, layers, filter, cannot, by_default=lambda layer: too_small(layer, tokens))
    if all(left_out.values()):
        mend = "change the filter"
        if TOO_SMALL.format(tokens) in left_out.values():
            mend = "give tokens if a forward pass brings more, or tokens=None to convert layers of any size"
        raise ValueError(
            f"torch_fp8: no layer of {type(model).__name__} would be converted. It has {len(layers)} linear layers"
            f"{some(left_out)}; {mend}"
        )
    chosen: dict[str, Any] = {name: layer for name, layer in layers.items() if not left_out[name]}
    for device in {layer.weight.device for layer in chosen.values()}:
        check_device(device)
    for name, layer in chosen.items():
        if fuse_main_grad and is_conv1d(layer):
            raise ValueError(
                f"torch_fp8: fuse_main_grad is for weights (out_features, in_features), but {name or '(root)'} is a "
                "Conv1D, whose weight is transposed; convert without it, or leave the layer out by the filter"
            )
    LayerState(recipe, torch.device("meta"))  # a recipe of the user's own may fail here
    classes = {name: fp8_class_of(layer) for name, layer in chosen.items()}

    for name, layer in chosen.items():
        recompute = isinstance(layer, Layer) and layer.fp8_state.recompute
        if isinstance(layer, Layer):
            layer._make_plain()
        layer.__class__ = classes[name]
        layer._make_fp8(recipe, auto_update, fuse_main_grad)
        layer.fp8_state.keep_codes(not recompute)
        layer.fp8_state.model = weakref.ref(model)
        layer.__dict__.pop(NOT_FP8, None)
    for name, layer in layers.items():
        if left_out[name] and not isinstance(layer, Layer):
            setattr(layer, NOT_FP8, left_out[name])
    _share_inputs(model)
    feed_blocks(model)
    attach_attentions(model)
    for attention in attentions(model).values():
        attention.fp8_state.model = weakref.ref(model)
    return model


def _share_inputs(model: nn.Module) -> None:
    """Put layers into groups that cast their input once. A name says nothing for certain, and need not: a layer that
    meets another tensor than its siblings casts for itself."""
    for module in model.modules():
        for names in SIBLINGS:
            children = [child for name in names if isinstance(child := getattr(module, name, None), Layer)]
            alike = {(child.in_features, child.recipe, child.weight.device) for child in children}
            if len(children) > 1 and len(alike) == 1 and all(child.fp8_state.group is None for child in children):
                share_input(children)


def revert(model: nn.Module) -> nn.Module:
    """Make every FP8 layer of ``model`` the ``nn.Linear``, or the layer of another class, that it was, in place;
    returns the model. Scales are forgotten. What ``fuse`` joined stays so, attention in FP8 too, until ``unfuse``.

    Raises ValueError, with the model as it was, where a layer cannot go back: it is frozen, its forward was replaced on
    the object (accelerate's ``device_map``), or another class was derived from its own."""
    _check_not_frozen(model, "revert")
    layers = fp8_layers(model)
    classes = {name: plain_class_of(layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        why = ""
        if "forward" in layer.__dict__:
            why = "its forward was replaced on the object, as accelerate's device_map does; undo that first"
        elif classes[name] is None:
            why = f"its class {type(layer).__name__} was derived from an FP8 layer's; undo that first"
        if why:
            raise ValueError(f"torch_fp8: {name or '(root)'} cannot be reverted: {why}")
    for name, layer in layers.items():
        layer._make_plain()
        layer.__class__ = cast(Any, classes[name])
    return model


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the FP8 layers of ``model`` compute as they did before ``convert``, its attentions in 16 bits,
    and nothing is recorded.

    Raises ValueError where a layer is frozen."""
    _check_not_frozen(model, "disabled")
    modules = list(scaled_modules(model).values())
    before = [module.fp8_enabled for module in modules]
    for module in modules:
        module.fp8_enabled = False
    try:
        yield model
    finally:
        for module, enabled in zip(modules, before, strict=True):
            module.fp8_enabled = enabled


def _check_not_frozen(model: nn.Module, what: str) -> None:
    for name in frozen_layers(model):
        raise ValueError(
            f"torch_fp8: {what} needs 16-bit weights, but {name or '(root)'} is frozen, and its 16-bit weight is gone; "
            "load the model anew, or keep a copy of it before torch_fp8.freeze"
        )
