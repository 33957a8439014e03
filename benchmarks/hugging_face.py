"""transformers' Llama, 4 layers of Llama-3-8B's width, forward + backward, eager. Writes results/hugging_face.md.

The same model in BF16, after fp8.convert, and after fp8.convert and fp8.fuse; and, where it is installed, in BF16 with
Liger-Kernel's patches (norm, rotary positions and SwiGLU in Triton). The head and the loss are left out. Each FP8
weight is cast once a step.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch_fp8 as fp8
from lib.common import gpu_ms, loop_ms, options, randn, scaled, start
from lib.report import header, pair, table, write
from lib.steps import converted, llama, step_of
from torch import Tensor, nn

LAYERS = 4
SEQUENCES = (4, 1)
TOKENS = 8192
LIGER = "BF16, Liger-Kernel"


class Body(nn.Module):
    """The layers of a model of transformers, from embeddings to the last hidden state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(inputs_embeds=x, use_cache=False).last_hidden_state


def body() -> Body:
    import transformers

    shape, *_ = llama()
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.ffn, num_hidden_layers=LAYERS, vocab_size=64,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, max_position_embeddings=TOKENS,
        attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device(options.device):
        model = transformers.LlamaModel(config).bfloat16()
    model.embed_tokens = None
    return Body(model)


def patched(module: Body) -> Body:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(model=module.model, fused_linear_cross_entropy=False, cross_entropy=False)
    return module


def measure(arms: dict[str, Callable[[], object]]) -> dict[str, tuple[float, float]]:
    gpu, loop = gpu_ms(arms, rounds=10), loop_ms(arms, seconds=0.3)
    return {name: (gpu[name], loop[name]) for name in arms}


def main() -> None:
    start(__doc__)
    (tokens,) = scaled(TOKENS)
    bf16, rows, ours = body(), {}, {}
    converted_, fused = converted(bf16, tokens), fp8.fuse(converted(bf16, tokens))
    for sequences in SEQUENCES:
        x, dy = (randn(sequences, tokens // sequences, llama()[0].hidden, requires_grad=grad) for grad in (True, False))
        ours[sequences] = step_of(fused, x, dy), x, dy
        arms = {
            "BF16": step_of(bf16, x, dy),
            "convert": step_of(converted_, x, dy),
            "convert + fuse": ours[sequences][0],
        }
        rows[sequences] = measure(arms)
    if importlib.util.find_spec("liger_kernel") and not options.dry:
        # Its patches change functions of transformers for every model, so it is measured after all others, beside the
        # fused model again.
        theirs = patched(bf16)
        for sequences, (step, x, dy) in ours.items():
            measured = measure({LIGER: step_of(theirs, x, dy), "again": step})
            same = [a / b for a, b in zip(rows[sequences]["convert + fuse"], measured["again"])]
            rows[sequences][LIGER] = tuple(ms * drift for ms, drift in zip(measured[LIGER], same))
    table_rows = [
        [f"{sequences} x {TOKENS // sequences}", name, pair(gpu, loop),
         f"**{pair(measured['BF16'][0] / gpu, measured['BF16'][1] / loop)}**"]
        for sequences, measured in rows.items() for name, (gpu, loop) in measured.items()
    ]  # fmt: skip
    head = ["sequences x tokens", "model", "ms, GPU / loop", "times as fast as BF16, GPU / loop"]
    write("hugging_face", header("transformers' Llama"), __doc__.split("\n\n")[1] + "\n", table(head, table_rows))


if __name__ == "__main__":
    main()
