// Cast to FP8 with transpose, amax and column sums in one pass over x.
//
// A block takes a tile of 128 x 128. A thread loads 8 neighbouring columns of 8 neighbouring rows, 16 bytes a load for
// 16-bit types, so that a warp reads two whole 256-byte row pieces at a time. It converts, stores the row-major codes
// straight from registers (128 contiguous bytes a row), transposes its 8 x 8 bytes in registers and hands them to
// shared memory, from which the block writes the transposed tile in 128-byte rows.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "launch.h"

namespace torch_fp8::cuda {
namespace {

constexpr int kTile = 128;   // rows and columns of a tile
constexpr int kPatch = 8;    // rows and columns of a thread's patch
constexpr int kPatches = kTile / kPatch;
constexpr int kThreads = kPatches * kPatches;
constexpr int kWarps = kThreads / 32;
static_assert(kTile == kBiasRows, "a tile makes one row of column sums");
static_assert(kTile % kAlignment == 0, "padding never leaves a tile");

template <Format kFormat>
constexpr __nv_fp8_interpretation_t kInterpretation = kFormat == Format::kE4M3 ? __NV_E4M3 : __NV_E5M2;

// Four scaled values as codes, the first in the lowest byte.
template <Format kFormat>
__device__ uint32_t encode4(float a, float b, float c, float d) {
  const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, kInterpretation<kFormat>);
  const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, kInterpretation<kFormat>);
  return low | high << 16;
}

// Rows of four bytes to columns of four bytes.
__device__ void transpose4x4(const uint32_t (&rows)[4], uint32_t (&columns)[4]) {
  const uint32_t low01 = __byte_perm(rows[0], rows[1], 0x5140), high01 = __byte_perm(rows[0], rows[1], 0x7362);
  const uint32_t low23 = __byte_perm(rows[2], rows[3], 0x5140), high23 = __byte_perm(rows[2], rows[3], 0x7362);
  columns[0] = __byte_perm(low01, low23, 0x5410);
  columns[1] = __byte_perm(low01, low23, 0x7632);
  columns[2] = __byte_perm(high01, high23, 0x5410);
  columns[3] = __byte_perm(high01, high23, 0x7632);
}

template <class T>
__device__ float to_float(T x) {
  return static_cast<float>(x);
}

// kPatch neighbouring elements, aligned to 16 bytes.
template <class T>
struct alignas(16) Pack {
  T values[kPatch];
};

// The patch's row as it lies in registers between load and conversion.
template <class T>
__device__ Pack<T> load_row(const Matrix& x, bool vectorised, int64_t row, int64_t col) {
  const T* const data = static_cast<const T*>(x.data);
  Pack<T> pack;
  if (vectorised && row < x.rows && col + kPatch <= x.cols) {
    pack = *reinterpret_cast<const Pack<T>*>(data + row * x.row_stride + col);
  } else {
#pragma unroll
    for (int j = 0; j < kPatch; ++j) {
      const bool inside = row < x.rows && col + j < x.cols;
      pack.values[j] = inside ? data[row * x.row_stride + (col + j) * x.col_stride] : T(0.0f);
    }
  }
  return pack;
}

__device__ uint32_t block_max(uint32_t value) {
  __shared__ uint32_t of_warp[kWarps];
  value = __reduce_max_sync(0xFFFFFFFF, value);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  value = threadIdx.x < kWarps ? of_warp[threadIdx.x] : 0;
  return __reduce_max_sync(0xFFFFFFFF, value);  // whole in warp 0
}

// Magnitudes compare like the integers of their bits, and so NaN is the largest of all.
__device__ void raise_amax(float* amax, uint32_t block_amax) {
  if (threadIdx.x == 0 && block_amax > *reinterpret_cast<volatile uint32_t*>(amax)) {
    atomicMax(reinterpret_cast<uint32_t*>(amax), block_amax);
  }
}

struct Tile {
  int64_t row, col;  // of this thread's patch
};

__device__ Tile my_tile(int64_t tiles_across) {
  const int64_t tile_row = blockIdx.x / tiles_across, tile_col = blockIdx.x % tiles_across;
  return {tile_row * kTile + threadIdx.x / kPatches * kPatch, tile_col * kTile + threadIdx.x % kPatches * kPatch};
}

template <class T>
__global__ void __launch_bounds__(kThreads) amax_kernel(Matrix x, bool vectorised, int64_t tiles_across, float* amax) {
  const Tile tile = my_tile(tiles_across);
  uint32_t seen = 0;
#pragma unroll
  for (int i = 0; i < kPatch; ++i) {
    const Pack<T> pack = load_row<T>(x, vectorised, tile.row + i, tile.col);
#pragma unroll
    for (int j = 0; j < kPatch; ++j) seen = max(seen, __float_as_uint(to_float(pack.values[j])) & 0x7FFFFFFF);
  }
  raise_amax(amax, block_max(seen));
}

// Column sums of the tile: each thread's own patch first, then over the patches above one another.
__device__ void store_column_sums(const float (&sums)[kPatch], float* out, Tile tile, int64_t padded_cols) {
  __shared__ float of_patch[kPatches][kTile + 4];  // + 4: rows start in different banks
  const int patch_row = threadIdx.x / kPatches, first_col = threadIdx.x % kPatches * kPatch;
#pragma unroll
  for (int j = 0; j < kPatch; ++j) of_patch[patch_row][first_col + j] = sums[j];
  __syncthreads();
  if (threadIdx.x >= kTile) return;
  float sum = 0;
#pragma unroll
  for (int p = 0; p < kPatches; ++p) sum += of_patch[p][threadIdx.x];
  const int64_t tile_row = tile.row / kTile, col = tile.col / kTile * kTile + threadIdx.x;
  if (col < padded_cols) out[tile_row * padded_cols + col] = sum;
}

// The tile's transpose through shared memory. A column of the tile is 16 pieces of 8 bytes; piece p of column c lies
// at place p ^ (c / 8), which spreads the writes of a half warp over all banks and keeps two neighbouring pieces in
// one 16-byte unit.
__device__ void store_transposed(const uint32_t (&codes)[kPatch][2], const QuantizeArgs& args, Tile tile,
                                 int64_t padded_rows, int64_t padded_cols) {
  __shared__ alignas(16) uint2 columns[kTile][kPatches];
  const int patch_row = threadIdx.x / kPatches, patch_col = threadIdx.x % kPatches;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t top[4] = {codes[0][half], codes[1][half], codes[2][half], codes[3][half]};
    const uint32_t bottom[4] = {codes[4][half], codes[5][half], codes[6][half], codes[7][half]};
    uint32_t upper[4], lower[4];
    transpose4x4(top, upper);
    transpose4x4(bottom, lower);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      columns[patch_col * kPatch + half * 4 + j][patch_row ^ patch_col] = make_uint2(upper[j], lower[j]);
    }
  }
  __syncthreads();

  constexpr int kUnits = kTile / 16;  // 16-byte units of a column
  const int unit = threadIdx.x % kUnits;
  const int64_t first_row = tile.row / kTile * kTile, first_col = tile.col / kTile * kTile;
  const int64_t row = first_row + unit * 16;
#pragma unroll
  for (int c = threadIdx.x / kUnits; c < kTile; c += kThreads / kUnits) {
    const int64_t col = first_col + c;
    if (row >= padded_rows || col >= padded_cols) continue;
    const int turn = c / kPatch;
    uint4 piece = *reinterpret_cast<const uint4*>(&columns[c][(unit ^ turn >> 1) * 2]);
    if (turn & 1) piece = make_uint4(piece.z, piece.w, piece.x, piece.y);
    *reinterpret_cast<uint4*>(args.q_t + col * padded_rows + row) = piece;
  }
}

template <class T, Format kFormat, bool kTransposed, bool kSums>
__global__ void __launch_bounds__(kThreads) quantize_kernel(QuantizeArgs args, bool vectorised, int64_t tiles_across) {
  const int64_t padded_rows = padded(args.x.rows), padded_cols = padded(args.x.cols);
  const Tile tile = my_tile(tiles_across);
  const float scale = args.slot->scale;

  Pack<T> packs[kPatch];
#pragma unroll
  for (int i = 0; i < kPatch; ++i) packs[i] = load_row<T>(args.x, vectorised, tile.row + i, tile.col);

  uint32_t seen = 0;
  uint32_t codes[kPatch][2];
  float sums[kPatch] = {};
#pragma unroll
  for (int i = 0; i < kPatch; ++i) {
    float x[kPatch];
#pragma unroll
    for (int j = 0; j < kPatch; ++j) {
      const float value = to_float(packs[i].values[j]);
      seen = max(seen, __float_as_uint(value) & 0x7FFFFFFF);
      if constexpr (kSums) sums[j] += value;
      x[j] = value * scale;
    }
    codes[i][0] = encode4<kFormat>(x[0], x[1], x[2], x[3]);
    codes[i][1] = encode4<kFormat>(x[4], x[5], x[6], x[7]);
    const int64_t row = tile.row + i;
    if (args.q && row < padded_rows && tile.col < padded_cols) {
      *reinterpret_cast<uint2*>(args.q + row * padded_cols + tile.col) = make_uint2(codes[i][0], codes[i][1]);
    }
  }

  if (args.amax) raise_amax(args.amax, block_max(seen));
  if (args.scale_inv && blockIdx.x == 0 && threadIdx.x == 0) *args.scale_inv = args.slot->scale_inv;
  if constexpr (kSums) store_column_sums(sums, args.column_sums, tile, padded_cols);
  if constexpr (kTransposed) store_transposed(codes, args, tile, padded_rows, padded_cols);
}

__global__ void scale_from_amax_kernel(Slot* slot, float target, bool power_of_two) {
  slot->scale = is_usable(slot->amax) ? scale_for(slot->amax, target, power_of_two) : 1.0f;
  slot->scale_inv = 1.0f / slot->scale;
}

bool is_vectorised(const Matrix& x) {
  const int64_t size = x.type == Type::kFloat32 ? 4 : 2;
  return x.col_stride == 1 && x.row_stride * size % 16 == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

struct Grid {
  int64_t across, blocks;
};

Grid grid_of(const Matrix& x) {
  const int64_t across = (padded(x.cols) + kTile - 1) / kTile, down = (padded(x.rows) + kTile - 1) / kTile;
  const int64_t blocks = across * down;
  if (blocks > INT32_MAX) {
    throw std::runtime_error("torch_fp8: a matrix of " + std::to_string(x.rows) + " x " + std::to_string(x.cols) +
                             " is larger than one launch can quantise; split it");
  }
  return {across, blocks};
}

template <class Function>
void with_type(Type type, Function&& function) {
  switch (type) {
    case Type::kFloat32: return function(float{});
    case Type::kFloat16: return function(__half{});
    case Type::kBFloat16: return function(__nv_bfloat16{});
  }
}

template <class T, Format kFormat>
void launch_quantize_as(const QuantizeArgs& args, Grid grid, cudaStream_t stream) {
  const bool transposed = args.q_t, sums = args.column_sums;
  const auto kernel = transposed ? sums ? quantize_kernel<T, kFormat, true, true> : quantize_kernel<T, kFormat, true, false>
                      : sums     ? quantize_kernel<T, kFormat, false, true>
                                 : quantize_kernel<T, kFormat, false, false>;
  kernel<<<grid.blocks, kThreads, 0, stream>>>(args, is_vectorised(args.x), grid.across);
  check(cudaGetLastError(), "quantize_kernel");
}

}  // namespace

void launch_amax(const Matrix& x, float* amax, cudaStream_t stream) {
  const Grid grid = grid_of(x);
  if (grid.blocks == 0) return;
  with_type(x.type, [&](auto t) {
    amax_kernel<decltype(t)><<<grid.blocks, kThreads, 0, stream>>>(x, is_vectorised(x), grid.across, amax);
  });
  check(cudaGetLastError(), "amax_kernel");
}

void launch_scale_from_amax(Slot* slot, float target, bool power_of_two, cudaStream_t stream) {
  scale_from_amax_kernel<<<1, 1, 0, stream>>>(slot, target, power_of_two);
  check(cudaGetLastError(), "scale_from_amax_kernel");
}

void launch_quantize(const QuantizeArgs& args, cudaStream_t stream) {
  const Grid grid = grid_of(args.x);
  if (grid.blocks == 0) return;  // nothing to quantise, and no GEMM will read its scale
  with_type(args.x.type, [&](auto t) {
    using T = decltype(t);
    args.format == Format::kE4M3 ? launch_quantize_as<T, Format::kE4M3>(args, grid, stream)
                                 : launch_quantize_as<T, Format::kE5M2>(args, grid, stream);
  });
}

}  // namespace torch_fp8::cuda
