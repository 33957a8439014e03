// Norms of any size and layout, which norm.cu does not take: a block reads a row for its moments, and reads it again;
// then the tiles of tile.cuh cast by those.
#include "cuda/cast/norm.cuh"
#include "cuda/cast/tile.cuh"

namespace torch_fp8::cuda {
namespace {

constexpr int kRowThreads = 512;

// The sum over a block, the same bits in every thread.
__device__ float block_sum(float x) {
  __shared__ float of_warp[kRowThreads / 32];
  x = warp_sum(x);
  __syncthreads();  // the sum before has been read
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return warp_sum(lane < kRowThreads / 32 ? of_warp[lane] : 0.0f);
}

template <class T>
__device__ float element(const Matrix& x, int64_t row, int64_t col) {
  return to_float(static_cast<const T*>(x.data)[row * x.row_stride + col * x.col_stride]);
}

// What is normalised.
template <class T>
__device__ float element(const NormArgs& args, int64_t row, int64_t col) {
  const float x = element<T>(args.cast.x, row, col);
  return args.residual.data ? to_float(T(x + element<T>(args.residual, row, col))) : x;
}

template <class T>
__global__ void __launch_bounds__(kRowThreads) moments_kernel(__grid_constant__ const NormArgs args) {
  const int64_t row = blockIdx.x, rows = args.cast.x.rows, cols = args.cast.x.cols;
  begin_dependent();
  // From some element on: a sum of large values loses what they differ by.
  const float origin = element<T>(args, row, 0);
  float sum = 0, squares = 0;
  for (int64_t col = threadIdx.x; col < cols; col += kRowThreads) {
    const float x = element<T>(args, row, col);
    if (args.sum) static_cast<T*>(args.sum)[row * cols + col] = T(x);
    sum += x - origin;
  }
  const float mean = args.layer_norm ? origin + block_sum(sum) / static_cast<float>(cols) : 0.0f;
  for (int64_t col = threadIdx.x; col < cols; col += kRowThreads) {
    const float distance = element<T>(args, row, col) - mean;
    squares += distance * distance;
  }
  const float rstd = reciprocal_deviation(block_sum(squares), cols, args.eps);
  if (threadIdx.x == 0) store_stats(args.stats, args.layer_norm, rows, row, mean, rstd);
  if (!args.y) return;
  for (int64_t col = threadIdx.x; col < cols; col += kRowThreads) {
    const float n = normalised(element<T>(args, row, col), mean, rstd);
    const float bias = args.bias.data ? parameter<T>(args.bias, col) : 0.0f;
    static_cast<T*>(args.y)[row * cols + col] = T(n * gain_at<T>(args.gain, args.gain_offset, col) + bias);
  }
}

// y as what a tile is made of.
template <class T>
struct NormSource {
  const NormArgs& args;
  float y[kPatchRows][kPackSize];

  __device__ float at(int64_t row, int64_t col) const {
    const auto [mean, rstd] = stats_of(args.stats, args.layer_norm, args.cast.x.rows, row);
    const float bias = args.bias.data ? parameter<T>(args.bias, col) : 0.0f;
    return normalised(element<T>(args, row, col), mean, rstd) * gain_at<T>(args.gain, args.gain_offset, col) + bias;
  }
  __device__ void load(const Tile& tile) {
    const int64_t row = tile.row + tile.patch_row * kPatchRows, col = tile.col + tile.patch_col * kPackSize;
#pragma unroll
    for (int i = 0; i < kPatchRows; ++i) {
#pragma unroll
      for (int j = 0; j < kPackSize; ++j) {
        y[i][j] = row + i < args.cast.x.rows && col + j < args.cast.x.cols ? at(row + i, col + j) : 0.0f;
      }
    }
  }
  __device__ float value(int i, int j) const { return y[i][j]; }
};

template <class T, bool kTransposed>
__global__ void __launch_bounds__(kThreads, 2)
    cast_normed_kernel(__grid_constant__ const NormArgs args, uint32_t tiles_across) {
  __shared__ uint32_t of_warp[kWarps];
  const Tile tile = tile_of(args.cast.x, blockIdx.x, tiles_across);
  begin_dependent();
  NormSource<T> source{args};
  source.load(tile);
  cast_loaded<Format::kE4M3, kTransposed, false>(source, args.cast, tile, args.cast.slot->scale, of_warp);
  store_scalars(args.cast, of_warp);
}

// A block a part: what norm_backward.cu does, with each row read twice, and sums in memory.
template <class T>
__global__ void __launch_bounds__(kRowThreads) norm_backward_any_kernel(__grid_constant__ const NormBackwardArgs args) {
  const int64_t part = blockIdx.x, rows = args.x.rows, cols = args.x.cols;
  begin_dependent();
  for (int64_t row = part; row < rows; row += args.parts) {
    const auto [mean, rstd] = stats_of(args.stats, args.layer_norm, rows, row);
    float sum = 0, products = 0;
    for (int64_t col = threadIdx.x; col < cols; col += kRowThreads) {
      const float g = element<T>(args.dy, row, col) * gain_at<T>(args.gain, args.gain_offset, col);
      sum += g;
      products += g * normalised(element<T>(args.x, row, col), mean, rstd);
    }
    sum = args.layer_norm ? block_sum(sum) / static_cast<float>(cols) : 0.0f;
    products = block_sum(products) / static_cast<float>(cols);
    for (int64_t col = threadIdx.x; col < cols; col += kRowThreads) {
      const float dy = element<T>(args.dy, row, col), n = normalised(element<T>(args.x, row, col), mean, rstd);
      float dx = rstd * (dy * gain_at<T>(args.gain, args.gain_offset, col) - sum - n * products);
      if (args.dsum.data) dx += element<T>(args.dsum, row, col);
      static_cast<T*>(args.dx)[row * cols + col] = T(dx);
      const int64_t at = part * cols + col;
      if (args.dgain) args.dgain[at] = (row == part ? 0.0f : args.dgain[at]) + dy * n;
      if (args.dbias) args.dbias[at] = (row == part ? 0.0f : args.dbias[at]) + dy;
    }
  }
}

}  // namespace

void launch_norm_any(const NormArgs& args, cudaStream_t stream) {
  const Matrix& x = args.cast.x;
  with_type(x.type, [&](auto t) {
    using T = decltype(t);
    launch(moments_kernel<T>, blocks_for(x.rows, 1), kRowThreads, stream, args);
    if (!args.cast.slot) return;
    launch(args.cast.q_t ? cast_normed_kernel<T, true> : cast_normed_kernel<T, false>, tiles_of(x), kThreads, stream,
           args, tiles_across(x));
  });
}

void launch_norm_backward_any(const NormBackwardArgs& args, cudaStream_t stream) {
  with_type(args.x.type, [&](auto t) {
    launch(norm_backward_any_kernel<decltype(t)>, blocks_for(args.parts, 1), kRowThreads, stream, args);
  });
}

}  // namespace torch_fp8::cuda
