// Norms for layers that are not trained: y and, in the same pass over x, its codes, each row by its own amax or all by
// a slot's scale. A block takes a row and keeps it in registers, so no barrier waits for another row's loads.
#include "cuda/cast/norm.cuh"
#include "cuda/common/encode.cuh"

namespace torch_fp8::cuda {
namespace {

// The sum, or the maximum, of all threads of a block, the same bits in every thread. of_warp is of this call alone: a
// second call with it would need a barrier in front.
struct Sum {
  static __device__ float of_lanes(float x) { return warp_sum(x); }
  static constexpr float kNothing = 0.0f;
};
struct Largest {
  static __device__ uint32_t of_lanes(uint32_t x) { return __reduce_max_sync(0xFFFFFFFF, x); }
  static constexpr uint32_t kNothing = 0;
};
template <class How, class T>
__device__ T over_block(T x, T (&of_warp)[32]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warps = static_cast<int>(blockDim.x) / 32;
  x = How::of_lanes(x);
  if (lane == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  return How::of_lanes(lane < warps ? of_warp[lane] : How::kNothing);
}

template <class T>
__device__ Words<T> load_words(const Matrix& x, int64_t row, int64_t col) {
  const T* const source = static_cast<const T*>(x.data) + row * x.row_stride + col;
  Words<T> words;
#pragma unroll
  for (size_t i = 0; i < sizeof words.of / sizeof(uint4); ++i) {
    words.of[i] = __ldcs(reinterpret_cast<const uint4*>(source) + i);  // nobody reads it again
  }
  return words;
}

// Of a vector, 16-byte aligned, that all blocks read: it stays in the caches.
template <class T>
__device__ void load_parameters(const Vector& v, int64_t col, float (&x)[kPackSize]) {
  const auto load = [&](auto t) {
    using P = decltype(t);
    Words<P> words;
    const auto* const source = reinterpret_cast<const uint4*>(static_cast<const P*>(v.data) + col);
#pragma unroll
    for (size_t i = 0; i < sizeof words.of / sizeof(uint4); ++i) words.of[i] = __ldg(source + i);
    unpack(words, x);
  };
  v.type == Type::kFloat32 ? load(float{}) : load(T{});
}

// kPacks: of a row, that a thread holds.
template <class T, int kPacks, bool kLayerNorm>
__global__ void __launch_bounds__(kPacks > 2 ? 1024 : 512) norm_rows_kernel(__grid_constant__ const NormRowsArgs args) {
  __shared__ float sums[32], squares[32];
  __shared__ uint32_t largest[32];
  const NormArgs& norm = args.norm;
  const Matrix& x = norm.cast.x;
  const int64_t row = blockIdx.x, cols = x.cols;
  const auto col_of = [](int i) { return (int64_t{i} * blockDim.x + threadIdx.x) * kPackSize; };
  begin_dependent();

  Words<T> loaded[kPacks], added[kPacks];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    if (col_of(i) >= cols) continue;
    loaded[i] = load_words<T>(x, row, col_of(i));
    if (norm.residual.data) added[i] = load_words<T>(norm.residual, row, col_of(i));
  }
  float held[kPacks][kPackSize];
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
#pragma unroll
    for (int j = 0; j < kPackSize; ++j) held[i][j] = 0.0f;
    if (col_of(i) >= cols) continue;
    unpack(loaded[i], held[i]);
    if (norm.residual.data) {
      float others[kPackSize];
      unpack(added[i], others);
#pragma unroll
      for (int j = 0; j < kPackSize; ++j) held[i][j] += others[j];
      const Words<T> total = words_of<T>(held[i]);
      unpack(total, held[i]);  // it is the rounded sum that is normalised
      if (norm.sum) store_whole(static_cast<T*>(norm.sum) + row * cols + col_of(i), total);
    }
#pragma unroll
    for (int j = 0; j < kPackSize; ++j) sum += held[i][j];
  }

  float mean = 0, of_squares = 0;
  if constexpr (kLayerNorm) mean = over_block<Sum>(sum, sums) / static_cast<float>(cols);
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    if (col_of(i) >= cols) continue;
#pragma unroll
    for (int j = 0; j < kPackSize; ++j) of_squares += (held[i][j] - mean) * (held[i][j] - mean);
  }
  const float rstd = reciprocal_deviation(over_block<Sum>(of_squares, squares), cols, norm.eps);

  uint32_t seen = 0;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    if (col_of(i) >= cols) continue;
    float gain[kPackSize], bias[kPackSize];
    if (norm.gain.data) load_parameters<T>(norm.gain, col_of(i), gain);
    if (norm.bias.data) load_parameters<T>(norm.bias, col_of(i), bias);
#pragma unroll
    for (int j = 0; j < kPackSize; ++j) {
      const float factor = norm.gain.data ? gain[j] + norm.gain_offset : 1.0f;
      held[i][j] = normalised(held[i][j], mean, rstd) * factor + (norm.bias.data ? bias[j] : 0.0f);
    }
    const Words<T> y = words_of<T>(held[i]);
    store_whole(static_cast<T*>(norm.y) + row * cols + col_of(i), y);
    unpack(y, held[i]);  // codes are those of y as it is read
#pragma unroll
    for (int j = 0; j < kPackSize; ++j) seen = max(seen, raw_magnitude(held[i][j]));
  }

  if (!args.q) return;
  float scale;
  if (args.slot) {
    scale = args.slot->scale;
  } else {
    const float amax = __uint_as_float(magnitude(__uint_as_float(over_block<Largest>(seen, largest))));
    const Slot slot = own_slot(amax, E4M3::kMax, kExact);
    if (threadIdx.x == 0) args.scale_inv[row] = slot.scale_inv;
    scale = slot.scale;
  }
  const int64_t padded_cols = padded(cols);
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    if (col_of(i) >= padded_cols) continue;
    uint8_t* const q = args.q + row * padded_cols + col_of(i);
    *reinterpret_cast<uint2*>(q) = encode8<Format::kE4M3>(held[i], scale);
    if (seen < kInfinity) continue;
#pragma unroll
    for (int j = 0; j < kPackSize; ++j) {
      if (is_infinite(held[i][j])) q[j] = kNaNCode;
    }
  }
}

constexpr int kMostPacks = 4, kMostThreads = 1024;

// Whole packs of every row, and as few of them as a block's registers hold.
bool fits(const NormArgs& args) {
  const auto in_packs = [](const Matrix& x) { return !x.data || is_vectorised(x); };
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  const int64_t cols = args.cast.x.cols;
  return in_packs(args.cast.x) && in_packs(args.residual) && aligned(args.gain.data) && aligned(args.bias.data) &&
         cols % kPackSize == 0 && padded(cols) <= int64_t{kMostPacks} * kMostThreads * kPackSize;
}

template <class T, int kPacks>
void launch_as(const NormRowsArgs& args, cudaStream_t stream) {
  const Matrix& x = args.norm.cast.x;
  const int64_t packs = padded(x.cols) / kPackSize, warps = (packs + 32 * kPacks - 1) / (32 * kPacks);
  const auto kernel = args.norm.layer_norm ? norm_rows_kernel<T, kPacks, true> : norm_rows_kernel<T, kPacks, false>;
  launch(kernel, blocks_for(x.rows, 1), static_cast<uint32_t>(32 * warps), stream, args);
}

void launch_norm_rows(const NormRowsArgs& args, cudaStream_t stream) {
  if (!fits(args.norm)) return norm_and_quantize(cuda_kernels(), args);
  with_type(args.norm.cast.x.type, [&](auto t) {
    using T = decltype(t);
    const int64_t packs = padded(args.norm.cast.x.cols) / kPackSize;
    packs <= 128            ? launch_as<T, 1>(args, stream)
    : packs <= kMostThreads ? launch_as<T, 2>(args, stream)
                            : launch_as<T, kMostPacks>(args, stream);
  });
}

[[maybe_unused]] const bool filled = fill<launch_norm_rows>(cuda_kernels().norm_rows);

}  // namespace
}  // namespace torch_fp8::cuda
