// Few rows of x on a weight in FP8 that is read once: what decoding does. The time is that of streaming the weight, so
// it is requested as early and as much at a time as can be: before the kernel in front has finished (programmatic
// dependent launch), since weights are constants. Who writes one must do so from a kernel that does not let its
// successors start early; freezing ends with a plain copy.
//
// One row: gemv_kernel, on the CUDA cores. 2 to 16 rows: mma_kernel, on the tensor cores in x's own type, which holds
// every E4M3 value exactly. Both add products in float32; scales and bias come last.
#include <algorithm>

#include "decode.cuh"

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

__device__ uint4 load_x(const void* pointer) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(pointer)
               : "memory");
  return v;
}

__device__ void let_successor_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ void wait_for_predecessor() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ uint32_t operand_of(uint32_t codes, __half) { return halves_of(codes); }
__device__ uint32_t operand_of(uint32_t codes, __nv_bfloat16) {
  const __nv_bfloat162 pair = __float22bfloat162_rn(to_float2(halves_of(codes), __half{}));
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <class T>
__device__ void store_output(const SkinnyArgs& args, int64_t token, int64_t row, float sum) {
  if (args.scale_kind != WeightScale::kBlock) sum *= args.w_scale[args.scale_kind == WeightScale::kChannel ? row : 0];
  if (args.bias) sum += to_float(static_cast<const T*>(args.bias)[row]);
  static_cast<T*>(args.out)[token * args.n + row] = static_cast<T>(sum);
}

// ---- one row of x ---------------------------------------------------------------------------------------------------

constexpr int kGemvRows = 4;              // of the weight, for a warp
constexpr int kLoads = 2;                 // of a lane and row at a time, 16 codes each
constexpr int kSlice = kLoads * 32 * 16;  // columns that a warp takes at a time
constexpr int kMostSlices = 16;           // warps side by side along k
constexpr uint32_t kMultiprocessors = 132;

template <class T>
__global__ void __launch_bounds__(kMostSlices * 32) gemv_kernel(SkinnyArgs args, int slices, int groups) {
  __shared__ float sums_of_warp[kMostSlices][kGemvRows];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int slice = warp % slices, group = warp / slices;
  const int64_t first_row = (int64_t{blockIdx.x} * groups + group) * kGemvRows;
  const int step = slices * kSlice, k = static_cast<int>(args.k);
  const uint8_t* rows[kGemvRows];
#pragma unroll
  for (int r = 0; r < kGemvRows; ++r) {  // a row too many is read again and not written
    rows[r] = args.w + min(first_row + r, args.n - 1) * args.k + lane * 16;
  }
  float sums[kGemvRows] = {};

  let_successor_start();
  for (int base = slice * kSlice; base < k; base += step) {
    uint4 codes[kLoads][kGemvRows], x[kLoads][2];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const bool inside = base + i * 512 + lane * 16 < k;
#pragma unroll
      for (int r = 0; r < kGemvRows; ++r) codes[i][r] = inside ? load_weight(rows[r] + base + i * 512) : uint4{};
    }
    if (base < step) wait_for_predecessor();
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const T* const source = static_cast<const T*>(args.x) + base + i * 512 + lane * 16;
      const bool inside = base + i * 512 + lane * 16 < k;
#pragma unroll
      for (int half = 0; half < 2; ++half) x[i][half] = inside ? load_x(source + 8 * half) : uint4{};
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // four columns
        const float2 x01 = to_float2(word(x[i][j / 2], j % 2 * 2), T{});
        const float2 x23 = to_float2(word(x[i][j / 2], j % 2 * 2 + 1), T{});
#pragma unroll
        for (int r = 0; r < kGemvRows; ++r) {
          const uint32_t packed = word(codes[i][r], j);
          const float2 w01 = to_float2(halves_of(packed & 0xFFFF), __half{});
          const float2 w23 = to_float2(halves_of(packed >> 16), __half{});
          sums[r] = fmaf(w01.x, x01.x, sums[r]);
          sums[r] = fmaf(w01.y, x01.y, sums[r]);
          sums[r] = fmaf(w23.x, x23.x, sums[r]);
          sums[r] = fmaf(w23.y, x23.y, sums[r]);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kGemvRows; ++r) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sums[r] += __shfl_xor_sync(0xFFFFFFFF, sums[r], distance);
    if (lane == 0) sums_of_warp[warp][r] = sums[r];
  }
  __syncthreads();
  const int output = static_cast<int>(threadIdx.x);
  if (output >= groups * kGemvRows) return;
  const int64_t row = int64_t{blockIdx.x} * groups * kGemvRows + output;
  if (row >= args.n) return;
  float sum = 0;
  for (int s = 0; s < slices; ++s) sum += sums_of_warp[output / kGemvRows * slices + s][output % kGemvRows];
  store_output<T>(args, 0, row, sum);
}

// ---- 2 to 16 rows of x ----------------------------------------------------------------------------------------------

constexpr int kMmaWarps = 8;  // of a block: they share the columns of k in turn
constexpr int kMmaRows = 16;  // of the weight, for a block
constexpr int kChunk = 64;    // columns that a warp takes at a time: 16 a lane and row

__device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The weight is the instruction's A (16 rows), x its B (8 tokens); kTokens tiles of 8. An instruction contracts 16
// columns, in whatever order both operands agree on: lane (g, t) of 8 x 4 takes 16 neighbouring columns from 16 t on of
// weight rows g and g + 8 and of token g, and feeds four of them to each of four instructions.
template <class T, int kTokens, bool kBlocks, bool kOneWave>
__global__ void __launch_bounds__(kMmaWarps * 32, kOneWave ? 2 : 3) mma_kernel(SkinnyArgs args) {
  __shared__ float sums_of_warp[kMmaWarps][kTokens * 8][kMmaRows];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, t = lane % 4;
  const int64_t first_row = int64_t{blockIdx.x} * kMmaRows;
  constexpr int kStep = kMmaWarps * kChunk;
  constexpr int kDepth = kTokens == 1 || kOneWave ? 4 : 2;  // chunks that a warp has in flight
  const int k = static_cast<int>(args.k), first_col = warp * kChunk + t * 16;
  const int chunks = (k - warp * kChunk + kStep - 1) / kStep;   // of this warp,
  const int lane_chunks = (k - first_col + kStep - 1) / kStep;  // and those that reach as far as this lane
  // Rows and tokens too many are read again and not written.
  const uint8_t* const low_row = args.w + min(first_row + g, args.n - 1) * k + first_col;
  const uint8_t* const high_row = args.w + min(first_row + g + 8, args.n - 1) * k + first_col;
  const T* tokens[kTokens];
#pragma unroll
  for (int tile = 0; tile < kTokens; ++tile) {
    tokens[tile] = static_cast<const T*>(args.x) + min(int64_t{tile} * 8 + g, args.m - 1) * k + first_col;
  }

  uint4 codes[kDepth][2];
  uint4 x[2][kTokens][2];
  const auto request_weight = [&](int slot, int i) {
    codes[slot][0] = i < lane_chunks ? load_weight(low_row + i * kStep) : uint4{};
    codes[slot][1] = i < lane_chunks ? load_weight(high_row + i * kStep) : uint4{};
  };
  const auto request_x = [&](int slot, int i) {
#pragma unroll
    for (int tile = 0; tile < kTokens; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        x[slot][tile][half] = i < lane_chunks ? load_x(tokens[tile] + i * kStep + 8 * half) : uint4{};
      }
    }
  };

  let_successor_start();
#pragma unroll
  for (int slot = 0; slot < kDepth; ++slot) request_weight(slot, slot);
  wait_for_predecessor();
  request_x(0, 0);

  float sums[kTokens][4] = {};
  for (int base = 0; base < chunks; base += kDepth) {
#pragma unroll
    for (int slot = 0; slot < kDepth; ++slot) {
      const int i = base + slot;
      request_x((slot + 1) % 2, i + 1);
      float part[kTokens][4] = {};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t low = word(codes[slot][0], j), high = word(codes[slot][1], j);
        const uint32_t a[4] = {operand_of(low & 0xFFFF, T{}), operand_of(high & 0xFFFF, T{}),
                               operand_of(low >> 16, T{}), operand_of(high >> 16, T{})};
#pragma unroll
        for (int tile = 0; tile < kTokens; ++tile) {
          const uint4& half = x[slot % 2][tile][j / 2];
          mma(kBlocks ? part[tile] : sums[tile], a, word(half, j % 2 * 2), word(half, j % 2 * 2 + 1), T{});
        }
      }
      request_weight(slot, i + kDepth);
      if constexpr (kBlocks) {  // 16 rows and 64 columns lie in one block of 128 x 128
        const int across = (k + kScaleBlock - 1) / kScaleBlock, col = warp * kChunk + i * kStep;
        const float scale = i < chunks ? args.w_scale[first_row / kScaleBlock * across + col / kScaleBlock] : 0.0f;
#pragma unroll
        for (int tile = 0; tile < kTokens; ++tile) {
#pragma unroll
          for (int c = 0; c < 4; ++c) sums[tile][c] = fmaf(part[tile][c], scale, sums[tile][c]);
        }
      }
    }
  }

#pragma unroll
  for (int tile = 0; tile < kTokens; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums_of_warp[warp][tile * 8 + 2 * t + i % 2][g + i / 2 * 8] = sums[tile][i];
  }
  __syncthreads();
  const int output = static_cast<int>(threadIdx.x), token = output / kMmaRows;
  const int64_t row = first_row + output % kMmaRows;
  if (token >= args.m || token >= kTokens * 8 || row >= args.n) return;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kMmaWarps; ++i) sum += sums_of_warp[i][token][output % kMmaRows];
  store_output<T>(args, token, row, sum);
}
static_assert(kSkinnyRows * kMmaRows <= kMmaWarps * 32, "a thread for each output");
static_assert(kScaleBlock % kMmaRows == 0 && kScaleBlock % kChunk == 0,
              "a chunk of a tile lies in one block of scales");

template <class T, int kTokens, bool kBlocks>
void launch_mma(const SkinnyArgs& args, cudaStream_t stream) {
  // Where two blocks an SM hold the whole weight, each may have more registers, and so more of it in flight.
  const uint32_t grid = blocks_for(args.n, kMmaRows);
  const auto kernel =
      grid <= 2 * kMultiprocessors ? mma_kernel<T, kTokens, kBlocks, true> : mma_kernel<T, kTokens, kBlocks, false>;
  launch(kernel, grid, kMmaWarps * 32, stream, args);
}

template <class T>
void launch_typed(const SkinnyArgs& args, cudaStream_t stream) {
  const bool blocks = args.scale_kind == WeightScale::kBlock;
  if (args.m == 1 && !blocks) {
    // A warp goes twice along its slice: half as many blocks leave room for the next kernel's to start early.
    const int64_t along = (args.k + kSlice - 1) / kSlice;
    const int64_t slices = std::clamp<int64_t>((along + 1) / 2, 1, kMostSlices);
    const int64_t groups = std::max<int64_t>(1, 8 / slices);
    launch(gemv_kernel<T>, blocks_for(args.n, groups * kGemvRows), static_cast<int>(slices * groups * 32), stream, args,
           static_cast<int>(slices), static_cast<int>(groups));
    return;
  }
  if (args.m <= 8) {
    blocks ? launch_mma<T, 1, true>(args, stream) : launch_mma<T, 1, false>(args, stream);
  } else {
    blocks ? launch_mma<T, 2, true>(args, stream) : launch_mma<T, 2, false>(args, stream);
  }
}

}  // namespace

void launch_skinny(const SkinnyArgs& args, cudaStream_t stream) {
  args.type == Type::kFloat16 ? launch_typed<__half>(args, stream) : launch_typed<__nv_bfloat16>(args, stream);
}

}  // namespace torch_fp8::cuda
