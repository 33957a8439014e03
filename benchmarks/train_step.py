"""Whole training steps: 8 layers of Llama-3-8B's width with embedding and head, AdamW, 4 micro-batches of 8192 tokens.
Writes results/train_step.md.

BF16 parameters and optimizer states in all arms. In the FP8 arms the linear layers of the blocks are FP8 (the head is
not), and the blocks are fp8.TransformerBlock; compiled is torch.compile of each block and of head and loss, in its
default mode. Arms run one after the other, since two of them do not fit the memory; the loss is that of the last step.
"""

from __future__ import annotations

import gc
import statistics
import time

import torch
from lib.common import options, scaled, start
from lib.report import header, table, write
from lib.steps import FusedLayer, llama
from torch import Tensor, nn
from torch.nn import functional as F

from models.llama import DecoderLayer, Shape

LAYERS, MICRO_BATCHES, SEQUENCES, TOKENS = 8, 4, 4, 8192
WARM, STEPS = 2, 5


class Head(nn.Module):
    def __init__(self, shape: Shape, vocabulary: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(shape.hidden, 1e-5)
        self.linear = nn.Linear(shape.hidden, vocabulary, bias=False)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.linear(self.norm(x)).flatten(0, 1), targets.flatten())


class Model(nn.Module):
    def __init__(self, kind: type[nn.Module], compiled: bool) -> None:
        super().__init__()
        shape, _, self.vocabulary = llama()
        self.embedding = nn.Embedding(self.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(kind(shape) for _ in range(2 if options.dry else LAYERS))
        self.head = Head(shape, self.vocabulary)
        self.compiled = compiled

    def compile_parts(self) -> None:
        for module in (*self.layers, self.head):
            module.compile(dynamic=False, backend="aot_eager" if options.dry else "inductor")

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x, targets)


def measure(kind: type[nn.Module], compiled: bool) -> tuple[float, float, float]:
    """Seconds of a step, GiB at most, the last loss."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    (tokens,) = scaled(TOKENS)
    with torch.device(options.device):
        model = Model(kind, compiled).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=not options.dry)
    size = (MICRO_BATCHES, SEQUENCES, tokens // SEQUENCES + 1)
    data = torch.randint(0, model.vocabulary, size, device=options.device)
    if not options.dry:
        torch.cuda.reset_peak_memory_stats()
    times, loss = [], torch.zeros(())
    for step in range(2 if options.dry else WARM + STEPS):
        if compiled and step == 1:  # past the first step, whose scales are its tensors' own
            model.compile_parts()
        began = time.perf_counter()
        for batch in data:
            loss = model(batch[:, :-1], batch[:, 1:])
            (loss / MICRO_BATCHES).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not options.dry:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    peak = 0.0 if options.dry else torch.cuda.max_memory_allocated() / 2**30
    last = loss.item()
    del model, optimizer, loss
    gc.collect()
    if not options.dry:
        torch.cuda.empty_cache()
    return statistics.median(times[0 if options.dry else WARM :]), peak, last


def main() -> None:
    start(__doc__)
    arms = {
        "BF16": (DecoderLayer, False),
        "BF16 compiled": (DecoderLayer, True),
        "FP8": (FusedLayer, False),
        "FP8 compiled": (FusedLayer, True),
    }
    measured = {name: measure(*arm) for name, arm in arms.items()}
    tokens = MICRO_BATCHES * TOKENS
    rows = [
        [name, f"{seconds * 1e3:.0f}", f"{tokens / seconds:.0f}", f"**{measured['BF16'][0] / seconds:.2f}**",
         f"{measured['BF16 compiled'][0] / seconds:.2f}", f"{peak:.1f}", f"{loss:.3f}"]
        for name, (seconds, peak, loss) in measured.items()
    ]  # fmt: skip
    head = ["arm", "ms a step", "tokens/s", "times as fast as BF16", "as BF16 compiled", "GiB at most", "last loss"]
    note = __doc__.split("\n\n")[1] + "\n"
    write("train_step", header("Whole training steps"), note, table(head, rows))


if __name__ == "__main__":
    main()
