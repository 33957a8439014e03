"""FP8 attention in transformers' models: ``attn_implementation="torch_fp8"``, an entry of its table of attentions."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.attention import AttentionState, ScaledDotProductAttention, attentions
from ..layers.linear import Layer, fp8_layers
from ..layers.modes import MODES

NAME = "torch_fp8"
_CHILD = "fp8_attention"
# What neither FP8 attention nor PyTorch's computes, by the name under which a model asks for it, and an attribute of
# the modules that do. Indices say which keys a query sees, which such models tell "sdpa" by the mask.
_NOT_COMPUTED = {
    "softcap": "attn_logit_softcapping",
    "s_aux": "sinks",
    "sinks": "sink_proj",
    "indices": "indexer",
    "block_indices": "indexer",
}
_BEFORE = "_fp8_attention_before"  # on a model: the implementation that set_attention replaced
_MODE_BEFORE = "_mode_before"  # on an attention: the mode that it replaced


def enter_table() -> None:
    """Once, when transformers' table is there."""
    modeling, masking = (sys.modules.get(f"transformers.{name}") for name in ("modeling_utils", "masking_utils"))
    interface, masks = (
        getattr(module, name, None)
        for module, name in ((modeling, "AttentionInterface"), (masking, "AttentionMaskInterface"))
    )
    if interface is None or masks is None:
        return  # of a transformers that has no such table yet
    interface.register(NAME, attention_forward)
    masks.register(NAME, functools.partial(_mask, masks()["sdpa"]))


def _mask(
    of_sdpa: Any, *, q_length: int, kv_length: int, q_offset: Any = 0, attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True, local_size: int | None = None, **kwargs: Any,
) -> Tensor | None:  # fmt: skip
    """No mask where causal order is all that it would say; that of ``"sdpa"`` otherwise, which in a trace of older
    versions of PyTorch is always there."""
    if q_length != kv_length and getattr(kwargs.get("config"), "num_kv_shared_layers", None):
        # Layers that share keys (Gemma 4) leave queries out, of the mask too if there is one: which, only that says.
        allow_is_causal_skip = False
    is_whole = isinstance(q_offset, int) and q_offset == 0 and q_length == kv_length
    in_window = local_size is None or kv_length < local_size
    if torch.compiler.is_compiling() and allow_is_causal_skip and attention_mask is None and is_whole and in_window:
        return None
    return of_sdpa(
        q_length=q_length, kv_length=kv_length, q_offset=q_offset, attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip, local_size=local_size, **kwargs,
    )  # fmt: skip


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query (batch, heads, tokens, head_dim), result (batch, tokens, heads, head_dim). With a
    mask, dropout, a position bias, one query, or keys of a cache, it is what ``"sdpa"`` computes, in 16 bits."""
    asked = (name for name in _NOT_COMPUTED if kwargs.get(name) is not None)
    _check_computed(module, asked, 'set attn_implementation="eager"')
    attention = getattr(module, _CHILD, None)
    if attention is None:
        attention = _attach(module)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    of_cache = key.shape[2] != query.shape[2]
    if causal and of_cache and attention_mask is None and getattr(module, "is_kv_shared_layer", False):
        queries, keys = query.shape[2], key.shape[2]  # the last queries, as _mask has it
        seen = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        attention_mask = seen[None, None]
    is_one = query.shape[2] == 1  # of a prompt of one token; later ones come with keys of a cache
    if attention_mask is not None or dropout > 0 or is_one or of_cache or kwargs.get("position_bias") is not None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        why = "keys of a cache" if of_cache else "there is one query" if is_one else "it has a mask"
        why = "it has dropout" if dropout > 0 and not of_cache else why
        attention.note("16bit", why)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    made = attention(query, key, value, is_causal=causal, scale=scaling, enable_gqa=True)
    return made.transpose(1, 2).contiguous(), None


def _check_computed(module: nn.Module, asks: Iterable[str], mend: str) -> None:
    for name in asks:
        raise ValueError(
            f"torch_fp8: {type(module).__name__} asks its attention for {name}, which neither FP8 attention nor "
            f"PyTorch's computes; {mend}"
        )


def _follows_sdpa(kind: type[nn.Module]) -> bool:
    """Whether models with attentions of this class are written for ``"sdpa"``, whose rules ``attention_forward``
    follows: where there is no mask, ``is_causal`` says which keys a query sees. Others count on a mask, and some have
    attentions of decoders that say they are not causal."""
    for base in kind.__mro__:
        here = vars(sys.modules[base.__module__]).values()
        models = [c for c in here if hasattr(c, "_supports_sdpa") and c.__module__ == base.__module__]
        if models:
            return any(model._supports_sdpa for model in models)
    return True


def _check_follows_sdpa(module: nn.Module, mend: str) -> None:
    if not _follows_sdpa(type(module)):
        raise ValueError(
            f'torch_fp8: {type(module).__name__} belongs to a model that does not support transformers\' "sdpa" '
            f"(_supports_sdpa), whose rules FP8 attention follows; {mend}"
        )


def _attach(module: nn.Module, mode: str = "auto") -> ScaledDotProductAttention:
    _check_follows_sdpa(module, 'set attn_implementation="eager"')
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "torch_fp8: FP8 attention has no scaling state yet, and none can be made while a graph is traced; call "
            "torch_fp8.fuse(model, attention=...) or torch_fp8.convert(model), or the model once, before torch.compile"
        )
    attention = ScaledDotProductAttention(mode=mode).goes_with(module)
    attention.follows_layers = True
    _follow(attention)
    attention.train(module.training)
    setattr(module, _CHILD, attention)
    return attention


def _follow(attention: ScaledDotProductAttention, other: Layer | None = None) -> None:
    """An attention that was given no recipe of its own is scaled as the first FP8 layer that it goes with; as the other
    one where none of those is FP8, for its recipe is at least one that somebody chose for this model."""
    owners = [owner for owner in attention.fp8_owners.found() if isinstance(owner, nn.Module)]
    layer = next((layer for owner in owners for layer in fp8_layers(owner).values()), other)
    if layer is None or not attention.follows_layers:
        return
    before = attention.fp8_state
    if layer.recipe != before.recipe:  # otherwise what its scales learned holds
        attention.fp8_state = AttentionState(layer.recipe, before.slots.device, before.shared_scale, before.p_scale)
        attention.settle()
    attention.auto_update = layer.auto_update
    attention.fp8_state.model = layer.fp8_state.model or before.model


def _follow_layers(model: nn.Module) -> None:
    other = next(iter(fp8_layers(model).values()), None)
    for attention in attentions(model).values():
        _follow(attention, other)


def _attentions_of_transformers(model: nn.Module) -> list[nn.Module]:
    return [
        module
        for module in model.modules()
        if hasattr(module, "is_causal") and hasattr(getattr(module, "config", None), "_attn_implementation")
    ]


def attach_attentions(model: nn.Module) -> None:
    """Give a state to the attentions of a model whose config asks for this implementation, and to all that follow the
    model's layers their recipe."""
    for module in _attentions_of_transformers(model):
        is_asked = module.config._attn_implementation == NAME and getattr(module, _CHILD, None) is None  # type: ignore[union-attr]
        if is_asked and _follows_sdpa(type(module)):  # forward refuses the others
            _attach(module)
    _follow_layers(model)


def check_attention(model: nn.Module, mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"torch_fp8: attention must be one of {', '.join(MODES)}, got {mode!r}")
    if not _ours(model) and not _attentions_of_transformers(model):
        raise ValueError(
            f"torch_fp8: {type(model).__name__} has no attention that could run with attention={mode!r}: neither "
            "fp8.Attention nor one that asks transformers' table of attentions"
        )
    for module in _attentions_of_transformers(model):
        asks = (name for name, attribute in _NOT_COMPUTED.items() if getattr(module, attribute, None) is not None)
        _check_computed(module, asks, "call fuse without attention")
        _check_follows_sdpa(module, "call fuse without attention")


def why_idle(module: nn.Module) -> str:
    """Why an attention of transformers' does not ask ours any more; empty where it does, or never did."""
    if getattr(module, _CHILD, None) is None or module.config._attn_implementation == NAME:  # type: ignore[union-attr]
        return ""
    return f'not asked: attn_implementation is "{module.config._attn_implementation}"'  # type: ignore[union-attr]


def set_attention(model: nn.Module, mode: str) -> None:
    """The attentions of a model run with this mode: those of transformers' models, and our own."""
    theirs = _attentions_of_transformers(model)
    for root in _roots(model) if theirs else ():
        before = root.config._attn_implementation
        root.set_attn_implementation(NAME)
        root.__dict__.setdefault(_BEFORE, before)
    for module in theirs:
        if getattr(module, _CHILD, None) is None:
            _attach(module)
    _follow_layers(model)
    for attention in _ours(model):
        attention.__dict__.setdefault(_MODE_BEFORE, attention.mode)
        attention.mode = mode


def _ours(model: nn.Module) -> list[ScaledDotProductAttention]:
    return [module for module in model.modules() if isinstance(module, ScaledDotProductAttention)]


def unset_attention(model: nn.Module) -> None:
    """Undo what ``set_attention`` did."""
    for root in _roots(model):
        before = root.__dict__.pop(_BEFORE, None)
        if before not in (None, NAME):
            root.set_attn_implementation(before)
            for module in _attentions_of_transformers(root):
                if isinstance(getattr(module, _CHILD, None), ScaledDotProductAttention):
                    delattr(module, _CHILD)
    for attention in _ours(model):
        attention.mode = attention.__dict__.pop(_MODE_BEFORE, attention.mode)


def _roots(model: nn.Module) -> list[Any]:
    """The outermost modules that can change their implementation, which pass it on to what is inside."""
    if hasattr(model, "set_attn_implementation"):
        return [model]
    return [root for child in model.children() for root in _roots(child)]
