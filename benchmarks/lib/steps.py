"""What is timed: forward and backward of modules, the three FP8 GEMMs of a layer, and the floor under them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch_fp8 as fp8
from torch import Tensor, nn

from models.llama import SIZES, Shape, rotation_of

from .common import options, randn

Call = Callable[[], object]
quantize, gemm = torch.ops.torch_fp8.quantize, torch.ops.torch_fp8.gemm
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def llama() -> tuple[Shape, int, int]:
    """What is timed of Llama-3-8B: a layer's shape, the number of layers, the vocabulary. Tiny in a dry run."""
    return SIZES["tiny" if options.dry else "8B"]


def linear(kind: type[nn.Linear], k: int, n: int, bias: bool = False) -> nn.Linear:
    return kind(k, n, bias=bias, device=options.device, dtype=torch.bfloat16)


class FusedLayer(nn.Module):
    """DecoderLayer as fp8.TransformerBlock."""

    def __init__(self, shape: Shape, recompute: bool = False) -> None:
        super().__init__()
        self.head = shape.head
        sizes = shape.hidden, shape.heads, shape.ffn
        self.block = fp8.TransformerBlock(*sizes, num_kv_heads=shape.kv_heads, recompute=recompute)
        self.rotation: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] not in self.rotation:
            self.rotation[x.shape[1]] = rotation_of(x.shape[1], self.head, x)
        return self.block(x, *self.rotation[x.shape[1]])


def converted(module: nn.Module, tokens: int) -> nn.Module:
    """A copy of a module in BF16 as fp8.convert leaves it for so many tokens: perhaps in BF16, where FP8 would lose."""
    module = copy.deepcopy(module)
    try:
        # In a dry run all is tiny, and FP8 is to be tried all the same.
        return fp8.convert(module, tokens=None if options.dry else tokens)
    except ValueError:
        return module


def forward_of(module: nn.Module, x: Tensor, recast: bool = True) -> Call:
    """A forward pass that saves for backward. With recast, as the first after optimizer.step(): FP8 weights are cast
    anew. Without, as one of very many micro-batches, for which they stay cast while their gradients add up."""
    memos = _settle(module, x)
    if not recast and memos:
        for _ in range(2 if options.dry else 50_000):  # a step is trusted to have as many micro-batches as the last
            module(x[..., :16, :])
        fp8.update_scales(module)

    def forward() -> Tensor:
        for memo in memos if recast else ():
            memo.end_step()
        return module(x)

    return forward


def step_of(module: nn.Module, x: Tensor, dy: Tensor, recast: bool = True) -> Call:
    """Forward and backward with all gradients, which are new tensors in each call; without recast the parameters' add
    up."""
    forward = forward_of(module, x, recast)
    leaves = [x, *(module.parameters() if recast else ())]

    def step() -> None:
        forward().backward(dy)
        for leaf in leaves:
            leaf.grad = None

    return step


def _settle(module: nn.Module, x: Tensor) -> list:
    """Past the first step, whose exact scales are not what is timed. What the host remembers of each FP8 layer."""
    layers = [layer for layer in module.modules() if isinstance(layer, fp8.Linear)]
    for _ in range(2 if layers else 0):
        y = module(x)
        y.backward(torch.randn_like(y))
        for leaf in [x, *module.parameters()]:
            leaf.grad = None
        fp8.update_scales(module)
    return [layer.fp8_state.memo for layer in layers]


@dataclass
class Layer:
    """The tensors of one linear layer, in BF16 and quantised in both layouts, and its GEMMs by name."""

    m: int
    k: int
    n: int
    x: Tensor = field(init=False)  # (M, K) bfloat16
    w: Tensor = field(init=False)  # (N, K)
    dy: Tensor = field(init=False)  # (M, N)

    def __post_init__(self) -> None:
        m, k, n = self.m, self.k, self.n
        self.x, self.w, self.dy = randn(m, k), randn(n, k) * k**-0.5, randn(m, n)
        slots = fp8._C.new_slots(torch.device(options.device))
        casts = [
            quantize(t, slots, role, dtype, own_amax=True, columnwise=True)
            for role, (t, dtype) in enumerate([(self.x, E4M3), (self.w, E4M3), (self.dy, E5M2)])
        ]
        (xq, xt, sx, _), (wq, wt, sw, _), (gq, gt, sg, _) = casts
        # name -> a, b, their scales; out (rows of a, rows of b) = a . b^T; whether the tensor core sums alone
        self.operands = {
            "fprop": (xq, wq, sx, sw, [m, n], True),
            "dgrad": (gq, wt, sg, sw, [m, k], False),
            "wgrad": (gt, xt, sg, sx, [n, k], False),
        }

    def gemm(self, name: str) -> Call:
        a, b, a_scale, b_scale, size, fast = self.operands[name]
        return lambda: gemm(a, b, a_scale, b_scale, None, size, torch.bfloat16, fast)

    def floor(self, recast: bool, backward: bool) -> Call:
        """The layer's FP8 GEMMs, and in place of each cast a copy of as many bytes: 2 read, 1 + 1 written an
        element."""
        copies = [_copy(self.x)] + ([_copy(self.w)] if recast else [])
        calls = [*copies, self.gemm("fprop")]
        if backward:
            calls += [_copy(self.dy), self.gemm("dgrad"), self.gemm("wgrad")]

        def floor() -> None:
            for call in calls:
                call()

        return floor


def _copy(source: Tensor) -> Call:
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
