// Cast to FP8 with transpose, amax and column sums in one pass over x.
//
// A block takes a tile of 128 x 128. A thread loads 8 neighbouring columns of 4 neighbouring rows, 16 bytes a load for
// 16-bit types, so that a warp reads two whole 256-byte row pieces at a time. It converts, stores the row-major codes
// straight from registers (128 contiguous bytes a row), transposes its 4 x 8 bytes in registers and hands them to
// shared memory, from which the block writes the transposed tile in 128-byte rows. Tiles go to blocks in the order of
// their addresses, which keeps DRAM pages open.
//
// Where only row-major codes are asked for and nothing is padded, the matrix is one dense array and no tiles are
// needed.
#include <algorithm>

#include "cuda/common/block.cuh"
#include "cuda/common/encode.cuh"
#include "cuda/common/transpose.cuh"

namespace torch_fp8::cuda {
namespace {

constexpr int kTile = 128;                                              // rows and columns of a tile
constexpr int kPatchRows = 4;                                           // of a thread's patch
constexpr int kAcross = kTile / kPackSize, kDown = kTile / kPatchRows;  // patches of a tile
constexpr int kThreads = kAcross * kDown;
constexpr int kWarps = kThreads / 32;
static_assert(kTile == kBiasRows, "a tile makes one row of column sums");
static_assert(kTile % kAlignment == 0 && kAlignment % kPackSize == 0 && kAlignment % kPatchRows == 0,
              "padding leaves no tile and cuts no patch");

constexpr int kDenseThreads = 1024, kDensePacks = 2;  // of the kernel for dense arrays: threads, packs of a thread

struct Tile {
  int64_t row, col;          // of the tile's first element
  int patch_row, patch_col;  // which patch of the tile is this thread's
  bool whole;                // no element of the tile lies outside of x
};

__device__ Tile tile_of(const Matrix& x, uint32_t index, uint32_t tiles_across) {
  const int64_t row = int64_t{index / tiles_across} * kTile, col = int64_t{index % tiles_across} * kTile;
  const int thread = static_cast<int>(threadIdx.x);
  return {row, col, thread / kAcross, thread % kAcross, row + kTile <= x.rows && col + kTile <= x.cols};
}

// All loads are issued before the first value is used.
template <class T>
__device__ void load_patch(const Matrix& x, bool vectorised, const Tile& tile, Pack<T> (&rows)[kPatchRows]) {
  const int64_t row = tile.row + tile.patch_row * kPatchRows, col = tile.col + tile.patch_col * kPackSize;
  const T* const patch = static_cast<const T*>(x.data) + row * x.row_stride + col * x.col_stride;
  if (vectorised && tile.whole) {
#pragma unroll
    for (int i = 0; i < kPatchRows; ++i) rows[i] = *reinterpret_cast<const Pack<T>*>(patch + i * x.row_stride);
    return;
  }
  const int inside_rows = static_cast<int>(min(int64_t{kPatchRows}, x.rows - row));
  const int inside_cols = static_cast<int>(min(int64_t{kPackSize}, x.cols - col));
#pragma unroll
  for (int i = 0; i < kPatchRows; ++i) {
    const T* element = patch + i * x.row_stride;
#pragma unroll
    for (int j = 0; j < kPackSize; ++j, element += x.col_stride) {
      rows[i].values[j] = i < inside_rows && j < inside_cols ? *element : T(0.0f);
    }
  }
}

// The transposed tile in shared memory: a column is 32 words of 4 bytes, one a patch. Word w of column c lies at place
// w ^ 2 * (c / 8 % 16): a warp, which writes two neighbouring words of 16 such columns, finds each in a bank of its
// own, and every four words that make 16 bytes stay together.
using Columns = uint32_t[kTile][kDown];

__device__ int place_of(const Tile& tile) { return tile.patch_row ^ 2 * tile.patch_col; }

__device__ void stage_transposed(Columns& columns, const uint2 (&codes)[kPatchRows], const Tile& tile) {
  const int place = place_of(tile);
  uint32_t words[4];
  transpose4x4({codes[0].x, codes[1].x, codes[2].x, codes[3].x}, words);
#pragma unroll
  for (int j = 0; j < 4; ++j) columns[tile.patch_col * kPackSize + j][place] = words[j];
  transpose4x4({codes[0].y, codes[1].y, codes[2].y, codes[3].y}, words);
#pragma unroll
  for (int j = 0; j < 4; ++j) columns[tile.patch_col * kPackSize + 4 + j][place] = words[j];
}

// mark_infinities for a patch: in q, and in columns where there are any, before others read them.
template <class T>
__device__ void mark_patch(const QuantizeArgs& args, const Tile& tile, Columns* columns) {
  const Matrix& x = args.x;
  const int64_t row = tile.row + tile.patch_row * kPatchRows, col = tile.col + tile.patch_col * kPackSize;
#pragma unroll 1
  for (int element = 0; element < kPatchRows * kPackSize; ++element) {
    const int i = element / kPackSize, j = element % kPackSize;
    if (row + i >= x.rows || col + j >= x.cols) continue;
    if (!is_infinite(static_cast<const T*>(x.data)[(row + i) * x.row_stride + (col + j) * x.col_stride])) continue;
    if (args.q) args.q[(row + i) * padded(x.cols) + col + j] = kNaNCode;
    if (columns) {
      uint32_t& word = (*columns)[tile.patch_col * kPackSize + j][place_of(tile)];
      word = (word & ~(0xFFu << 8 * i)) | uint32_t{kNaNCode} << 8 * i;
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
    const int turn = c / kPackSize;
    uint4 piece = *reinterpret_cast<const uint4*>(&columns[c][(unit ^ turn >> 1) * 4]);
    if (turn & 1) piece = make_uint4(piece.z, piece.w, piece.x, piece.y);
    *reinterpret_cast<uint4*>(q_t + (tile.col + c) * padded_rows + row) = piece;
  }
}

// Sums of the tile's columns, first over the two patches above one another in a warp.
using WarpSums = float[kWarps][kTile];

__device__ void stage_sums(WarpSums& warp_sums, float (&sums)[kPackSize], const Tile& tile) {
  static_assert(2 * kAcross == 32, "a warp holds two rows of patches");
#pragma unroll
  for (int j = 0; j < kPackSize; ++j) sums[j] += __shfl_xor_sync(0xFFFFFFFF, sums[j], kAcross);
  if (threadIdx.x % 32 >= kAcross) return;
  float* const place = &warp_sums[threadIdx.x / 32][tile.patch_col * kPackSize];
  *reinterpret_cast<float4*>(place) = make_float4(sums[0], sums[1], sums[2], sums[3]);
  *reinterpret_cast<float4*>(place + 4) = make_float4(sums[4], sums[5], sums[6], sums[7]);
}

__device__ void store_sums(const WarpSums& warp_sums, const Tile& tile, float* column_sums, int64_t padded_cols) {
  const int64_t col = tile.col + threadIdx.x;
  if (threadIdx.x >= kTile || col >= padded_cols) return;
  float sum = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += warp_sums[warp][threadIdx.x];
  column_sums[tile.row / kBiasRows * padded_cols + col] = sum;
}

// By one thread, last of all: nobody waits for its round trips to memory.
template <int kCount>
__device__ void store_scalars(const QuantizeArgs& args, const uint32_t (&of_warp)[kCount]) {
  if (threadIdx.x != 0) return;
  if (args.amax) raise_amax(args.amax, max_of_warps(of_warp));
  if (args.scale_inv && blockIdx.x == 0) *args.scale_inv = args.slot->scale_inv;
}

// The maxima of the tile's warps are in of_warp at the end.
template <class T, Format kFormat, bool kTransposed, bool kSums>
__device__ __forceinline__ void cast_tile(const QuantizeArgs& args, bool vectorised, const Tile& tile, float scale,
                                          uint32_t (&of_warp)[kWarps]) {
  const int64_t padded_rows = padded(args.x.rows), padded_cols = padded(args.x.cols);
  Pack<T> rows[kPatchRows];
  load_patch(args.x, vectorised, tile, rows);

  uint32_t seen = 0;
  uint2 codes[kPatchRows];
  float sums[kPackSize] = {};
#pragma unroll
  for (int i = 0; i < kPatchRows; ++i) {
    float x[kPackSize];
#pragma unroll
    for (int j = 0; j < kPackSize; ++j) {
      x[j] = to_float(rows[i].values[j]);
      seen = max(seen, raw_magnitude(x[j]));
      if constexpr (kSums) sums[j] += x[j];
    }
    codes[i] = encode8<kFormat>(x, scale);
  }

  const int64_t row = tile.row + tile.patch_row * kPatchRows, col = tile.col + tile.patch_col * kPackSize;
  // Padded sizes are multiples of the patch: it lies inside of q or outside.
  if (args.q && row < padded_rows && col < padded_cols) {
    uint8_t* const patch = args.q + row * padded_cols + col;
#pragma unroll
    for (int i = 0; i < kPatchRows; ++i) *reinterpret_cast<uint2*>(patch + i * padded_cols) = codes[i];
  }
  stage_max(of_warp, seen);
  __shared__ alignas(16) Columns columns;
  if constexpr (kTransposed) stage_transposed(columns, codes, tile);
  if (seen >= kInfinity) [[unlikely]]
    mark_patch<T>(args, tile, kTransposed ? &columns : nullptr);
  __shared__ alignas(16) WarpSums warp_sums;
  if constexpr (kSums) stage_sums(warp_sums, sums, tile);
  __syncthreads();
  if constexpr (kTransposed) store_transposed(columns, tile, args.q_t, padded_rows, padded_cols);
  if constexpr (kSums) store_sums(warp_sums, tile, args.column_sums, padded_cols);
}

template <class T, Format kFormat, bool kTransposed, bool kSums>
__global__ void __launch_bounds__(kThreads, 2)
    quantize_kernel(__grid_constant__ const QuantizeArgs args, bool vectorised, uint32_t tiles_across) {
  __shared__ uint32_t of_warp[kWarps];
  const Tile tile = tile_of(args.x, blockIdx.x, tiles_across);
  begin_dependent();
  cast_tile<T, kFormat, kTransposed, kSums>(args, vectorised, tile, args.slot->scale, of_warp);
  store_scalars(args, of_warp);
}

// In the ordinary case a block reads two numbers and ends, so there are few blocks, and where there is work each takes
// many tiles.
template <class T, Format kFormat>
__global__ void __launch_bounds__(kThreads, 2)
    recast_kernel(__grid_constant__ const RecastArgs args, bool vectorised, uint32_t tiles_across, uint32_t tiles) {
  __shared__ uint32_t of_warp[kWarps];
  const QuantizeArgs& cast = args.cast;
  begin_dependent();
  const float amax = *cast.amax;
  if (!is_unfit(cast.slot->scale, amax, kFormat, args.target)) return;
  const Slot own = own_slot(amax, args.target, args.power_of_two);
  for (uint32_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Tile tile = tile_of(cast.x, index, tiles_across);
    if (cast.q_t) {
      cast_tile<T, kFormat, true, false>(cast, vectorised, tile, own.scale, of_warp);
    } else {
      cast_tile<T, kFormat, false, false>(cast, vectorised, tile, own.scale, of_warp);
    }
    __syncthreads();  // before the next tile is put in the place of this one
  }
  if (cast.scale_inv && blockIdx.x == 0 && threadIdx.x == 0) *cast.scale_inv = own.scale_inv;
}

// The row-major codes of a dense x that needs no padding.
template <class T, Format kFormat>
__global__ void __launch_bounds__(kDenseThreads)
    quantize_dense_kernel(__grid_constant__ const QuantizeArgs args, int64_t packs) {
  __shared__ uint32_t of_warp[kDenseThreads / 32];
  const int64_t first = int64_t{blockIdx.x} * (kDenseThreads * kDensePacks) + threadIdx.x;
  begin_dependent();
  const float scale = args.slot->scale;
  Pack<T> loaded[kDensePacks];
#pragma unroll
  for (int i = 0; i < kDensePacks; ++i) {
    const int64_t pack = first + i * kDenseThreads;
    if (pack < packs) loaded[i] = static_cast<const Pack<T>*>(args.x.data)[pack];
  }
  uint32_t seen = 0;
#pragma unroll
  for (int i = 0; i < kDensePacks; ++i) {
    const int64_t pack = first + i * kDenseThreads;
    if (pack >= packs) continue;
    seen = max_of_pack(loaded[i], seen);
    store_codes<kFormat>(args.q + pack * kPackSize, loaded[i], scale);
  }
  if (seen >= kInfinity) [[unlikely]] {
    for (int64_t pack = first; pack < min(first + kDensePacks * kDenseThreads, packs); pack += kDenseThreads) {
      const int64_t element = pack * kPackSize;
      mark_infinities(args.q + element, static_cast<const T*>(args.x.data) + element, 1, kPackSize);
    }
  }
  stage_max(of_warp, seen);
  __syncthreads();
  store_scalars(args, of_warp);
}

uint32_t tiles_across(const Matrix& x) { return blocks_for(padded(x.cols), kTile); }
uint32_t tiles_of(const Matrix& x) {
  return blocks_for(int64_t{tiles_across(x)} * blocks_for(padded(x.rows), kTile), 1);
}

template <class T, Format kFormat>
void launch_quantize_as(const QuantizeArgs& args, cudaStream_t stream) {
  const Matrix& x = args.x;
  const bool unpadded = x.rows % kAlignment == 0 && x.cols % kAlignment == 0;
  if (args.q && !args.q_t && !args.column_sums && unpadded && is_dense(x)) {
    const int64_t packs = x.rows * x.cols / kPackSize;
    launch(quantize_dense_kernel<T, kFormat>, blocks_for(packs, kDenseThreads * kDensePacks), kDenseThreads, stream,
           args, packs);
    return;
  }
  const bool transposed = args.q_t, sums = args.column_sums;
  const auto kernel = transposed
                          ? sums ? quantize_kernel<T, kFormat, true, true> : quantize_kernel<T, kFormat, true, false>
                      : sums ? quantize_kernel<T, kFormat, false, true>
                             : quantize_kernel<T, kFormat, false, false>;
  launch(kernel, tiles_of(x), kThreads, stream, args, is_vectorised(x), tiles_across(x));
}

void launch_quantize(const QuantizeArgs& args, cudaStream_t stream) {
  if (args.x.rows == 0 || args.x.cols == 0) return;  // nothing to quantise, and no GEMM will read its scale
  with_type(args.x.type, [&](auto t) {
    using T = decltype(t);
    args.format == Format::kE4M3 ? launch_quantize_as<T, Format::kE4M3>(args, stream)
                                 : launch_quantize_as<T, Format::kE5M2>(args, stream);
  });
}

void launch_recast(const RecastArgs& args, cudaStream_t stream) {
  const Matrix& x = args.cast.x;
  const uint32_t tiles = tiles_of(x);
  if (tiles == 0) return;
  with_type(x.type, [&](auto t) {
    using T = decltype(t);
    const auto kernel =
        args.cast.format == Format::kE4M3 ? recast_kernel<T, Format::kE4M3> : recast_kernel<T, Format::kE5M2>;
    launch(kernel, std::min(tiles, 2 * kMultiprocessors), kThreads, stream, args, is_vectorised(x), tiles_across(x),
           tiles);
  });
}

[[maybe_unused]] const bool filled =
    fill<launch_quantize>(cuda_kernels().quantize) && fill<launch_recast>(cuda_kernels().recast);

}  // namespace
}  // namespace torch_fp8::cuda
