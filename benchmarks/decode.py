"""Inference of Llama-3-8B with random weights, batch 1, BF16 against FP8. Writes results/decode.md and .png.

Decode: 128 tokens after a prompt of 512, greedy, each step one replay of a CUDA graph; wall time of all steps, host
included. Its one row is not quantised: only the weights are FP8. Prefill: a prompt in eager mode, with the logits of
its last token. Norms, rotary positions, SwiGLU's product and residuals are compiled in all arms, to kernels that let
the next one start early (TORCHINDUCTOR_ENABLE_PDL); attention, embedding and output head stay in BF16. *modules*: each
layer runs as the PyTorch module that it is, and only rotary positions are compiled. *fused*: the same modules after
`fp8.fuse`, with nothing else compiled: norms add the residual and make the codes of their readers, and SwiGLU those of
the last layer.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch_fp8 as fp8
from lib.common import gpu_ms, loop_ms, options, scaled, start
from lib.report import bars, header, legend, level, numbers, pair, table, write
from lib.steps import llama
from torch import nn
from torch_fp8.observe.evaluation import shared_copy
from torch_fp8.picture import FP8, INK, SECOND

from models.decoder import Decoder, best

PROMPT, NEW, ROUNDS = 512, 128, 5
PREFILLS = (2048, 8192)
SCALED = {
    "FP8, token": "FP8, inputs scaled by token",
    "FP8, static": "FP8, inputs scaled by constants",
    "FP8, token, fused": "by token, fp8.fuse",
}
OVER = " × BF16: "  # between what is timed and the regimes, in the heads of columns
ARMS = {  # what fp8.freeze is told
    "FP8, token": {"activations": "token", "weight": "channel"},
    "FP8, static": {"activations": "static", "weight": "tensor"},
}


def build() -> Decoder:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(options.device):
            return Decoder(*llama()).eval()
    finally:
        torch.set_default_dtype(before)


def as_modules(model: Decoder) -> Decoder:
    """The same model, whose layers run as modules."""
    model = shared_copy(model)
    model.by_modules = True
    return model


def prompt_of(model: Decoder, tokens: int) -> torch.Tensor:
    return torch.randint(model.embedding.num_embeddings, (1, tokens), device=options.device)


def decoding(model: Decoder, prompt: int, new: int):
    """A function that generates so many tokens after a prompt that was read once."""
    cache = model.new_cache(prompt + new)
    first = model(prompt_of(model, prompt), cache).argmax(-1)
    token, position = first.clone(), torch.tensor([prompt], device=options.device)

    def step() -> None:
        token.copy_(best(model.step(token, position, cache)))
        position.add_(1)

    replay = step
    if not options.dry:
        step()  # compiles and loads the kernels, which a capture cannot do
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replay = graph.replay

    def generate() -> None:
        token.copy_(first)
        position.fill_(prompt)
        for _ in range(new):
            replay()

    return generate


def decode_seconds(arms: dict, rounds: int) -> dict[str, float]:
    """Median wall time of a generation, arms interleaved."""
    synchronize = (lambda: None) if options.dry else torch.cuda.synchronize
    times = {name: [] for name in arms}
    for timed in [False] + [True] * rounds:  # the first round warms up
        for name, generate in arms.items():
            synchronize()
            began = time.perf_counter()
            generate()
            synchronize()
            if timed:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def linear_bytes(model: Decoder) -> int:
    """Of everything in the layers but their norms."""
    layers = [m for layer in model.layers for m in layer.modules() if isinstance(m, nn.Linear)]
    return sum(t.numel() * t.element_size() for layer in layers for t in [*layer.parameters(), *layer.buffers()])


def draw(figure, tables) -> None:
    (rows,) = tables
    columns = [column.split(OVER) for column in rows[0] if OVER in column]
    groups = [f"{what}\n{regime}" for what, regimes in columns for regime in regimes.split(" / ")]
    series = {
        SCALED[row["arm"]]: (color, [x for column in columns for x in numbers(row[OVER.join(column)])])
        for row, color in zip([row for row in rows if row["arm"] in SCALED], (FP8, SECOND, INK))
    }
    axes = figure.subplots()
    bars(axes, groups, series, "%.2f")
    level(axes, "BF16")
    axes.set(ylabel="times as fast as BF16\nhigher is better", title="Batch 1")
    legend(axes)


@torch.inference_mode()
def main() -> None:
    start(__doc__)
    torch._inductor.config.triton.enable_pdl = True
    if options.dry:
        torch.compiler.set_stance("force_eager")  # to compile would take longer than all else
    prompt, new, rounds = (16, 4, 1) if options.dry else (PROMPT, NEW, (ROUNDS + 1) // 2 if options.quick else ROUNDS)
    models = {"BF16": build()}
    for name, how in ARMS.items():
        model = shared_copy(models["BF16"])
        if how["activations"] == "static":
            fp8.calibrate(model, [prompt_of(model, prompt)])
        models[name] = fp8.freeze(model, **how)
    for name in ("BF16", "FP8, token"):
        models[f"{name}, modules"] = as_modules(models[name])
    for name in ARMS:
        models[f"{name}, fused"] = fp8.fuse(as_modules(models[name]))
    seconds = decode_seconds({name: decoding(model, prompt, new) for name, model in models.items()}, rounds)
    prefill = {}
    for tokens in scaled(*PREFILLS):
        ids, cache = prompt_of(models["BF16"], tokens), models["BF16"].new_cache(tokens)
        arms = {name: lambda model=model, ids=ids, cache=cache: model(ids, cache) for name, model in models.items()}
        prefill[tokens] = gpu_ms(arms, rounds=8), loop_ms(arms, seconds=0.5, rounds=2)

    rows = []
    for name, model in models.items():
        row = [name, f"{linear_bytes(model) / 2**30:.2f}", f"{new / seconds[name]:.1f}",
               f"**{seconds['BF16'] / seconds[name]:.2f}**"]  # fmt: skip
        for tokens, (gpu, loop) in prefill.items():
            row.append(pair(tokens / gpu[name] * 1e3, tokens / loop[name] * 1e3, digits=0))
            row.append(f"**{pair(gpu['BF16'] / gpu[name], loop['BF16'] / loop[name])}**")
        rows.append(row)
    head = ["arm", "linear layers GiB", "decode tokens/s", f"decode{OVER}loop"]
    for tokens in prefill:
        head += [f"prefill 1 × {tokens} tokens/s, GPU / loop", f"prefill of {tokens} tokens{OVER}GPU / loop"]

    write(
        "decode",
        header("Inference of Llama-3-8B: torch_fp8 against BF16"),
        __doc__.split("\n\n")[1],
        table(head, rows),
        draw=draw,
    )


if __name__ == "__main__":
    main()
