// The backward pass of norms. Blocks stay, and walk over the rows: while one row is worked on, the next ones are on
// their way into a ring in shared memory, a slot for a row of dy, of x and of dsum. A thread has the same columns in
// every row, and so their sums, dgain and dbias, in its registers. The gain and a row's stats are asked for early:
// behind the bytes of the ring they come late.
#include <algorithm>

#include "cuda/cast/norm.cuh"
#include "cuda/common/barrier.cuh"

namespace torch_fp8::cuda {
namespace {

constexpr int kMostThreads = 512, kMostPacks = 4;
constexpr int kMostSlots = 64;
constexpr int kSharedBytes = 228 * 1024;  // of a multiprocessor
constexpr int kStaticBytes = 2 * 1024;    // of a block: what it declares, and what CUDA keeps for itself

struct Ring {
  int slots, slot_bytes, per_row;  // per_row: slots that a row takes
  int gain_bytes;                  // in front of the slots, where registers are too few for the gain
};

// kPacks: of a row that a thread has.
template <class T, int kPacks, bool kLayerNorm>
__global__ void __launch_bounds__(kMostThreads, 1)
    norm_backward_kernel(__grid_constant__ const NormBackwardArgs args, Ring ring) {
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ alignas(8) uint64_t full[kMostSlots];
  __shared__ float of_warp[2][2][kMostThreads / 32];  // by turns; the sum of g, the sum of g * n
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int warps = threads / 32, lane = thread % 32;
  const int packs = static_cast<int>(args.x.cols) / kPackSize;
  const int64_t rows = args.x.rows, cols = args.x.cols, step = gridDim.x;
  uint8_t* const slots = dynamic + ring.gain_bytes;
  const uint32_t first_full = shared_address(full), first_slot = shared_address(slots);
  begin_dependent();
  if (thread == 0) {
    for (int s = 0; s < ring.slots; ++s) init_barrier(first_full + s * 8, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  // The fetching thread's place: the next row, which of its tensors, and the slot for it.
  int64_t next_row = blockIdx.x;
  int next_tensor = 0, next_slot = 0;
  const auto refill = [&](int count) {
    for (; count > 0 && next_row < rows; --count) {
      const Matrix& source = next_tensor == 0 ? args.dy : next_tensor == 1 ? args.x : args.dsum;
      const int bytes = static_cast<int>(cols * sizeof(T));
      expect_bytes(first_full + next_slot * 8, bytes);
      fetch(first_slot + next_slot * ring.slot_bytes, static_cast<const T*>(source.data) + next_row * source.row_stride,
            bytes, first_full + next_slot * 8);
      if (++next_slot == ring.slots) next_slot = 0;
      if (++next_tensor == ring.per_row) next_tensor = 0, next_row += step;
    }
  };

  // All of it or nothing lies within a row.
  const auto inside = [&](int p) { return thread + p * threads < packs; };
  uint32_t bits[kPacks][kPackSize] = {};
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
#pragma unroll
    for (int j = 0; j < kPackSize; ++j) {
      const int col = (thread + p * threads) * kPackSize + j;
      if (args.gain.data && inside(p)) bits[p][j] = parameter_bits<T>(args.gain, col);
    }
  }
  // Volatile, so that the load stays where it stands.
  const auto load_stats = [&](int64_t row) {
    const volatile float* const stats = args.stats + row;
    return kLayerNorm ? Stats{stats[0], stats[rows]} : Stats{0.0f, stats[0]};
  };
  Stats ahead = load_stats(blockIdx.x);
  if (thread == 0) refill(ring.slots);

  float gain[kPacks][kPackSize], dgain[kPacks][kPackSize] = {}, dbias[kPacks][kPackSize] = {};
  float* const shared_gain = reinterpret_cast<float*>(dynamic) + thread * kPackSize;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
#pragma unroll
    for (int j = 0; j < kPackSize; ++j) {
      gain[p][j] = args.gain.data ? parameter_of<T>(args.gain, bits[p][j]) + args.gain_offset : 1.0f;
      if (kLayerNorm && inside(p)) shared_gain[p * threads * kPackSize + j] = gain[p][j];
    }
  }
  const auto load_gain = [&](int p, float(&of_pack)[kPackSize]) {
    if constexpr (kLayerNorm) {
      load_floats(shared_gain + p * threads * kPackSize, of_pack);
    } else {
#pragma unroll
      for (int j = 0; j < kPackSize; ++j) of_pack[j] = gain[p][j];
    }
  };

  int slot = 0, phase = 0, parity = 0;
  // Where this thread's packs of the next tensor of the row are, once they are there.
  const auto next = [&] {
    wait(first_full + slot * 8, phase);
    const auto* const packs = reinterpret_cast<const Words<T>*>(slots + slot * ring.slot_bytes) + thread;
    if (++slot == ring.slots) slot = 0, phase ^= 1;
    return packs;
  };
  const float per_col = 1.0f / static_cast<float>(cols);
  for (int64_t row = blockIdx.x; row < rows; row += step, parity ^= 1) {
    const float mean = ahead.mean, rstd = ahead.rstd;
    if (row + step < rows) ahead = load_stats(row + step);
    const float shift = -mean * rstd;
    const auto of_row = [&](float x) { return kLayerNorm ? x * rstd + shift : x * rstd; };
    const Words<T>* const of_dy = next();
    const Words<T>* const of_x = next();
    float2 sums{};
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (!inside(p)) continue;
      float dy[kPackSize], x[kPackSize], of_gain[kPackSize];
      unpack(of_dy[p * threads], dy);
      unpack(of_x[p * threads], x);
      load_gain(p, of_gain);
#pragma unroll
      for (int j = 0; j < kPackSize; ++j) {
        const float n = of_row(x[j]), g = dy[j] * of_gain[j];
        if constexpr (kLayerNorm) sums.x += g, dbias[p][j] += dy[j];
        sums.y += g * n;
        dgain[p][j] += dy[j] * n;
      }
    }
    // Lanes 0 ... 15 add up the one sum, the others the other.
    const int which = lane / 16;
    float sum = sum_of_lanes<16>((which ? sums.y : sums.x) + __shfl_xor_sync(0xFFFFFFFF, which ? sums.x : sums.y, 16));
    if (lane % 16 == 0) of_warp[parity][which][thread / 32] = sum;
    __syncthreads();
    // Here everybody is done with the row before.
    if (thread == 0 && row != blockIdx.x) refill(ring.per_row);
    sum = sum_of_lanes<16>(lane % 16 < warps ? of_warp[parity][which][lane % 16] : 0.0f) * per_col;
    const float of_g = __shfl_sync(0xFFFFFFFF, sum, 0), of_products = __shfl_sync(0xFFFFFFFF, sum, 16);
    const Words<T>* const of_dsum = args.dsum.data ? next() : nullptr;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (!inside(p)) continue;
      float dx[kPackSize], x[kPackSize], of_gain[kPackSize], dsum[kPackSize] = {};
      unpack(of_dy[p * threads], dx);
      unpack(of_x[p * threads], x);
      if (of_dsum) unpack(of_dsum[p * threads], dsum);
      load_gain(p, of_gain);
#pragma unroll
      for (int j = 0; j < kPackSize; ++j) {
        const float n = of_row(x[j]);
        dx[j] = rstd * (dx[j] * of_gain[j] - of_g - n * of_products) + dsum[j];
      }
      reinterpret_cast<Words<T>*>(static_cast<T*>(args.dx) + row * cols)[thread + p * threads] = words_of<T>(dx);
    }
  }
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    if (!inside(p)) continue;
    const int64_t at = blockIdx.x * cols + int64_t{thread + p * threads} * kPackSize;
    if (args.dgain) store_floats(args.dgain + at, dgain[p]);
    if (kLayerNorm && args.dbias) store_floats(args.dbias + at, dbias[p]);
  }
}

template <class T, int kPacks>
void launch_as(const NormBackwardArgs& args, int threads, const Ring& ring, cudaStream_t stream) {
  const int shared_bytes = ring.gain_bytes + ring.slots * ring.slot_bytes;
  const auto run = [&](auto kernel) {
    allow_shared(kernel, kSharedBytes - kStaticBytes);
    launch(kernel, Grid{static_cast<uint32_t>(args.parts), threads, shared_bytes}, stream, args, ring);
  };
  args.layer_norm ? run(norm_backward_kernel<T, kPacks, true>) : run(norm_backward_kernel<T, kPacks, false>);
}

template <class T>
void launch_typed(const NormBackwardArgs& args, cudaStream_t stream) {
  const bool residual = args.dsum.data;
  const bool vectorised = is_vectorised(args.dy) && is_vectorised(args.x) && (!residual || is_vectorised(args.dsum));
  const int64_t cols = args.x.cols, packs = cols / kPackSize;
  if (!vectorised || (args.dbias && !args.layer_norm) || cols % kPackSize != 0 || packs > kMostThreads * kMostPacks) {
    return launch_norm_backward_any(args, stream);
  }
  const int threads = static_cast<int>(std::min<int64_t>(kMostThreads, (packs + 63) / 64 * 32));
  const int64_t of_multiprocessor = norm_parts(INT64_MAX, cols) / kMultiprocessors;
  const auto in_shared = [](int64_t bytes) { return static_cast<int>((bytes + 127) / 128 * 128); };
  Ring ring{0, in_shared(cols * static_cast<int64_t>(sizeof(T))), residual ? 3 : 2,
            args.layer_norm ? in_shared(cols * static_cast<int64_t>(sizeof(float))) : 0};
  const int64_t of_block = kSharedBytes / of_multiprocessor - kStaticBytes - ring.gain_bytes;
  ring.slots = static_cast<int>(std::min<int64_t>(kMostSlots, of_block / ring.slot_bytes));
  // dy and x of the next row must be on their way when the slots of the row before are given back.
  if (ring.slots < ring.per_row + 2) return launch_norm_backward_any(args, stream);
  packs <= 2 * kMostThreads ? launch_as<T, 2>(args, threads, ring, stream)
                            : launch_as<T, kMostPacks>(args, threads, ring, stream);
}

void launch_norm_backward(const NormBackwardArgs& args, cudaStream_t stream) {
  with_type(args.x.type, [&](auto t) { launch_typed<decltype(t)>(args, stream); });
}

[[maybe_unused]] const bool filled = fill<launch_norm_backward>(cuda_kernels().norm_backward);

}  // namespace
}  // namespace torch_fp8::cuda
