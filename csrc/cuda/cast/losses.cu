// What casts lose: counted in whole numbers, whose sums do not depend on the order of blocks.
#include "cuda/common/block.cuh"

namespace torch_fp8::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr uint32_t kBlocks = 1024;

template <class T>
__global__ void __launch_bounds__(kThreads) count_losses_kernel(LossArgs args) {
  __shared__ uint32_t of_warp[kWarps];
  begin_dependent();
  const float scale = args.slot->scale, most = max_of(args.format), least = half_smallest_of(args.format);
  const Matrix& x = args.x;
  uint32_t counts[kLosses] = {};
  uint32_t seen = 0;
  for (int64_t row = blockIdx.x; row < x.rows; row += kBlocks) {
    const T* const values = static_cast<const T*>(x.data) + row * x.row_stride;
#pragma unroll 8
    for (int64_t col = threadIdx.x; col < x.cols; col += kThreads) {
      const float value = to_float(values[col * x.col_stride]), scaled = fabsf(value * scale);
      const uint32_t magnitude = raw_magnitude(value);
      counts[kSaturated] += scaled > most && magnitude < kInfinity;
      counts[kFlushed] += magnitude != 0 && scaled <= least;
      counts[kInf] += magnitude == kInfinity;
      counts[kNaN] += magnitude > kInfinity;
      seen = max(seen, magnitude);
    }
  }
#pragma unroll
  for (int i = 0; i < kLosses; ++i) {
    const uint32_t of_all = __reduce_add_sync(0xFFFFFFFF, counts[i]);
    if (threadIdx.x % 32 == 0 && of_all != 0) {
      atomicAdd(reinterpret_cast<unsigned long long*>(args.counts + i), of_all);
    }
  }
  stage_max(of_warp, seen);
  __syncthreads();
  if (threadIdx.x != 0) return;
  raise_amax(args.values + 1, max_of_warps(of_warp));
  if (blockIdx.x == 0) args.values[0] = scale;
}

void launch_count_losses(const LossArgs& args, cudaStream_t stream) {
  with_type(args.x.type, [&](auto t) { launch(count_losses_kernel<decltype(t)>, kBlocks, kThreads, stream, args); });
}

[[maybe_unused]] const bool filled = fill<launch_count_losses>(cuda_kernels().count_losses);

}  // namespace
}  // namespace torch_fp8::cuda
