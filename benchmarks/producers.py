"""What stands between the linear layers, made and cast in one pass, against a device copy that moves as many bytes.
Writes results/producers.md and .png."""

from __future__ import annotations

import math

import torch
import torch_fp8 as fp8
from lib.common import graph_us, options, randn, scaled, start
from lib.report import header, shares_of_copy, table, write

SHAPES = [(8192, 4096), (8192, 14336)]
BEYOND_L2 = 0.6e9  # bytes of all buffers of an arm: ten times the L2
REPLAY = 5e9  # bytes of a replay: 1 ms or more on any Hopper GPU
NOTE = """*graph* regime. Forward: SwiGLU reads gate and up, 2 bytes an element each, and writes codes and their
transpose, 1 + 1; GeLU reads one. Backward: reads dy too, and writes codes and transposes of each gradient; where one
layer made gate and up, halves are read and written. The copy
moves as many bytes: the fewest, for nothing is written in 16 bits. A norm reads x and writes codes and transpose; with
a residual it reads that too and writes the sum. Its backward reads dy and x, and what else reached the sum, and writes
dx; the gradients of gain and bias are in its time. A norm of frozen layers writes its result in 16
bits and its codes, each row by its own amax.
"""
OPS = torch.ops.torch_fp8
CASTS = [fp8.DelayedScaling().options().cast(role).packed for role in range(3)]
PASSES = {  # bytes an element
    "SwiGLU, codes alone": 5,
    "SwiGLU": 6,
    "SwiGLU backward": 10,
    "SwiGLU backward, gate and up of one layer": 10,
    "GeLU (tanh)": 4,
    "GeLU (tanh) backward": 6,
    "GeLU backward": 6,
    "RMSNorm": 4,
    "RMSNorm, codes and 16 bits": 6,
    "RMSNorm + residual": 8,
    "LayerNorm": 4,
    "RMSNorm of frozen layers": 5,
    "RMSNorm of frozen layers + residual": 9,
    "RMSNorm backward": 6,
    "RMSNorm backward + residual": 8,
    "LayerNorm backward": 6,
}


def measure(rows: int, cols: int) -> dict[str, float]:
    """µs of each pass, and of the copies."""
    elements = rows * cols
    sets = max(2, math.ceil(BEYOND_L2 / (6 * elements))) if not options.dry else 2
    launches = max(sets, math.ceil(REPLAY / (6 * elements)))
    gates, ups, grads = ([randn(rows, cols) for _ in range(sets)] for _ in range(3))
    both = [torch.cat(pair, -1) for pair in zip(gates, ups)]
    sources = [randn(math.ceil(2.5 * elements)) for _ in range(2)]
    targets = [torch.empty_like(source) for source in sources]
    slots = [torch.tensor([[1 / 8, 8.0, 0.0, 1.0]] * 3, device=options.device) for _ in range(2)]

    def forward(gated: bool, activation: int, columnwise: bool = True):
        return lambda i: OPS.activation_cast(
            gates[i], ups[i] if gated else None, activation, slots[0], 0, CASTS, 7, True, True, True, columnwise
        )

    def backward(gated: bool, activation: int):
        up_slots, histories = (slots[1], [7, 7]) if gated else (None, [7])
        return lambda i: OPS.activation_backward_cast(
            grads[i], gates[i], ups[i] if gated else None, activation, slots[0], up_slots, 2, CASTS, histories, True,
            True,
        )  # fmt: skip

    def backward_by_halves(i: int):
        return OPS.activation_backward_cast(
            grads[i], both[i], None, 0, slots[0], None, 2, CASTS, [7], True, True, halves=1
        )  # fmt: skip

    gain = randn(cols)
    rms, layer = (
        OPS.norm_cast(gates[0], None, gain, None, 1e-5, layer_norm, 0.0, None, 0, CASTS, 7, True, True, False, False,
                      False)[5]
        for layer_norm in (False, True)
    )  # fmt: skip

    def norm(added: bool = False, layer_norm: bool = False, wants_y: bool = False):
        return lambda i: OPS.norm_cast(
            gates[i], ups[i] if added else None, gain, gain if layer_norm else None, 1e-5, layer_norm, 0.0, slots[0],
            0, CASTS, 7, True, True, True, True, wants_y,
        )  # fmt: skip

    def frozen_norm(added: bool = False):
        return lambda i: OPS.frozen_norm(gates[i], ups[i] if added else None, gain, None, 1e-5, False, 0.0)

    def norm_backward(added: bool = False, layer_norm: bool = False):
        return lambda i: OPS.norm_backward(
            grads[i], gates[i], ups[i] if added else None, gain, layer if layer_norm else rms, layer_norm, 0.0, True,
            layer_norm,
        )  # fmt: skip

    def copy(bytes_moved: int):
        pairs = [[t[: elements * bytes_moved // 4] for t in pair] for pair in zip(targets, sources)]
        return lambda i: pairs[i % 2][0].copy_(pairs[i % 2][1])

    arms = {
        "SwiGLU, codes alone": forward(True, 0, columnwise=False),
        "SwiGLU": forward(True, 0),
        "SwiGLU backward": backward(True, 0),
        "SwiGLU backward, gate and up of one layer": backward_by_halves,
        "GeLU (tanh)": forward(False, 2),
        "GeLU (tanh) backward": backward(False, 2),
        "GeLU backward": backward(False, 1),
        "RMSNorm": norm(),
        "RMSNorm, codes and 16 bits": norm(wants_y=True),
        "RMSNorm + residual": norm(added=True),
        "LayerNorm": norm(layer_norm=True),
        "RMSNorm of frozen layers": frozen_norm(),
        "RMSNorm of frozen layers + residual": frozen_norm(added=True),
        "RMSNorm backward": norm_backward(),
        "RMSNorm backward + residual": norm_backward(added=True),
        "LayerNorm backward": norm_backward(layer_norm=True),
        **{f"copy of {size}": copy(size) for size in sorted(set(PASSES.values()))},
    }
    return graph_us(arms, sets, launches)


def draw(figure, tables) -> None:
    shares_of_copy(figure, tables[0], "BF16 matrix")


def main() -> None:
    start(__doc__)
    rows = []
    for shape in SHAPES:
        size = scaled(*shape)
        us = measure(*size)
        for name, moved in PASSES.items():
            share = us[f"copy of {moved}"] / us[name]
            speed = moved * math.prod(size) / us[name] / 1e3
            rows.append(
                ["{} x {}".format(*size), name, moved, f"{us[f'copy of {moved}']:.1f}", f"{us[name]:.1f}",
                 f"{speed:.0f}", f"**{share:.0%}**"]
            )  # fmt: skip

    head = ["BF16 matrix", "pass", "bytes an element", "copy, µs", "pass, µs", "GB/s", "share of copy"]
    write("producers", header("Producers against a device copy"), NOTE, table(head, rows), draw=draw)


if __name__ == "__main__":
    main()
