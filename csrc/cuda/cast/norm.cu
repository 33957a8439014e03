// RMSNorm and LayerNorm made and cast in one pass over x. A cluster of blocks stays on its multiprocessors and walks
// over pieces of 32 whole rows, of which each block has its share of the columns in shared memory, and a warp 4 rows of
// that share. So sums of rows are those of a warp, which it sends to the other blocks; and a warp that is done with its
// rows fetches those of the next piece by itself. The sums are moments, a mean and the squares around it, so that
// nothing cancels where a mean is large (T. Chan et al., 1979, for adding them up). Loops over columns are not
// unrolled: with the rows in registers, the kernel waited for its own code.
#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "cuda/cast/norm.cuh"
#include "cuda/common/barrier.cuh"
#include "cuda/common/cluster.cuh"
#include "cuda/common/encode.cuh"
#include "cuda/common/transpose.cuh"

namespace torch_fp8::cuda {
namespace {

constexpr int kWarps = 8, kWarpRows = 4, kThreads = kWarps * 32, kRows = kWarps * kWarpRows;  // of a block
constexpr int kChunk = 32 * kPackSize;  // columns of a warp, side by side
constexpr int kMostBlocks = 16;         // of a cluster on Hopper

struct Moments {
  float mean, squares;  // of some elements of a row: the sum of (x - mean)^2
};
using BlockMoments = Moments[kRows];

// How the columns are shared out, and a block's shared memory.
struct Share {
  int blocks;  // of a cluster
  int width;   // columns of a block, a multiple of kAlignment
  int chunks;  // of them, in whole ones

  template <class T>
  __host__ __device__ int piece_bytes() const {
    return kRows * chunks * kChunk * static_cast<int>(sizeof(T));
  }
  __host__ __device__ int codes_bytes() const { return kRows * chunks * kChunk; }  // of the transpose
  template <class T>
  int shared_bytes() const {
    return piece_bytes<T>() + codes_bytes() + 2 * chunks * kChunk * static_cast<int>(sizeof(float)) +
           2 * blocks * static_cast<int>(sizeof(BlockMoments));
  }
};

// |x| included; NaN stays.
__device__ inline float larger(float seen, float x) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(seen), "f"(fabsf(x)));
  return larger;
}

// The conversion saturates Inf, which must become NaN.
__device__ inline void mark_infinities(uint2& codes, const float (&x)[kPackSize]) {
#pragma unroll
  for (int j = 0; j < kPackSize; ++j) {
    uint32_t& word = j < 4 ? codes.x : codes.y;
    if (raw_magnitude(x[j]) == kInfinity) word = (word & ~(0xFFu << 8 * (j % 4))) | uint32_t{kNaNCode} << 8 * (j % 4);
  }
}

// The transpose in shared memory: a column is kWarps words of 4 rows. A lane's 8 columns are in the order of j ^ lane %
// 4, and the words of each in that of word ^ lane / 4: so the 32 lanes, which write one word of 32 columns, find each
// in a bank of its own, and a column's 16 bytes stay together.
__device__ inline void stage(uint32_t* of_lane, const uint2 (&codes)[kWarpRows], int warp, int lane) {
  uint32_t words[4];
  const auto put = [&](int j, uint32_t word) { of_lane[(j ^ lane % 4) * kWarps + (warp ^ lane / 4)] = word; };
  transpose4x4({codes[0].x, codes[1].x, codes[2].x, codes[3].x}, words);
#pragma unroll
  for (int j = 0; j < 4; ++j) put(j, words[j]);
  transpose4x4({codes[0].y, codes[1].y, codes[2].y, codes[3].y}, words);
#pragma unroll
  for (int j = 0; j < 4; ++j) put(4 + j, words[j]);
}

// 16 rows of a column.
__device__ inline uint4 unstage(const uint32_t* columns, int col, int unit) {
  const int j = col % kPackSize, lane = col / kPackSize % 32, turn = lane / 4;
  const uint32_t* const column = columns + (col - j + (j ^ lane % 4)) * kWarps;
  uint4 v = *reinterpret_cast<const uint4*>(column + (unit ^ turn / 4) * 4);
  if (turn & 1) v = make_uint4(v.y, v.x, v.w, v.z);
  if (turn & 2) v = make_uint4(v.z, v.w, v.x, v.y);
  return v;
}

__device__ inline void load_floats(const float* source, float (&out)[kPackSize]) {
  const float4 low = *reinterpret_cast<const float4*>(source), high = *reinterpret_cast<const float4*>(source + 4);
  out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
  out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
}

template <class T, bool kLayerNorm>
__global__ void __launch_bounds__(kThreads, 2)
    norm_kernel(__grid_constant__ const NormArgs args, __grid_constant__ const Share share) {
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ alignas(8) uint64_t full[kWarps], told[2][kWarps];  // the warp's rows are here, the others' moments
  __shared__ uint32_t of_warp[kWarps];
  const int blocks = share.blocks, width = share.width, chunks = share.chunks, held_cols = chunks * kChunk;
  auto* const columns = reinterpret_cast<uint32_t*>(dynamic + share.piece_bytes<T>());
  float* const gain = reinterpret_cast<float*>(dynamic + share.piece_bytes<T>() + share.codes_bytes());
  float* const bias = gain + held_cols;
  auto* const moments = reinterpret_cast<BlockMoments*>(bias + held_cols);  // of all blocks, for two pieces in turn
  const Matrix& x = args.cast.x;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int rank = static_cast<int>(blockIdx.x) % blocks, cols = static_cast<int>(x.cols);
  const auto cols_of = [&](int of_rank) { return min(width, cols - of_rank * width); };
  const int first_col = rank * width, cols_here = cols_of(rank), lane_col = lane * kPackSize;
  const int64_t pieces = (x.rows + kRows - 1) / kRows, step = gridDim.x / static_cast<uint32_t>(blocks);
  const int64_t padded_rows = padded(x.rows), padded_cols = padded(x.cols);
  const int padded_here = static_cast<int>(min(int64_t{width}, padded_cols - first_col));
  const uint32_t full_here = shared_address(&full[warp]);
  // This warp's rows in shared memory, from this lane's first pack on.
  auto* const packs = reinterpret_cast<Words<T>*>(dynamic) + warp * kWarpRows * chunks * 32 + lane;
  const auto rows_from = [&](int64_t row) {
    return static_cast<int>(max(int64_t{0}, min(int64_t{kWarpRows}, x.rows - row)));
  };
  begin_dependent();
  if (lane == 0) {
    init_barrier(full_here, 1);
    for (auto& of_warps : told) init_barrier(shared_address(&of_warps[warp]), 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();

  const auto fetch_rows = [&](int64_t piece) {
    const int64_t row = piece * kRows + warp * kWarpRows;
    const int rows = rows_from(row), bytes = cols_here * static_cast<int>(sizeof(T));
    if (rows == 0) return;
    if (args.residual.data) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // behind what was written
    if (lane == 0) expect_bytes(full_here, rows * bytes);
    __syncwarp();
    if (lane >= rows) return;
    fetch(shared_address(packs - lane + lane * chunks * 32),
          static_cast<const T*>(x.data) + (row + lane) * x.row_stride + first_col, bytes, full_here);
  };
  int64_t piece = blockIdx.x / static_cast<uint32_t>(blocks);
  fetch_rows(piece);
  for (int c = static_cast<int>(threadIdx.x); c < held_cols; c += kThreads) {
    gain[c] = c < cols_here ? gain_at<T>(args.gain, args.gain_offset, first_col + c) : 0.0f;
    bias[c] = c < cols_here && args.bias.data ? parameter<T>(args.bias, first_col + c) : 0.0f;
  }
  const float scale = args.cast.slot ? args.cast.slot->scale : 1.0f;
  // What was written is there, and so are the other blocks.
  blocks > 1 ? synchronize_cluster() : __syncthreads();

  float seen = 0;
  for (int parity = 0, turn = 0; piece < pieces; piece += step, turn ^= parity, parity ^= 1) {
    const int64_t first_row = piece * kRows, row = first_row + warp * kWarpRows;
    const int rows_left = rows_from(row);
    // This lane's first pack of a row, in memory where rows are so far apart.
    const auto in_memory = [&](const void* data, int64_t row_stride, int i) {
      return const_cast<T*>(static_cast<const T*>(data)) + (row + i) * row_stride + first_col + lane_col;
    };
    Words<T> added[kWarpRows];
    const auto load_residual = [&](int c) {
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i) {
        if (i >= rows_left || lane_col + c * kChunk >= cols_here) continue;
        const T* const place = in_memory(args.residual.data, args.residual.row_stride, i) + c * kChunk;
        added[i] = *reinterpret_cast<const Words<T>*>(place);
      }
    };
    if (args.residual.data) load_residual(0);
    if (rows_left > 0) wait(full_here, parity);
    if (args.residual.data) {
#pragma unroll 1
      for (int c = 0; c < chunks; ++c) {
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i) {
          if (i >= rows_left || lane_col + c * kChunk >= cols_here) continue;
          float terms[kPackSize], others[kPackSize];
          unpack(packs[(i * chunks + c) * 32], terms);
          unpack(added[i], others);
#pragma unroll
          for (int j = 0; j < kPackSize; ++j) terms[j] += others[j];
          const Words<T> sum = words_of<T>(terms);
          packs[(i * chunks + c) * 32] = sum;
          if (args.sum) store_whole(in_memory(args.sum, cols, i) + c * kChunk, sum);
        }
        load_residual(c + 1);
      }
    }
    // Of rows behind the last, these are sums of whatever lies there; nobody reads them.
    const auto sums_of_rows = [&](const auto& term, float (&sums)[kWarpRows]) {
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i) sums[i] = 0;
#pragma unroll 1
      for (int c = 0; c < chunks; ++c) {
        if (lane_col + c * kChunk >= cols_here) continue;
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i) {
          float terms[kPackSize];
          unpack(packs[(i * chunks + c) * 32], terms);
#pragma unroll
          for (int j = 0; j < kPackSize; ++j) sums[i] += term(terms[j], i);
        }
      }
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i) sums[i] = warp_sum(sums[i]);
    };
    // Means are those of distances from the row's first element: sums of large values lose what these differ by.
    float origin[kWarpRows] = {}, mean[kWarpRows] = {}, squares[kWarpRows];
    if constexpr (kLayerNorm) {
      const auto first = [&](const Matrix& of) {
        return lane < rows_left ? to_float(static_cast<const T*>(of.data)[(row + lane) * of.row_stride]) : 0.0f;
      };
      float of_row = first(x);
      if (args.residual.data) of_row = to_float(T(of_row + first(args.residual)));
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i) origin[i] = __shfl_sync(0xFFFFFFFF, of_row, i);
      sums_of_rows([&](float x, int i) { return x - origin[i]; }, mean);
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i) mean[i] /= static_cast<float>(cols_here);
    }
    const auto squared = [&](float x, int i) {
      const float distance = kLayerNorm ? x - origin[i] - mean[i] : x;
      return distance * distance;
    };
    sums_of_rows(squared, squares);
    // To the same warp of each block, 4 lanes for a block, a row each. The barrier that counts these words is all that
    // a warp waits for: one of the whole cluster would wait for every store to memory as well. There are two in turn,
    // as a block may be one piece ahead of another.
    BlockMoments* const of_blocks = moments + parity * blocks;
    const uint32_t told_here = shared_address(&told[parity][warp]);
    if (lane == 0) expect_bytes(told_here, blocks * kWarpRows * static_cast<int>(sizeof(Moments)));
    Moments to_send{};
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      if (lane % kWarpRows == i) to_send = {mean[i], squares[i]};
    }
#pragma unroll 1
    for (int to = lane / kWarpRows; to < blocks; to += 32 / kWarpRows) {
      const uint32_t place = shared_address(&of_blocks[rank][warp * kWarpRows + lane % kWarpRows]);
      send_to(to, place, to_send.mean, to_send.squares, told_here);
    }
    __syncwarp();
    wait(told_here, turn);
    float rstd[kWarpRows];
    const float count = lane < blocks ? static_cast<float>(cols_of(lane)) : 0.0f;
    const float per_col = 1.0f / static_cast<float>(cols);
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      const Moments m = lane < blocks ? of_blocks[lane][warp * kWarpRows + i] : Moments{};
      mean[i] = kLayerNorm ? warp_sum(count * m.mean) * per_col : 0.0f;
      const float distance = m.mean - mean[i];
      squares[i] = warp_sum(m.squares + count * distance * distance);
    }
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      rstd[i] = reciprocal_deviation(squares[i], cols, args.eps);
      if constexpr (kLayerNorm) mean[i] += origin[i];
      if (rank == 0 && lane == i && i < rows_left) {
        store_stats(args.stats, kLayerNorm, x.rows, row + i, mean[i], rstd[i]);
      }
    }
#pragma unroll 1
    for (int c = 0; c < chunks; ++c) {
      const int col = lane_col + c * kChunk;
      float g[kPackSize], b[kPackSize];
      load_floats(gain + col, g);
      load_floats(bias + col, b);
      // No branch between the rows, whose arithmetic the compiler can then interleave.
      Words<T> rows[kWarpRows];
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i) rows[i] = packs[(i * chunks + c) * 32];
      const auto norm = [&](int i, float (&y)[kPackSize]) {
        unpack(rows[i], y);
#pragma unroll
        for (int j = 0; j < kPackSize; ++j) {
          y[j] = (kLayerNorm ? normalised(y[j], mean[i], rstd[i]) : y[j] * rstd[i]) * g[j] + b[j];
        }
      };
      const auto inside = [&](int i) { return i < rows_left && col < cols_here; };
      uint2 codes[kWarpRows];
      float largest = 0;
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i) {
        float y[kPackSize], of_pairs[kPackSize / 2];
        norm(i, y);
#pragma unroll
        for (int j = 0; j < kPackSize / 2; ++j) of_pairs[j] = larger(fabsf(y[2 * j]), y[2 * j + 1]);
        const float of_row = larger(larger(of_pairs[0], of_pairs[1]), larger(of_pairs[2], of_pairs[3]));
        const uint2 encoded = encode8<Format::kE4M3>(y, scale);
        codes[i] = inside(i) ? encoded : uint2{};
        largest = larger(largest, inside(i) ? of_row : 0.0f);
      }
      seen = larger(seen, largest);
      if (!is_finite(largest)) [[unlikely]] {
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i) {
          float y[kPackSize];
          norm(i, y);
          if (inside(i)) mark_infinities(codes[i], y);
        }
      }
      if (args.y) {
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i) {
          float y[kPackSize];
          norm(i, y);
          if (inside(i)) store_whole(in_memory(args.y, cols, i) + c * kChunk, words_of<T>(y));
        }
      }
      if (args.cast.q && col < padded_here && row < padded_rows) {
        uint8_t* const q = args.cast.q + row * padded_cols + first_col + col;
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i) *reinterpret_cast<uint2*>(q + i * padded_cols) = codes[i];
      }
      if (args.cast.q_t) stage(columns + col * kWarps, codes, warp, lane);
    }
    __syncwarp();
    if (piece + step < pieces) fetch_rows(piece + step);
    if (!args.cast.q_t) continue;
    __syncthreads();
    constexpr int kUnits = kRows / 16;  // 16-byte units of a column
    const int unit = static_cast<int>(threadIdx.x) % kUnits;
    if (first_row + unit * 16 >= padded_rows) continue;
    uint8_t* const q_t = args.cast.q_t + first_col * padded_rows + first_row + unit * 16;
#pragma unroll 4
    for (int col = static_cast<int>(threadIdx.x) / kUnits; col < padded_here; col += kThreads / kUnits) {
      *reinterpret_cast<uint4*>(q_t + col * padded_rows) = unstage(columns, col, unit);
    }
  }
  stage_max(of_warp, __float_as_uint(seen));
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (args.cast.amax) raise_amax(args.cast.amax, max_of_warps(of_warp));
  if (args.cast.scale_inv && blockIdx.x == 0) *args.cast.scale_inv = args.cast.slot->scale_inv;
}
static_assert(kAlignment % kWarpRows == 0, "padding leaves no warp's rows and cuts none");

// How many clusters of that kernel the device holds at a time; 0: it has none so large.
template <class Kernel>
int resident_clusters(Kernel kernel, const Grid& grid) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, int>, int> known;
  int device;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard lock(mutex);
  const auto [entry, is_new] =
      known.try_emplace({reinterpret_cast<const void*>(kernel), device, grid.cluster, grid.shared_bytes});
  if (is_new) entry->second = most_clusters(kernel, grid);
  return entry->second;
}

constexpr int kMostShared = 227 * 1024 / 2 - 1024;  // of a block, where two are on a multiprocessor

template <class T>
void launch_typed(const NormArgs& args, cudaStream_t stream) {
  constexpr int kMostChunks = sizeof(T) == 2 ? 4 : 2;  // of a block
  const Matrix& x = args.cast.x;
  const bool vectorised = is_vectorised(x) && (!args.residual.data || is_vectorised(args.residual));
  if (!vectorised || x.cols % kPackSize != 0 || x.cols > kMostBlocks * kMostChunks * kChunk) {
    return launch_norm_any(args, stream);
  }
  const auto cols = static_cast<int>(padded(x.cols));
  const int blocks = (cols + kMostChunks * kChunk - 1) / (kMostChunks * kChunk);
  const int width = static_cast<int>(padded((cols + blocks - 1) / blocks));
  const Share share{blocks, width, (width + kChunk - 1) / kChunk};
  const auto kernel = args.layer_norm ? norm_kernel<T, true> : norm_kernel<T, false>;
  allow_shared(kernel, kMostShared);
  if (blocks > 8) allow_large_cluster(kernel);
  Grid grid{static_cast<uint32_t>(blocks), kThreads, share.shared_bytes<T>(), blocks};
  const int clusters = resident_clusters(kernel, grid);
  if (clusters == 0) return launch_norm_any(args, stream);
  grid.blocks *= std::min(static_cast<uint32_t>(clusters), blocks_for(x.rows, kRows));
  launch(kernel, grid, stream, args, share);
}

void launch_norm(const NormArgs& args, cudaStream_t stream) {
  with_type(args.cast.x.type, [&](auto t) { launch_typed<decltype(t)>(args, stream); });
}

[[maybe_unused]] const bool filled = fill<launch_norm>(cuda_kernels().norm);

}  // namespace
}  // namespace torch_fp8::cuda
