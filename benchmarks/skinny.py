"""Few rows of x on an FP8 weight, as in decoding, against reading the weight and against BF16. Writes
results/skinny.md.

"read" is a kernel that only reads the weight's bytes, launched ahead of its turn as ours are: the floor. "token" is a
weight with a scale a channel and activations scaled by token, "static" one with one scale, as x; "block" has scales for
128 x 128 of the weight and for 128 columns of a row of x. "cast + GEMM" is the library's own static cast and GEMM,
whatever the rows; "_scaled_mm" and "_scaled_mm rows" get x quantised already, with one scale on each side or one for
each row. Up to 16 rows, 8 at N = 28672, no arm of ours quantises x.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from lib.common import graph_us, options, randn, scaled, start
from lib.report import header, table, write
from lib.steps import E4M3, gemm, quantize
from torch.nn import functional as F

SHAPES = [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)]  # K, N
ROWS = (1, 2, 4, 8, 16, 17, 32, 64, 128, 256)
BEYOND_L2 = 0.6e9  # bytes of all weights of an arm: ten times the L2
LAUNCHES = 100
STATIC, TOKEN = 1, 3
FROZEN = torch.ops.torch_fp8.frozen_linear
NOTE = f"""*graph* regime, {LAUNCHES} launches or more, weights of {BEYOND_L2 / 1e9} GB or more in rotation, µs a call.
"""

# A block reads 16 KB in order; the sum is kept from being optimised away. Started early, as the kernels it is held to.
READ = """
__global__ void __launch_bounds__(256) read_kernel(const uint4* data, int64_t count, float* out) {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  const int64_t first = int64_t{blockIdx.x} * 1024 + threadIdx.x;
  uint4 v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = first + i * 256 < count ? data[first + i * 256] : uint4{};
  asm volatile("griddepcontrol.wait;" ::: "memory");
  unsigned mixed = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) mixed ^= v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
  if (mixed == 0x12345678u) out[0] = 1.0f;
}
void read_bytes(at::Tensor w, at::Tensor out) {
  const int64_t count = w.nbytes() / 16;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>((count + 1023) / 1024);
  config.blockDim = 256;
  config.stream = c10::cuda::getCurrentCUDAStream();
  config.attrs = &attribute;
  config.numAttrs = 1;
  C10_CUDA_CHECK(cudaLaunchKernelEx(&config, read_kernel, static_cast<const uint4*>(w.const_data_ptr()), count,
                                    out.data_ptr<float>()));
}
"""


def reader() -> Callable[[torch.Tensor], object]:
    if options.dry:
        return lambda w: w.view(torch.uint8).max()
    from torch.utils.cpp_extension import load_inline

    includes = "#include <c10/cuda/CUDAException.h>\n#include <c10/cuda/CUDAStream.h>\n"
    module = load_inline(
        "torch_fp8_read",
        cpp_sources="void read_bytes(at::Tensor w, at::Tensor out);",
        cuda_sources=includes + READ,
        functions=["read_bytes"],
        extra_cuda_cflags=["-gencode=arch=compute_90a,code=sm_90a"],
    )
    out = torch.zeros(1, device=options.device)
    return lambda w: module.read_bytes(w, out)


def measure(k: int, n: int, read: Callable[[torch.Tensor], object]) -> list[list[str]]:
    sets = 2 if options.dry else math.ceil(BEYOND_L2 / (n * k))
    weights = [(randn(n, k) * 50).clamp(-448, 448).to(E4M3) for _ in range(sets)]
    wide = [randn(n, k) for _ in range(math.ceil(sets / 2))]
    blocks = torch.rand(math.ceil(n / 128), math.ceil(k / 128), device=options.device)
    channels, one = torch.rand(n, 1, device=options.device), torch.ones(1, device=options.device)
    slot = torch.tensor([[1 / 64, 64.0, 0.0, 1.0]], device=options.device)  # scale_inv, scale, amax, cursor
    rows = []
    for m in ROWS:
        x = randn(m, k)
        codes, _, x_scale, _ = quantize(x, slot, 0, E4M3, record=False)
        by_rows = torch.rand(codes.shape[0], 1, device=options.device), channels.t()
        by_rows = (x_scale, one) if options.dry else by_rows  # the CPU has it not

        def frozen(scale: torch.Tensor, x: torch.Tensor = x):
            return lambda i: FROZEN(x, weights[i], scale, None, None, TOKEN)

        def cast_and_gemm(i: int, x: torch.Tensor = x, m: int = m) -> torch.Tensor:
            q, _, scale, _ = quantize(x, slot, 0, E4M3, record=False)
            return gemm(q, weights[i], scale, one, None, [m, n], torch.bfloat16, True)

        def scaled_mm(x_scale: torch.Tensor, w_scale: torch.Tensor, codes: torch.Tensor = codes):
            return lambda i: torch._scaled_mm(
                codes, weights[i].t(), scale_a=x_scale, scale_b=w_scale, out_dtype=torch.bfloat16, use_fast_accum=True
            )

        us = graph_us(
            {
                "read": lambda i: read(weights[i]),
                "token": frozen(channels),
                "static": lambda i, x=x: FROZEN(x, weights[i], one, None, slot, STATIC),
                "block": frozen(blocks),
                "cast + GEMM": cast_and_gemm,
                "_scaled_mm": scaled_mm(x_scale, one),
                "_scaled_mm rows": scaled_mm(*by_rows),
                "BF16": lambda i, x=x: F.linear(x, wide[i % len(wide)]),
            },
            sets,
            math.ceil(LAUNCHES / sets) * sets,
        )
        rows.append([
            f"K{k} N{n}", m, *(f"{t:.2f}" for t in us.values()), f"**{us['token'] / us['read']:.2f}**",
            f"**{us['BF16'] / us['token']:.2f}**", f"{us['cast + GEMM'] / us['token']:.2f}",
            f"{us['BF16'] / us['block']:.2f}",
        ])  # fmt: skip
    return rows


def main() -> None:
    start(__doc__)
    read = reader()
    rows = [row for shape in SHAPES for row in measure(*scaled(*shape), read)]
    head = ["weight", "M", "read", "token", "static", "block", "cast + GEMM", "_scaled_mm", "_scaled_mm rows", "BF16",
            "token over read", "BF16 over token", "cast + GEMM over token", "BF16 over block"]  # fmt: skip
    note = " ".join(__doc__.split("\n\n")[1].split())
    write("skinny", header("Few rows on an FP8 weight"), NOTE, f"{note}\n", table(head, rows))


if __name__ == "__main__":
    main()
