// What a tensor that is scaled by itself needs before its cast: its largest magnitude, and the scale that follows.
#include "cuda/common/block.cuh"

namespace torch_fp8::cuda {
namespace {

constexpr int kThreads = 512, kPacks = 4;  // packs that a thread has in flight
constexpr int kWarps = kThreads / 32;

__device__ void store_part(float* parts, uint32_t seen) {
  __shared__ uint32_t of_warp[kWarps];
  stage_max(of_warp, seen);
  __syncthreads();
  if (threadIdx.x == 0) parts[blockIdx.x] = __uint_as_float(max_of_warps(of_warp));
}

template <class T>
__global__ void __launch_bounds__(kThreads) amax_dense_kernel(const T* data, int64_t packs, float* parts) {
  const auto* const x = reinterpret_cast<const Pack<T>*>(data);
  constexpr int64_t kStep = kThreads * kPacks;
  begin_dependent();
  uint32_t seen = 0;
  int64_t pack = blockIdx.x * kStep + threadIdx.x;
  for (; pack + kStep - kThreads < packs; pack += gridDim.x * kStep) {
    Pack<T> loaded[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) loaded[i] = x[pack + i * kThreads];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) seen = max(seen, max_of_pack(loaded[i]));
  }
  for (int i = 0; i < kPacks && pack < packs; ++i, pack += kThreads) seen = max(seen, max_of_pack(x[pack]));
  store_part(parts, seen);
}

// Any strides.
template <class T>
__global__ void __launch_bounds__(kThreads) amax_kernel(Matrix x, float* parts) {
  begin_dependent();
  uint32_t seen = 0;
  for (int64_t row = blockIdx.x; row < x.rows; row += gridDim.x) {
    const T* const values = static_cast<const T*>(x.data) + row * x.row_stride;
    for (int64_t col = threadIdx.x; col < x.cols; col += kThreads) {
      seen = max(seen, raw_magnitude(to_float(values[col * x.col_stride])));
    }
  }
  store_part(parts, seen);
}

static_assert(kThreads == kAmaxParts, "a thread reads a part");

__global__ void __launch_bounds__(kThreads)
    scale_from_amax_kernel(const float* parts, Slot* slot, float target, int margin) {
  __shared__ uint32_t of_warp[kWarps];
  begin_dependent();
  stage_max(of_warp, __float_as_uint(parts[threadIdx.x]));
  __syncthreads();
  if (threadIdx.x == 0) *slot = own_slot(__uint_as_float(max_of_warps(of_warp)), target, margin);
}

void launch_amax(const Matrix& x, float* parts, cudaStream_t stream) {
  with_type(x.type, [&](auto t) {
    using T = decltype(t);
    if (is_dense(x)) {
      launch(amax_dense_kernel<T>, kAmaxParts, kThreads, stream, static_cast<const T*>(x.data),
             x.rows * x.cols / kPackSize, parts);
    } else {
      launch(amax_kernel<T>, kAmaxParts, kThreads, stream, x, parts);
    }
  });
}

void launch_scale_from_amax(const float* parts, Slot* slot, float target, int margin, cudaStream_t stream) {
  launch(scale_from_amax_kernel, 1, kThreads, stream, parts, slot, target, margin);
}

[[maybe_unused]] const bool amax_filled = fill<launch_amax>(cuda_kernels().amax);
[[maybe_unused]] const bool scale_from_amax_filled = fill<launch_scale_from_amax>(cuda_kernels().scale_from_amax);

}  // namespace
}  // namespace torch_fp8::cuda
