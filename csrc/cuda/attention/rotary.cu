// The norm of each head and rotary positions, of q and k in one launch. A group of lanes holds a head, a lane kPairs of
// its pairs: of each the two elements that turn together, so that nothing but the norm's sums crosses lanes.
#include <bit>

#include "cuda/common/block.cuh"

namespace torch_fp8::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kPairs = 8;                                                       // of a lane: two packs
constexpr int kPersistent = static_cast<int>(kRotaryParts / kMultiprocessors);  // blocks of a multiprocessor
static_assert(kPairs == kPackSize && kRotaryDims == 2 * 32 * kPairs, "a head fits a warp");

struct Pairs {
  float first[kPairs], second[kPairs];
};

// How a launch is divided: blocks behind q_blocks are k's.
struct Division {
  uint32_t q_blocks, blocks, lanes;  // lanes of a head, a power of two
};

template <class T>
__device__ void load_pack(const T* data, float (&values)[kPackSize]) {
  const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(data);
#pragma unroll
  for (int j = 0; j < kPackSize; ++j) values[j] = to_float(pack.values[j]);
}

__device__ void load_pack(const void* data, Type type, int64_t at, float (&values)[kPackSize]) {
  switch (type) {
    case Type::kFloat16: return load_pack(static_cast<const __half*>(data) + at, values);
    case Type::kBFloat16: return load_pack(static_cast<const __nv_bfloat16*>(data) + at, values);
    default: return load_pack(static_cast<const float*>(data) + at, values);
  }
}

__device__ float element(const void* data, Type type, int64_t at) {
  switch (type) {
    case Type::kFloat16: return to_float(static_cast<const __half*>(data)[at]);
    case Type::kBFloat16: return to_float(static_cast<const __nv_bfloat16*>(data)[at]);
    default: return static_cast<const float*>(data)[at];
  }
}

// The pairs of one lane, the same in each head. kPacked: they are neighbours, and their elements two whole packs.
template <bool kPacked, bool kInterleaved>
struct Lane {
  const RotaryArgs& args;
  int lane;

  __device__ int pair(int j) const { return kPacked ? lane * kPairs + j : lane + 32 * j; }
  __device__ bool exists(int j) const { return pair(j) < static_cast<int>(args.dims / 2); }
  __device__ bool turns(int j) const { return pair(j) < static_cast<int>(args.rotary_dims / 2); }
  // Elements that are not turned are paired in the same manner.
  __device__ int2 elements(int pair) const {
    if (kPacked ? kInterleaved : args.interleaved) return {2 * pair, 2 * pair + 1};
    const int turned = static_cast<int>(args.rotary_dims / 2);
    if (pair < turned) return {pair, pair + turned};
    return {pair + turned, pair + static_cast<int>(args.dims / 2)};
  }

  template <class Load>
  __device__ Pairs loaded(const Load& load_at, bool active) const {
    Pairs x{};
    if (!active || !exists(0)) return x;
    if constexpr (kPacked) {
      const int first = elements(pair(0)).x, second = kInterleaved ? first + kPackSize : elements(pair(0)).y;
      float low[kPackSize], high[kPackSize];
      load_at(first, low), load_at(second, high);
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        const float* const half = j < kPairs / 2 ? low : high;
        x.first[j] = kInterleaved ? half[2 * j % kPairs] : low[j];
        x.second[j] = kInterleaved ? half[2 * j % kPairs + 1] : high[j];
      }
    } else {
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        if (!exists(j)) continue;
        const int2 at = elements(pair(j));
        x.first[j] = load_at(at.x), x.second[j] = load_at(at.y);
      }
    }
    return x;
  }

  template <class T>
  __device__ Pairs load(const T* head, bool active) const {
    if constexpr (kPacked) {
      return loaded([&](int at, float (&values)[kPackSize]) { load_pack(head + at, values); }, active);
    } else {
      return loaded([&](int at) { return to_float(head[at]); }, active);
    }
  }
  __device__ Pairs load(const void* data, Type type) const {
    if constexpr (kPacked) {
      return loaded([&](int at, float (&values)[kPackSize]) { load_pack(data, type, at, values); }, true);
    } else {
      return loaded([&](int at) { return element(data, type, at); }, true);
    }
  }

  template <class T>
  __device__ void store(T* head, const Pairs& x) const {
    if (!exists(0)) return;
    if constexpr (kPacked) {
      Pack<T> low, high;
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        Pack<T>& half = j < kPairs / 2 ? low : high;
        (kInterleaved ? half.values[2 * j % kPairs] : low.values[j]) = static_cast<T>(x.first[j]);
        (kInterleaved ? half.values[2 * j % kPairs + 1] : high.values[j]) = static_cast<T>(x.second[j]);
      }
      const int first = elements(pair(0)).x, second = kInterleaved ? first + kPackSize : elements(pair(0)).y;
      store_whole(head + first, low), store_whole(head + second, high);
    } else {
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        if (!exists(j)) continue;
        const int2 at = elements(pair(j));
        head[at.x] = static_cast<T>(x.first[j]), head[at.y] = static_cast<T>(x.second[j]);
      }
    }
  }

  // cos as first, sin as second; of pairs that turn.
  __device__ Pairs angles(int64_t row, bool packed) const {
    Pairs angles{};
    if (!turns(0)) return angles;
    const int64_t step = args.table_pair_stride;
    if (kPacked && packed) {
      load_pack(args.cos, args.table_type, row + pair(0), angles.first);
      load_pack(args.sin, args.table_type, row + pair(0), angles.second);
      return angles;
    }
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      if (!turns(j)) continue;
      angles.first[j] = element(args.cos, args.table_type, row + pair(j) * step);
      angles.second[j] = element(args.sin, args.table_type, row + pair(j) * step);
    }
    return angles;
  }
  // sign -1 turns back by the same angles: the transposed map.
  __device__ void turn(Pairs& x, const Pairs& angles, float sign) const {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      if (!turns(j)) continue;
      const float c = angles.first[j], s = sign * angles.second[j], x1 = x.first[j], x2 = x.second[j];
      x.first[j] = x1 * c - x2 * s;
      x.second[j] = x2 * c + x1 * s;
    }
  }
};

// Both elements of each pair.
template <class Function>
__device__ void for_each(Function&& function) {
#pragma unroll
  for (int j = 0; j < kPairs; ++j) function(&Pairs::first, j), function(&Pairs::second, j);
}

__device__ float sum_of_group(float value, uint32_t lanes) {
  for (uint32_t distance = lanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFF, value, distance);
  }
  return value;
}

// The factors behind an RMS norm; with tanh the one before it is in args.
template <RotaryNorm kNorm, class Lane>
__device__ Pairs gain_of(const RotaryArgs& args, const RotarySide& side, const Lane& lane) {
  Pairs gain;
  for_each([&](auto part, int j) { (gain.*part)[j] = 1.0f; });
  if (kNorm != RotaryNorm::kRms || !side.gain) return gain;
  gain = lane.load(side.gain, side.gain_type);
  for_each([&](auto part, int j) { (gain.*part)[j] += args.gain_offset; });
  return gain;
}

// The heads of one block, one of each group at a time.
struct Work {
  const RotaryArgs& args;
  const RotarySide& side;
  uint32_t lanes, block, blocks;

  __device__ Work(const RotaryArgs& args, const Division& division)
      : args(args),
        side(blockIdx.x < division.q_blocks ? args.q : args.k),
        lanes(division.lanes),
        block(blockIdx.x < division.q_blocks ? blockIdx.x : blockIdx.x - division.q_blocks),
        blocks(blockIdx.x < division.q_blocks ? division.q_blocks : division.blocks - division.q_blocks) {}

  struct Head {
    uint32_t index, batch, token, head;
    bool exists;

    __device__ int64_t of(const Heads& x) const {
      return batch * x.batch_stride + token * x.token_stride + head * x.head_stride;
    }
  };

  // All lanes of a block call the function equally often, also where there is no head for them.
  template <class Function>
  __device__ void for_heads(Function&& function) const {
    const auto heads = static_cast<uint32_t>(side.heads), tokens = static_cast<uint32_t>(args.tokens);
    const uint32_t count = static_cast<uint32_t>(args.batch) * tokens * heads, together = kThreads / lanes;
    const uint32_t group = threadIdx.x / lanes;
    for (uint32_t first = block * together; first < count; first += blocks * together) {
      const uint32_t index = min(first + group, count - 1), row = index / heads;
      function(Head{index, row / tokens, row % tokens, index % heads, first + group < count});
    }
  }
  __device__ int64_t table_row(const Head& head) const {
    return head.batch * args.table_batch_stride + head.token * args.table_token_stride;
  }
};

template <class T, RotaryNorm kNorm, bool kPacked, bool kInterleaved>
__global__ void __launch_bounds__(kThreads, 4)
    rotary_kernel(__grid_constant__ const RotaryArgs args, const Division division, bool packed_tables) {
  const Work work(args, division);
  const Lane<kPacked, kInterleaved> lane{args, static_cast<int>(threadIdx.x % division.lanes)};
  begin_dependent();
  work.for_heads([&](const Work::Head& head) {
    Pairs x = lane.load(static_cast<const T*>(work.side.x.data) + head.of(work.side.x), head.exists);
    const Pairs angles = lane.angles(work.table_row(head), packed_tables);
    if constexpr (kNorm == RotaryNorm::kRms) {
      const Pairs gain = gain_of<kNorm>(args, work.side, lane);
      float squares = 0;
      for_each([&](auto part, int j) { squares += (x.*part)[j] * (x.*part)[j]; });
      const float rstd = rsqrtf(sum_of_group(squares, work.lanes) / static_cast<float>(args.dims) + args.eps);
      for_each([&](auto part, int j) { (x.*part)[j] *= rstd * (gain.*part)[j]; });
    } else if constexpr (kNorm == RotaryNorm::kTanh) {
      const float factor = element(work.side.gain, work.side.gain_type, 0);
      for_each([&](auto part, int j) { (x.*part)[j] = tanhf(factor * (x.*part)[j]); });
    }
    lane.turn(x, angles, 1.0f);
    if (head.exists) lane.store(static_cast<T*>(work.side.out) + head.index * args.dims, x);
  });
}

// The block's sums, in an order that never changes, to its row of parts: of each element or, with tanh, of all.
template <RotaryNorm kNorm, class Lane>
__device__ void store_sums(const RotaryArgs& args, const Lane& lane, uint32_t lanes, const Pairs& sums) {
  __shared__ float staged[kNorm == RotaryNorm::kTanh ? kWarps : kThreads * 2 * kPairs];
  if constexpr (kNorm == RotaryNorm::kTanh) {
    float sum = 0;
    for_each([&](auto part, int j) { sum += (sums.*part)[j]; });
    sum = sum_of_group(sum, 32);
    if (threadIdx.x % 32 == 0) staged[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int warp = 1; warp < kWarps; ++warp) sum += staged[warp];
    args.parts[blockIdx.x] = sum;
  } else {
    const int dims = static_cast<int>(args.dims), groups = static_cast<int>(kThreads / lanes);
    float* const row = staged + threadIdx.x / lanes * dims;
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      if (!lane.exists(j)) continue;
      // Interleaved packs hold their pairs in order, as elements() has them.
      const int2 at = lane.elements(lane.pair(j));
      row[at.x] = sums.first[j], row[at.y] = sums.second[j];
    }
    __syncthreads();
    for (int column = static_cast<int>(threadIdx.x); column < dims; column += kThreads) {
      float sum = 0;
      for (int group = 0; group < groups; ++group) sum += staged[group * dims + column];
      args.parts[blockIdx.x * dims + column] = sum;
    }
  }
}

template <class T, RotaryNorm kNorm, bool kPacked, bool kInterleaved>
__global__ void __launch_bounds__(kThreads, kNorm == RotaryNorm::kNone ? 4 : kPersistent)
    rotary_backward_kernel(__grid_constant__ const RotaryArgs args, const Division division, bool packed_tables) {
  const Work work(args, division);
  const Lane<kPacked, kInterleaved> lane{args, static_cast<int>(threadIdx.x % division.lanes)};
  begin_dependent();
  const Pairs gain = gain_of<kNorm>(args, work.side, lane);
  const float factor = kNorm == RotaryNorm::kTanh ? element(work.side.gain, work.side.gain_type, 0) : 0.0f;
  Pairs sums{};
  work.for_heads([&](const Work::Head& head) {
    Pairs d = lane.load(static_cast<const T*>(work.side.dy.data) + head.of(work.side.dy), head.exists);
    Pairs x;
    if constexpr (kNorm != RotaryNorm::kNone) {
      x = lane.load(static_cast<const T*>(work.side.x.data) + head.of(work.side.x), head.exists);
    }
    lane.turn(d, lane.angles(work.table_row(head), packed_tables), -1.0f);
    if constexpr (kNorm == RotaryNorm::kRms) {
      float squares = 0, dot = 0;
      for_each([&](auto part, int j) {
        squares += (x.*part)[j] * (x.*part)[j];
        dot += (d.*part)[j] * (gain.*part)[j] * (x.*part)[j];
      });
      const float size = static_cast<float>(args.dims);
      const float rstd = rsqrtf(sum_of_group(squares, work.lanes) / size + args.eps);
      const float mean = sum_of_group(dot, work.lanes) * rstd / size;
      for_each([&](auto part, int j) {
        const float normal = (x.*part)[j] * rstd;
        if (head.exists) (sums.*part)[j] += (d.*part)[j] * normal;
        (d.*part)[j] = rstd * ((d.*part)[j] * (gain.*part)[j] - normal * mean);
      });
    } else if constexpr (kNorm == RotaryNorm::kTanh) {
      for_each([&](auto part, int j) {
        const float t = tanhf(factor * (x.*part)[j]), slope = (d.*part)[j] * (1.0f - t * t);
        (sums.*part)[j] += slope * (x.*part)[j];
        (d.*part)[j] = slope * factor;
      });
    }
    if (head.exists) lane.store(static_cast<T*>(work.side.out) + head.index * args.dims, d);
  });
  if constexpr (kNorm != RotaryNorm::kNone) {
    if (args.parts) store_sums<kNorm>(args, lane, work.lanes, sums);
  }
}

// dgain of both sides: q's are the parts in front, k's those behind.
constexpr int kColumns = 32, kLines = 32, kInFlight = 8;
__global__ void __launch_bounds__(kColumns* kLines)
    gain_sums_kernel(__grid_constant__ const RotaryArgs args, const Division division, int cols) {
  __shared__ float of_line[kLines][kColumns];
  const bool of_q = blockIdx.x % 2 == 0;
  const RotarySide& side = of_q ? args.q : args.k;
  const uint32_t lane = threadIdx.x % kColumns, line = threadIdx.x / kColumns, col = blockIdx.x / 2 * kColumns + lane;
  const uint32_t begin = of_q ? 0 : division.q_blocks, end = of_q ? division.q_blocks : division.blocks;
  begin_dependent();
  if (!side.dgain) return;
  float sum = 0;
  if (static_cast<int>(col) < cols) {
    for (uint32_t row = begin + line; row < end; row += kLines * kInFlight) {
      float loaded[kInFlight];
#pragma unroll
      for (uint32_t i = 0; i < kInFlight; ++i) {
        loaded[i] = row + i * kLines < end ? args.parts[(row + i * kLines) * cols + col] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) sum += loaded[i];
    }
  }
  of_line[line][lane] = sum;
  __syncthreads();
  if (line != 0 || static_cast<int>(col) >= cols) return;
  for (int i = 1; i < kLines; ++i) sum += of_line[i][lane];
  switch (side.gain_type) {
    case Type::kFloat16: static_cast<__half*>(side.dgain)[col] = static_cast<__half>(sum); break;
    case Type::kBFloat16: static_cast<__nv_bfloat16*>(side.dgain)[col] = static_cast<__nv_bfloat16>(sum); break;
    default: static_cast<float*>(side.dgain)[col] = sum;
  }
}

bool is_packed(const Heads& x) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.batch_stride % kPackSize == 0 &&
         x.token_stride % kPackSize == 0 && x.head_stride % kPackSize == 0;
}

bool is_packed(const RotaryArgs& args) {
  bool packed = args.dims % (2 * kPackSize) == 0 && args.rotary_dims % (2 * kPackSize) == 0;
  for (const RotarySide* side : {&args.q, &args.k}) {
    packed = packed && is_packed(side->x) && is_packed(side->dy) && reinterpret_cast<uintptr_t>(side->gain) % 16 == 0;
  }
  return packed;
}

bool has_packed_tables(const RotaryArgs& args) {
  return args.table_pair_stride == 1 && args.table_token_stride % kPackSize == 0 &&
         args.table_batch_stride % kPackSize == 0 && reinterpret_cast<uintptr_t>(args.cos) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(args.sin) % 16 == 0;
}

// most: of blocks, or 0.
Division divide(const RotaryArgs& args, bool packed, uint32_t most) {
  const int64_t rows = args.batch * args.tokens, heads = args.q.heads + args.k.heads;
  blocks_for(rows * heads, 1);  // whose numbers have 31 bits
  const uint32_t lanes = packed ? std::bit_ceil(static_cast<uint32_t>(args.dims / (2 * kPairs))) : 32;
  const auto blocks_of = [&](const RotarySide& side) {
    const uint32_t needed = blocks_for(rows * side.heads, kThreads / lanes);
    if (most == 0 || needed == 0) return needed;
    const uint32_t share = static_cast<uint32_t>(most * side.heads / heads);
    return std::min(needed, std::max(share, 1u));
  };
  const uint32_t q_blocks = blocks_of(args.q);
  return {q_blocks, q_blocks + blocks_of(args.k), lanes};
}

template <class Function>
void with_norm(RotaryNorm norm, Function&& function) {
  switch (norm) {
    case RotaryNorm::kNone: return function(std::integral_constant<RotaryNorm, RotaryNorm::kNone>{});
    case RotaryNorm::kRms: return function(std::integral_constant<RotaryNorm, RotaryNorm::kRms>{});
    case RotaryNorm::kTanh: return function(std::integral_constant<RotaryNorm, RotaryNorm::kTanh>{});
  }
}

void launch_rotary(const RotaryArgs& args, cudaStream_t stream) {
  const bool packed = is_packed(args);
  const Division division = divide(args, packed, 0);
  if (division.blocks == 0) return;
  with_type(args.type, [&](auto t) {
    with_norm(args.norm, [&](auto norm) {
      using T = decltype(t);
      const auto kernel = !packed            ? rotary_kernel<T, norm(), false, false>
                          : args.interleaved ? rotary_kernel<T, norm(), true, true>
                                             : rotary_kernel<T, norm(), true, false>;
      launch(kernel, division.blocks, kThreads, stream, args, division, has_packed_tables(args));
    });
  });
}

void launch_rotary_backward(const RotaryArgs& args, cudaStream_t stream) {
  const bool packed = is_packed(args), sums = args.parts;
  const Division division = divide(args, packed, sums ? kRotaryParts : 0);
  if (division.blocks > 0) {
    with_type(args.type, [&](auto t) {
      with_norm(args.norm, [&](auto norm) {
        using T = decltype(t);
        const auto kernel = !packed            ? rotary_backward_kernel<T, norm(), false, false>
                            : args.interleaved ? rotary_backward_kernel<T, norm(), true, true>
                                               : rotary_backward_kernel<T, norm(), true, false>;
        launch(kernel, division.blocks, kThreads, stream, args, division, has_packed_tables(args));
      });
    });
  }
  if (!sums) return;
  const int cols = args.norm == RotaryNorm::kTanh ? 1 : static_cast<int>(args.dims);
  launch(gain_sums_kernel, 2 * blocks_for(cols, kColumns), kColumns * kLines, stream, args, division, cols);
}

[[maybe_unused]] const bool filled =
    fill<launch_rotary>(cuda_kernels().rotary) && fill<launch_rotary_backward>(cuda_kernels().rotary_backward);

}  // namespace
}  // namespace torch_fp8::cuda
