// The norm of each head and rotary positions, of q and k in one launch. A group of lanes holds a head, a lane kPairs of
// its pairs: of each the two elements that turn together, so that nothing but the norm's sums crosses lanes.
#include <bit>

#include "cuda/common/block.cuh"
#include "cuda/common/decode.cuh"

namespace torch_fp8::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kPairs = 8;  // of a lane: two packs
static_assert(kPairs == kPackSize && kRotaryDims == 2 * 32 * kPairs, "a head fits a warp");

// Blocks of a multiprocessor, at least. A block takes one head a group. Where it sums a gain's gradient it stays, and
// loads each head while the one before it is worked on.
constexpr int kStaying = static_cast<int>(kRotaryParts / kMultiprocessors);
template <RotaryNorm kNorm, bool kStays>
constexpr int kBlocks = kNorm == RotaryNorm::kNone ? 5
                        : kStays                   ? kStaying
                                                   : 3;

struct Pairs {
  float first[kPairs], second[kPairs];
};

// How a launch is divided: blocks behind q_blocks are k's.
struct Division {
  uint32_t q_blocks, blocks, lanes;  // lanes of a head, a power of two
  float per_dim;                     // 1 / dims
};

// Eight elements as they were loaded. All loads of a head are on their way before the first is waited for; a conversion
// by a type that is known only when it runs would wait inside of its branch.
struct Raw {
  uint32_t words[kPairs];  // one element each where they are spread, or as they lie in memory
};

template <class T>
constexpr Type kTypeOf = std::is_same_v<T, float>    ? Type::kFloat32
                         : std::is_same_v<T, __half> ? Type::kFloat16
                                                     : Type::kBFloat16;

__device__ __forceinline__ const char* address(const void* data, Type type, int64_t at) {
  return static_cast<const char*>(data) + at * (type == Type::kFloat32 ? 4 : 2);
}

__device__ __forceinline__ void load_words(uint32_t* words, const char* from) {
  const uint4 loaded = *reinterpret_cast<const uint4*>(from);
  words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
}

__device__ __forceinline__ Raw load_pack(const void* data, Type type, int64_t at) {
  Raw raw{};
  load_words(raw.words, address(data, type, at));
  if (type == Type::kFloat32) load_words(raw.words + 4, address(data, type, at + 4));
  return raw;
}

// Four elements and four others.
__device__ __forceinline__ Raw load_halves(const void* data, Type type, int64_t at, int64_t other) {
  Raw raw{};
  const char *const first = address(data, type, at), *const second = address(data, type, other);
  if (type == Type::kFloat32) {
    load_words(raw.words, first), load_words(raw.words + 4, second);
  } else {
    const uint2 low = *reinterpret_cast<const uint2*>(first), high = *reinterpret_cast<const uint2*>(second);
    raw.words[0] = low.x, raw.words[1] = low.y, raw.words[2] = high.x, raw.words[3] = high.y;
  }
  return raw;
}

__device__ __forceinline__ uint32_t load_bits(const void* data, Type type, int64_t at) {
  const char* const from = address(data, type, at);
  return type == Type::kFloat32 ? *reinterpret_cast<const uint32_t*>(from) : *reinterpret_cast<const uint16_t*>(from);
}

__device__ __forceinline__ float float_of(uint32_t bits, Type type) {
  if (type == Type::kFloat32) return __uint_as_float(bits);
  if (type == Type::kBFloat16) return __uint_as_float(bits << 16);
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// The branches by the type are around all eight: one for each element were a third of the instructions.
__device__ __forceinline__ void to_floats(const Raw& raw, Type type, bool spread, float (&values)[kPairs]) {
  if (type == Type::kFloat32) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) values[j] = __uint_as_float(raw.words[j]);
    return;
  }
  uint32_t pairs[kPairs / 2];
#pragma unroll
  for (int j = 0; j < kPairs; j += 2) {
    pairs[j / 2] = spread ? raw.words[j] | raw.words[j + 1] << 16 : raw.words[j / 2];
  }
  const auto convert = [&](auto t) {
#pragma unroll
    for (int j = 0; j < kPairs; j += 2) {
      const float2 pair = to_float2(pairs[j / 2], t);
      values[j] = pair.x, values[j + 1] = pair.y;
    }
  };
  type == Type::kBFloat16 ? convert(__nv_bfloat16{}) : convert(__half{});
}

__device__ float element(const void* data, Type type, int64_t at) { return float_of(load_bits(data, type, at), type); }

struct RawPairs {
  Raw first, second;  // of a lane whose pairs are packed: its two packs
};

// The pairs of one lane, the same in each head. kPacked: their elements are two whole packs.
template <bool kPacked, bool kInterleaved>
struct Lane {
  const RotaryArgs& args;
  int lane;

  __device__ int pair(int j) const {
    if (!kPacked) return lane + 32 * j;
    if (!kInterleaved) return lane * kPairs + j;
    return lane * (kPairs / 2) + j % (kPairs / 2) + (j < kPairs / 2 ? 0 : static_cast<int>(args.dims / 4));
  }
  // Alike for all pairs of a pack.
  __device__ int first_beside(int j) const { return !kPacked ? j : kInterleaved ? j / 4 * 4 : 0; }
  __device__ bool exists(int j) const {
    return kPacked ? lane < static_cast<int>(args.dims / (2 * kPairs)) : pair(j) < static_cast<int>(args.dims / 2);
  }
  __device__ bool turns(int j) const { return pair(first_beside(j)) < static_cast<int>(args.rotary_dims / 2); }
  // Elements that are not turned are paired in the same manner.
  __device__ int2 elements(int pair) const {
    if (kPacked ? kInterleaved : args.interleaved) return {2 * pair, 2 * pair + 1};
    const int turned = static_cast<int>(args.rotary_dims / 2);
    if (pair < turned) return {pair, pair + turned};
    return {pair + turned, pair + static_cast<int>(args.dims / 2)};
  }
  __device__ int2 packs() const {
    if (kInterleaved) return {2 * pair(0), 2 * pair(kPairs / 2)};
    return elements(pair(0));
  }

  __device__ __forceinline__ RawPairs load(const void* data, Type type, int64_t at) const {
    RawPairs raw{};
    if constexpr (kPacked) {
      if (!exists(0)) return raw;
      const int2 from = packs();
      return {load_pack(data, type, at + from.x), load_pack(data, type, at + from.y)};
    }
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      if (!exists(j)) continue;
      const int2 from = elements(pair(j));
      raw.first.words[j] = load_bits(data, type, at + from.x);
      raw.second.words[j] = load_bits(data, type, at + from.y);
    }
    return raw;
  }
  __device__ __forceinline__ Pairs pairs(const RawPairs& raw, Type type) const {
    Pairs x;
    if constexpr (kPacked && kInterleaved) {
      float low[kPairs], high[kPairs];
      to_floats(raw.first, type, false, low), to_floats(raw.second, type, false, high);
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        const float* const pack = j < kPairs / 2 ? low : high;
        x.first[j] = pack[2 * j % kPairs], x.second[j] = pack[2 * j % kPairs + 1];
      }
    } else {
      to_floats(raw.first, type, !kPacked, x.first), to_floats(raw.second, type, !kPacked, x.second);
    }
    return x;
  }

  template <class T>
  __device__ void store(T* head, const Pairs& x) const {
    if (!exists(0)) return;
    if constexpr (kPacked) {
      Pack<T> low, high;
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        Pack<T>& pack = j < kPairs / 2 ? low : high;
        (kInterleaved ? pack.values[2 * j % kPairs] : low.values[j]) = static_cast<T>(x.first[j]);
        (kInterleaved ? pack.values[2 * j % kPairs + 1] : high.values[j]) = static_cast<T>(x.second[j]);
      }
      const int2 to = packs();
      store_whole(head + to.x, low), store_whole(head + to.y, high);
    } else {
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        if (!exists(j)) continue;
        const int2 at = elements(pair(j));
        head[at.x] = static_cast<T>(x.first[j]), head[at.y] = static_cast<T>(x.second[j]);
      }
    }
  }

  // cos and sin of the pairs that turn. packed: columns are neighbours.
  __device__ __forceinline__ Raw load_table(const void* table, int64_t row, bool packed) const {
    Raw raw{};
    if (kPacked && packed) {
      if (!kInterleaved && turns(0)) raw = load_pack(table, args.table_type, row + pair(0));
      if (kInterleaved && turns(0)) {
        const int other = turns(kPairs / 2) ? pair(kPairs / 2) : pair(0);
        raw = load_halves(table, args.table_type, row + pair(0), row + other);
      }
      return raw;
    }
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      if (turns(j)) raw.words[j] = load_bits(table, args.table_type, row + pair(j) * args.table_pair_stride);
    }
    return raw;
  }
  __device__ __forceinline__ RawPairs load_angles(int64_t row, bool packed) const {
    return {load_table(args.cos, row, packed), load_table(args.sin, row, packed)};
  }
  // sign -1 turns back by the same angles: the transposed map.
  __device__ __forceinline__ void turn(Pairs& x, const RawPairs& angles, bool packed, float sign) const {
    float cos[kPairs], sin[kPairs];
    to_floats(angles.first, args.table_type, !(kPacked && packed), cos);
    to_floats(angles.second, args.table_type, !(kPacked && packed), sin);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const float c = cos[j], s = sign * sin[j], x1 = x.first[j], x2 = x.second[j];
      if (!turns(j)) continue;
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

// The factors behind an RMS norm; without a gain 1.
template <class Lane>
__device__ __forceinline__ Pairs gain_of(const RotaryArgs& args, const RotarySide& side, const Lane& lane,
                                         const RawPairs& raw) {
  Pairs gain = lane.pairs(raw, side.gain_type);
  for_each([&](auto part, int j) { (gain.*part)[j] = side.gain ? (gain.*part)[j] + args.gain_offset : 1.0f; });
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

  __device__ Head head_at(uint32_t first, uint32_t count) const {
    const auto heads = static_cast<uint32_t>(side.heads), tokens = static_cast<uint32_t>(args.tokens);
    const uint32_t found = first + threadIdx.x / lanes, index = min(found, count - 1), row = index / heads;
    return {index, row / tokens, row % tokens, index % heads, found < count};
  }
  // All lanes of a block call the functions equally often, also where there is no head for them. kAhead: the next head
  // is loaded before this one is used.
  template <bool kAhead, class Load, class Use>
  __device__ __forceinline__ void for_heads(const Load& load, const Use& use) const {
    const uint32_t count = static_cast<uint32_t>(args.batch * args.tokens * side.heads), together = kThreads / lanes;
    uint32_t first = block * together;
    if (first >= count) return;
    Head head = head_at(first, count);
    auto loaded = load(head);
    for (first += blocks * together; first < count; first += blocks * together) {
      const Head next = head_at(first, count);
      auto ahead = loaded;
      if constexpr (kAhead) ahead = load(next);
      use(head, loaded);
      if constexpr (!kAhead) ahead = load(next);
      head = next, loaded = ahead;
    }
    use(head, loaded);
  }
  __device__ int64_t table_row(const Head& head) const {
    return head.batch * args.table_batch_stride + head.token * args.table_token_stride;
  }
};

template <class T, RotaryNorm kNorm, bool kPacked, bool kInterleaved>
__global__ void __launch_bounds__(kThreads, kBlocks<kNorm, false>)
    rotary_kernel(__grid_constant__ const RotaryArgs args, const Division division, bool packed_tables) {
  const Work work(args, division);
  const Lane<kPacked, kInterleaved> lane{args, static_cast<int>(threadIdx.x % division.lanes)};
  begin_dependent();
  const float factor = kNorm == RotaryNorm::kTanh ? element(work.side.gain, work.side.gain_type, 0) : 0.0f;
  struct Loaded {
    RawPairs x, angles, gain;
  };
  const auto load = [&](const Work::Head& head) {
    Loaded loaded{lane.load(work.side.x.data, kTypeOf<T>, head.of(work.side.x)),
                  lane.load_angles(work.table_row(head), packed_tables),
                  {}};
    if (kNorm == RotaryNorm::kRms && work.side.gain) loaded.gain = lane.load(work.side.gain, work.side.gain_type, 0);
    return loaded;
  };
  work.for_heads<false>(load, [&](const Work::Head& head, const Loaded& loaded) {
    Pairs x = lane.pairs(loaded.x, kTypeOf<T>);
    if constexpr (kNorm == RotaryNorm::kRms) {
      float squares = 0;
      for_each([&](auto part, int j) { squares += (x.*part)[j] * (x.*part)[j]; });
      const float rstd = rsqrtf(sum_of_group(squares, work.lanes) * division.per_dim + args.eps);
      const Pairs gain = gain_of(args, work.side, lane, loaded.gain);
      for_each([&](auto part, int j) { (x.*part)[j] *= rstd * (gain.*part)[j]; });
    } else if constexpr (kNorm == RotaryNorm::kTanh) {
      for_each([&](auto part, int j) { (x.*part)[j] = tanhf(factor * (x.*part)[j]); });
    }
    lane.turn(x, loaded.angles, packed_tables, 1.0f);
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
__global__ void __launch_bounds__(kThreads, kBlocks<kNorm, true>)
    rotary_backward_kernel(__grid_constant__ const RotaryArgs args, const Division division, bool packed_tables) {
  const Work work(args, division);
  const Lane<kPacked, kInterleaved> lane{args, static_cast<int>(threadIdx.x % division.lanes)};
  begin_dependent();
  RawPairs raw_gain{};
  if (kNorm == RotaryNorm::kRms && work.side.gain) raw_gain = lane.load(work.side.gain, work.side.gain_type, 0);
  const Pairs gain = gain_of(args, work.side, lane, raw_gain);
  const float factor = kNorm == RotaryNorm::kTanh ? element(work.side.gain, work.side.gain_type, 0) : 0.0f;
  Pairs sums{};
  struct Loaded {
    RawPairs d, x, angles;
  };
  const auto load = [&](const Work::Head& head) {
    Loaded loaded{lane.load(work.side.dy.data, kTypeOf<T>, head.of(work.side.dy)),
                  {},
                  lane.load_angles(work.table_row(head), packed_tables)};
    if (kNorm != RotaryNorm::kNone) loaded.x = lane.load(work.side.x.data, kTypeOf<T>, head.of(work.side.x));
    return loaded;
  };
  work.for_heads<kNorm != RotaryNorm::kNone>(load, [&](const Work::Head& head, const Loaded& loaded) {
    Pairs d = lane.pairs(loaded.d, kTypeOf<T>);
    const Pairs x = lane.pairs(loaded.x, kTypeOf<T>);
    lane.turn(d, loaded.angles, packed_tables, -1.0f);
    if constexpr (kNorm == RotaryNorm::kRms) {
      float squares = 0, dot = 0;
      for_each([&](auto part, int j) {
        squares += (x.*part)[j] * (x.*part)[j];
        dot += (d.*part)[j] * (gain.*part)[j] * (x.*part)[j];
      });
      const float rstd = rsqrtf(sum_of_group(squares, work.lanes) * division.per_dim + args.eps);
      const float mean = sum_of_group(dot, work.lanes) * rstd * division.per_dim;
      for_each([&](auto part, int j) {
        const float normal = (x.*part)[j] * rstd;
        if (head.exists) (sums.*part)[j] += (d.*part)[j] * normal;
        (d.*part)[j] = rstd * ((d.*part)[j] * (gain.*part)[j] - normal * mean);
      });
    } else if constexpr (kNorm == RotaryNorm::kTanh) {
      for_each([&](auto part, int j) {
        const float t = tanhf(factor * (x.*part)[j]), slope = (d.*part)[j] * (1.0f - t * t);
        if (head.exists) (sums.*part)[j] += slope * (x.*part)[j];
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

Division divide(const RotaryArgs& args, bool packed, bool stays) {
  const int64_t rows = args.batch * args.tokens, heads = args.q.heads + args.k.heads;
  blocks_for(rows * heads, 1);  // whose numbers have 31 bits
  const uint32_t lanes = packed ? std::bit_ceil(static_cast<uint32_t>(args.dims / (2 * kPairs))) : 32;
  const auto blocks_of = [&](const RotarySide& side) {
    const uint32_t needed = blocks_for(rows * side.heads, kThreads / lanes);
    if (!stays || needed == 0) return needed;
    const uint32_t share = static_cast<uint32_t>(kRotaryParts * side.heads / heads);
    return std::min(needed, std::max(share, 1u));
  };
  const uint32_t q_blocks = blocks_of(args.q);
  return {q_blocks, q_blocks + blocks_of(args.k), lanes, 1.0f / static_cast<float>(args.dims)};
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
  const Division division = divide(args, packed, false);
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
  const Division division = divide(args, packed, args.norm != RotaryNorm::kNone);
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
