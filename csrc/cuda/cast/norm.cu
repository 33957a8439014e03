// RMSNorm and LayerNorm made and cast in one pass over x. A cluster of blocks stays on its multiprocessors and walks
// over pieces of 32 whole rows: each block has its share of the columns, held in registers between the sums of the rows
// and the codes, while the next pieces are on their way into a ring in shared memory. A warp has 4 rows of half of the
// block's columns, so that sums of rows are those of warps, added up through the shared memory of the cluster. They are
// moments, a mean and the squares around it, so that nothing cancels where a mean is large (T. Chan et al., 1979, for
// adding them up).
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

constexpr int kWarpRows = 4, kDown = 8, kHalves = 2;  // a block has kDown warps above one another, kHalves side by side
constexpr int kRows = kDown * kWarpRows, kThreads = kDown * kHalves * 32;
constexpr int kChunk = 32 * kPackSize;  // columns of a warp, side by side
constexpr int kMostBlocks = 16;         // of a cluster on Hopper
constexpr int kSlots = 3;               // of the ring: pieces of x and, with one, of the residual in turn

// kChunks: how many of them a warp has.
template <class T, int kChunks>
struct Shape {
  static constexpr int kCols = kHalves * kChunks * kChunk;
  static constexpr int kSlotBytes = kRows * kCols * static_cast<int>(sizeof(T));
  static constexpr int kSharedBytes = kSlots * kSlotBytes + kCols * kRows;  // and the codes of the transpose
};

struct Moments {
  float mean, squares;  // of some elements of a row: the sum of (x - mean)^2
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

// The transpose in shared memory: a column is kDown words of 4 rows. A lane's 8 columns are in the order of j ^ lane %
// 4, and the words of each in that of word ^ lane / 4: so the 32 lanes, which write one word of 32 columns, find each
// in a bank of its own, and a column's 16 bytes stay together.
__device__ inline void stage(uint32_t* of_lane, const uint2 (&codes)[kWarpRows], int down, int lane) {
  uint32_t words[4];
  const auto put = [&](int j, uint32_t word) { of_lane[(j ^ lane % 4) * kDown + (down ^ lane / 4)] = word; };
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
  const uint32_t* const column = columns + (col - j + (j ^ lane % 4)) * kDown;
  uint4 v = *reinterpret_cast<const uint4*>(column + (unit ^ turn / 4) * 4);
  if (turn & 1) v = make_uint4(v.y, v.x, v.w, v.z);
  if (turn & 2) v = make_uint4(v.z, v.w, v.x, v.y);
  return v;
}

// blocks: of a cluster; width: columns of a block, a multiple of 16.
template <class T, bool kLayerNorm, int kChunks>
__global__ void __launch_bounds__(kThreads, 1)
    norm_kernel(__grid_constant__ const NormArgs args, int blocks, int width) {
  using S = Shape<T, kChunks>;
  extern __shared__ __align__(128) uint8_t dynamic[];
  __shared__ alignas(8) uint64_t full[kSlots];
  __shared__ Moments moments[2][kHalves][kRows];
  __shared__ uint32_t of_warp[kThreads / 32];
  auto* const columns = reinterpret_cast<uint32_t*>(dynamic + kSlots * S::kSlotBytes);
  const Matrix& x = args.cast.x;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int down = warp % kDown, half = warp / kDown;
  const int rank = static_cast<int>(blockIdx.x) % blocks, cols = static_cast<int>(x.cols);
  const int first_col = rank * width, cols_here = min(width, cols - first_col);
  const int block_col = half * kChunks * kChunk + lane * kPackSize;  // of this thread's first pack
  const int64_t tiles = (x.rows + kRows - 1) / kRows, first_tile = blockIdx.x / static_cast<uint32_t>(blocks);
  const int64_t step = gridDim.x / static_cast<uint32_t>(blocks);
  const int64_t padded_rows = padded(x.rows), padded_cols = padded(x.cols);
  const int padded_here = static_cast<int>(min(int64_t{width}, padded_cols - first_col));
  const bool added = args.residual.data;
  const uint32_t first_full = shared_address(full), first_slot = shared_address(dynamic);
  begin_dependent();
  if (threadIdx.x == 0) {
    for (int s = 0; s < kSlots; ++s) init_barrier(first_full + s * 8, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  // The first warp's place: which piece is next, of which matrix, and the slot for it.
  int64_t next_tile = first_tile;
  int next_slot = 0;
  bool next_residual = false;
  const auto refill = [&](int count) {
    for (; count > 0 && next_tile < tiles; --count) {
      const Matrix& source = next_residual ? args.residual : x;
      const int64_t first = next_tile * kRows;
      const int rows = static_cast<int>(min(int64_t{kRows}, x.rows - first));
      const int bytes = cols_here * static_cast<int>(sizeof(T));
      if (lane == 0) expect_bytes(first_full + next_slot * 8, rows * bytes);
      __syncwarp();
      if (lane < rows) {
        fetch(first_slot + next_slot * S::kSlotBytes + lane * S::kCols * static_cast<int>(sizeof(T)),
              static_cast<const T*>(source.data) + (first + lane) * source.row_stride + first_col, bytes,
              first_full + next_slot * 8);
      }
      if (++next_slot == kSlots) next_slot = 0;
      if (!added || next_residual) next_tile += step;
      next_residual = added && !next_residual;
    }
  };
  if (warp == 0) refill(kSlots);

  float gain[kChunks][kPackSize], bias[kChunks][kPackSize];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int j = 0; j < kPackSize; ++j) {
      const int col = block_col + c * kChunk + j;
      gain[c][j] = col < cols_here ? gain_at<T>(args.gain, args.gain_offset, first_col + col) : 0.0f;
      bias[c][j] = col < cols_here && args.bias.data ? parameter<T>(args.bias, first_col + col) : 0.0f;
    }
  }
  const float scale = args.cast.slot ? args.cast.slot->scale : 1.0f;
  // Columns of a half of a block.
  const auto cols_of = [&](int of_rank, int of_half) {
    const int here = min(width, cols - of_rank * width);
    return static_cast<float>(max(0, min(kChunks * kChunk, here - of_half * kChunks * kChunk)));
  };

  int slot = 0, phase = 0, parity = 0;
  // This thread's packs of the next piece, once it is there.
  const auto next = [&] {
    wait(first_full + slot * 8, phase);
    const auto* const packs = reinterpret_cast<const Words<T>*>(dynamic + slot * S::kSlotBytes) +
                              (down * kWarpRows * S::kCols + block_col) / kPackSize;
    if (++slot == kSlots) slot = 0, phase ^= 1;
    return packs;
  };
  float seen = 0;
  for (int64_t tile = first_tile; tile < tiles; tile += step, parity ^= 1) {
    const int64_t first_row = tile * kRows, row = first_row + down * kWarpRows;
    const int rows_left = static_cast<int>(min(int64_t{kWarpRows}, x.rows - row));
    const auto inside = [&](int i, int c) { return i < rows_left && block_col + c * kChunk < cols_here; };
    const auto store = [&](void* target, int i, int c, const Words<T>& words) {
      T* const place = static_cast<T*>(target) + (row + i) * cols + first_col + block_col + c * kChunk;
      *reinterpret_cast<Words<T>*>(place) = words;
    };
    Words<T> held[kChunks][kWarpRows];
    const Words<T>* const of_x = next();
    const Words<T>* const of_residual = added ? next() : nullptr;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i) {
        held[c][i] = {};
        if (!inside(i, c)) continue;
        constexpr int kRowPacks = S::kCols / kPackSize;
        held[c][i] = of_x[i * kRowPacks + c * 32];
        if (!added) continue;
        float terms[kPackSize], others[kPackSize];
        unpack(held[c][i], terms);
        unpack(of_residual[i * kRowPacks + c * 32], others);
#pragma unroll
        for (int j = 0; j < kPackSize; ++j) terms[j] += others[j];
        held[c][i] = words_of<T>(terms);
        if (args.sum) store(args.sum, i, c, held[c][i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      Moments m{};
      if constexpr (kLayerNorm) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          float terms[kPackSize];
          unpack(held[c][i], terms);
#pragma unroll
          for (int j = 0; j < kPackSize; ++j) m.mean += terms[j];
        }
        m.mean = warp_sum(m.mean) / fmaxf(cols_of(rank, half), 1.0f);
      }
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        if (kLayerNorm && !inside(i, c)) continue;
        float terms[kPackSize];
        unpack(held[c][i], terms);
#pragma unroll
        for (int j = 0; j < kPackSize; ++j) {
          const float distance = kLayerNorm ? terms[j] - m.mean : terms[j];
          m.squares += distance * distance;
        }
      }
      m.squares = warp_sum(m.squares);
      if (lane == 0) moments[parity][half][down * kWarpRows + i] = m;
    }
    blocks > 1 ? synchronize_cluster() : __syncthreads();
    // Here everybody holds what was in the slots.
    if (warp == 0) refill(added ? 2 : 1);
    float mean[kWarpRows], rstd[kWarpRows];
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      const int of_rank = lane / kHalves, of_half = lane % kHalves;
      Moments m{};
      float count = 0;
      if (of_rank < blocks) {
        const uint32_t address = shared_address(&moments[parity][of_half][down * kWarpRows + i]);
        m = {load_from(of_rank, address), load_from(of_rank, address + 4)};
        count = cols_of(of_rank, of_half);
      }
      mean[i] = kLayerNorm ? warp_sum(count * m.mean) / static_cast<float>(cols) : 0.0f;
      const float distance = m.mean - mean[i];
      rstd[i] = reciprocal_deviation(warp_sum(m.squares + count * distance * distance), cols, args.eps);
      if (rank == 0 && half == 0 && lane == i && i < rows_left) {
        store_stats(args.stats, kLayerNorm, x.rows, row + i, mean[i], rstd[i]);
      }
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      uint2 codes[kWarpRows];
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i) {
        codes[i] = {};
        if (!inside(i, c)) continue;
        float y[kPackSize], largest = 0;
        unpack(held[c][i], y);
#pragma unroll
        for (int j = 0; j < kPackSize; ++j) {
          y[j] = (kLayerNorm ? normalised(y[j], mean[i], rstd[i]) : y[j] * rstd[i]) * gain[c][j] + bias[c][j];
          largest = larger(largest, y[j]);
        }
        seen = larger(seen, largest);
        codes[i] = encode8<Format::kE4M3>(y, scale);
        if (!is_finite(largest)) [[unlikely]]
          mark_infinities(codes[i], y);
        if (args.y) store(args.y, i, c, words_of<T>(y));
      }
      const int col = block_col + c * kChunk;
      if (args.cast.q && col < padded_here && row < padded_rows) {
        uint8_t* const q = args.cast.q + row * padded_cols + first_col + col;
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i) *reinterpret_cast<uint2*>(q + i * padded_cols) = codes[i];
      }
      if (args.cast.q_t) stage(columns + col * kDown, codes, down, lane);
    }
    if (!args.cast.q_t) continue;
    __syncthreads();
    constexpr int kUnits = kRows / 16;  // 16-byte units of a column
    const int unit = static_cast<int>(threadIdx.x) % kUnits;
    if (first_row + unit * 16 >= padded_rows) continue;
    uint8_t* const q_t = args.cast.q_t + first_col * padded_rows + first_row + unit * 16;
#pragma unroll
    for (int i = 0; i < S::kCols * kUnits / kThreads; ++i) {
      const int col = (static_cast<int>(threadIdx.x) + i * kThreads) / kUnits;
      if (col < padded_here) *reinterpret_cast<uint4*>(q_t + col * padded_rows) = unstage(columns, col, unit);
    }
  }
  stage_max(of_warp, __float_as_uint(seen));
  // Nor does a block end while another reads its moments.
  blocks > 1 ? synchronize_cluster() : __syncthreads();
  if (threadIdx.x != 0) return;
  if (args.cast.amax) raise_amax(args.cast.amax, max_of_warps(of_warp));
  if (args.cast.scale_inv && blockIdx.x == 0) *args.cast.scale_inv = args.cast.slot->scale_inv;
}
static_assert(kAlignment % kWarpRows == 0, "padding leaves no warp's rows and cuts none");
static_assert(kMostBlocks * kHalves == 32, "a lane for each half of a block");

// How many clusters of that kernel the device holds at a time; 0: it has none so large.
template <class Kernel>
int resident_clusters(Kernel kernel, const Grid& grid) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int>, int> known;
  int device;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard lock(mutex);
  const auto [entry, is_new] = known.try_emplace({reinterpret_cast<const void*>(kernel), device, grid.cluster});
  if (is_new) entry->second = most_clusters(kernel, grid);
  return entry->second;
}

template <class T, int kChunks>
void launch_as(const NormArgs& args, cudaStream_t stream) {
  using S = Shape<T, kChunks>;
  const auto kernel = args.layer_norm ? norm_kernel<T, true, kChunks> : norm_kernel<T, false, kChunks>;
  const int64_t cols = padded(args.cast.x.cols);
  const int blocks = static_cast<int>(blocks_for(cols, S::kCols));
  const int width = static_cast<int>(padded((cols + blocks - 1) / blocks));
  allow_shared(kernel, S::kSharedBytes);
  if (blocks > 8) allow_large_cluster(kernel);
  Grid grid{static_cast<uint32_t>(blocks), kThreads, S::kSharedBytes, blocks};
  const int clusters = resident_clusters(kernel, grid);
  if (clusters == 0) return launch_norm_any(args, stream);
  grid.blocks *= std::min(static_cast<uint32_t>(clusters), blocks_for(args.cast.x.rows, kRows));
  launch(kernel, grid, stream, args, blocks, width);
}

template <class T>
void launch_typed(const NormArgs& args, cudaStream_t stream) {
  constexpr int kMost = sizeof(T) == 2 ? 2 : 1;  // chunks that fit the registers, and three slots
  const Matrix& x = args.cast.x;
  const bool vectorised = is_vectorised(x) && (!args.residual.data || is_vectorised(args.residual));
  if (!vectorised || x.cols % kPackSize != 0 || x.cols > kMostBlocks * Shape<T, kMost>::kCols) {
    return launch_norm_any(args, stream);
  }
  x.cols <= Shape<T, 1>::kCols ? launch_as<T, 1>(args, stream) : launch_as<T, kMost>(args, stream);
}

void launch_norm(const NormArgs& args, cudaStream_t stream) {
  with_type(args.cast.x.type, [&](auto t) { launch_typed<decltype(t)>(args, stream); });
}

[[maybe_unused]] const bool filled = fill<launch_norm>(cuda_kernels().norm);

}  // namespace
}  // namespace torch_fp8::cuda
