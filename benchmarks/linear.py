"""fp8.Linear, forward and backward, against nn.Linear in BF16 and against the floor. Writes results/linear.md.

The floor is what the hardware asks for: the three FP8 GEMMs with the algorithms in use, and every cast's bytes (2 read,
1 + 1 written an element) at the speed of a device copy of as many bytes, all timed in the same run. The weight's cast
is counted once a call, as in a step without gradient accumulation.
"""

from __future__ import annotations

import torch
import torch_fp8 as fp8
from common import gpu_ms, header, loop_ms, table, write
from torch import nn

SHAPES = [  # M (tokens), K (in), N (out)
    (8192, 4096, 4096),
    (8192, 4096, 6144),
    (8192, 4096, 14336),
    (8192, 14336, 4096),
    (2048, 4096, 14336),
    (512, 1024, 1024),
]
HOST_SHAPE = (16, 256, 256)


def step_of(layer: nn.Linear, x: torch.Tensor, dy: torch.Tensor):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)

    def step() -> None:
        layer(x).backward(dy)
        layer.weight.grad = x.grad = None

    step(), optimizer.step()  # the first step's exact scales are not what is timed
    if isinstance(layer, fp8.Linear):
        plain_step = step

        def step() -> None:
            layer._memo.after_update()  # as after optimizer.step(): the weight is cast anew
            plain_step()

    return step


def copy_of(elements: int):
    """A copy that reads and writes as many bytes as a cast with transpose of so many BF16 elements."""
    source, target = (torch.empty(2 * elements, dtype=torch.uint8, device="cuda").random_(255) for _ in range(2))
    return lambda: target.copy_(source)


def measure(m: int, k: int, n: int) -> dict[str, object]:
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
    bf16 = nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16)
    ours = fp8.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16)
    steps = {"bf16": step_of(bf16, x, dy), "fp8": step_of(ours, x, dy)}

    slots = fp8._C.new_slots(torch.device("cuda"))
    cast = torch.ops.torch_fp8.quantize
    (xq, xt, sx, _), (wq, wt, sw, _) = (
        cast(t, slots, 0, torch.float8_e4m3fn, own_amax=True, columnwise=True)
        for t in (x.detach(), ours.weight.detach())
    )
    gq, gt, sg, _ = cast(dy, slots, 2, torch.float8_e5m2, own_amax=True, columnwise=True)
    gemm = torch.ops.torch_fp8.gemm

    def gemms() -> None:
        gemm(xq, wq, sx, sw, None, [m, n], torch.bfloat16, True)
        gemm(gq, wt, sg, sw, None, [m, k], torch.bfloat16, False)
        gemm(gt, xt, sg, sx, None, [n, k], torch.bfloat16, False)

    copies = [copy_of(rows * cols) for rows, cols in ((m, k), (m, n), (n, k))]
    casts = [
        lambda t=t, f=f: cast(t, slots, 0, f, columnwise=True)
        for t, f in (
            (x.detach(), torch.float8_e4m3fn),
            (dy, torch.float8_e5m2),
            (ours.weight.detach(), torch.float8_e4m3fn),
        )
    ]
    arms = {
        **steps,
        "gemms": gemms,
        "copies": lambda: [copy() for copy in copies],
        "casts": lambda: [call() for call in casts],
    }
    gpu = gpu_ms(arms)
    loop = loop_ms(steps)

    torch.cuda.synchronize()
    peaks = {}
    for name, step in steps.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {"gpu": gpu, "loop": loop, "peak": peaks}


def host_us() -> dict[str, dict[str, float]]:
    """Wall time of a call whose kernels take next to nothing: the host's share."""
    m, k, n = HOST_SHAPE
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
    layers = {
        "bf16": nn.Linear(k, n, device="cuda", dtype=torch.bfloat16),
        "fp8": fp8.Linear(k, n, device="cuda", dtype=torch.bfloat16),
    }
    for layer in layers.values():
        step_of(layer, x, dy)

    def both(layer: nn.Linear) -> None:
        layer(x).backward(dy)

    def without_grad(layer: nn.Linear) -> None:
        with torch.no_grad():
            layer(x)

    kinds = {"forward": lambda layer: layer(x), "forward, no_grad": without_grad, "forward + backward": both}
    return {
        kind: {name: ms * 1e3 for name, ms in loop_ms(
            {name: lambda layer=layer, call=call: call(layer) for name, layer in layers.items()}
        ).items()}
        for kind, call in kinds.items()
    }  # fmt: skip


def main() -> None:
    rows = []
    for m, k, n in SHAPES:
        result = measure(m, k, n)
        gpu, loop, peak = result["gpu"], result["loop"], result["peak"]
        floor = gpu["gemms"] + gpu["copies"]
        rows.append([
            f"M{m} K{k} N{n}",
            f"{gpu['bf16']:.3f} / {loop['bf16']:.3f}",
            f"{gpu['fp8']:.3f} / {loop['fp8']:.3f}",
            f"**{gpu['bf16'] / gpu['fp8']:.2f} / {loop['bf16'] / loop['fp8']:.2f}**",
            f"{floor:.3f}",
            f"{gpu['fp8'] / floor:.2f}",
            f"{gpu['gemms']:.3f}",
            f"{gpu['casts']:.3f} ({gpu['copies'] / gpu['casts']:.0%})",
            f"{peak['bf16']:.0f} / {peak['fp8']:.0f}",
        ])  # fmt: skip
    head = ["shape", "BF16 ms, GPU / loop", "FP8 ms, GPU / loop", "FP8 over BF16, GPU / loop", "floor ms",
            "FP8 / floor", "GEMMs ms", "casts ms (share of copy speed)", "peak MiB, BF16 / FP8"]  # fmt: skip
    host = host_us()
    host_rows = [
        [kind, f"{us['bf16']:.1f}", f"{us['fp8']:.1f}", f"{us['fp8'] / us['bf16']:.2f}"] for kind, us in host.items()
    ]
    write("linear.md", "\n".join([
        header("Linear, forward + backward: torch_fp8 against nn.Linear in BF16"),
        "One forward and backward with both gradients, no bias, delayed scaling in its steady state, one weight cast a "
        "call. Casts are timed one after another with events, which flatters neither side but counts launch gaps.\n",
        table(head, rows),
        "\nHost time per call at M{} K{} N{} with bias, µs (weight cast cached):\n".format(*HOST_SHAPE),
        table(["call", "nn.Linear", "fp8.Linear", "ratio"], host_rows),
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
