// The transpose of codes, for GEMMs that want the other layout of a weight that is kept in one.
//
// A block takes a tile of 128 x 128 codes. A thread loads 16 neighbouring columns of 4 neighbouring rows, 16 bytes a
// load, transposes them in registers, and hands them to shared memory, from which the block writes 128-byte rows.
#include "cuda/common/block.cuh"
#include "cuda/common/transpose.cuh"

namespace torch_fp8::cuda {
namespace {

constexpr int kTile = 128;                                               // rows and columns of a tile
constexpr int kPatchRows = 4, kPatchCols = 16;                           // of a thread's patch
constexpr int kAcross = kTile / kPatchCols, kDown = kTile / kPatchRows;  // patches of a tile
constexpr int kThreads = kAcross * kDown;
constexpr int kUnits = kTile / 16;           // 16-byte units of a column
constexpr int kColumns = kThreads / kUnits;  // that the block writes at a time

__global__ void __launch_bounds__(kThreads) transpose_kernel(TransposeArgs args, bool vectorised, uint32_t across) {
  // A column is 32 words of 4 bytes, one a patch. Word w of column c lies at place w ^ 4 * (c / 16): a warp, which
  // writes four neighbouring words of 8 such columns, finds each in a bank of its own, and so does who reads 16 bytes.
  __shared__ alignas(16) uint32_t columns[kTile][kDown];
  const int thread = static_cast<int>(threadIdx.x), patch_row = thread / kAcross, patch_col = thread % kAcross;
  const int64_t tile_row = int64_t{blockIdx.x / across} * kTile, tile_col = int64_t{blockIdx.x % across} * kTile;
  const int64_t row = tile_row + patch_row * kPatchRows, col = tile_col + patch_col * kPatchCols;
  const uint8_t* const patch = args.codes + row * args.cols + col;
  begin_dependent();

  uint32_t words[kPatchRows][kPatchCols / 4];
  if (vectorised && row + kPatchRows <= args.rows && col < args.cols) {
#pragma unroll
    for (int i = 0; i < kPatchRows; ++i) {
      const uint4 loaded = *reinterpret_cast<const uint4*>(patch + i * args.cols);
      words[i][0] = loaded.x, words[i][1] = loaded.y, words[i][2] = loaded.z, words[i][3] = loaded.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPatchRows; ++i) {
#pragma unroll
      for (int j = 0; j < kPatchCols; ++j) {
        const bool inside = row + i < args.rows && col + j < args.cols;
        const uint32_t code = inside ? patch[i * args.cols + j] : 0;
        words[i][j / 4] = j % 4 == 0 ? code : words[i][j / 4] | code << j % 4 * 8;
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kPatchCols / 4; ++j) {
    uint32_t turned[4];
    transpose4x4({words[0][j], words[1][j], words[2][j], words[3][j]}, turned);
#pragma unroll
    for (int i = 0; i < 4; ++i) columns[patch_col * kPatchCols + j * 4 + i][patch_row ^ 4 * patch_col] = turned[i];
  }
  __syncthreads();

  const int64_t padded_rows = padded(args.rows), padded_cols = padded(args.cols);
  const int unit = thread % kUnits;
  if (tile_row + unit * 16 >= padded_rows) return;
#pragma unroll
  for (int i = 0; i < kTile / kColumns; ++i) {
    const int c = thread / kUnits + i * kColumns;
    if (tile_col + c >= padded_cols) return;
    const uint4 piece = *reinterpret_cast<const uint4*>(&columns[c][(unit ^ c / kPatchCols) * 4]);
    *reinterpret_cast<uint4*>(args.out + (tile_col + c) * padded_rows + tile_row + unit * 16) = piece;
  }
}

void launch_transpose(const TransposeArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.cols == 0) return;
  const uint32_t across = blocks_for(padded(args.cols), kTile);
  const bool vectorised = args.cols % 16 == 0 && reinterpret_cast<uintptr_t>(args.codes) % 16 == 0;
  launch(transpose_kernel, blocks_for(int64_t{across} * blocks_for(padded(args.rows), kTile), 1), kThreads, stream,
         args, vectorised, across);
}

[[maybe_unused]] const bool filled = fill<launch_transpose>(cuda_kernels().transpose);

}  // namespace
}  // namespace torch_fp8::cuda
