"""fuse and unfuse: norms, MLPs and the blocks around them computed in fewer passes, in models of any library.

What a module computes is not read off its name: its own forward is run on a few random numbers, with stubs for its
children (probe.py), and only where it computes what the fused module computes does that take its place.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from ..checks import check_bools
from ..layers.frozen import FrozenLinear, frozen_layers
from ..layers.fused import Fused, FusedAttention, FusedBlock, FusedMlp, FusedNorm, fused_class, fused_modules
from ..layers.linear import Layer, fp8_layers
from ..layers.norm import feed
from ..layers.rewired import why_not_rewired
from ..layers.siblings import SIBLINGS
from .attention import check_attention, set_attention, unset_attention
from .computes import linear_children, mlp_of, norm_of
from .probe import Probe
from .wiring import block_of

NOT_FUSED = "_not_fused"  # on a module that fuse looked at and left alone: why


def fuse(model: nn.Module, *, recompute: bool = False, attention: str | None = None) -> nn.Module:
    """Let the norms, MLPs and blocks of a model compute in fewer passes, in place; returns the model.

    A norm makes the FP8 codes of its result for the layers that read it and takes the residual's addition into its
    pass; an MLP casts its product and the gradients of gate and up as they are made; the last GEMM of a block adds the
    residual; an attention turns queries and keys in one launch. Modules stay the same objects with the same parameters,
    names and hooks; ``state_dict()`` is not affected. Losses and gradients differ by rounding: what is cast was never
    rounded to 16 bits.

    Each module's own forward is run on a few numbers with stubs for its children, in training and in evaluation, and
    the module is fused only where it computes what the fused one does: pre-norm and post-norm blocks with RMSNorm or
    LayerNorm, gated and plain MLPs with SiLU, GELU, xIELU or squared ReLU, whose gate and up may be the halves of one
    layer's output. A module with dropout that is larger than 0 is not. ``summary`` says what was fused, and why the
    rest was not. What cannot be fused in a call (a child with hooks or a forward of its own, another dtype, arguments
    that were not foreseen, DTensors) is computed as before.

    The order: ``convert``, then ``fuse``; before ``torch.compile``, DDP, ``fully_shard`` and adapters. What comes later
    may come as it likes: ``disabled`` and ``revert`` leave the norms and blocks fused, whose layers then compute one by
    one. Of a frozen model, before or after ``freeze``, norms and MLPs make the codes that frozen layers read, where
    those are scaled by token or static and no gradient is wanted; the codes are those that the layers would make. After
    another ``convert``, or to fuse what was added, call ``fuse`` again. Whoever changes what a module computes
    (another activation, another factor, a global that its forward reads) calls ``unfuse`` first and ``fuse`` after. A
    write past the version counter (``y.data``, numpy) to a norm's result is not seen by the layers that take its codes.
    A program that a frozen, fused model is exported to for any number of rows hands over no codes; with strict=True it
    serves few rows or many, as its example.

    recompute: keep less between forward and backward: the codes of the fused modules' weights are made again in
        backward and, in eager mode, those that norms and MLPs made. For one micro-batch a step: with several, each
        casts the weights anew. ``unfuse`` takes it back.

    attention: "auto", "fp8_forward", "fp8" or "16bit": the attention's products run so, as in
        :class:`ScaledDotProductAttention`; of transformers' models (whose ``attn_implementation`` becomes "torch_fp8")
        and of ``fp8.Attention``. None: as before. Of a model without FP8 layers this is all that is changed. Attentions
        have the recipe and auto_update of their FP8 layers, as :func:`convert` says; ``DelayedScaling()`` in a model
        without any. One without FP8 layers in its module that ``set_attn_implementation`` alone asked for knows of no
        others until the next ``convert`` or ``fuse``: ``DelayedScaling()`` until then.

    Raises ValueError, with the model as it was, where nothing can be fused, no layer is in FP8, no attention could
    run so, or recompute is no bool."""
    check_bools(recompute=recompute)
    if attention is not None:
        check_attention(model, attention)
    if not fp8_layers(model) and not frozen_layers(model):
        if attention is not None:
            set_attention(model, attention)
            return model
        raise ValueError(
            f"torch_fp8: fuse takes a model with FP8 layers, but {type(model).__name__} has none; call "
            "torch_fp8.convert first"
        )
    found: dict[nn.Module, tuple[type[Fused], type[Fused], Any]] = {}
    reasons: dict[nn.Module, str] = {}
    probe = Probe(model)
    for module in model.modules():
        try:
            kind = None if isinstance(module, Fused) else _fusion_of(module, probe)
        except Exception as error:  # what somebody else's forward does in its backward, or on stubs, is not foreseen
            reasons[module] = f"it cannot be looked at ({type(error).__name__}: {str(error)[:80]})"
            continue
        if not kind:
            continue
        base, fusion = kind
        if isinstance(fusion, str):
            reasons[module] = fusion
            continue
        try:
            found[module] = base, fused_class(base, type(module)), fusion
        except Exception as error:  # somebody else's metaclass or __init_subclass__
            reasons[module] = f"no class derives from its own ({type(error).__name__}: {str(error)[:80]})"
    if not found and not fused_modules(model):
        why = "; ".join(sorted(set(reasons.values()))[:3])
        raise ValueError(
            f"torch_fp8: nothing of {type(model).__name__} can be fused{': ' if why else ''}{why}; fuse takes norms, "
            "MLPs over FP8 layers and the blocks around them"
        )
    for module in model.modules():
        module.__dict__.pop(NOT_FUSED, None)
    for module, reason in reasons.items():
        module.__dict__[NOT_FUSED] = reason
    for module, (base, made, fusion) in found.items():
        module.__class__ = made
        module.__dict__["fp8_fusion"] = fusion
        if base is FusedNorm:
            module.__dict__["fp8_readers"] = ()
    feed_blocks(model)
    if attention is not None:
        set_attention(model, attention)
    if recompute:
        for layer in _layers_of_fused(model):
            layer.fp8_state.keep_codes(False)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Give every fused module of ``model`` the class that it had, in place; returns the model.

    Raises ValueError, with the model as it was, where another class was derived from a fused one (``fully_shard``)."""
    for name, module in fused_modules(model).items():
        if "plain_class" not in type(module).__dict__:
            raise ValueError(
                f"torch_fp8: {name or '(root)'} cannot be unfused: its class {type(module).__name__} was derived from "
                "a fused one; undo that first"
            )
    for layer in _layers_of_fused(model):
        layer.fp8_state.keep_codes(True)
    for module in fused_modules(model).values():
        module.__class__ = cast(Any, type(module).plain_class)
    unset_attention(model)
    for part in model.modules():
        for attribute in ("fp8_fusion", "fp8_readers", NOT_FUSED):
            part.__dict__.pop(attribute, None)
    return model


def _layers_of_fused(model: nn.Module) -> list[Layer]:
    return [layer for module in fused_modules(model).values() for layer in fp8_layers(module).values()]


def feed_blocks(model: nn.Module) -> None:
    """Tell the norms of fused blocks which layers read what they make: those of the module that gets it."""
    for block in model.modules():
        if not isinstance(block, FusedBlock):
            continue
        for step in block.fp8_fusion.steps:
            norm = getattr(block, step.value, None) if step.addend is None else None
            if isinstance(norm, FusedNorm):
                child, width = getattr(block, step.child), next((p.shape[0] for p in norm.parameters(False)), None)
                readers = _readers(child, width)
                feed(readers)
                norm.fp8_readers = tuple(readers or _frozen_readers(child, width))


def _frozen_readers(module: nn.Module, width: int | None) -> list[FrozenLinear]:
    """The same of layers that are frozen: one of them, as which the codes are made."""
    names = [name for siblings in SIBLINGS for name in siblings] + list(_FIRST)
    if isinstance(module, FusedMlp):
        names = [module.fp8_fusion.up]
    children = [getattr(module, name, None) for name in names]
    return [child for child in children if isinstance(child, FrozenLinear) and child.in_features == width][:1]


def _readers(module: nn.Module, width: int | None) -> list[Layer]:
    """The layers of an attention or MLP that take its input: the members of one group, or the one that was seen to take
    it or is named so. A wrong guess costs time and no number: a layer takes codes of the very tensor that it was given,
    or casts."""
    layers = {name: child for name, child in module.named_children() if isinstance(child, Layer)}
    for layer in layers.values():
        group = layer.fp8_state.group
        members = [other for other in layers.values() if other.fp8_state.group is group]
        if group is not None and len(members) > 1 and layer.in_features == width:
            return members
    names = (module.fp8_fusion.up,) if isinstance(module, FusedMlp) else _FIRST
    return [layer for name, layer in layers.items() if name in names and layer.in_features == width][:1]


# Names of layers that take the input of an attention or an MLP alone.
_FIRST = (
    "qkv_proj", "query_key_value", "c_attn", "Wqkv", "in_proj", "qkv", "qkv_linear", "gate_up_proj", "c_fc", "fc1",
    "dense_h_to_4h", "up_proj", "fc_in", "w1",
)  # fmt: skip


@torch.inference_mode(False)
@torch.enable_grad()
def _fusion_of(module: nn.Module, probe: Probe) -> tuple[type[Fused], Any] | None:
    """Which kind of module it would be, and how; a string says why it is none. None: it is of no kind that is ever
    fused."""
    kind: tuple[type[Fused], Any] | None = None
    if (how := norm_of(module, probe)) is not None:
        kind = FusedNorm, how
    elif linear_children(module) and (why := why_not_rewired(type(module))) is not None:
        kind = FusedAttention, why or None
    elif (of_mlp := mlp_of(module, probe)) is not None:
        kind = FusedMlp, of_mlp
    elif (of_block := block_of(module, probe)) is not None:
        kind = FusedBlock, of_block
    if kind is not None and "forward" in module.__dict__:
        return kind[0], "its forward was replaced on the object"
    return kind
