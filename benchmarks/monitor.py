"""What fp8.monitor and fp8.activations cost: a training step of a decoder layer of Llama-3-8B with and without them.
Writes results/monitor.md.

Forward, backward and optimizer step (SGD), 4 x 2048 tokens. In a sampled step the monitor reads each layer's input,
weight and output gradient once more; activations reads q, k and v, what the down projection is given, the layer's
output and the parameters' gradients, some times each, and the fused layer computes gate, up and their product once
more. The last columns are averages: at one sampled step in a hundred, the default of both, and in fifty, that of
fp8.watch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch_fp8 as fp8
from lib.common import gpu_ms, loop_ms, options, randn, scaled, start
from lib.report import header, pair, table, write
from lib.steps import FusedLayer, converted, llama
from torch import Tensor, nn

from models.llama import DecoderLayer

TOKENS, SEQUENCES, EVERY = 8192, 4, (100, 50)


def main() -> None:
    start(__doc__)
    (tokens,) = scaled(TOKENS)
    shape, *_ = llama()
    x, dy = (randn(SEQUENCES, tokens // SEQUENCES, shape.hidden, requires_grad=grad) for grad in (True, False))
    with torch.device(options.device):
        layers = {
            "`fp8.convert`": converted(DecoderLayer(shape).bfloat16(), tokens),
            "`fp8.TransformerBlock`": FusedLayer(shape).bfloat16(),
        }
    head = ["layer", "what samples", "step, ms: GPU / loop", "sampled step", "over plain"]
    head += [f"average at every={every}" for every in EVERY]
    rows = [row for name, layer in layers.items() for row in measured(name, layer, x, dy)]
    write("monitor", header("The cost of fp8.monitor and fp8.activations"), __doc__.split("\n\n")[1], table(head, rows))


def measured(name: str, layer: nn.Module, x: Tensor, dy: Tensor) -> Iterator[list[str]]:
    model = nn.Sequential(layer)  # whose members are decoder layers
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step() -> None:
        model(x).backward(dy)
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    def monitored() -> None:
        with fp8.monitor(model) as monitor:
            step()
        monitor.samples  # noqa: B018  brings the figures to the host

    def activations() -> None:
        with fp8.activations(model):  # which does so itself
            step()

    for _ in range(3):
        step()
    arms = {"plain": step, "`fp8.monitor`": monitored, "`fp8.activations`": activations}
    gpu, loop = gpu_ms(arms, rounds=20), loop_ms(arms, seconds=0.5)
    for arm in list(arms)[1:]:
        over = [ms[arm] / ms["plain"] for ms in (gpu, loop)]
        averages = [" / ".join(f"{(share - 1) / every:+.2%}" for share in over) for every in EVERY]
        yield [name, arm, pair(gpu["plain"], loop["plain"]), pair(gpu[arm], loop[arm]), pair(*over), *averages]


if __name__ == "__main__":
    main()
