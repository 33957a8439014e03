// Few rows of x on a weight in FP8 that is read once: what decoding does. The time is that of streaming the weight, so
// it is requested as early and as much at a time as can be: where it stands (SkinnyArgs) while the kernels in front
// still run, else behind a wait.
//
// One row: gemv_kernel, on the CUDA cores. 2 to 8 rows: skinny_ring.cu, where it is made for the product. Else up to 16
// rows: mma_kernel, on the tensor cores in x's own type, which holds every E4M3 value exactly. All add products in
// float32; scales and bias come last.
#include <algorithm>

#include "cuda/decode/skinny.cuh"

namespace torch_fp8::cuda {
namespace {

// These loads stay on their side of the wait: plain ones the compiler may move across it.
__device__ uint4 load_weight(const uint8_t* pointer) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(pointer)
               : "memory");
  return v;
}

__device__ uint32_t operand_of(uint32_t codes, __half) { return halves_of(codes); }
__device__ uint32_t operand_of(uint32_t codes, __nv_bfloat16) {
  return bits_of(__float22bfloat162_rn(to_float2(halves_of(codes), __half{})));
}

// ---- one row of x ---------------------------------------------------------------------------------------------------

constexpr int kSlice = 32 * 16;  // columns that a warp takes at a time
constexpr int kGemvWarps = 8, kMostSlices = 4;
template <int kRows>
constexpr int kGemvBlocks = kRows == 4 ? 4 : 3;  // on a multiprocessor

// The lanes' sums of each row, added up; a lane gets the row that it is told.
template <int kRows>
__device__ float sum_of_lanes(float (&sums)[kRows], int lane, int& row) {
  row = 0;
  int distance = 16;
#pragma unroll
  for (int half = kRows / 2; half >= 1; half /= 2, distance /= 2) {  // one half of the rows to either half of the lanes
    const bool upper = lane & distance;
    if (upper) row += half;
#pragma unroll
    for (int r = 0; r < half; ++r) {
      const float given = upper ? sums[r] : sums[r + half];
      sums[r] = (upper ? sums[r + half] : sums[r]) + __shfl_xor_sync(0xFFFFFFFF, given, distance);
    }
  }
#pragma unroll
  for (; distance >= 1; distance /= 2) sums[0] += __shfl_xor_sync(0xFFFFFFFF, sums[0], distance);
  return sums[0];
}

// A warp takes kRows rows of the weight and every blockDim.x / 32-th slice of k; blockDim.y groups of warps lie below
// each other.
template <class T, int kRows>
__global__ void __launch_bounds__(kGemvWarps * 32, kGemvBlocks<kRows>) gemv_kernel(SkinnyArgs args) {
  __shared__ float sums_of_warp[kGemvWarps][kRows];
  const int lane = static_cast<int>(threadIdx.x) % 32, slices = static_cast<int>(blockDim.x) / 32;
  const int warp = static_cast<int>(threadIdx.y * slices + threadIdx.x / 32);
  const int groups = static_cast<int>(blockDim.y), k = static_cast<int>(args.k), step = slices * kSlice;
  const int64_t block_row = int64_t{blockIdx.x} * groups * kRows;
  const int64_t first_row = min(block_row + threadIdx.y * kRows, args.n - 1);
  const int rows = static_cast<int>(min(args.n - first_row, int64_t{kRows}));
  const uint8_t* const w = args.w + first_row * k;
  const int output = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  const int64_t output_row = output < groups * kRows ? block_row + output : args.n;
  float sums[kRows] = {};
  Epilogue<T> epilogue;

  begin_reading_early(args.weight_stands);
  const int first = static_cast<int>(threadIdx.x) / 32 * kSlice + lane * 16;
  for (int col = first; col - lane * 16 < k; col += step) {
    const bool inside = col < k;
    uint4 codes[kRows], x[2] = {};
    const uint8_t* source = w + col;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {  // a row too many is the last again, and not written
      codes[r] = inside ? load_weight(source) : uint4{};
      if (r + 1 < rows) source += k;
    }
    if (col == first) {
      epilogue = load_epilogue<T>(args, output_row);
      wait_for_predecessor();
    }
    if (inside) load_x(x, static_cast<const T*>(args.x) + col);
#pragma unroll
    for (int j = 0; j < 4; ++j) {  // four columns
      const float2 x01 = to_float2(word(x[j / 2], j % 2 * 2), T{});
      const float2 x23 = to_float2(word(x[j / 2], j % 2 * 2 + 1), T{});
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const uint32_t packed = word(codes[r], j);
        const float2 w01 = to_float2(halves_of(packed & 0xFFFF), __half{});
        const float2 w23 = to_float2(halves_of(packed >> 16), __half{});
        sums[r] = fmaf(w01.x, x01.x, sums[r]);
        sums[r] = fmaf(w01.y, x01.y, sums[r]);
        sums[r] = fmaf(w23.x, x23.x, sums[r]);
        sums[r] = fmaf(w23.y, x23.y, sums[r]);
      }
    }
  }
  int row;
  const float sum = sum_of_lanes(sums, lane, row);
  if (lane % (32 / kRows) == 0) sums_of_warp[warp][row] = sum;
  __syncthreads();
  const bool stores = output_row < args.n;
  float total = 0;
  if (stores) {
    for (int s = 0; s < slices; ++s) total += sums_of_warp[output / kRows * slices + s][output % kRows];
  }
  save_overflown<T>(args, stores, 0, output_row, total, epilogue);
  if (stores) store_output<T>(args, 0, output_row, total, epilogue);
}

template <class T, int kRows>
void launch_gemv(const SkinnyArgs& args, int slices, cudaStream_t stream) {
  const int groups = kGemvWarps / slices;
  launch(gemv_kernel<T, kRows>, blocks_for(args.n, groups * kRows), dim3(slices * 32, groups), stream, args);
}

// ---- 2 to 16 rows of x ----------------------------------------------------------------------------------------------

// The weight is the instruction's A (16 rows), x its B (8 tokens); kTokens tiles of 8. An instruction contracts 16
// columns, in whatever order both operands agree on: lane (g, t) of 8 x 4 takes 16 neighbouring columns from 16 t on of
// weight rows g and g + 8 and of token g, and feeds four of them to each of four instructions. kResident blocks share a
// multiprocessor.
template <class T, int kTokens, int kWarps, int kResident, bool kBlocks>
__global__ void __launch_bounds__(kWarps * 32, kResident) mma_kernel(SkinnyArgs args) {
  constexpr int kStep = kWarps * kChunk, kDepth = 2;                 // chunks that a warp has in flight
  __shared__ float sums_of_warp[kWarps][kTokens * 8][kMmaRows + 4];  // + 4: no bank is written twice at a time
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, t = lane % 4;
  const int64_t first_row = int64_t{blockIdx.x} * kMmaRows;
  const int k = static_cast<int>(args.k), first_col = warp * kChunk + t * 16;
  const int chunks = (k - warp * kChunk + kStep - 1) / kStep;   // of this warp,
  const int lane_chunks = (k - first_col + kStep - 1) / kStep;  // and those that reach as far as this lane
  // Rows and tokens too many are the last again, and not written.
  const int rows = static_cast<int>(min(args.n - first_row, int64_t{kMmaRows})), m = static_cast<int>(args.m);
  const uint8_t* const low_row = args.w + (first_row + min(g, rows - 1)) * k + first_col;
  const uint8_t* const high_row = args.w + (first_row + min(g + 8, rows - 1)) * k + first_col;
  const T* tokens[kTokens];
#pragma unroll
  for (int tile = 0; tile < kTokens; ++tile) {
    tokens[tile] = static_cast<const T*>(args.x) + int64_t{min(tile * 8 + g, m - 1)} * k + first_col;
  }

  uint4 codes[kDepth][2], x[kDepth][kTokens][2];
  float scales[kDepth] = {};  // of blocks: a tile's rows and a chunk's columns lie in one of 128 x 128
  const auto request_weight = [&](int slot, int i) {
    codes[slot][0] = i < lane_chunks ? load_weight(low_row + i * kStep) : uint4{};
    codes[slot][1] = i < lane_chunks ? load_weight(high_row + i * kStep) : uint4{};
    if (kBlocks && i < chunks) {
      scales[slot] = args.w_scale[scale_index(WeightScale::kBlock, k, first_row, warp * kChunk + i * kStep)];
    }
  };
  const auto request_x = [&](int slot, int i) {
#pragma unroll
    for (int tile = 0; tile < kTokens; ++tile) {
      if (i < lane_chunks) {
        load_x(x[slot][tile], tokens[tile] + i * kStep);
      } else {
        x[slot][tile][0] = x[slot][tile][1] = uint4{};
      }
    }
  };

  begin_reading_early(args.weight_stands);
#pragma unroll
  for (int slot = 0; slot < kDepth; ++slot) request_weight(slot, slot);
  const int output = static_cast<int>(threadIdx.x), token = output / kMmaRows;
  const int64_t output_row = first_row + output % kMmaRows;
  Epilogue<T> epilogue = load_epilogue<T>(args, output_row);
  wait_for_predecessor();
  request_x(0, 0);

  float sums[kTokens][4] = {};
  for (int base = 0; base < chunks; base += kDepth) {
#pragma unroll
    for (int slot = 0; slot < kDepth; ++slot) {
      request_x((slot + 1) % kDepth, base + slot + 1);
      float part[kTokens][4] = {};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t low = word(codes[slot][0], j), high = word(codes[slot][1], j);
        const uint32_t a[4] = {operand_of(low & 0xFFFF, T{}), operand_of(high & 0xFFFF, T{}),
                               operand_of(low >> 16, T{}), operand_of(high >> 16, T{})};
#pragma unroll
        for (int tile = 0; tile < kTokens; ++tile) {
          const uint4& half = x[slot][tile][j / 2];
          mma(kBlocks ? part[tile] : sums[tile], a, word(half, j % 2 * 2), word(half, j % 2 * 2 + 1), T{});
        }
      }
      if constexpr (kBlocks) {
#pragma unroll
        for (int i = 0; i < 4 * kTokens; ++i) {
          sums[i / 4][i % 4] = fmaf(part[i / 4][i % 4], scales[slot], sums[i / 4][i % 4]);
        }
      }
      request_weight(slot, base + slot + kDepth);
    }
  }

#pragma unroll
  for (int i = 0; i < 4 * kTokens; ++i) {
    sums_of_warp[warp][i / 4 * 8 + 2 * t + i % 2][g + i % 4 / 2 * 8] = sums[i / 4][i % 4];
  }
  __syncthreads();
  if (token >= kTokens * 8) return;  // whole warps
  const bool stores = token < args.m && output_row < args.n;
  float sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += sums_of_warp[w][token][output % kMmaRows];
  save_overflown<T>(args, stores, token, output_row, sum, epilogue);
  if (stores) store_output<T>(args, token, output_row, sum, epilogue);
}
static_assert(kSkinnyRows * kMmaRows <= 8 * 32, "a thread for each output");
static_assert(kScaleBlock % kMmaRows == 0 && kScaleBlock % kChunk == 0,
              "a chunk of a block's rows lies in one block of scales");

// ---- how many blocks ------------------------------------------------------------------------------------------------

// A kernel of few microseconds is fastest where all of its blocks are resident at once, with as many warps and as much
// of the weight in flight as that leaves room for.
template <class T, bool kBlocks>
void launch_mma(const SkinnyArgs& args, cudaStream_t stream) {
  const uint32_t grid = blocks_for(args.n, kMmaRows);
  const auto go = [&](auto kernel, int warps) { launch(kernel, grid, warps * 32, stream, args); };
  const bool two_fit = grid <= 2 * kMultiprocessors;
  if (args.m <= 8) {
    two_fit ? go(mma_kernel<T, 1, 16, 2, kBlocks>, 16) : go(mma_kernel<T, 1, 8, 3, kBlocks>, 8);
  } else {
    two_fit ? go(mma_kernel<T, 2, 8, 2, kBlocks>, 8) : go(mma_kernel<T, 2, 8, 3, kBlocks>, 8);
  }
}

template <class T>
void launch_typed(const SkinnyArgs& args, cudaStream_t stream) {
  if (args.scale_kind == WeightScale::kBlock) return launch_mma<T, true>(args, stream);
  if (args.m > 1) return launch_mma<T, false>(args, stream);
  const auto slices = static_cast<int>(std::min<int64_t>(kMostSlices, (args.k + kSlice - 1) / kSlice));
  const bool few_rows_fit = blocks_for(args.n, kGemvWarps / slices * 4) <= kGemvBlocks<4> * kMultiprocessors;
  few_rows_fit ? launch_gemv<T, 4>(args, slices, stream) : launch_gemv<T, 8>(args, slices, stream);
}

void launch_skinny(const SkinnyArgs& args, cudaStream_t stream) {
  if (is_for_ring(args.m, args.n, args.k)) return launch_skinny_ring(args, stream);
  args.type == Type::kFloat16 ? launch_typed<__half>(args, stream) : launch_typed<__nv_bfloat16>(args, stream);
}

[[maybe_unused]] const bool filled = fill<launch_skinny>(cuda_kernels().skinny);

}  // namespace
}  // namespace torch_fp8::cuda
