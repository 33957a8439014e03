// Few rows of x on a weight in FP8 that is read once: what decoding does. The time is that of streaming the weight, so
// it is requested as early and as much at a time as can be: before the kernel in front has finished (programmatic
// dependent launch), since weights are constants. Who writes one must do so from a kernel that does not let its
// successors start early; freezing ends with a plain copy.
//
// One row: gemv_kernel, on the CUDA cores. 2 to 16 rows: mma_kernel, on the tensor cores in x's own type, which holds
// every E4M3 value exactly. Both add products in float32; scales and bias come last.
#include <cuda_fp8.h>

#include "block.cuh"

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

__device__ float2 to_float2(uint32_t bits, __half) { return __half22float2(*reinterpret_cast<const __half2*>(&bits)); }
__device__ float2 to_float2(uint32_t bits, __nv_bfloat16) {
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xFFFF0000));
}

// Two E4M3 codes as two halves, exactly.
__device__ uint32_t halves_of(uint32_t codes) {
  const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes), __NV_E4M3);
  return uint32_t{raw.x} | uint32_t{raw.y} << 16;
}

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

constexpr int kGemvRows = 4;     // of the weight, for a warp
constexpr int kSlice = 1024;     // columns that a warp takes at a time: two loads of 16 a lane and row
constexpr int kMostSlices = 16;  // warps side by side along k

template <class T>
__global__ void __launch_bounds__(kMostSlices * 32) gemv_kernel(SkinnyArgs args, int slices, int groups) {
  __shared__ float sums_of_warp[kMostSlices][kGemvRows];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int slice = warp % slices, group = warp / slices;
  const int64_t first_row = (int64_t{blockIdx.x} * groups + group) * kGemvRows;
  float sums[kGemvRows] = {};

  let_successor_start();
  for (int64_t base = 0; base < args.k; base += int64_t{slices} * kSlice) {
    uint4 codes[2][kGemvRows];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t col = base + slice * kSlice + i * 512 + lane * 16;
#pragma unroll
      for (int r = 0; r < kGemvRows; ++r) {
        const bool inside = col < args.k && first_row + r < args.n;
        codes[i][r] = inside ? load_weight(args.w + (first_row + r) * args.k + col) : uint4{};
      }
    }
    if (base == 0) wait_for_predecessor();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t col = base + slice * kSlice + i * 512 + lane * 16;
      if (col >= args.k) continue;
      const T* const x = static_cast<const T*>(args.x) + col;
      const uint4 low = load_x(x), high = load_x(x + 8);
      const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      float2 values[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) values[j] = to_float2(words[j], T{});
#pragma unroll
      for (int r = 0; r < kGemvRows; ++r) {
        const uint32_t packed[4] = {codes[i][r].x, codes[i][r].y, codes[i][r].z, codes[i][r].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 a = to_float2(halves_of(packed[j] & 0xFFFF), __half{});
          const float2 b = to_float2(halves_of(packed[j] >> 16), __half{});
          sums[r] = fmaf(a.x, values[2 * j].x, sums[r]);
          sums[r] = fmaf(a.y, values[2 * j].y, sums[r]);
          sums[r] = fmaf(b.x, values[2 * j + 1].x, sums[r]);
          sums[r] = fmaf(b.y, values[2 * j + 1].y, sums[r]);
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
constexpr int kDepth = 4;     // chunks that a warp has in flight

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
template <class T, int kTokens, bool kBlocks>
__global__ void __launch_bounds__(kMmaWarps * 32, kTokens == 1 ? 3 : 2) mma_kernel(SkinnyArgs args) {
  __shared__ float sums_of_warp[kMmaWarps][kTokens * 8][kMmaRows];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, t = lane % 4;
  const int64_t first_row = int64_t{blockIdx.x} * kMmaRows;
  const int64_t chunks = (args.k + kChunk - 1) / kChunk;
  const int64_t mine = chunks > warp ? (chunks - warp + kMmaWarps - 1) / kMmaWarps : 0;
  const int64_t first_col = int64_t{warp} * kChunk + t * 16, step = int64_t{kMmaWarps} * kChunk;
  const uint8_t* const w = args.w + (first_row + g) * args.k;
  const T* const x = static_cast<const T*>(args.x) + g * args.k;
  const bool low_inside = first_row + g < args.n, high_inside = first_row + g + 8 < args.n;

  uint4 codes[kDepth][2];
  uint4 tokens[kDepth][kTokens][2];
  const auto request_weight = [&](int slot, int64_t i) {
    const int64_t col = first_col + i * step;
    const bool inside = i < mine && col < args.k;
    codes[slot][0] = inside && low_inside ? load_weight(w + col) : uint4{};
    codes[slot][1] = inside && high_inside ? load_weight(w + 8 * args.k + col) : uint4{};
  };
  const auto request_x = [&](int slot, int64_t i) {
    const int64_t col = first_col + i * step;
#pragma unroll
    for (int tile = 0; tile < kTokens; ++tile) {
      const bool inside = i < mine && col < args.k && tile * 8 + g < args.m;
      const T* const source = x + tile * 8 * args.k + col;
      tokens[slot][tile][0] = inside ? load_x(source) : uint4{};
      tokens[slot][tile][1] = inside ? load_x(source + 8) : uint4{};
    }
  };

  let_successor_start();
#pragma unroll
  for (int slot = 0; slot < kDepth; ++slot) request_weight(slot, slot);
  wait_for_predecessor();
#pragma unroll
  for (int slot = 0; slot < kDepth; ++slot) request_x(slot, slot);

  float sums[kTokens][4] = {};
  for (int64_t base = 0; base < mine; base += kDepth) {
#pragma unroll
    for (int slot = 0; slot < kDepth; ++slot) {
      const uint32_t low[4] = {codes[slot][0].x, codes[slot][0].y, codes[slot][0].z, codes[slot][0].w};
      const uint32_t high[4] = {codes[slot][1].x, codes[slot][1].y, codes[slot][1].z, codes[slot][1].w};
      float part[kTokens][4] = {};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t a[4] = {operand_of(low[j] & 0xFFFF, T{}), operand_of(high[j] & 0xFFFF, T{}),
                               operand_of(low[j] >> 16, T{}), operand_of(high[j] >> 16, T{})};
#pragma unroll
        for (int tile = 0; tile < kTokens; ++tile) {
          const uint4 half = tokens[slot][tile][j / 2];
          mma(kBlocks ? part[tile] : sums[tile], a, j % 2 ? half.z : half.x, j % 2 ? half.w : half.y, T{});
        }
      }
      if constexpr (kBlocks) {  // 16 rows and 64 columns lie in one block of 128 x 128
        const int64_t chunk = warp + (base + slot) * kMmaWarps;
        const int64_t across = (args.k + kScaleBlock - 1) / kScaleBlock;
        const float scale =
            base + slot < mine ? args.w_scale[first_row / kScaleBlock * across + chunk * kChunk / kScaleBlock] : 0.0f;
#pragma unroll
        for (int tile = 0; tile < kTokens; ++tile) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[tile][i] = fmaf(part[tile][i], scale, sums[tile][i]);
        }
      }
      request_weight(slot, base + slot + kDepth);
      request_x(slot, base + slot + kDepth);
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

template <class T>
void launch_typed(const SkinnyArgs& args, cudaStream_t stream) {
  const bool blocks = args.scale_kind == WeightScale::kBlock;
  if (args.m == 1 && !blocks) {
    const int64_t slices = std::min<int64_t>(kMostSlices, (args.k + kSlice - 1) / kSlice);
    const int64_t groups = std::max<int64_t>(1, 8 / slices);
    launch(gemv_kernel<T>, blocks_for(args.n, groups * kGemvRows), static_cast<int>(slices * groups * 32), stream, args,
           static_cast<int>(slices), static_cast<int>(groups));
    return;
  }
  const auto kernel = args.m <= 8 ? (blocks ? mma_kernel<T, 1, true> : mma_kernel<T, 1, false>)
                                  : (blocks ? mma_kernel<T, 2, true> : mma_kernel<T, 2, false>);
  launch(kernel, blocks_for(args.n, kMmaRows), kMmaWarps * 32, stream, args);
}

}  // namespace

void launch_skinny(const SkinnyArgs& args, cudaStream_t stream) {
  args.type == Type::kFloat16 ? launch_typed<__half>(args, stream) : launch_typed<__nv_bfloat16>(args, stream);
}

}  // namespace torch_fp8::cuda
