"""What distinguishes the architectures of "Towards Fully FP8 GEMM LLM Training at Scale" (arXiv 2505.20524), as its
tables 1, 6 and 7 and its appendix B have them, and sizes of one shape: heads of 128."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Literal, get_args

from .checks import check_counts, check_type

Qk = Literal["none", "rms", "frozen_rms", "tanh"]
Post = Literal["none", "rms", "layer_scale"]
Activation = Literal["swiglu", "smooth_swiglu_token", "smooth_swiglu_channel", "gelu", "xielu"]
STD = 0.02  # of what weights are drawn from


@dataclass(frozen=True)
class Architecture:
    """One block for all: h = x + post(attention(pre(x))), y = h + post(ffn(pre(h))).

    pre_norm: pre is an RMSNorm with a gain, and so is the norm behind the last block; else both are the identity.
    post: what a branch makes goes through it before it is added.
    small_gains: the gains of post begin at 1 / sqrt(layers), and not at 1.
    final_norm: of what the last block makes. unit_input: the embedding is multiplied by 1 / STD, for a variance of 1.
    qk: what each head of q and k goes through before its positions: an RMS norm with a trained gain, one without, or
    tanh(alpha x) with one trained alpha for q and one for k.
    own_scale: the softmax has the scale of :class:`Shape`, and not 1 / sqrt(head).
    """

    pre_norm: bool = False
    post: Post = "none"
    small_gains: bool = False
    final_norm: bool = False
    unit_input: bool = False
    qk: Qk = "none"
    own_scale: bool = False
    activation: Activation = "swiglu"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("qk", self.qk, get_args(Qk)),
            ("post", self.post, get_args(Post)),
            ("activation", self.activation, get_args(Activation)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if self.pre_norm == (self.post != "none"):
            raise ValueError(
                "a branch is normalised before (pre_norm=True) or scaled behind (post), and not "
                f"{'both' if self.pre_norm else 'neither'}: got pre_norm={self.pre_norm} and post={self.post!r}"
            )
        if self.small_gains and self.post == "none":
            raise ValueError('small_gains is of the gains of post, but post is "none"; give post="rms"')
        if self.own_scale and self.qk == "none":
            raise ValueError(
                'own_scale stands in for the gain that qk="frozen_rms" and "tanh" do not have, but qk is "none"'
            )

    @property
    def gated(self) -> bool:
        return self.activation not in ("gelu", "xielu")


def _fog(qk: Qk, activation: Activation) -> Architecture:
    return Architecture(
        post="rms", small_gains=True, unit_input=True, qk=qk, own_scale=True, activation=activation
    )  # fmt: skip


def _llama(activation: Activation) -> Architecture:
    return Architecture(pre_norm=True, final_norm=True, activation=activation)


def _op(qk: Qk) -> Architecture:
    return Architecture(post="layer_scale", small_gains=True, unit_input=True, qk=qk, activation="gelu")


ARCHITECTURES = {
    "llama3": _llama("swiglu"),
    "llama3-smooth-token": _llama("smooth_swiglu_token"),
    "llama3-smooth-channel": _llama("smooth_swiglu_channel"),
    "olmo2": Architecture(post="rms", final_norm=True, qk="rms"),
    "op": _op("rms"),
    "op-frozen-qk": _op("frozen_rms"),
    "fog-max": _fog("frozen_rms", "xielu"),
    "fog-opt": _fog("frozen_rms", "gelu"),
    "fog-flash": _fog("tanh", "gelu"),
    "fog-swiglu": _fog("frozen_rms", "swiglu"),
}


def architecture(name: str) -> Architecture:
    """By name; a wrong one is a ValueError with the near ones."""
    check_type("an architecture's name", name, str)
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(name.lower(), ARCHITECTURES, n=3)
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"no architecture has the name {name!r}; {meant}There are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


@dataclass(frozen=True)
class Shape:
    """Widths and depth. ffn: of each of SwiGLU's two projections; an FFN without a gate is half as wide again, which
    is as many parameters. scale: of the softmax where an architecture has one of its own. tied: the head is the
    embedding."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    scale: float = math.sqrt(2) / 8  # as of an RMS norm with gain sqrt(2), over heads of 128
    tied: bool = True
    head: int = 128

    def __post_init__(self) -> None:
        check_counts(**{name: of for name, of in vars(self).items() if name not in ("scale", "tied")})
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads, got {self.kv_heads} and {self.heads}")
        if self.heads * self.head != self.hidden:
            raise ValueError(
                f"heads of {self.head} must fill hidden, got {self.heads} x {self.head} = {self.heads * self.head} and "
                f"hidden {self.hidden}"
            )
        if self.head % 2 or self.ffn % 2:
            raise ValueError(f"head and ffn must be even, got {self.head} and {self.ffn}")
        if not (isinstance(self.scale, float | int) and 0 < self.scale < math.inf):
            raise ValueError(f"scale must be positive and finite, got {self.scale!r}")

    def ffn_of(self, architecture: Architecture) -> int:
        return self.ffn if architecture.gated else self.ffn * 3 // 2


SIZES = {  # those of the paper, and smaller ones, which have the softmax scale of the paper's smallest
    "tiny": Shape(2, 256, 256, 2, 1),
    "25M": Shape(6, 512, 2048, 4, 2),
    "100M": Shape(12, 768, 3072, 6, 3),
    "200M": Shape(12, 1024, 4096, 8, 4),
    "390M": Shape(16, 1024, 4096, 8, 4),
    "1.5B": Shape(16, 2048, 8192, 16, 8, scale=0.125, tied=False),
    "8B": Shape(32, 4096, 14336, 32, 8, scale=0.125, tied=False),
}
