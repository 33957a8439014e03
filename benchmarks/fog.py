"""Layers of Llama 3 and of the FOG architectures (arXiv 2505.20524), forward + backward. Writes results/fog.md, .png.

Blocks of models/fog.py at the widths of the paper's 1.5B and 8B models, without embedding, head and optimizer; BF16
parameters, 16,384 tokens in a pass, each FP8 weight cast once a step. *FP8*: every linear layer, after fp8.fuse,
eager; *compiled*: torch.compile of each block, where only the FFNs are fused and the rest is left to the compiler.
*attention*: the attention's products too in mode "auto", with one scale for q, k and v; the table says what that chose.
Tokens a second are those of the loop, for so many layers.

Where the time of a step goes, by the profiler's clock. *norms* has the sums of their gains' gradients, *attention* what
cuDNN launches around it.
"""

from __future__ import annotations

import gc
from typing import NamedTuple

import torch
from lib.common import gpu_ms, loop_ms, options, randn, scaled, start
from lib.kinds import KINDS, profiled
from lib.report import LOOP, bars, header, legend, level, numbers, pair, table, write
from lib.steps import step_of
from torch import Tensor, nn
from torch_fp8.picture import FAINT, FP8, INK, SECOND, THIRD

from models.fog import Attention, Block, rotation_of_positions
from models.fog_config import ARCHITECTURES, SIZES, Shape
from models.fog_fp8 import to_fp8

TOKENS = 16384  # of a pass
LAYERS = {"8B": 4, "1.5B": 8}
CONTEXTS = (4096, 16384)
OVER = "times as fast as Llama BF16 compiled, GPU / loop"


class Arm(NamedTuple):
    architecture: str
    fp8: bool = True
    attention: str = "16bit"
    compiled: bool = False


BASE = "Llama 3, BF16, compiled"
ARMS = {
    BASE: Arm("llama3", fp8=False, compiled=True),
    "Llama 3, FP8": Arm("llama3"),
    "Llama 3, FP8, attention": Arm("llama3", attention="auto"),
    "FOG-max, FP8": Arm("fog-max"),
    "FOG-max, FP8, attention": Arm("fog-max", attention="auto"),
    "FOG-opt, FP8": Arm("fog-opt"),
    "FOG-opt, FP8, attention": Arm("fog-opt", attention="auto"),
    "FOG-flash, BF16, compiled": Arm("fog-flash", fp8=False, compiled=True),
    "FOG-flash, FP8": Arm("fog-flash"),
    "FOG-flash, FP8, attention": Arm("fog-flash", attention="auto"),
    "FOG-flash, FP8, attention, compiled": Arm("fog-flash", attention="auto", compiled=True),
}
DRAWN = {
    "Llama 3, FP8": FAINT,
    "FOG-max, FP8, attention": SECOND,
    "FOG-opt, FP8, attention": THIRD,
    "FOG-flash, FP8, attention": FP8,
    "FOG-flash, FP8, attention, compiled": INK,
}


class Layers(nn.Module):
    def __init__(self, arm: Arm, shape: Shape, layers: int) -> None:
        super().__init__()
        self.shape = shape
        self.blocks = nn.ModuleList(Block(ARCHITECTURES[arm.architecture], shape) for _ in range(layers))
        self.rotation: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.rotation is None or len(self.rotation[0]) != x.shape[1]:
            self.rotation = rotation_of_positions(x.shape[1], self.shape, x.device)
        for block in self.blocks:
            x = block(x, *self.rotation)
        return x


def make(arm: Arm, shape: Shape, layers: int, x: Tensor, dy: Tensor):
    """A step of an arm, and its layers."""
    with torch.device(options.device):
        model = Layers(arm, shape, layers).bfloat16()
    if arm.fp8:
        to_fp8(model, attention=arm.attention, fuse="ffn" if arm.compiled else "all")
    step = step_of(model, x, dy)  # the first steps, whose scales are their tensors' own, are not compiled
    if arm.compiled:
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=False, backend="aot_eager" if options.dry else "inductor")
    return step, model


def ran_in(model: nn.Module) -> str:
    found = {
        getattr(part.attend, "last", None) or ("16bit",) for part in model.modules() if isinstance(part, Attention)
    }
    return ", ".join(sorted(mode for mode, *_ in found))


def measure(size: str, context: int, names: list[str]) -> dict[str, tuple]:
    """Of each arm: ms in the two regimes, what its attention ran in, and its profile."""
    torch._dynamo.reset()
    (tokens, context), layers = scaled(TOKENS, context), 1 if options.dry else LAYERS[size]
    shape = SIZES["tiny" if options.dry else size]
    lie = (max(1, tokens // context), context, shape.hidden)
    x, dy = randn(*lie, requires_grad=True), randn(*lie)
    made = {name: make(ARMS[name], shape, layers, x, dy) for name in names}
    arms = {name: step for name, (step, _) in made.items()}
    gpu, loop = gpu_ms(arms, rounds=8), loop_ms(arms, seconds=1)
    return {name: (gpu[name], loop[name], ran_in(made[name][1]), profiled(arms[name])) for name in names}


def draw(figure, tables) -> None:
    cells: dict[str, dict[str, float]] = {}
    for row in tables[0]:
        cell = cells.setdefault(f"{row['width']}, context {row['context']}", {})
        cell[row["arm"]] = numbers(row[OVER])[1]
    axes = figure.subplots()
    series = {arm: (color, [cell.get(arm, 0.0) for cell in cells.values()]) for arm, color in DRAWN.items()}
    bars(axes, list(cells), series, "%.2f")
    level(axes, "Llama BF16\ncompiled")
    axes.set(ylabel="times as fast, tokens/s\nhigher is better", title=f"Forward + backward of layers, {LOOP}")
    legend(axes, below=True)


def main() -> None:
    args = start(
        __doc__,
        widths={"nargs": "+", "choices": list(LAYERS), "default": list(LAYERS), "help": "default: both"},
        contexts={"nargs": "+", "type": int, "choices": CONTEXTS, "default": CONTEXTS, "help": "default: both"},
        arms={"nargs": "+", "choices": list(ARMS), "default": list(ARMS), "metavar": "ARM", "help": "default: all"},
    )
    names = [BASE, *(name for name in args.arms if name != BASE)]
    rows: list[list] = []
    kinds: list[list] = []
    for size in args.widths:
        for context in args.contexts:
            measured = measure(size, context, names)
            base = measured[BASE]
            for name, (gpu, loop, mode, profile) in measured.items():
                speed, over = f"{TOKENS / loop * 1e3:,.0f}", pair(base[0] / gpu, base[1] / loop)
                rows.append([size, context, name, mode, speed, pair(gpu, loop), f"**{over}**"])
                print(" | ".join(map(str, rows[-1])), flush=True)
                cells = [f"{count}, {us / 1e3:.1f}" for count, us in profile.values()]
                kinds.append([size, context, name, *cells])
            report(rows, kinds)  # after each: what was measured is kept where the next one is cut off
            gc.collect()
            if not options.dry:
                torch.cuda.empty_cache()


def report(rows: list[list], kinds: list[list]) -> None:
    note, of_kinds = __doc__.split("\n\n")[1:]
    layers = ", ".join(f"{LAYERS[size]} layers of {size} width" for size in dict.fromkeys(row[0] for row in rows))
    head = ["width", "context", "arm", "attention ran in", "tokens/s", "ms, GPU / loop", OVER]
    by_kind = table(["width", "context", "arm", *(f"{kind}: launches, ms" for kind in KINDS)], kinds)
    title = header("Layers of Llama 3 and FOG")
    write("fog", title, f"{note}\n\nMeasured: {layers}.\n", table(head, rows), of_kinds, by_kind, draw=draw)


if __name__ == "__main__":
    main()
