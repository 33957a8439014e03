"""A decoder layer of Llama-3-8B under torch.compile, forward + backward. Writes results/compiled.md.

Eager and compiled (fullgraph=True, default mode, static shape), BF16 and FP8, all four interleaved. In FP8 each weight
is cast once a call. Compilation fuses the norms, rotations and SwiGLU of both arms, which leaves more of the time to
the linear layers; the casts to FP8 are kernels of their own there too.
"""

from __future__ import annotations

import torch
from lib.common import gpu_ms, loop_ms, options, randn, scaled, start
from lib.report import header, pair, table, write
from lib.steps import converted, llama, step_of
from torch import nn

from models.llama import DecoderLayer

TOKENS = 8192
SEQUENCES = (4, 1)


def compiled(module: nn.Module) -> nn.Module:
    module.compile(fullgraph=True, dynamic=False, backend="aot_eager" if options.dry else "inductor")
    return module


def measure(sequences: int) -> tuple[dict[str, float], dict[str, float]]:
    """ms of the four arms in the two regimes."""
    (tokens,) = scaled(TOKENS)
    shape, *_ = llama()
    x, dy = (randn(sequences, tokens // sequences, shape.hidden, requires_grad=grad) for grad in (True, False))
    with torch.device(options.device):
        bf16 = DecoderLayer(shape).bfloat16()
    bf16(x)  # its angles are a constant of the graph
    torch._dynamo.reset()
    arms = {
        "bf16": step_of(bf16, x, dy),
        "fp8": step_of(converted(bf16, tokens), x, dy),
        "bf16 compiled": step_of(compiled(DecoderLayer(shape).to(x)), x, dy),
        "fp8 compiled": step_of(compiled(converted(bf16, tokens)), x, dy),
    }
    return gpu_ms(arms, rounds=20), loop_ms(arms, seconds=0.5)


def main() -> None:
    start(__doc__)
    rows = []
    for sequences in SEQUENCES:
        gpu, loop = measure(sequences)
        ratios = [
            pair(gpu[a] / gpu[b], loop[a] / loop[b])
            for a, b in (("bf16", "fp8"), ("bf16 compiled", "fp8 compiled"), ("fp8", "fp8 compiled"))
        ]
        rows.append([f"{sequences} x {TOKENS // sequences}", *(pair(gpu[arm], loop[arm]) for arm in gpu), *ratios])
    head = ["sequences x tokens", *(f"{arm}, ms" for arm in gpu), "eager FP8 over BF16", "compiled FP8 over BF16",
            "FP8: compiled over eager"]  # fmt: skip
    write(
        "compiled",
        header("A decoder layer of Llama-3-8B under torch.compile"),
        __doc__.split("\n\n")[1],
        "\nEach cell: GPU / loop.\n",
        table(head, rows),
    )


if __name__ == "__main__":
    main()
