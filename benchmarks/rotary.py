"""Rotary positions of q and k, without and with an RMS norm of each head, against a device copy that moves as many
bytes. Writes results/rotary.md and .png."""

from __future__ import annotations

import math

import torch
from lib.common import graph_us, options, randn, start
from lib.report import header, shares_of_copy, table, write

SHAPES = {  # batch, tokens, heads of q and of k, dims
    "Llama-3-8B, 4 x 2048 tokens": (4, 2048, 32, 8, 128),
    "Llama-3-8B, 1 x 8192 tokens": (1, 8192, 32, 8, 128),
}
BEYOND_L2 = 0.6e9  # bytes of all buffers of an arm: ten times the L2
REPLAY = 5e9  # bytes of a replay: 1 ms or more on any Hopper GPU
NOTE = """*graph* regime. Forward: q and k are read and written once, 2 bytes an element each way. Backward: the
gradients likewise and, with a norm, q and k are read again; gradients of the gains are made. The copy moves as many
bytes: the fewest, for the tables and the gains come from the cache.
"""
OPS = torch.ops.torch_fp8
PASSES = {  # bytes an element
    "rotary": 4,
    "rotary, interleaved": 4,
    "rotary backward": 4,
    "RMS norm + rotary": 4,
    "RMS norm + rotary backward": 6,
}


def measure(batch: int, tokens: int, q_heads: int, k_heads: int, dims: int) -> dict[str, float]:
    """µs of each pass, and of the copies."""
    elements = batch * tokens * (q_heads + k_heads) * dims
    sets = max(2, math.ceil(BEYOND_L2 / (4 * elements))) if not options.dry else 2
    launches = max(sets, math.ceil(REPLAY / (4 * elements)))
    qs, ks, dqs, dks = (
        [randn(batch, tokens, heads, dims) for _ in range(sets)] for heads in (q_heads, k_heads, q_heads, k_heads)
    )
    sources = [randn(math.ceil(1.5 * elements)) for _ in range(2)]
    targets = [torch.empty_like(source) for source in sources]
    cos, sin = (randn(1, tokens, dims) for _ in range(2))
    columns = slice(dims // 2)  # GPT-J's and GLM's tables of interleaved pairs: one column each
    q_gain, k_gain = (randn(dims) for _ in range(2))

    def forward(interleaved: bool, norm: int):
        gains = (q_gain, k_gain) if norm else (None, None)
        c, s = (cos[..., columns], sin[..., columns]) if interleaved else (cos, sin)
        return lambda i: OPS.rotary(qs[i], ks[i], c, s, dims, interleaved, False, norm, *gains)

    def backward(norm: int):
        gains = (q_gain, k_gain) if norm else (None, None)
        return lambda i: OPS.rotary_backward(
            dqs[i], dks[i], *((qs[i], ks[i]) if norm else (None, None)), cos, sin, dims, False, False, norm, *gains,
            1e-6, 0.0, norm > 0,
        )  # fmt: skip

    def copy(bytes_moved: int):
        pairs = [[t[: elements * bytes_moved // 4] for t in pair] for pair in zip(targets, sources)]
        return lambda i: pairs[i % 2][0].copy_(pairs[i % 2][1])

    arms = {
        "rotary": forward(False, 0),
        "rotary, interleaved": forward(True, 0),
        "rotary backward": backward(0),
        "RMS norm + rotary": forward(False, 1),
        "RMS norm + rotary backward": backward(1),
        **{f"copy of {size}": copy(size) for size in sorted(set(PASSES.values()))},
    }
    return graph_us(arms, sets, launches)


def draw(figure, tables) -> None:
    shares_of_copy(figure, tables[0], "shape")


def main() -> None:
    start(__doc__)
    rows = []
    for name, shape in SHAPES.items():
        size = (2, 16, 2, 1, 32) if options.dry else shape
        us = measure(*size)
        for each, moved in PASSES.items():
            elements = math.prod(size[:2]) * sum(size[2:4]) * size[4]
            share, speed = us[f"copy of {moved}"] / us[each], moved * elements / us[each] / 1e3
            rows.append(
                [name, each, moved, f"{us[f'copy of {moved}']:.1f}", f"{us[each]:.1f}", f"{speed:.0f}",
                 f"**{share:.0%}**"]
            )  # fmt: skip

    head = ["shape", "pass", "bytes an element", "copy, µs", "pass, µs", "GB/s", "share of copy"]
    write("rotary", header("Rotary positions against a device copy"), NOTE, table(head, rows), draw=draw)


if __name__ == "__main__":
    main()
