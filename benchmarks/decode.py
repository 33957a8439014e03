"""Inference of Llama-3-8B with random weights, batch 1, BF16 against FP8. Writes results/decode.md and .png.

Decode: 128 tokens after a prompt of 512, greedy, each step one replay of a CUDA graph; wall time of all steps, host
included. Its one row is not quantised: only the weights are FP8. Prefill: a prompt in eager mode, with the logits of
its last token. Norms, rotary positions, SwiGLU's product and residuals are compiled in all arms, to kernels that let
the next one start early (TORCHINDUCTOR_ENABLE_PDL); attention, embedding and output head stay in BF16.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch_fp8 as fp8
from lib.common import gpu_ms, loop_ms, options, scaled, start
from lib.report import BF16, FP8, OTHER, bars, header, legend, pair, plot, table, write
from lib.steps import llama
from torch_fp8.observe.evaluation import shared_copy

from models.decoder import Decoder, best

PROMPT, NEW, ROUNDS = 512, 128, 5
PREFILLS = (2048, 8192)
DECODE_TARGET, PREFILL_TARGET = 1.60, 1.35
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
    layers = [layer for block in model.layers for layer in (block.qkv, block.o, block.gate_up, block.down)]
    return sum(t.numel() * t.element_size() for layer in layers for t in [*layer.parameters(), *layer.buffers()])


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
    head = ["arm", "linear layers GiB", "decode tokens/s", f"× BF16 (target {DECODE_TARGET:.2f})"]
    for tokens in prefill:
        head += [f"prefill 1 × {tokens} tokens/s, GPU / loop", f"× BF16 (target {PREFILL_TARGET:.2f})"]

    def draw(figure) -> None:
        axes = figure.subplots()
        each = [seconds, *(loop for _, loop in prefill.values())]
        series = {name: (color, [t["BF16"] / t[name] for t in each]) for name, color in zip(ARMS, (FP8, OTHER))}
        groups = ["decode", *(f"prefill\n1 x {tokens}" for tokens in prefill)]
        bars(axes, groups, series, [DECODE_TARGET] + [PREFILL_TARGET] * len(prefill))
        axes.axhline(1, color=BF16, linewidth=1)
        axes.set(ylabel="speed over BF16", title="Llama-3-8B, batch 1 (prefill: loop)")
        legend(figure)

    write(
        "decode",
        header("Inference of Llama-3-8B: torch_fp8 against BF16"),
        __doc__.split("\n\n")[1],
        table(head, rows),
        plot("decode", draw),
    )


if __name__ == "__main__":
    main()
