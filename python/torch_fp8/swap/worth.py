"""Where FP8 pays: how much faster than ``nn.Linear`` in BF16 an FP8 layer of a given size can be.

A GEMM of M tokens, K inputs and N outputs gains in proportion to M K N, the casts that FP8 needs cost in proportion to
M K + M N + K N, and launches and the host cost the same at any size. So a layer that is small, or narrow on one side,
loses in FP8 whatever the kernels do.
"""

from __future__ import annotations

# What an H200 sustains in a loop, after benchmarks/results/linear.md, rounded in favour of BF16; small.md compares the
# prediction with what was measured. An H100 reads memory more slowly: near the border it gains less than predicted, or
# loses a little.
BF16_FLOPS = 720e12  # a second, in a layer's three GEMMs
FP8_FLOPS = 1250e12
CAST_SPEED = 3.6e12  # bytes a second, read and written together
CAST_BYTES = 4  # an element: its BF16 value read, its code written twice, once transposed
LAUNCH_GAP = 2.5e-6  # seconds between two kernels; FP8 has three more, the casts of x, dy and w
# Seconds of the host, in eager mode, for a forward and backward: the loop of M512 K1024 N1024 on the slower of two
# machines (the other took 112 and 144 us), because a layer left in BF16 loses less than one that is slowed down.
BF16_HOST = 160e-6
FP8_HOST = 195e-6  # with the cast of the weight


def speedup(tokens: int, in_features: int, out_features: int) -> float:
    """Predicted time of ``nn.Linear`` in BF16 over that of ``fp8.Linear`` for one forward and backward in eager mode.

    Both take the GPU's time or the host's, whichever is longer. FP8 pays above 1: the GEMMs then save more than the
    casts cost, and BF16 keeps the GPU busy for longer than the host needs to launch FP8. More tokens never make a layer
    that pays one that does not.

    Taken as given: 16-bit parameters, ``DelayedScaling`` (``CurrentScaling`` reads each tensor once more) and one cast
    of the weight a call (gradient accumulation shares it). Pure arithmetic, the same for every device.
    """
    flop = 3 * 2 * tokens * in_features * out_features  # fprop, dgrad, wgrad
    elements = tokens * in_features + tokens * out_features + in_features * out_features
    bf16 = flop / BF16_FLOPS
    fp8 = flop / FP8_FLOPS + CAST_BYTES * elements / CAST_SPEED + 3 * LAUNCH_GAP
    return max(bf16, BF16_HOST) / max(fp8, FP8_HOST)
