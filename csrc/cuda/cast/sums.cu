// The second step of a bias gradient: the column sums of every kBiasRows rows, added up and rounded once.
#include "cuda/common/block.cuh"

namespace torch_fp8::cuda {
namespace {

constexpr int kColumns = 32, kLines = 16;  // a block: columns side by side, and lines of it that share the rows
constexpr int kInFlight = 8;               // loads of a thread before the first is used

template <class T>
__global__ void __launch_bounds__(kColumns* kLines)
    add_column_sums_kernel(const float* parts, int64_t count, int64_t cols, int64_t stride, T* out) {
  __shared__ float of_line[kLines][kColumns];
  const int lane = static_cast<int>(threadIdx.x) % kColumns, line = static_cast<int>(threadIdx.x) / kColumns;
  const int64_t col = int64_t{blockIdx.x} * kColumns + lane;
  begin_dependent();
  float sum = 0;
  if (col < cols) {
    for (int64_t row = line; row < count; row += kLines * kInFlight) {
      float loaded[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t r = row + i * kLines;
        loaded[i] = r < count ? parts[r * stride + col] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) sum += loaded[i];
    }
  }
  of_line[line][lane] = sum;
  __syncthreads();
  if (line != 0 || col >= cols) return;
#pragma unroll
  for (int i = 1; i < kLines; ++i) sum += of_line[i][lane];
  out[col] = static_cast<T>(sum);
}

void launch_add_column_sums(const ColumnSums& sums, cudaStream_t stream) {
  if (sums.cols == 0) return;
  with_type(sums.type, [&](auto t) {
    using T = decltype(t);
    launch(add_column_sums_kernel<T>, blocks_for(sums.cols, kColumns), kColumns * kLines, stream, sums.parts,
           sums.count, sums.cols, sums.stride, static_cast<T*>(sums.out));
  });
}

[[maybe_unused]] const bool filled = fill<launch_add_column_sums>(cuda_kernels().add_column_sums);

}  // namespace
}  // namespace torch_fp8::cuda
