"""A norm with a SwiGLU FFN, and a whole decoder layer of Llama-3-8B, forward + backward. Writes results/fused.md, .png.

BF16 eager and compiled; FP8 layers alone (*converted*, as fp8.convert leaves a plain PyTorch module); and the fused
modules, fp8.RMSNorm with fp8.MLP, and fp8.TransformerBlock: eager, compiled, and eager with recompute=True. Each FP8
weight is cast once a step, as without gradient accumulation; a *later micro-batch* of many keeps the codes of weights,
and its gradients are added to those of the others. The *floor* is what cannot be avoided: the FP8 GEMMs, the
BF16 attention, and a copy of as many bytes as everything between them must read and write. Where they are installed,
torchao's compiled layers and, for the FFN, Transformer Engine's LayerNormMLP stand beside ours.

Where the time of a decoder layer's forward and backward goes, by the profiler's clock. *norms* has the sums of their
gains' gradients, *attention* what cuDNN launches around it.
"""

from __future__ import annotations

import torch
import torch_fp8 as fp8
from lib.common import gpu_ms, loop_ms, options, randn, scaled, start
from lib.kinds import KINDS, profiled
from lib.peers import ADAPTERS, TORCHAO, TRANSFORMER_ENGINE, peer_modules, torchao, transformer_engine_ffn
from lib.report import bars, header, legend, level, numbers, pair, table, write
from lib.steps import FusedLayer, Layer, converted, forward_of, llama, step_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fp8.picture import FP8, INK, SECOND

from models.llama import FFN, DecoderLayer, Shape, rms_norm

TOKENS = 8192
OVER = "times as fast as BF16, GPU / loop"
CASES = [  # name, sequences
    ("RMSNorm + SwiGLU FFN, 8192 tokens", 0),
    ("decoder layer, 4 x 2048 tokens", 4),
    ("decoder layer, 1 x 8192 tokens", 1),
]
# Bytes that must be read and written, for each element of the hidden state, of the FFN's product, of queries, keys and
# values, and of the weights. Norm: 2, and codes and transpose 1 + 1; with a residual 4, 2 + 2; residual into the next
# norm 4, 2; a cast 2, 1 + 1; backward of a norm 4, 2, with a residual 6, 2, and its codes 2. SwiGLU: 4, 1 + 1, backward
# 6, 2 x (1 + 1). Rotary positions 2, 2, backward 2, and codes 1 + 1.
FFN_BYTES = {"hidden": 4 + 4 + 6, "product": 6 + 10, "weights": 4}
LAYER_BYTES = {
    "hidden": 4 + 8 + 6 + 4 + 4 + 10 + 8,
    "product": 6 + 10,
    "queries": 4 + 4,
    "keys": 4 + 4,
    "values": 4,
    "weights": 4,
}


class NormFFN(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(shape.hidden))
        self.ffn = FFN(shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(rms_norm(x, self.norm))


class FusedFFN(nn.Module):
    def __init__(self, shape: Shape, recompute: bool = False) -> None:
        super().__init__()
        self.norm, self.ffn = fp8.RMSNorm(shape.hidden), fp8.MLP(shape.hidden, shape.ffn, recompute=recompute)
        self.norm.feeds(*self.ffn.readers)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.norm(x))


def compiled(module: nn.Module) -> nn.Module:
    module.compile(fullgraph=True, dynamic=False, backend="aot_eager" if options.dry else "inductor")
    return module


def floor(shape: Shape, tokens: int, sequences: int):
    """The GEMMs of a layer, its attention, and a copy of the bytes between."""
    hidden, ffn, kv = shape.hidden, shape.ffn, shape.kv_heads * shape.head
    sizes = [(hidden, ffn), (hidden, ffn), (ffn, hidden)]
    elements = {"hidden": tokens * hidden, "product": tokens * ffn, "weights": 3 * hidden * ffn}
    bytes_of = FFN_BYTES
    if sequences:
        bytes_of = LAYER_BYTES
        sizes += [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)]
        elements |= {"queries": tokens * hidden, "keys": tokens * kv, "values": tokens * kv}
        elements["weights"] += 2 * hidden * hidden + 2 * hidden * kv
    layers = {size: Layer(tokens, *size) for size in sizes}
    gemms = [layers[size].gemm(name) for size in sizes for name in ("fprop", "dgrad", "wgrad")]
    moved = sum(bytes_of[name] * elements[name] for name in bytes_of)
    source = torch.empty(moved // 4, device=options.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    length = tokens // max(1, sequences)
    q, k, v = (randn(max(1, sequences), n, length, shape.head, requires_grad=True) for n in
               (shape.heads, shape.kv_heads, shape.kv_heads))  # fmt: skip
    dy = randn(*q.shape)

    def run() -> None:
        for gemm in gemms:
            gemm()
        target.copy_(source)
        if sequences:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            torch.autograd.grad(y, (q, k, v), dy)

    return run


def memory(module: nn.Module, x: Tensor, dy: Tensor) -> tuple[float, float]:
    """MiB over parameters and input after forward, and at most in backward."""
    forward = forward_of(module, x)
    for leaf in (x, *module.parameters()):
        leaf.grad = None
    if options.dry:
        forward().backward(dy)
        return 0.0, 0.0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = forward()
    after = torch.cuda.memory_allocated()
    y.backward(dy)
    peak = torch.cuda.max_memory_allocated()
    for leaf in (x, *module.parameters()):
        leaf.grad = None
    return (after - before) / 2**20, (peak - before) / 2**20


def measure_later() -> dict[str, tuple]:
    """As measure, of one of many micro-batches of the FFN."""
    (tokens,) = scaled(TOKENS)
    shape, *_ = llama()
    x, dy = randn(1, tokens, shape.hidden, requires_grad=True), randn(1, tokens, shape.hidden)
    with torch.device(options.device):
        modules = {"BF16": NormFFN(shape).bfloat16(), "FP8 fused": FusedFFN(shape).bfloat16()}
    arms = {name: step_of(module, x, dy, recast=False) for name, module in modules.items()}
    gpu, loop = gpu_ms(arms, rounds=20), loop_ms(arms, seconds=0.4)
    return {name: (gpu[name], loop[name]) for name in arms}


def measure(sequences: int) -> tuple[dict[str, tuple], dict[str, dict[str, tuple[int, float]]]]:
    """Of each arm: ms in the two regimes, MiB after forward and at most, launches; and its profile."""
    (tokens,) = scaled(TOKENS)
    shape, *_ = llama()
    size = (max(1, sequences), tokens // max(1, sequences), shape.hidden)
    x, dy = randn(*size, requires_grad=True), randn(*size)
    plain, fused = (DecoderLayer, FusedLayer) if sequences else (NormFFN, FusedFFN)
    with torch.device(options.device):
        modules = {
            "BF16": plain(shape).bfloat16(),
            "BF16 compiled": plain(shape).bfloat16(),
            "FP8 fused": fused(shape).bfloat16(),
            "FP8 fused, compiled": fused(shape).bfloat16(),
            "FP8 fused, recompute": fused(shape, recompute=True).bfloat16(),
        }
    modules["FP8 converted"] = converted(modules["BF16"], tokens)
    for module in modules.values():
        module(x)  # its angles are a constant of the graph
    torch._dynamo.reset()
    for name in ("BF16 compiled", "FP8 fused, compiled"):
        compiled(modules[name])
    makers = {TORCHAO: lambda: torchao(modules["BF16"])}
    if not sequences:
        makers[TRANSFORMER_ENGINE] = lambda: transformer_engine_ffn(shape)
    modules |= peer_modules(makers, x, dy)
    arms = {name: step_of(module, x, dy) for name, module in modules.items()}
    arms["floor"] = floor(shape, tokens, sequences)
    gpu, loop = gpu_ms(arms, rounds=20), loop_ms(arms, seconds=0.4)
    profiles = {name: profiled(arms[name]) for name in modules}
    rest = {
        name: (*memory(module, x, dy), sum(count for count, _ in profiles[name].values()))
        for name, module in modules.items()
    }
    return {name: (gpu[name], loop[name], *rest.get(name, ())) for name in arms}, profiles


def draw(figure, tables) -> None:
    rows = [row for row in tables[0] if "later" not in row["module"]]
    modules = dict.fromkeys(row["module"] for row in rows)
    arms = {"BF16 compiled": INK, "FP8 converted": SECOND, "FP8 fused": FP8}
    series = {arm: (color, [numbers(row[OVER])[0] for row in rows if row["arm"] == arm]) for arm, color in arms.items()}
    axes = figure.subplots()
    bars(axes, [module.replace(", ", "\n") for module in modules], series, "%.2f")
    level(axes, "BF16 eager")
    axes.set(ylabel="times as fast as BF16 eager\nhigher is better", title="Forward + backward, GPU")
    legend(axes)


def main() -> None:
    start(__doc__)
    rows, kinds = [], []
    for name, sequences in CASES:
        measured, profiles = measure(sequences)
        bf16, bf16_compiled = measured["BF16"], measured["BF16 compiled"]
        if sequences:
            ours = {arm: profile for arm, profile in profiles.items() if arm not in ADAPTERS}
            for kind in KINDS:
                cells = (f"{count}, {us:.0f}" for count, us in (profile[kind] for profile in ours.values()))
                kinds.append([name, kind, *cells])
        for arm, (gpu, loop, *rest) in measured.items():
            after, peak, count = (f"{rest[0]:.0f}", f"{rest[1]:.0f}", str(rest[2])) if rest else ("", "", "")
            rows.append([
                name, arm, pair(gpu, loop), f"**{pair(bf16[0] / gpu, bf16[1] / loop)}**",
                pair(bf16_compiled[0] / gpu, bf16_compiled[1] / loop), f"{gpu / measured['floor'][0]:.2f}", after, peak,
                count,
            ])  # fmt: skip
    head = [
        "module", "arm", "ms, GPU / loop", OVER, "as BF16 compiled, GPU / loop",
        "over the floor, GPU", "MiB after forward", "MiB at most", "launches",
    ]  # fmt: skip
    later = measure_later()
    for arm, (gpu, loop) in later.items():
        ratio = pair(later["BF16"][0] / gpu, later["BF16"][1] / loop)
        rows.append([f"{CASES[0][0]}, a later micro-batch", arm, pair(gpu, loop), f"**{ratio}**", *[""] * 5])
    note, of_kinds = __doc__.split("\n\n")[1:]
    by_kind = table(["module", "kernels", *(f"{arm}: launches, us" for arm in ours)], kinds)
    title = header("Blocks of Llama-3-8B in fewer passes")
    write("fused", title, f"{note}\n", table(head, rows), of_kinds, by_kind, draw=draw)


if __name__ == "__main__":
    main()
