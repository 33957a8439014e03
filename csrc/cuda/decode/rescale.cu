// Scales of rows and columns, bias and rounding for a product that came in float32 without them.
#include "cuda/common/block.cuh"

namespace torch_fp8::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) rescale_kernel(RescaleArgs args, uint32_t blocks_across, bool vectorised) {
  const int64_t row = blockIdx.x / blocks_across;
  const int64_t first = (int64_t{blockIdx.x % blocks_across} * kThreads + threadIdx.x) * 4;
  begin_dependent();
  if (first >= args.cols) return;
  const float row_scale = args.row_scale[args.one_row_scale ? 0 : row];
  const float4 sums = *reinterpret_cast<const float4*>(args.sums + row * args.stride + first);
  float values[4] = {sums.x, sums.y, sums.z, sums.w};
  T* const out = static_cast<T*>(args.out) + row * args.cols + first;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t col = min(first + i, args.cols - 1);
    values[i] = rescaled(values[i], row_scale, args.col_scale[args.one_col_scale ? 0 : col]);
    if (args.bias) values[i] += to_float(static_cast<const T*>(args.bias)[col]);
  }
  if (vectorised) {
    T rounded[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) rounded[i] = static_cast<T>(values[i]);
    return store_whole(out, rounded);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (first + i < args.cols) out[i] = static_cast<T>(values[i]);
  }
}

void launch_rescale(const RescaleArgs& args, cudaStream_t stream) {
  const uint32_t across = blocks_for(args.cols, kThreads * 4);
  with_type(args.type, [&](auto t) {
    launch(rescale_kernel<decltype(t)>, blocks_for(args.rows * across, 1), kThreads, stream, args, across,
           args.cols % 4 == 0 && reinterpret_cast<uintptr_t>(args.out) % 16 == 0);
  });
}

[[maybe_unused]] const bool filled = fill<launch_rescale>(cuda_kernels().rescale);

}  // namespace
}  // namespace torch_fp8::cuda
