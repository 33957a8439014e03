// 2 to 8 rows of x on an FP8 weight of up to 8192 columns that is read once. Where skinny.cu has as much of the weight
// under way as fits the registers of its blocks, here a block stays on each multiprocessor, and a ring of 200 KB in
// shared memory is refilled whatever the other warps do: over tiles of the weight, and where that stands (SkinnyArgs)
// while the kernels in front still run. x is fetched once a block and stays in registers.
#include <algorithm>

#include "cuda/common/barrier.cuh"
#include "cuda/decode/skinny.cuh"

namespace torch_fp8::cuda {
namespace {

constexpr int kWarps = 8, kConsumers = kWarps * 32, kThreads = kConsumers + 32;  // and a warp that fetches
constexpr int kStep = kWarps * kChunk;                 // columns that all warps take at a time
constexpr int kPiece = 2048, kSteps = kPiece / kStep;  // columns of a tile that are fetched together
constexpr int kPitch = kPiece + 64;                    // of a row in the ring: reading it meets no bank twice at a time
constexpr int kStageBytes = kMmaRows * kPitch;
constexpr int kStages = 6;
constexpr int kTokens = kRingRows;
using Sums = float[kWarps][kTokens][kMmaRows + 4];  // + 4 to the same end
constexpr int kSharedBytes = kStages * kStageBytes + 2 * static_cast<int>(sizeof(Sums));

// `count` bytes, a multiple of 16, to shared memory; the barrier counts them.
__device__ void fetch(uint32_t target, const uint8_t* source, int count, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
               "l"(source), "r"(count), "r"(barrier)
               : "memory");
}
__device__ uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// A code becomes a half by one instruction and a BF16 by four, so x is brought to halves, once. What a warp multiplies
// of a token is scaled by a power of two, so that its maximum lies in [2^14, 2^15): then all is exact down to 2^-31 of
// the maximum, and what is smaller has an error of 2^-39 of it, far below that of a float32 sum. Returns what undoes
// it.
template <int kChunks>
__device__ float to_halves(uint4 (&x)[kChunks][2], __nv_bfloat16) {
  __nv_bfloat162 most = {};
  const auto see = [&most](uint32_t pair) { most = __hmax2(most, __habs2(pair_of<__nv_bfloat162>(pair))); };
#pragma unroll
  for (int i = 0; i < kChunks * 8; ++i) see(word(x[i / 8][i / 4 % 2], i % 4));
#pragma unroll
  for (int lanes = 1; lanes <= 2; lanes *= 2) {  // the four of a token
    see(__shfl_xor_sync(0xFFFFFFFF, bits_of(most), lanes));
  }
  const uint32_t both = bits_of(most), largest = max(both >> 16, both & 0xFFFF);
  constexpr uint32_t kBias = 127, kMost = 14;
  const uint32_t exponent = min(max(largest >> 7, kMost + 1), 2 * kBias);  // so that both factors are normal numbers
  const uint32_t inverse = (2 * kBias + kMost - exponent) << 7, factor = inverse << 16 | inverse;
  const auto scaled = [factor](uint32_t pair) {
    const __nv_bfloat162 product = __hmul2(pair_of<__nv_bfloat162>(pair), pair_of<__nv_bfloat162>(factor));
    return bits_of(__float22half2_rn(to_float2(bits_of(product), __nv_bfloat16{})));
  };
#pragma unroll
  for (int i = 0; i < kChunks * 2; ++i) {
    uint4& v = x[i / 2][i % 2];
    v = {scaled(v.x), scaled(v.y), scaled(v.z), scaled(v.w)};
  }
  return __uint_as_float((exponent - kMost) << 23);
}
template <int kChunks>
__device__ float to_halves(uint4 (&)[kChunks][2], __half) {
  return 1.0f;
}

// Operands as in mma_kernel: lane (g, t) of 8 x 4 has 16 neighbouring columns of a chunk, of weight rows g and g + 8
// and of token g. kChunks of a warp make up a whole row.
template <class T, int kChunks, bool kBlocks>
__global__ void __launch_bounds__(kThreads, 1) ring_kernel(SkinnyArgs args) {
  extern __shared__ __align__(16) uint8_t dynamic[];
  __shared__ alignas(8) uint64_t full[kStages], empty[kStages];
  __shared__ float factors[kWarps][kTokens];  // of what a warp multiplies of a token
  auto* const sums = reinterpret_cast<Sums*>(dynamic + kStages * kStageBytes);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int g = lane / 4, t = lane % 4;
  const int n = static_cast<int>(args.n), k = static_cast<int>(args.k), m = static_cast<int>(args.m);
  const int first_row = static_cast<int>(blockIdx.x) * kMmaRows, row_step = static_cast<int>(gridDim.x) * kMmaRows;
  int stage = 0, round = 0;  // of the ring; both sides go through it in the same order
  const uint32_t ring = shared_address(dynamic), first_full = shared_address(full), first_empty = shared_address(empty);
  const auto full_now = [&] { return first_full + stage * 8; };
  const auto empty_now = [&] { return first_empty + stage * 8; };
  const auto stage_now = [&] { return ring + stage * kStageBytes; };
  const auto next_stage = [&] {
    if (++stage == kStages) stage = 0, round ^= 1;
  };

  begin_reading_early(args.weight_stands);
  if (thread == kConsumers) {
    for (int s = 0; s < kStages; ++s) {
      init_barrier(first_full + s * 8, 1);
      init_barrier(first_empty + s * 8, kWarps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  if (warp == kWarps) {
    for (int row = first_row; row < n; row += row_step) {
      const int rows = min(n - row, kMmaRows);
      for (int col = 0; col < k; col += kPiece, next_stage()) {
        const int count = min(k - col, kPiece);
        wait(empty_now(), round ^ 1);
        if (lane == 0) expect_bytes(full_now(), rows * count);
        __syncwarp();
        if (lane < rows) fetch(stage_now() + lane * kPitch, args.w + int64_t{row + lane} * k + col, count, full_now());
      }
    }
    return;
  }

  // Of blocks: a tile's rows and a chunk's columns lie in one of 128 x 128. Lane c has the scale of chunk c, and gets
  // the next tile's in time.
  const auto request_scale = [&](int row) {
    const int col = lane * kStep + warp * kChunk;
    return kBlocks && row < n && col < k ? args.w_scale[scale_index(WeightScale::kBlock, k, row, col)] : 0;
  };
  float next_scale = request_scale(first_row);

  const int first_col = warp * kChunk + t * 16;
  uint4 x[kChunks][2];
  wait_for_predecessor();
  // A token too many is the last again, and not written.
  const T* x_row = static_cast<const T*>(args.x) + int64_t{min(g, m - 1)} * k + first_col;
  asm("" : "+l"(x_row));  // an address: else it is computed anew before each load
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (first_col + c * kStep < k) {
      load_x(x[c], x_row + c * kStep);
    } else {
      x[c][0] = x[c][1] = uint4{};
    }
  }
  const float factor = to_halves(x, T{});
  if (t == 0) factors[warp][g] = factor;

  const int token = thread / kMmaRows;
  int buffer = 0;
  for (int row = first_row; row < n; row += row_step) {
    const int output_row = row + thread % kMmaRows;
    const Epilogue<T> epilogue = load_epilogue<T>(args, output_row);
    const float scale_of_chunk = next_scale;
    next_scale = request_scale(row + row_step);
    float products[4] = {};
#pragma unroll
    for (int piece = 0; piece < kChunks / kSteps; ++piece) {
      const int count = min(k - piece * kPiece, kPiece);
      if (count <= 0) break;
      wait(full_now(), round);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int col = first_col + step * kStep;
        const uint32_t at = stage_now() + g * kPitch + col;
        const bool inside = col < count;
        const uint4 low = inside ? load_shared(at) : uint4{}, high = inside ? load_shared(at + 8 * kPitch) : uint4{};
        if (step == kSteps - 1) {
          __syncwarp();
          if (lane == 0) arrive(empty_now());
        }
        float part[4] = {};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t l = word(low, j), h = word(high, j);
          const uint32_t a[4] = {halves_of(l & 0xFFFF), halves_of(h & 0xFFFF), halves_of(l >> 16), halves_of(h >> 16)};
          const uint4& b = x[piece * kSteps + step][j / 2];
          mma(kBlocks ? part : products, a, word(b, j % 2 * 2), word(b, j % 2 * 2 + 1), __half{});
        }
        if constexpr (kBlocks) {
          const float scale = __shfl_sync(0xFFFFFFFF, scale_of_chunk, piece * kSteps + step);
#pragma unroll
          for (int i = 0; i < 4; ++i) products[i] = fmaf(part[i], scale, products[i]);
        }
      }
      next_stage();
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[buffer][warp][2 * t + i % 2][g + i / 2 * 8] = products[i];
    asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");
    if (token < m && output_row < n) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        // The scale comes before what may make the sum too large for float32.
        sum = fmaf(sums[buffer][w][token][thread % kMmaRows] * epilogue.scale, factors[w][token], sum);
      }
      store_output<T>(args, token, output_row, sum, {1.0f, epilogue.bias});
    }
    buffer ^= 1;  // nobody waits until these have been read: the next barrier sees to it
  }
}
static_assert(kTokens == 8 && kTokens * kMmaRows <= kConsumers, "a thread for each output");
static_assert(kRingCols % (2 * kPiece) == 0 && kRingCols / kStep <= 32, "a lane for each chunk");

template <class T, int kChunks, bool kBlocks>
void launch_ring(const SkinnyArgs& args, cudaStream_t stream) {
  const auto kernel = ring_kernel<T, kChunks, kBlocks>;
  allow_shared(kernel, kSharedBytes);
  const uint32_t tiles = blocks_for(args.n, kMmaRows);
  launch(kernel, Grid{std::min(tiles, kMultiprocessors), kThreads, kSharedBytes}, stream, args);
}

template <class T, bool kBlocks>
void launch_typed(const SkinnyArgs& args, cudaStream_t stream) {
  constexpr int kChunks = kRingCols / kStep;
  args.k <= kRingCols / 2 ? launch_ring<T, kChunks / 2, kBlocks>(args, stream)
                          : launch_ring<T, kChunks, kBlocks>(args, stream);
}

template <class T>
void launch_scaled(const SkinnyArgs& args, cudaStream_t stream) {
  args.scale_kind == WeightScale::kBlock ? launch_typed<T, true>(args, stream) : launch_typed<T, false>(args, stream);
}

}  // namespace

void launch_skinny_ring(const SkinnyArgs& args, cudaStream_t stream) {
  args.type == Type::kFloat16 ? launch_scaled<__half>(args, stream) : launch_scaled<__nv_bfloat16>(args, stream);
}

}  // namespace torch_fp8::cuda
