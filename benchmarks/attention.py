"""Attention in each mode against PyTorch's in BF16 (its cuDNN backend), casts included; what is kept for backward; and
a decoder layer in each mode. Writes results/attention.md and .png, and the times by which mode "auto" chooses:
python/torch_fp8/layers/attention_times.json."""

from __future__ import annotations

import datetime
import functools
import json
from pathlib import Path

import torch
import torch_fp8 as fp8
from lib.common import gpu_ms, loop_ms, options, randn, start
from lib.report import FP8, SECOND, bars, header, legend, level, numbers, pair, table, write
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch_fp8.layers import attention as layer

CELLS = [  # causal, batch, heads of queries, of keys, tokens, dims
    *(
        (True, batch, heads, kv_heads, tokens, 128)
        for batch, tokens in ((4, 1024), (4, 2048), (2, 4096), (1, 8192), (1, 16384))
        for heads, kv_heads in ((32, 8), (32, 32), (16, 8))
    ),
    *((False, batch, 32, 32, tokens, 128) for batch, tokens in ((4, 2048), (2, 4096), (1, 8192))),
    (True, 2, 32, 32, 4096, 64),
    (True, 2, 16, 16, 4096, 256),
]
try:
    from flash_attn_interface import flash_attn_func as FA3
except ImportError:
    FA3 = None

FIRST = "batch, heads, tokens, dims"
NOTE = """ms, *GPU*: whole calls, casts of q, k and v and the result's way back to BF16 included; delayed scales.
BF16 is PyTorch's `scaled_dot_product_attention` with its cuDNN backend. *expanded*: in backward each query head has
keys and values of its own, whose gradients are summed. *casts*: of q, k and v alone. *kept*: MiB for backward, the
inputs included where they are kept."""
BLOCK_NOTE = """A Llama-3-8B decoder layer (`fp8.TransformerBlock`), forward and backward, in each mode of its
attention; one weight cast in every call."""


def attend(module: fp8.ScaledDotProductAttention, q, k, v, causal: bool, backward: bool, expand: bool):
    call = layer.call_of(module, q, layer.EVERY_ROLE if backward else layer.FORWARD_ROLES)
    return layer.run(call, q, k, v, causal, None, backward, expand)


def measure(causal: bool, batch: int, heads: int, kv_heads: int, tokens: int, dims: int):
    """ms of each arm: forward, and forward with backward; and the bytes that are kept."""
    if options.dry:
        batch, heads, kv_heads, tokens = 1, 2 * heads // kv_heads, 2, 64
    q, k, v = (randn(batch, tokens, n, dims).transpose(1, 2).requires_grad_() for n in (heads, kv_heads, kv_heads))
    dy = torch.randn_like(q)
    kept: dict[str, float] = {}

    def plain():
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION] if not options.dry else [SDPBackend.MATH]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=heads != kv_heads)

    calls = {"16bit": plain}
    module = fp8.ScaledDotProductAttention().to(q.device)
    calls["fp8_forward"] = functools.partial(attend, module, q, k, v, causal, False, False)
    if dims == 128:
        calls["fp8"] = functools.partial(attend, module, q, k, v, causal, True, False)
        if heads != kv_heads:
            calls["fp8 expanded"] = functools.partial(attend, module, q, k, v, causal, True, True)

    def both(call):
        q.grad = k.grad = v.grad = None
        call().backward(dy)

    for call in calls.values():  # the first step is scaled by own amaxes
        both(call)
    fp8.update_scales(torch.nn.ModuleList([module]))
    for name, call in calls.items():
        sizes: dict[int, int] = {}

        def note(t, sizes=sizes):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            call()
        kept[name] = sum(sizes.values()) / 2**20

    def forward(call):
        with torch.no_grad():
            return call()

    forwards = {name: functools.partial(forward, call) for name, call in calls.items() if "expanded" not in name}
    forwards["casts"] = lambda: [
        torch.ops.torch_fp8.quantize(
            t.transpose(1, 2).reshape(batch * tokens, -1), module.fp8_slots, i, torch.float8_e4m3fn, record=False
        )
        for i, t in enumerate((q, k, v))
    ]
    if FA3 is not None:
        codes = [t.detach().transpose(1, 2).to(torch.float8_e4m3fn) for t in (q, k, v)]
        forwards["FA3 FP8"] = lambda: FA3(*codes, causal=causal)
    return (
        gpu_ms(forwards, rounds=20),
        gpu_ms({name: functools.partial(both, call) for name, call in calls.items()}, rounds=20),
        kept,
    )


def measure_block(batch: int, tokens: int) -> dict[str, tuple[float, float]]:
    """ms of the layer in each mode, GPU and loop."""
    hidden, heads, kv_heads, wide = (4096, 32, 8, 14336) if not options.dry else (256, 2, 1, 512)
    if options.dry:
        tokens = 64
    x = randn(batch, tokens, hidden, requires_grad=True)
    cos, sin = randn(tokens, 128), randn(tokens, 128)
    dy = torch.randn_like(x)
    arms = {}
    for mode in ("16bit", "fp8_forward", "fp8", "auto"):
        block = fp8.TransformerBlock(
            hidden, heads, wide, num_kv_heads=kv_heads, attention=mode, device=x.device, dtype=torch.bfloat16
        )

        def step(block=block):
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION] if not options.dry else [SDPBackend.MATH]):
                block(x, cos, sin).backward(dy)

        step()
        fp8.update_scales(block)
        arms[mode] = step
    gpu, loop = gpu_ms(arms, rounds=20), loop_ms(arms)
    return {mode: (gpu[mode], loop[mode]) for mode in arms}


def name_of(cell) -> str:
    causal, batch, heads, kv_heads, tokens, dims = cell
    return f"{batch}, {heads}/{kv_heads}, {tokens}, {dims}{'' if causal else ', no mask'}"


def draw(figure, tables) -> None:
    rows = tables[0]
    names = [row[FIRST].replace(", ", "\n", 1).replace(", ", "\n") for row in rows]
    series = {
        label: (color, [(numbers(row[f"both: BF16 over {label}"]) or [0.0])[0] for row in rows])
        for label, color in (("fp8_forward", SECOND), ("auto", FP8))
    }
    axes = figure.subplots()
    bars(axes, names, series, "%.2f")
    level(axes, "BF16")
    axes.tick_params(axis="x", labelsize=6)
    axes.set(ylabel="times as fast as BF16\nhigher is better", title="Forward + backward, GPU time")
    legend(axes)


def main() -> None:
    start(__doc__)
    forward_rows, both_rows, data = [], [], []
    for cell in CELLS:
        forward, both, kept = measure(*cell)
        causal, batch, heads, _, tokens, dims = cell
        data.append(
            dict(zip(("causal", "batch", "heads", "kv_heads", "tokens", "dims"), cell))
            | {"us": {m: [round(1e3 * t, 1) for t in ([forward[m.partition(" ")[0]], both[m]])] for m in both}}
        )
        flops = (2 if causal else 4) * batch * heads * tokens**2 * dims
        best = min((both[m] for m in both if m.partition(" ")[0] == "fp8"), default=None)
        auto = min(both.values())
        forward_rows.append([
            name_of(cell), *(f"{forward[m]:.3f}" for m in ("16bit", "fp8_forward", "casts")),
            f"{flops / forward['fp8_forward'] / 1e9:.0f}", f"**{forward['16bit'] / forward['fp8_forward']:.2f}**",
            f"{forward['16bit'] / (forward['fp8_forward'] - forward['casts']):.2f}",
            *([f"{forward['FA3 FP8']:.3f}"] if FA3 else []),
        ])  # fmt: skip
        both_rows.append([
            name_of(cell),
            *(f"{both[m]:.3f}" if m in both else "–" for m in ("16bit", "fp8_forward", "fp8", "fp8 expanded")),
            f"**{both['16bit'] / both['fp8_forward']:.2f}**", f"**{both['16bit'] / best:.2f}**" if best else "–",
            f"**{both['16bit'] / auto:.2f}**", f"{kept['16bit']:.0f}", f"{kept['fp8_forward']:.0f}",
        ])  # fmt: skip
        print(forward_rows[-1], both_rows[-1], flush=True)
        torch.cuda.empty_cache()
    both_head = [FIRST, "BF16", "fp8_forward", "fp8", "fp8 expanded", "both: BF16 over fp8_forward",
                 "both: BF16 over fp8, the faster", "both: BF16 over auto", "kept, BF16", "kept, FP8"]  # fmt: skip
    forward_head = [FIRST, "BF16", "FP8", "casts", "FP8 TFLOP/s", "BF16 over FP8", "casts taken off"]
    blocks = {f"{b} x {t} tokens": measure_block(b, t) for b, t in ((1, 8192), (4, 2048))}
    block_rows = []
    for shape, times in blocks.items():
        faster = [pair(*(a / b for a, b in zip(times["16bit"], times[m]))) for m in list(times)[1:]]
        block_rows.append([shape, *(pair(*t) for t in times.values()), *(f"**{ratio}**" for ratio in faster)])
    modes = list(next(iter(blocks.values())))
    cudnn = torch.backends.cudnn.version()
    text = (
        header("Attention in FP8")
        + f"* cuDNN {cudnn}\n\n{NOTE}\n\nForward and backward:\n\n"
        + table(both_head, both_rows)
        + "\nForward alone:\n\n"
        + table(forward_head + (["FA3 FP8, casts not included"] if FA3 else []), forward_rows)
        + f"\n{BLOCK_NOTE}\n\n"
        + table(["layer", *modes, *(f"16bit over {m}" for m in modes[1:])], block_rows)
    )
    write("attention", text, draw=draw)
    if not options.dry:
        facts = {"command": "python benchmarks/attention.py", "gpu": torch.cuda.get_device_name(),
                 "torch": torch.__version__, "cudnn": cudnn, "date": str(datetime.date.today()),
                 "us": "median of a whole call: forward alone, forward and backward"}  # fmt: skip
        path = Path(layer.__file__).parent / "attention_times.json"
        cells = ",\n".join("    " + json.dumps(cell) for cell in data)
        path.write_text(json.dumps(facts, indent=2)[:-2] + ',\n  "cells": [\n' + cells + "\n  ]\n}\n")


if __name__ == "__main__":
    main()
