// RMSNorm and LayerNorm made and cast in one pass over x. A cluster of blocks stays on its multiprocessors and walks
// over pieces of 32 whole rows. A warp has 4 rows of its part of the columns: it fetches them to shared memory, takes
// them into registers, and fetches those of the next piece before it works on these. Sums of rows are those of a warp,
// which it sends to the warps of the same rows. They are moments, a mean and the squares around it, so that nothing
// cancels where a mean is large (T. Chan et al., 1979, for adding them up).
#include <algorithm>
#include <bit>
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

constexpr int kWarpRows = 4, kDown = 8, kAcross = 2;  // warps of a block: one below another, and side by side
constexpr int kRows = kDown * kWarpRows, kThreads = kDown * kAcross * 32;
constexpr int kChunk = 32 * kPackSize;  // columns of a warp, side by side
template <class T>
constexpr int kMostChunks = sizeof(T) == 2 ? 4 : 2;  // of a part: 64 registers hold a warp's rows of them
constexpr int kMostBlocks = 16;                      // of a cluster on Hopper

struct Moments {
  float mean, squares;  // of some elements of a row: the sum of (x - mean)^2
};
using PartMoments = Moments[kRows];

// How the columns are shared out, and a block's shared memory.
struct Share {
  int blocks;  // of a cluster, kAcross parts each
  int width;   // columns of a part, a multiple of kAlignment
  int chunks;  // of them, in whole ones
  int pieces, step, padded_cols;
  int64_t padded_rows;

  __host__ __device__ int parts() const { return blocks * kAcross; }
  __host__ __device__ int held_cols() const { return kAcross * chunks * kChunk; }  // of a block
  template <class T>
  __host__ __device__ int piece_bytes() const {
    return kRows * held_cols() * static_cast<int>(sizeof(T));
  }
  __host__ __device__ int codes_bytes() const { return kRows * held_cols(); }  // of the transpose
  template <class T>
  int shared_bytes() const {
    return piece_bytes<T>() + codes_bytes() + 2 * held_cols() * static_cast<int>(sizeof(float)) +
           2 * parts() * static_cast<int>(sizeof(PartMoments));
  }
};

// |x| included; NaN stays.
__device__ inline float larger(float seen, float x) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(seen), "f"(fabsf(x)));
  return larger;
}

// Of a warp's sums of 4 rows a lane gets that of row lane / 8, the same bits in each of 8 lanes.
__device__ inline float sum_of_row(const float (&sums)[kWarpRows], int lane) {
  const bool high = lane & 16, odd = lane & 8;
  const float first = (high ? sums[2] : sums[0]) + __shfl_xor_sync(0xFFFFFFFF, high ? sums[0] : sums[2], 16);
  const float second = (high ? sums[3] : sums[1]) + __shfl_xor_sync(0xFFFFFFFF, high ? sums[1] : sums[3], 16);
  return sum_of_lanes<8>((odd ? second : first) + __shfl_xor_sync(0xFFFFFFFF, odd ? first : second, 8));
}

// The transpose in shared memory: a column is kDown words of 4 rows. Lane l of a warp has 8 columns, which are in the
// order of j ^ l % 4, and the words of each in that of word ^ l / 4: so the 32 lanes, which write one word of 32
// columns, find each in a bank of its own, and a column's units of 16 bytes stay together.
constexpr int kColumnBytes = kDown * 4;
static_assert(kDown == 8, "8 words and 4 columns fill the banks");
__device__ inline int place_of_lane(int lane, int down) {
  return lane * kPackSize * kColumnBytes + lane % 4 * kColumnBytes + (down ^ lane / 4) * 4;
}
__device__ inline int place_of_column(int of_lane, int chunk, int j) {
  return (of_lane ^ j * kColumnBytes) + chunk * kChunk * kColumnBytes;
}

__device__ inline void stage(uint8_t* columns, int of_lane, int chunk, const uint2 (&codes)[kWarpRows]) {
  uint32_t words[4];
  const auto put = [&](int j, uint32_t word) {
    *reinterpret_cast<uint32_t*>(columns + place_of_column(of_lane, chunk, j)) = word;
  };
  transpose4x4({codes[0].x, codes[1].x, codes[2].x, codes[3].x}, words);
#pragma unroll
  for (int j = 0; j < 4; ++j) put(j, words[j]);
  transpose4x4({codes[0].y, codes[1].y, codes[2].y, codes[3].y}, words);
#pragma unroll
  for (int j = 0; j < 4; ++j) put(4 + j, words[j]);
}

template <class T, bool kLayerNorm, bool kWantsY>
__global__ void __launch_bounds__(kThreads, 1)
    norm_kernel(__grid_constant__ const NormArgs args, __grid_constant__ const Share share) {
  extern __shared__ __align__(1024) uint8_t dynamic[];
  __shared__ alignas(8) uint64_t full[kDown * kAcross], told[2][kDown * kAcross];  // the warp's rows are here, moments
  __shared__ uint32_t of_warp[kDown * kAcross];
  const int blocks = share.blocks, width = share.width, chunks = share.chunks, parts = share.parts();
  uint8_t* const columns = dynamic + share.piece_bytes<T>();
  float* const gain = reinterpret_cast<float*>(columns + share.codes_bytes());
  float* const bias = gain + share.held_cols();
  auto* const moments = reinterpret_cast<PartMoments*>(bias + share.held_cols());  // of all parts, for two pieces
  const Matrix& x = args.cast.x;
  const int warp =
      __shfl_sync(0xFFFFFFFF, static_cast<int>(threadIdx.x) / 32, 0);  // which the compiler then knows to be uniform
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int down = warp % kDown, across = warp / kDown;
  const int rank = static_cast<int>(blockIdx.x) % blocks, cols = static_cast<int>(x.cols);
  const auto cols_of = [&](int part) { return max(0, min(width, cols - part * width)); };
  const int part = rank * kAcross + across, first_col = part * width, cols_here = cols_of(part);
  const int first_chunk = across * chunks, lane_col = lane * kPackSize;
  const int pieces = share.pieces, step = share.step;
  const int64_t padded_rows = share.padded_rows;
  const int padded_cols = share.padded_cols;
  const int padded_here = max(0, min(width, padded_cols - first_col));
  const int of_lane = place_of_lane(lane, down);
  const uint32_t full_here = shared_address(&full[warp]);
  // This warp's rows in shared memory, from this lane's first pack on.
  const auto* const packs = reinterpret_cast<const Words<T>*>(dynamic) + warp * kWarpRows * chunks * 32 + lane;
  const auto row_of = [&](int piece) { return int64_t{piece} * kRows + down * kWarpRows; };
  const auto rows_from = [&](int64_t row) {
    return static_cast<int>(max(int64_t{0}, min(int64_t{kWarpRows}, x.rows - row)));
  };
  if (lane == 0) {
    init_barrier(full_here, 1);
    for (auto& of_warps : told) init_barrier(shared_address(&of_warps[warp]), 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();
  begin_dependent();
  // Asked for before x: behind all of its bytes they would come late.
  constexpr int kOfThread = kMostChunks<T> * kChunk * kAcross / kThreads;
  const auto column_of = [&](int n) {  // of what this thread brings; -1: there is none
    const int held_col = static_cast<int>(threadIdx.x) + n * kThreads;
    const int of = rank * kAcross + held_col / (chunks * kChunk), of_part = held_col % (chunks * kChunk);
    return held_col < share.held_cols() && of_part < cols_of(of) ? of * width + of_part : -1;
  };
  uint32_t gain_bits[kOfThread], bias_bits[kOfThread];
#pragma unroll
  for (int n = 0; n < kOfThread; ++n) {
    const int col = column_of(n);
    gain_bits[n] = col >= 0 && args.gain.data ? parameter_bits<T>(args.gain, col) : 0;
    bias_bits[n] = col >= 0 && args.bias.data ? parameter_bits<T>(args.bias, col) : 0;
  }

  const auto fetch_rows = [&](int piece) {
    const int64_t row = row_of(piece);
    const int rows = rows_from(row), bytes = cols_here * static_cast<int>(sizeof(T));
    if (rows == 0 || bytes == 0) return;
    if (lane == 0) expect_bytes(full_here, rows * bytes);
    __syncwarp();
    if (lane >= rows) return;
    fetch(shared_address(packs - lane + lane * chunks * 32),
          static_cast<const T*>(x.data) + (row + lane) * x.row_stride + first_col, bytes, full_here);
  };
  Words<T> held[kMostChunks<T>][kWarpRows];  // of the warp's rows, what this lane has
  // To where its sum with x will be.
  const auto load_residual = [&](int piece, int c) {
    const int64_t row = row_of(piece);
    const int rows = rows_from(row), col = lane_col + c * kChunk;
    if (col >= cols_here) return;
    const T* const from = static_cast<const T*>(args.residual.data) + row * args.residual.row_stride + first_col + col;
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      if (i < rows) held[c][i] = *reinterpret_cast<const Words<T>*>(from + i * args.residual.row_stride);
    }
  };
  int piece = static_cast<int>(blockIdx.x) / blocks;
  fetch_rows(piece);
  if (args.residual.data) {
#pragma unroll
    for (int c = 0; c < kMostChunks<T>; ++c) load_residual(piece, c);
  }
#pragma unroll
  for (int n = 0; n < kOfThread; ++n) {
    const int held_col = static_cast<int>(threadIdx.x) + n * kThreads;
    if (held_col >= share.held_cols()) continue;
    const float factor = args.gain.data ? parameter_of<T>(args.gain, gain_bits[n]) + args.gain_offset : 1.0f;
    gain[held_col] = column_of(n) >= 0 ? factor : 0.0f;
    bias[held_col] = parameter_of<T>(args.bias, bias_bits[n]);
  }
  const float scale = args.cast.slot ? args.cast.slot->scale : 1.0f;
  // What was written is there, and so are the other blocks.
  blocks > 1 ? synchronize_cluster() : __syncthreads();

  constexpr int kPartThreads = kDown * 32;
  const auto synchronize_part = [&] {
    asm volatile("bar.sync %0, %1;" ::"r"(across + 1), "n"(kPartThreads) : "memory");
  };
  // The staged transpose of a piece to memory: two threads for a column, 16 rows each.
  const auto store_transposed = [&](int piece) {
    constexpr int kUnits = kRows / 16, kColumns = kPartThreads / kUnits;  // units of 16 bytes; columns at a time
    const int unit = lane % kUnits, first = down * (32 / kUnits) + lane / kUnits;
    const int64_t row = int64_t{piece} * kRows + unit * 16;
    if (row >= padded_rows) return;
#pragma unroll
    for (int begin = 0; begin < kChunk; begin += kColumns) {
      const int col = begin + first, of = col / kPackSize, turn = of / 4;
      const uint8_t* const from =
          columns + place_of_column(place_of_lane(of, 0) & ~31, first_chunk, col % kPackSize) + (unit ^ turn / 4) * 16;
      uint8_t* const to = args.cast.q_t + (first_col + col) * padded_rows + row;
#pragma unroll
      for (int c = 0; c < kMostChunks<T>; ++c) {
        if (c * kChunk + col >= padded_here) continue;
        uint4 v = *reinterpret_cast<const uint4*>(from + c * kChunk * kColumnBytes);
        if (turn & 1) v = make_uint4(v.y, v.x, v.w, v.z);
        if (turn & 2) v = make_uint4(v.z, v.w, v.x, v.y);
        *reinterpret_cast<uint4*>(to + c * kChunk * padded_rows) = v;
      }
    }
  };

  float seen = 0;
  bool staged = false;
  for (int parity = 0, turn = 0; piece < pieces; piece += step, turn ^= parity, parity ^= 1) {
    const int64_t row = row_of(piece);
    const int rows_left = rows_from(row);
    // This lane's first pack of the first row, in memory where rows are so far apart.
    const auto in_memory = [&](const void* data, int64_t row_stride) {
      return const_cast<T*>(static_cast<const T*>(data)) + row * row_stride + first_col + lane_col;
    };
    if (rows_left > 0 && cols_here > 0) wait(full_here, parity);
#pragma unroll
    for (int c = 0; c < kMostChunks<T>; ++c) {
      if (c >= chunks) continue;
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i) {
        const Words<T> fetched = packs[(i * chunks + c) * 32];
        if (!args.residual.data) {
          held[c][i] = fetched;
          continue;
        }
        float terms[kPackSize], others[kPackSize];
        unpack(fetched, terms);
        unpack(held[c][i], others);
#pragma unroll
        for (int j = 0; j < kPackSize; ++j) terms[j] += others[j];
        held[c][i] = words_of<T>(terms);
      }
    }
    __syncwarp();
    if (piece + step < pieces) fetch_rows(piece + step);
    if (args.sum) {
#pragma unroll
      for (int c = 0; c < kMostChunks<T>; ++c) {
        if (lane_col + c * kChunk >= cols_here) continue;
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i) {
          if (i < rows_left) store_whole(in_memory(args.sum, cols) + i * cols + c * kChunk, held[c][i]);
        }
      }
    }
    // Of rows behind the last, these are sums of whatever lies there; nobody reads them.
    const auto for_elements = [&](int end, const auto& use) {
#pragma unroll
      for (int c = 0; c < end; ++c) {
        if (lane_col + c * kChunk >= cols_here) continue;
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i) {
          float elements[kPackSize];
          unpack(held[c][i], elements);
#pragma unroll
          for (int j = 0; j < kPackSize; ++j) use(i, elements[j]);
        }
      }
    };
    // Of row lane / 8. The distances of all elements are taken from the mean of the first kChunk: that is near enough
    // to the mean for nothing to cancel, for where it is far the first elements alone make the deviation as large.
    Moments m{};
    float squares[kWarpRows] = {};
    if constexpr (kLayerNorm) {
      const float count = static_cast<float>(cols_here), per_col = cols_here > 0 ? 1.0f / count : 0.0f;
      const float per_first = 1.0f / static_cast<float>(max(1, min(kChunk, cols_here)));
      float sums[kWarpRows] = {}, origin[kWarpRows], rest[kWarpRows] = {};
      for_elements(1, [&](int i, float x) { sums[i] += x; });
      m.mean = sum_of_row(sums, lane) * per_first;
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i) origin[i] = __shfl_sync(0xFFFFFFFF, m.mean, 8 * i);
      for_elements(kMostChunks<T>, [&](int i, float x) {
        const float distance = x - origin[i];
        rest[i] += distance, squares[i] += distance * distance;
      });
      const float off = sum_of_row(rest, lane) * per_col;
      m.mean += off;
      m.squares = sum_of_row(squares, lane) - count * off * off;
      if (m.squares < 0) m.squares = 0;
    } else {
      for_elements(kMostChunks<T>, [&](int i, float x) { squares[i] += x * x; });
      m.squares = sum_of_row(squares, lane);
    }
    // To the warps of the same rows, those of this block among them: 8 lanes for a row, each for every eighth part. The
    // barrier that counts these words is all that a warp waits for: one of the whole cluster would wait for every store
    // to memory as well. There are two in turn, as a warp may be one piece ahead of another.
    PartMoments* const of_parts = moments + parity * parts;
    const uint32_t told_here = shared_address(&told[parity][warp]);
    const int of_row = down * kWarpRows + lane / 8;
    if (lane == 0) expect_bytes(told_here, parts * kWarpRows * static_cast<int>(sizeof(Moments)));
    for (int to = lane % 8; to < parts; to += 8) {
      // The parts of a block read one copy, which is written for each of them.
      const int other = to % kAcross * kDown + down;
      send_to(to / kAcross, shared_address(&of_parts[part][of_row]), m.mean, m.squares,
              shared_address(&told[parity][other]));
    }
    __syncwarp();
    // The piece before goes to memory while the moments are on their way.
    if (args.cast.q_t && staged) {
      synchronize_part();
      store_transposed(piece - step);
    }
    wait(told_here, turn);
    const float origin = kLayerNorm ? of_parts[0][of_row].mean : 0.0f;
    float offsets = 0;
    m = {};
    if constexpr (kLayerNorm) {
      for (int of = lane % 8; of < parts; of += 8) {
        offsets += static_cast<float>(cols_of(of)) * (of_parts[of][of_row].mean - origin);
      }
      m.mean = origin + sum_of_lanes<8>(offsets) / static_cast<float>(cols);
    }
    for (int of = lane % 8; of < parts; of += 8) {
      const Moments other = of_parts[of][of_row];
      const float distance = other.mean - m.mean;
      m.squares += other.squares + (kLayerNorm ? static_cast<float>(cols_of(of)) * distance * distance : 0.0f);
    }
    const float deviation = reciprocal_deviation(sum_of_lanes<8>(m.squares), cols, args.eps);
    if (part == 0 && lane % 8 == 0 && lane / 8 < rows_left) {
      store_stats(args.stats, kLayerNorm, x.rows, row + lane / 8, m.mean, deviation);
    }
    float mean[kWarpRows], rstd[kWarpRows];
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      mean[i] = __shfl_sync(0xFFFFFFFF, m.mean, 8 * i), rstd[i] = __shfl_sync(0xFFFFFFFF, deviation, 8 * i);
    }
    const auto normal = [&](int i, float x) { return kLayerNorm ? normalised(x, mean[i], rstd[i]) : x * rstd[i]; };
    if (args.cast.q_t && staged) synchronize_part();  // the piece before has left
    staged = true;
    uint32_t marked = 0;  // chunks with something that is not finite
#pragma unroll
    for (int c = 0; c < kMostChunks<T>; ++c) {
      const int col = lane_col + c * kChunk, held_col = lane_col + (first_chunk + c) * kChunk;
      if (c >= chunks) continue;
      const bool whole = rows_left == kWarpRows && (c + 1) * kChunk <= cols_here;
      const auto inside = [&](int i) { return i < rows_left && col < cols_here; };
      float g[kPackSize], b[kPackSize] = {};
      load_floats(gain + held_col, g);
      if constexpr (kLayerNorm) load_floats(bias + held_col, b);
      uint2 codes[kWarpRows];
      float largest = 0;
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i) {
        float y[kPackSize], of_pairs[kPackSize / 2];
        unpack(held[c][i], y);
#pragma unroll
        for (int j = 0; j < kPackSize; ++j) y[j] = normal(i, y[j]) * g[j] + b[j];
#pragma unroll
        for (int j = 0; j < kPackSize / 2; ++j) of_pairs[j] = larger(fabsf(y[2 * j]), y[2 * j + 1]);
        float of_row = larger(larger(of_pairs[0], of_pairs[1]), larger(of_pairs[2], of_pairs[3]));
        codes[i] = encode8<Format::kE4M3>(y, scale);
        if (!whole) {
          if (!inside(i)) codes[i] = {}, of_row = 0;
        }
        largest = larger(largest, of_row);
        if (kWantsY && inside(i)) store_whole(in_memory(args.y, cols) + i * cols + c * kChunk, words_of<T>(y));
      }
      if (args.cast.q_t) stage(columns, of_lane, first_chunk + c, codes);
      seen = larger(seen, largest);
      if (!is_finite(largest)) marked |= 1u << c;
      if (args.residual.data && piece + step < pieces) load_residual(piece + step, c);
      if (args.cast.q && col < padded_here && row < padded_rows) {
        uint8_t* const q = args.cast.q + row * padded_cols + first_col + col;
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i) *reinterpret_cast<uint2*>(q + i * padded_cols) = codes[i];
      }
    }
    // The conversion has saturated Inf, which must become NaN. x is read again, by few: in registers it could not be
    // found by a number.
    if (marked) [[unlikely]] {
#pragma unroll 1
      for (int c = 0; c < chunks; ++c) {
        if (!(marked >> c & 1)) continue;
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i) {
          const bool added = args.residual.data;
          const int64_t stride = added ? cols : x.row_stride;
          const T* const again = in_memory(added ? args.sum : x.data, stride) + i * stride + c * kChunk;
#pragma unroll 1
          for (int j = 0; j < kPackSize && i < rows_left; ++j) {
            const int col = lane_col + c * kChunk + j, held_col = first_chunk * kChunk + col;
            if (col >= cols_here) break;
            const float y = normal(i, to_float(again[j])) * gain[held_col] + bias[held_col];
            if (raw_magnitude(y) != kInfinity) continue;
            if (args.cast.q) args.cast.q[(row + i) * padded_cols + first_col + col] = kNaNCode;
            if (args.cast.q_t) columns[place_of_column(of_lane, first_chunk + c, j) + i] = kNaNCode;
          }
        }
      }
    }
  }
  if (args.cast.q_t && staged) {
    synchronize_part();
    store_transposed(piece - step);
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

constexpr int kMostShared = 226 * 1024;  // of a block

template <class T>
void launch_typed(const NormArgs& args, cudaStream_t stream) {
  constexpr int kOfBlock = kAcross * kMostChunks<T> * kChunk;  // columns, at most
  const Matrix& x = args.cast.x;
  const bool vectorised = is_vectorised(x) && (!args.residual.data || is_vectorised(args.residual));
  if (!vectorised || x.cols % kPackSize != 0 || x.cols > kMostBlocks * kOfBlock ||
      (args.bias.data && !args.layer_norm)) {
    return launch_norm_any(args, stream);
  }
  const auto cols = static_cast<int>(padded(x.cols));
  // A power of two: so few multiprocessors of a GPC, which has 16 or 18, stay idle.
  const auto blocks = static_cast<int>(std::bit_ceil(blocks_for(cols, kOfBlock)));
  const auto width = static_cast<int>(padded(blocks_for(cols, blocks * kAcross)));
  const auto pieces = static_cast<int>(blocks_for(x.rows, kRows));
  Share share{blocks, width, (width + kChunk - 1) / kChunk, pieces, 0, cols, padded(x.rows)};
  const auto kernel = args.layer_norm ? args.y ? norm_kernel<T, true, true> : norm_kernel<T, true, false>
                      : args.y ? norm_kernel<T, false, true>
                                      : norm_kernel<T, false, false>;
  allow_shared(kernel, kMostShared);
  if (blocks > 8) allow_large_cluster(kernel);
  Grid grid{0, kThreads, share.shared_bytes<T>(), blocks};
  grid.blocks = static_cast<uint32_t>(blocks);
  const int clusters = resident_clusters(kernel, grid);
  if (clusters == 0) return launch_norm_any(args, stream);
  share.step = std::min(clusters, pieces);
  grid.blocks *= static_cast<uint32_t>(share.step);
  launch(kernel, grid, stream, args, share);
}

void launch_norm(const NormArgs& args, cudaStream_t stream) {
  with_type(args.cast.x.type, [&](auto t) { launch_typed<decltype(t)>(args, stream); });
}

[[maybe_unused]] const bool filled = fill<launch_norm>(cuda_kernels().norm);

}  // namespace
}  // namespace torch_fp8::cuda
