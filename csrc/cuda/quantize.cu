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

constexpr int kTile = 128;  // rows and columns of a tile
constexpr int kPatch = 8;   // rows and columns of a thread's patch
constexpr int kPatches = kTile / kPatch;
constexpr int kThreads = kPatches * kPatches;
constexpr int kWarps = kThreads / 32;
static_assert(kTile == kBiasRows, "a tile makes one row of column sums");
static_assert(kTile % kAlignment == 0 && kAlignment % kPatch == 0, "padding leaves no tile and cuts no patch");

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

struct Tile {
  int64_t row, col;          // of the tile's first element
  int patch_row, patch_col;  // which patch of the tile is this thread's
  bool whole;                // no element of the tile lies outside of x
};

__device__ Tile my_tile(const Matrix& x, uint32_t tiles_across) {
  const int64_t row = int64_t{blockIdx.x / tiles_across} * kTile, col = int64_t{blockIdx.x % tiles_across} * kTile;
  const int thread = static_cast<int>(threadIdx.x);
  return {row, col, thread / kPatches, thread % kPatches, row + kTile <= x.rows && col + kTile <= x.cols};
}

// All loads are issued before the first value is used.
template <class T>
__device__ void load_patch(const Matrix& x, bool vectorised, const Tile& tile, Pack<T> (&rows)[kPatch]) {
  const int64_t row = tile.row + tile.patch_row * kPatch, col = tile.col + tile.patch_col * kPatch;
  const T* const patch = static_cast<const T*>(x.data) + row * x.row_stride + col * x.col_stride;
  if (vectorised && tile.whole) {
#pragma unroll
    for (int i = 0; i < kPatch; ++i) rows[i] = *reinterpret_cast<const Pack<T>*>(patch + i * x.row_stride);
    return;
  }
#pragma unroll
  for (int i = 0; i < kPatch; ++i) {
#pragma unroll
    for (int j = 0; j < kPatch; ++j) {
      const bool inside = row + i < x.rows && col + j < x.cols;
      rows[i].values[j] = inside ? patch[i * x.row_stride + j * x.col_stride] : T(0.0f);
    }
  }
}

// magnitude() without its second step, which the maximum takes once: NaN of any payload is above Inf.
__device__ uint32_t raw_magnitude(float x) { return __float_as_uint(x) & 0x7FFFFFFF; }

__device__ void stage_max(uint32_t (&of_warp)[kWarps], uint32_t seen) {
  seen = magnitude(__uint_as_float(__reduce_max_sync(0xFFFFFFFF, seen)));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = seen;
}

// By one thread, last of all: nobody waits for its round trip to memory.
__device__ void raise_amax(const uint32_t (&of_warp)[kWarps], float* amax) {
  if (threadIdx.x != 0) return;
  uint32_t seen = of_warp[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) seen = max(seen, of_warp[warp]);
  auto* const bits = reinterpret_cast<uint32_t*>(amax);
  if (seen > *static_cast<volatile uint32_t*>(bits)) atomicMax(bits, seen);
}

template <class T>
__global__ void __launch_bounds__(kThreads) amax_kernel(Matrix x, bool vectorised, uint32_t tiles_across, float* amax) {
  __shared__ uint32_t of_warp[kWarps];
  Pack<T> rows[kPatch];
  load_patch(x, vectorised, my_tile(x, tiles_across), rows);
  uint32_t seen = 0;
#pragma unroll
  for (int i = 0; i < kPatch; ++i) {
#pragma unroll
    for (int j = 0; j < kPatch; ++j) seen = max(seen, raw_magnitude(to_float(rows[i].values[j])));
  }
  stage_max(of_warp, seen);
  __syncthreads();
  raise_amax(of_warp, amax);
}

// The transposed tile in shared memory. A column is 16 pieces of 8 bytes, one a patch; piece p of column c lies at
// place p ^ (c / 8), which spreads the writes of a half warp over all banks and keeps two neighbouring pieces in one
// 16-byte unit.
using Columns = uint2[kTile][kPatches];

__device__ void stage_transposed(Columns& columns, const uint32_t (&codes)[kPatch][2], const Tile& tile) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t top[4] = {codes[0][half], codes[1][half], codes[2][half], codes[3][half]};
    const uint32_t bottom[4] = {codes[4][half], codes[5][half], codes[6][half], codes[7][half]};
    uint32_t upper[4], lower[4];
    transpose4x4(top, upper);
    transpose4x4(bottom, lower);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      columns[tile.patch_col * kPatch + half * 4 + j][tile.patch_row ^ tile.patch_col] = make_uint2(upper[j], lower[j]);
    }
  }
}

__device__ void store_transposed(const Columns& columns, const Tile& tile, uint8_t* q_t, int64_t padded_rows,
                                 int64_t padded_cols) {
  constexpr int kUnits = kTile / 16;           // 16-byte units of a column
  constexpr int kColumns = kThreads / kUnits;  // that the block writes at a time
  const int unit = static_cast<int>(threadIdx.x) % kUnits, first = static_cast<int>(threadIdx.x) / kUnits;
  const int64_t row = tile.row + unit * 16;
  if (row >= padded_rows) return;
#pragma unroll
  for (int i = 0; i < kTile / kColumns; ++i) {
    const int c = first + i * kColumns;
    if (tile.col + c >= padded_cols) continue;
    const int turn = c / kPatch;
    uint4 piece = *reinterpret_cast<const uint4*>(&columns[c][(unit ^ turn >> 1) * 2]);
    if (turn & 1) piece = make_uint4(piece.z, piece.w, piece.x, piece.y);
    *reinterpret_cast<uint4*>(q_t + (tile.col + c) * padded_rows + row) = piece;
  }
}

using PatchSums = float[kPatches][kTile + 4];  // + 4: rows start in different banks

// Column sums of the tile, over the patches above one another.
__device__ void store_sums(const PatchSums& sums, const Tile& tile, float* column_sums, int64_t padded_cols) {
  const int64_t col = tile.col + threadIdx.x;
  if (threadIdx.x >= kTile || col >= padded_cols) return;
  float sum = 0;
#pragma unroll
  for (int p = 0; p < kPatches; ++p) sum += sums[p][threadIdx.x];
  column_sums[tile.row / kBiasRows * padded_cols + col] = sum;
}

template <class T, Format kFormat, bool kTransposed, bool kSums>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(__grid_constant__ const QuantizeArgs args, bool vectorised, uint32_t tiles_across) {
  __shared__ uint32_t of_warp[kWarps];
  const int64_t padded_rows = padded(args.x.rows), padded_cols = padded(args.x.cols);
  const Tile tile = my_tile(args.x, tiles_across);
  const float scale = args.slot->scale;

  Pack<T> rows[kPatch];
  load_patch(args.x, vectorised, tile, rows);

  uint32_t seen = 0;
  uint32_t codes[kPatch][2];
  float sums[kPatch] = {};
#pragma unroll
  for (int i = 0; i < kPatch; ++i) {
    float x[kPatch];
#pragma unroll
    for (int j = 0; j < kPatch; ++j) {
      const float value = to_float(rows[i].values[j]);
      seen = max(seen, raw_magnitude(value));
      if constexpr (kSums) sums[j] += value;
      x[j] = value * scale;
    }
    codes[i][0] = encode4<kFormat>(x[0], x[1], x[2], x[3]);
    codes[i][1] = encode4<kFormat>(x[4], x[5], x[6], x[7]);
  }

  const int64_t row = tile.row + tile.patch_row * kPatch, col = tile.col + tile.patch_col * kPatch;
  // Padded sizes are multiples of the patch: it lies inside of q or outside.
  if (args.q && row < padded_rows && col < padded_cols) {
    uint8_t* const patch = args.q + row * padded_cols + col;
#pragma unroll
    for (int i = 0; i < kPatch; ++i) {
      *reinterpret_cast<uint2*>(patch + i * padded_cols) = make_uint2(codes[i][0], codes[i][1]);
    }
  }
  stage_max(of_warp, seen);

  if constexpr (kSums) {
    __shared__ PatchSums patch_sums;
#pragma unroll
    for (int j = 0; j < kPatch; ++j) patch_sums[tile.patch_row][tile.patch_col * kPatch + j] = sums[j];
    __syncthreads();
    store_sums(patch_sums, tile, args.column_sums, padded_cols);
  }
  if constexpr (kTransposed) {
    __shared__ alignas(16) Columns columns;
    stage_transposed(columns, codes, tile);
    __syncthreads();
    store_transposed(columns, tile, args.q_t, padded_rows, padded_cols);
  }
  if constexpr (!kSums && !kTransposed) __syncthreads();
  if (args.amax) raise_amax(of_warp, args.amax);
  if (args.scale_inv && blockIdx.x == 0 && threadIdx.x == 0) *args.scale_inv = args.slot->scale_inv;
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
  uint32_t across, blocks;
};

Grid grid_of(const Matrix& x) {
  const int64_t across = (padded(x.cols) + kTile - 1) / kTile, down = (padded(x.rows) + kTile - 1) / kTile;
  const int64_t blocks = across * down;
  if (blocks > INT32_MAX) {
    throw std::runtime_error("torch_fp8: a matrix of " + std::to_string(x.rows) + " x " + std::to_string(x.cols) +
                             " is larger than one launch can quantise; split it");
  }
  return {static_cast<uint32_t>(across), static_cast<uint32_t>(blocks)};
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
  const auto kernel = transposed
                          ? sums ? quantize_kernel<T, kFormat, true, true> : quantize_kernel<T, kFormat, true, false>
                      : sums ? quantize_kernel<T, kFormat, false, true>
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
