"""What fp8.monitor costs: a training step of a decoder layer of Llama-3-8B with and without it. Writes
results/monitor.md.

Forward, backward and optimizer step (SGD), 4 x 2048 tokens; a sampled step reads each layer's input, weight and output
gradient once more. The last column is the average at the default, one sampled step in a hundred.
"""

from __future__ import annotations

import torch
import torch_fp8 as fp8
from lib.common import gpu_ms, loop_ms, options, randn, scaled, start
from lib.report import header, pair, table, write
from lib.steps import converted, llama

from models.llama import DecoderLayer

TOKENS, SEQUENCES, EVERY = 8192, 4, 100


def main() -> None:
    start(__doc__)
    (tokens,) = scaled(TOKENS)
    shape, *_ = llama()
    x, dy = (randn(SEQUENCES, tokens // SEQUENCES, shape.hidden, requires_grad=grad) for grad in (True, False))
    with torch.device(options.device):
        layer = converted(DecoderLayer(shape).bfloat16(), tokens)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)

    def step() -> None:
        layer(x).backward(dy)
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    def sampled() -> None:
        with fp8.monitor(layer) as monitor:
            step()
        monitor.samples  # noqa: B018  brings the figures to the host

    for _ in range(3):
        step()
    arms = {"plain": step, "sampled": sampled}
    gpu, loop = gpu_ms(arms, rounds=20), loop_ms(arms, seconds=0.5)
    average = [(ms["sampled"] / ms["plain"] - 1) / EVERY for ms in (gpu, loop)]
    head = ["step, ms: GPU / loop", "sampled step, ms: GPU / loop", "sampled over plain", f"average at every={EVERY}"]
    row = [
        pair(gpu["plain"], loop["plain"]),
        pair(gpu["sampled"], loop["sampled"]),
        pair(gpu["sampled"] / gpu["plain"], loop["sampled"] / loop["plain"]),
        " / ".join(f"+{share:.2%}" for share in average),
    ]
    write("monitor", header("The cost of fp8.monitor"), __doc__.split("\n\n")[1], table(head, [row]))


if __name__ == "__main__":
    main()
