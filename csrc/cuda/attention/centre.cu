// Keys apart from what they have in common: one pass over their codes for the sums, one over those of keys and queries
// for the rest. Sums are whole numbers, so that they do not depend on the order in which blocks add to them.
#include "cuda/common/encode.cuh"

namespace torch_fp8::cuda {
namespace {

constexpr int kThreads = 256, kCodes = 16;  // threads of a block, neighbouring codes of a thread
constexpr int kTokens = 256;                // of a block
constexpr int kMostDims = kCodes * 16;

// Of a block: neighbouring threads hold the channels of a token, those behind the last channel nothing.
struct Place {
  int pack, row, rows;  // of the thread, and how many rows the block takes at a time
  bool has_codes;

  __device__ explicit Place(int64_t dims, int lanes)
      : pack(threadIdx.x % lanes), row(threadIdx.x / lanes), rows(kThreads / lanes), has_codes(pack * kCodes < dims) {}
};

// How many blocks take keys, and how many share a head.
struct Blocks {
  uint32_t of_keys, key_chunks, query_chunks;
};

// The power of two that holds a token's packs.
int lanes_for(int64_t dims) {
  int lanes = 1;
  while (lanes * kCodes < dims) lanes *= 2;
  return lanes;
}

__device__ void load_codes(float (&values)[kCodes], const uint8_t* codes) {
  union {
    uint4 whole;
    __nv_fp8x2_storage_t pairs[kCodes / 2];
  } loaded{__ldcg(reinterpret_cast<const uint4*>(codes))};
#pragma unroll
  for (int i = 0; i < kCodes / 2; ++i) {
    const float2 pair = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(loaded.pairs[i], __NV_E4M3)));
    values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
  }
}

// A block takes kTokens tokens of a head: the first blocks keys, the others queries.
struct Part {
  bool of_keys;
  int64_t tokens, heads, head, batch, kv_head, begin, end;  // head counts over all batches
  bool is_first;

  __device__ Part(const AttentionSize& size, const Blocks& blocks) : of_keys(blockIdx.x < blocks.of_keys) {
    const uint32_t block = of_keys ? blockIdx.x : blockIdx.x - blocks.of_keys,
                   chunks = of_keys ? blocks.key_chunks : blocks.query_chunks;
    tokens = of_keys ? size.kv_tokens : size.tokens, heads = of_keys ? size.kv_heads : size.heads;
    head = block / chunks, batch = head / heads, is_first = block % chunks == 0;
    kv_head = of_keys ? head : batch * size.kv_heads + head % heads / (size.heads / size.kv_heads);
    begin = int64_t{block % chunks} * kTokens, end = min(begin + kTokens, tokens);
  }
};

// Added over neighbouring lanes, which hold the channels of a row; all threads of a warp come here together.
__device__ float sum_of_row(float sum, int lanes) {
  for (int lane = lanes / 2; lane > 0; lane /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, lane);
  return sum;
}

// Sums of keys and of their squares, as whole numbers, and the longest query.
__global__ void __launch_bounds__(kThreads)
    sum_keys_kernel(__grid_constant__ const CentreArgs args, int lanes, Blocks blocks) {
  __shared__ int sums[kMostDims];
  __shared__ unsigned long long squares[kMostDims];
  __shared__ int longest;
  begin_dependent();
  const AttentionSize& size = args.size;
  const Place at(size.dims, lanes);
  const Part part(size, blocks);
  const int64_t step = part.heads * size.dims;
  const uint8_t* const codes = (part.of_keys ? args.k : args.q) + part.batch * part.tokens * step +
                               part.head % part.heads * size.dims + at.pack * kCodes;
  auto* const all = reinterpret_cast<unsigned long long*>(args.sums) + part.kv_head * (2 * size.dims + 1);
  // A thread's i-th channel is i * lanes + its pack here, so that neighbouring threads add to neighbouring words.
  for (int i = threadIdx.x; i < kMostDims; i += kThreads) sums[i] = 0, squares[i] = 0;
  if (threadIdx.x == 0) longest = 0;
  __syncthreads();
  if (part.of_keys) {
    if (at.has_codes) {
      int sum[kCodes]{};
      long long square[kCodes]{};
#pragma unroll 4
      for (int64_t t = part.begin + at.row; t < part.end; t += at.rows) {
        float values[kCodes];
        load_codes(values, codes + t * step);
#pragma unroll
        for (int i = 0; i < kCodes; ++i) {
          const int units = isnan(values[i]) ? 0 : static_cast<int>(values[i] * kCodeUnits);
          sum[i] += units, square[i] += static_cast<long long>(units) * units;
        }
      }
#pragma unroll
      for (int i = 0; i < kCodes; ++i) {
        atomicAdd(&sums[i * lanes + at.pack], sum[i]);
        atomicAdd(&squares[i * lanes + at.pack], static_cast<unsigned long long>(square[i]));
      }
    }
    __syncthreads();
    for (int d = threadIdx.x; d < size.dims; d += kThreads) {
      const int channel = d % kCodes * lanes + d / kCodes;
      atomicAdd(all + d, static_cast<unsigned long long>(int64_t{sums[channel]}));
      atomicAdd(all + size.dims + d, squares[channel]);
    }
    return;
  }
  for (int64_t row = part.begin; row < part.end; row += at.rows) {
    const int64_t t = row + at.row;
    float values[kCodes]{}, length = 0;
    if (at.has_codes && t < part.end) load_codes(values, codes + t * step);
#pragma unroll
    for (int i = 0; i < kCodes; ++i) length += values[i] * values[i];
    length = sum_of_row(length, lanes);
    // As whole numbers floats that are not negative have the same order, and NaN is the largest.
    if (at.pack == 0) atomicMax(&longest, __float_as_int(length) & 0x7FFFFFFF);
  }
  __syncthreads();
  if (threadIdx.x == 0) atomicMax(all + 2 * size.dims, static_cast<unsigned long long>(longest));
}

__global__ void __launch_bounds__(kThreads)
    centre_keys_kernel(__grid_constant__ const CentreArgs args, int lanes, Blocks blocks) {
  __shared__ float common[kMostDims], spreads[kMostDims];
  __shared__ bool stay;
  begin_dependent();
  const AttentionSize& size = args.size;
  const Place at(size.dims, lanes);
  const Part part(size, blocks);
  const int64_t* const sums = args.sums + part.kv_head * (2 * size.dims + 1);
  for (int d = threadIdx.x; d < size.dims; d += kThreads) {
    const float mean = common_part(sums[d], sums[size.dims + d], size.kv_tokens);
    common[d] = static_cast<float>(static_cast<__nv_fp8_e4m3>(mean));
    spreads[d] = mean == 0 ? 0 : spread_of(sums[d], sums[size.dims + d], size.kv_tokens);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float spread = 0;
    for (int d = 0; d < size.dims; ++d) spread += spreads[d];
    stay = !keeps_scores(args, spread / static_cast<float>(size.dims),
                         __int_as_float(static_cast<int>(sums[2 * size.dims])));
    if (blockIdx.x == 0 && args.apart) args.apart_scales[kK].scale_inv = 2 * args.scales[kK].scale_inv;
  }
  __syncthreads();
  const float q_scale_inv = args.scales[kQ].scale_inv, k_scale_inv = args.scales[kK].scale_inv;
  if (part.of_keys && part.is_first) {
    for (int d = threadIdx.x; d < size.dims; d += kThreads)
      args.common[part.head * size.dims + d] = stay ? 0.0f : common[d] * k_scale_inv;
  }
  if (part.of_keys && !args.apart) return;
  float apart[kCodes];
#pragma unroll
  for (int i = 0; i < kCodes; ++i) apart[i] = at.has_codes && !stay ? common[at.pack * kCodes + i] : 0.0f;

  const int64_t step = part.heads * size.dims,
                first = part.batch * part.tokens * step + part.head % part.heads * size.dims + at.pack * kCodes;
  // All threads of a warp go through the loop together, since they add up what they have of a row.
#pragma unroll 4
  for (int64_t row = part.begin; row < part.end; row += at.rows) {
    const int64_t t = row + at.row;
    const bool is_there = at.has_codes && t < part.end;
    float values[kCodes]{};
    if (is_there) load_codes(values, (part.of_keys ? args.k : args.q) + first + t * step);
    if (part.of_keys) {
      if (!is_there) continue;
#pragma unroll
      for (int i = 0; i < kCodes; ++i) values[i] = (values[i] - apart[i]) * 0.5f;
      const uint4 codes = make_uint4(encode4<Format::kE4M3>(values[0], values[1], values[2], values[3]),
                                     encode4<Format::kE4M3>(values[4], values[5], values[6], values[7]),
                                     encode4<Format::kE4M3>(values[8], values[9], values[10], values[11]),
                                     encode4<Format::kE4M3>(values[12], values[13], values[14], values[15]));
      __stcg(reinterpret_cast<uint4*>(args.apart + first + t * step), codes);
      continue;
    }
    float score = 0;
#pragma unroll
    for (int i = 0; i < kCodes; ++i) score += values[i] * apart[i];
    score = sum_of_row(score, lanes);
    if (is_there && at.pack == 0) {
      args.shifted[part.head * part.tokens + t] =
          args.lse[part.head * part.tokens + t] - rescaled(score, q_scale_inv, k_scale_inv) * size.scale;
    }
  }
}

void launch_centre_keys(const CentreArgs& args, cudaStream_t stream) {
  const AttentionSize& size = args.size;
  const int lanes = lanes_for(size.dims);
  const uint32_t key_chunks = blocks_for(size.kv_tokens, kTokens), query_chunks = blocks_for(size.tokens, kTokens);
  const Blocks blocks{blocks_for(size.batch * size.kv_heads * key_chunks, 1), key_chunks, query_chunks};
  const uint32_t all = blocks_for(blocks.of_keys + size.batch * size.heads * query_chunks, 1);
  launch(sum_keys_kernel, all, kThreads, stream, args, lanes, blocks);
  launch(centre_keys_kernel, all, kThreads, stream, args, lanes, blocks);
}

[[maybe_unused]] const bool filled = fill<launch_centre_keys>(cuda_kernels().centre_keys);

}  // namespace
}  // namespace torch_fp8::cuda
