// A tile of 128 x 128 cast to FP8, with its transpose, maxima and column sums in one pass.
//
// A thread loads 8 neighbouring columns of 4 neighbouring rows, 16 bytes a load for 16-bit types, so that a warp reads
// two whole 256-byte row pieces at a time. It converts, stores the row-major codes straight from registers (128
// contiguous bytes a row), transposes its 4 x 8 bytes in registers and hands them to shared memory, from which the
// block writes the transposed tile in 128-byte rows.
#pragma once

#include "cuda/common/block.cuh"
#include "cuda/common/encode.cuh"
#include "cuda/common/transpose.cuh"

namespace torch_fp8::cuda {

constexpr int kPatchRows = 4;                                           // of a thread's patch
constexpr int kAcross = kTile / kPackSize, kDown = kTile / kPatchRows;  // patches of a tile
constexpr int kThreads = kAcross * kDown;
constexpr int kWarps = kThreads / 32;
static_assert(kTile % kAlignment == 0 && kAlignment % kPackSize == 0 && kAlignment % kPatchRows == 0,
              "padding leaves no tile and cuts no patch");

struct Tile {
  int64_t row, col;          // of the tile's first element
  int patch_row, patch_col;  // which patch of the tile is this thread's
  bool whole;                // no element of the tile lies outside of x
};

__device__ inline Tile tile_of(const Matrix& x, uint32_t index, uint32_t tiles_across) {
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

__device__ inline int place_of(const Tile& tile) { return tile.patch_row ^ 2 * tile.patch_col; }

__device__ inline void stage_transposed(Columns& columns, const uint2 (&codes)[kPatchRows], const Tile& tile) {
  const int place = place_of(tile);
  uint32_t words[4];
  transpose4x4({codes[0].x, codes[1].x, codes[2].x, codes[3].x}, words);
#pragma unroll
  for (int j = 0; j < 4; ++j) columns[tile.patch_col * kPackSize + j][place] = words[j];
  transpose4x4({codes[0].y, codes[1].y, codes[2].y, codes[3].y}, words);
#pragma unroll
  for (int j = 0; j < 4; ++j) columns[tile.patch_col * kPackSize + 4 + j][place] = words[j];
}

// A matrix as what a tile is made of: loaded a patch at a time, and, for the few threads that meet an Inf, read again.
template <class T>
struct MatrixSource {
  const Matrix& x;
  bool vectorised;
  Pack<T> rows[kPatchRows];

  __device__ void load(const Tile& tile) { load_patch(x, vectorised, tile, rows); }
  __device__ float value(int i, int j) const { return to_float(rows[i].values[j]); }
  __device__ float at(int64_t row, int64_t col) const {
    return to_float(static_cast<const T*>(x.data)[row * x.row_stride + col * x.col_stride]);
  }
};

// mark_infinities for a patch: in q, and in columns where there are any, before others read them.
template <class Source>
__device__ void mark_patch(const Source& source, const QuantizeArgs& args, const Tile& tile, Columns* columns,
                           int64_t stride) {
  const int64_t row = tile.row + tile.patch_row * kPatchRows, col = tile.col + tile.patch_col * kPackSize;
#pragma unroll 1
  for (int element = 0; element < kPatchRows * kPackSize; ++element) {
    const int i = element / kPackSize, j = element % kPackSize;
    if (row + i >= args.x.rows || col + j >= args.x.cols) continue;
    if (raw_magnitude(source.at(row + i, col + j)) != kInfinity) continue;
    if (args.q) args.q[(row + i) * stride + col + j] = kNaNCode;
    if (columns) {
      uint32_t& word = (*columns)[tile.patch_col * kPackSize + j][place_of(tile)];
      word = (word & ~(0xFFu << 8 * i)) | uint32_t{kNaNCode} << 8 * i;
    }
  }
}

__device__ inline void store_transposed(const Columns& columns, const Tile& tile, uint8_t* q_t, int64_t padded_rows,
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

__device__ inline void stage_sums(WarpSums& warp_sums, float (&sums)[kPackSize], const Tile& tile) {
  static_assert(2 * kAcross == 32, "a warp holds two rows of patches");
#pragma unroll
  for (int j = 0; j < kPackSize; ++j) sums[j] += __shfl_xor_sync(0xFFFFFFFF, sums[j], kAcross);
  if (threadIdx.x % 32 >= kAcross) return;
  float* const place = &warp_sums[threadIdx.x / 32][tile.patch_col * kPackSize];
  *reinterpret_cast<float4*>(place) = make_float4(sums[0], sums[1], sums[2], sums[3]);
  *reinterpret_cast<float4*>(place + 4) = make_float4(sums[4], sums[5], sums[6], sums[7]);
}

__device__ inline void store_sums(const WarpSums& warp_sums, const Tile& tile, float* column_sums, int64_t padded_cols,
                                  int64_t stride) {
  const int64_t col = tile.col + threadIdx.x;
  if (threadIdx.x >= kTile || col >= padded_cols) return;
  float sum = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += warp_sums[warp][threadIdx.x];
  column_sums[tile.row / kBiasRows * stride + col] = sum;
}

// A thread's patch as codes, the largest magnitude that it held and, where they are asked for, the sums of its columns.
struct NoSums {};
struct Sums {
  float sums[kPackSize] = {};
};
template <bool kSums = false>
struct Patch : std::conditional_t<kSums, Sums, NoSums> {
  uint2 codes[kPatchRows];
  uint32_t seen = 0;
};

template <Format kFormat, bool kSums>
__device__ __forceinline__ void encode_row(Patch<kSums>& patch, int i, const float (&x)[kPackSize], float scale) {
#pragma unroll
  for (int j = 0; j < kPackSize; ++j) {
    if constexpr (kSums) patch.sums[j] += x[j];
    patch.seen = max(patch.seen, raw_magnitude(x[j]));
  }
  patch.codes[i] = encode8<kFormat>(x, scale);
}

// What a block has in shared memory once, however many tiles it stores one after the other.
__device__ inline Columns& shared_columns() {
  __shared__ alignas(16) Columns columns;
  return columns;
}
__device__ inline WarpSums& shared_sums() {
  __shared__ alignas(16) WarpSums sums;
  return sums;
}

// Out of the registers: codes, their transpose, maxima (in of_warp at the end) and column sums of a tile. args.x says
// no more than the size; source.at(row, col) is what was encoded. stride: from a row of q, and of column_sums, to the
// next. Before a block stores its next tile it synchronises.
template <bool kTransposed, bool kSums, class Source>
__device__ __forceinline__ void store_tile(Patch<kSums>& patch, const Source& source, const QuantizeArgs& args,
                                           const Tile& tile, uint32_t (&of_warp)[kWarps], int64_t stride) {
  const int64_t padded_rows = padded(args.x.rows), padded_cols = padded(args.x.cols);
  const int64_t row = tile.row + tile.patch_row * kPatchRows, col = tile.col + tile.patch_col * kPackSize;
  // Padded sizes are multiples of the patch: it lies inside of q or outside.
  if (args.q && row < padded_rows && col < padded_cols) {
    uint8_t* const place = args.q + row * stride + col;
#pragma unroll
    for (int i = 0; i < kPatchRows; ++i) *reinterpret_cast<uint2*>(place + i * stride) = patch.codes[i];
  }
  stage_max(of_warp, patch.seen);
  if constexpr (kTransposed) stage_transposed(shared_columns(), patch.codes, tile);
  if (patch.seen >= kInfinity) [[unlikely]]
    mark_patch(source, args, tile, kTransposed ? &shared_columns() : nullptr, stride);
  if constexpr (kSums) stage_sums(shared_sums(), patch.sums, tile);
  __syncthreads();
  if constexpr (kTransposed) {
    if (args.q_t) store_transposed(shared_columns(), tile, args.q_t, padded_rows, padded_cols);
  }
  if constexpr (kSums) store_sums(shared_sums(), tile, args.column_sums, padded_cols, stride);
}

template <bool kTransposed, bool kSums, class Source>
__device__ __forceinline__ void store_tile(Patch<kSums>& patch, const Source& source, const QuantizeArgs& args,
                                           const Tile& tile, uint32_t (&of_warp)[kWarps]) {
  store_tile<kTransposed>(patch, source, args, tile, of_warp, padded(args.x.cols));
}

// A tile of what the source has loaded.
template <Format kFormat, bool kTransposed, bool kSums, class Source>
__device__ __forceinline__ void cast_loaded(const Source& source, const QuantizeArgs& args, const Tile& tile,
                                            float scale, uint32_t (&of_warp)[kWarps]) {
  Patch<kSums> patch;
#pragma unroll
  for (int i = 0; i < kPatchRows; ++i) {
    float x[kPackSize];
#pragma unroll
    for (int j = 0; j < kPackSize; ++j) x[j] = source.value(i, j);
    encode_row<kFormat>(patch, i, x, scale);
  }
  store_tile<kTransposed>(patch, source, args, tile, of_warp);
}

template <class T, Format kFormat, bool kTransposed, bool kSums>
__device__ __forceinline__ void cast_tile(const QuantizeArgs& args, bool vectorised, const Tile& tile, float scale,
                                          uint32_t (&of_warp)[kWarps]) {
  MatrixSource<T> source{args.x, vectorised};
  source.load(tile);
  cast_loaded<kFormat, kTransposed, kSums>(source, args, tile, scale, of_warp);
}

// By one thread, last of all: nobody waits for its round trips to memory.
template <int kCount>
__device__ void store_scalars(const QuantizeArgs& args, const uint32_t (&of_warp)[kCount]) {
  if (threadIdx.x != 0) return;
  if (args.amax) raise_amax(args.amax, max_of_warps(of_warp));
  if (args.scale_inv && blockIdx.x == 0) *args.scale_inv = args.slot->scale_inv;
}

// Tiles are counted row by row.
inline uint32_t tiles_across(const Matrix& x) { return blocks_for(padded(x.cols), kTile); }
inline uint32_t tiles_of(const Matrix& x) {
  return blocks_for(int64_t{tiles_across(x)} * blocks_for(padded(x.rows), kTile), 1);
}

}  // namespace torch_fp8::cuda
