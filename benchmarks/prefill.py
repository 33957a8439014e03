"""Many rows of x on an FP8 weight, as in prefill, against BF16 and torch._scaled_mm; a frozen FFN, layer by layer and
fused; and what a call costs the host. Writes results/prefill.md.

Whole calls: x is cast in them. "tensor" takes two more launches than "static", for the amax; "block" has scales for
128 x 128 of the weight and for 128 columns of a row of x. "_scaled_mm" gets x quantised already, with one scale on each
side. All other weights of ours have a scale a channel, but for "static, tensor", which has one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch_fp8 as fp8
from lib.common import gpu_ms, loop_ms, options, randn, scaled, start
from lib.report import header, pair, table, write
from lib.steps import E4M3, llama, quantize
from torch import nn
from torch.nn import functional as F
from torch_fp8.observe.evaluation import shared_copy

from models.llama import FFN

SHAPES = [(8192, 4096, 4096), (8192, 4096, 6144), (8192, 4096, 28672), (8192, 14336, 4096), (512, 4096, 4096)]  # M K N
STATIC, TENSOR, TOKEN = 1, 2, 3
OURS = ("static, tensor", "static", "tensor", "token", "block")
TUNED = {"static, tensor": ("static", "tensor"), "token": ("token", "channel"), "block": ("token", "block")}
NOTE = "ms, *GPU* / *loop*.\n"
FFN_TOKENS = (2048, 8192)
FFNS = {"token": {"activations": "token", "weight": "channel"}, "static": {"activations": "static", "weight": "tensor"}}
FFN_NOTE = """The SwiGLU FFN of Llama-3-8B, eager. *fused* casts the product of gate and up as it is made and, scaled by
token, x once for both.
"""


def operands(m: int, k: int, n: int) -> dict[str, torch.Tensor]:
    device = options.device
    return {
        "x": randn(m, k),
        "w": (randn(n, k) * 50).clamp(-448, 448).to(E4M3),
        "wide": randn(n, k),
        "one": torch.ones(1, device=device),
        "channels": torch.rand(n, 1, device=device),
        "blocks": torch.rand(math.ceil(n / 128), math.ceil(k / 128), device=device),
        "slot": torch.tensor([[1 / 64, 64.0, 0.0, 1.0]], device=device),  # scale_inv, scale, amax, cursor
    }


def calls(m: int, k: int, n: int) -> dict[str, object]:
    t = operands(m, k, n)
    x, w, one = t["x"], t["w"], t["one"]
    codes, _, x_scale, _ = quantize(x, t["slot"], 0, E4M3, record=False)
    frozen = fp8._C.frozen_linear
    return {
        "BF16": lambda: F.linear(x, t["wide"]),
        "static, tensor": lambda: frozen(x, w, one, None, t["slot"], STATIC, None),
        "static": lambda: frozen(x, w, t["channels"], None, t["slot"], STATIC, None),
        "tensor": lambda: frozen(x, w, t["channels"], None, None, TENSOR, None),
        "token": lambda: frozen(x, w, t["channels"], None, None, TOKEN, None),
        "block": lambda: frozen(x, w, t["blocks"], None, None, TOKEN, None),
        "_scaled_mm": lambda: torch._scaled_mm(
            codes, w.t(), scale_a=x_scale, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        ),
    }


def tune(m: int, k: int, n: int) -> None:
    layers = [
        fp8.FrozenLinear(k, n, bias=False, device="meta", activations=activations, weight=weight)
        for activations, weight in TUNED.values()
    ]
    if not options.dry:
        fp8.tune(nn.ModuleList(layers), tokens=m)


def measure(size: tuple[int, ...], ours: Iterable[str]) -> list[str]:
    """A row: the times of all arms but those of ours that are not named, and BF16's over each of ours."""
    arms = {name: call for name, call in calls(*size).items() if name in ours or name not in OURS}
    gpu, loop = gpu_ms(arms), loop_ms(arms)
    speedups = [f"**{gpu['BF16'] / gpu[name]:.2f}** / {loop['BF16'] / loop[name]:.2f}" for name in ours]
    return ["M{} K{} N{}".format(*size), *(pair(gpu[arm], loop[arm], 3) for arm in arms), *speedups]


def measure_ffn(tokens: int) -> list[str]:
    """A row: ms of BF16 and of each way to freeze it, layer by layer and fused, and what BF16's are over them."""
    shape, *_ = llama()
    with torch.device(options.device):
        ffns: dict[str, nn.Module] = {"BF16": FFN(shape).bfloat16()}
    x = randn(tokens, shape.hidden)
    for name, how in FFNS.items():
        for fused in (False, True):
            ffn = shared_copy(ffns["BF16"])
            if how["activations"] == "static":
                fp8.calibrate(ffn, [x])
            fp8.freeze(ffn, **how)
            ffns[f"{name}, fused" if fused else name] = fp8.fuse(ffn) if fused else ffn
    arms = {name: lambda ffn=ffn: ffn(x) for name, ffn in ffns.items()}
    gpu, loop = gpu_ms(arms), loop_ms(arms)
    speedups = [f"**{gpu['BF16'] / gpu[name]:.2f}** / {loop['BF16'] / loop[name]:.2f}" for name in [*arms][1:]]
    return [tokens, *(pair(gpu[arm], loop[arm], 3) for arm in arms), *speedups]


def heads(ours: Iterable[str]) -> list[str]:
    return ["shape", "BF16", *ours, "_scaled_mm", *(f"BF16 over {name}" for name in ours)]


def main() -> None:
    start(__doc__)
    sizes = [scaled(*shape) for shape in SHAPES]
    with torch.no_grad():
        rows = [measure(size, OURS) for size in sizes]
        # So small that the host decides: a kernel of ours, a cast and one, a cast and cuBLASLt.
        host = {m: loop_ms(calls(m, 256, 256)) for m in (1, 32, 64)}
        for size in sizes:
            tune(*size)
        tuned = [measure(size, TUNED) for size in sizes]
        ffns = [measure_ffn(tokens) for tokens in scaled(*FFN_TOKENS)]
    host_rows = [
        [m, *(f"{t * 1e3:.1f}" for t in ms.values()), *(f"{ms[name] / ms['BF16']:.2f}" for name in OURS)]
        for m, ms in host.items()
    ]
    host_head = ["M, K256 N256", *(f"{arm}, µs" for arm in host[1]), *(f"{name} over BF16" for name in OURS)]
    of_ffn = [arm for name in FFNS for arm in (name, f"{name}, fused")]
    ffn_head = ["tokens", "BF16", *of_ffn, *(f"BF16 over {arm}" for arm in of_ffn)]
    note = " ".join(__doc__.split("\n\n")[1].split())
    write("prefill", header("Many rows on an FP8 weight"), NOTE, f"{note}\n", table(heads(OURS), rows),
          "After `fp8.tune` of these layers:\n", table(heads(TUNED), tuned),
          FFN_NOTE, table(ffn_head, ffns),
          "*loop* on layers so small that it is the host's time:\n", table(host_head, host_rows))  # fmt: skip


if __name__ == "__main__":
    main()
