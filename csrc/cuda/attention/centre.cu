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

// A block sums kTokens tokens of a head. A thread's own sums are of 16 tokens at most (lanes <= 16), which float32
// holds exactly.
__global__ void __launch_bounds__(kThreads)
    sum_keys_kernel(__grid_constant__ const CentreArgs args, int lanes, uint32_t chunks) {
  __shared__ int sums[2][kMostDims];
  __shared__ bool has_nan[kMostDims];
  begin_dependent();
  const AttentionSize& size = args.size;
  const Place at(size.dims, lanes);
  const int64_t head = blockIdx.x / chunks, batch = head / size.kv_heads;
  const int64_t begin = int64_t{blockIdx.x % chunks} * kTokens, end = min(begin + kTokens, size.kv_tokens);
  const uint8_t* const keys =
      args.k + batch * size.kv_tokens * size.kv_heads * size.dims + head % size.kv_heads * size.dims + at.pack * kCodes;
  // A thread's i-th channel is i * lanes + its pack here, so that neighbouring threads add to neighbouring words.
  for (int i = threadIdx.x; i < kMostDims; i += kThreads) sums[0][i] = sums[1][i] = 0, has_nan[i] = false;
  __syncthreads();
  if (at.has_codes) {
    float sum[kCodes]{}, magnitudes[kCodes]{};
#pragma unroll 4
    for (int64_t t = begin + at.row; t < end; t += at.rows) {
      float values[kCodes];
      load_codes(values, keys + t * size.kv_heads * size.dims);
#pragma unroll
      for (int i = 0; i < kCodes; ++i) sum[i] += values[i], magnitudes[i] += fabsf(values[i]);
    }
#pragma unroll
    for (int i = 0; i < kCodes; ++i) {
      const int channel = i * lanes + at.pack;
      if (isnan(sum[i])) has_nan[channel] = true;
      atomicAdd(&sums[0][channel], static_cast<int>(sum[i] * kCodeUnits));
      atomicAdd(&sums[1][channel], static_cast<int>(magnitudes[i] * kCodeUnits));
    }
  }
  __syncthreads();
  auto* const all = reinterpret_cast<unsigned long long*>(args.sums) + head * 2 * size.dims;
  for (int d = threadIdx.x; d < size.dims; d += kThreads) {
    const int channel = d % kCodes * lanes + d / kCodes;
    const int64_t magnitudes = has_nan[channel] ? kNoMagnitudes : sums[1][channel];
    atomicAdd(all + d, static_cast<unsigned long long>(int64_t{sums[0][channel]}));
    atomicAdd(all + size.dims + d, static_cast<unsigned long long>(magnitudes));
  }
}

// A block takes kTokens tokens of a head: the first key_blocks keys, the others queries.
__global__ void __launch_bounds__(kThreads)
    centre_keys_kernel(__grid_constant__ const CentreArgs args, int lanes, uint32_t key_blocks, uint32_t key_chunks,
                       uint32_t query_chunks) {
  __shared__ float common[kMostDims];
  begin_dependent();
  const AttentionSize& size = args.size;
  const Place at(size.dims, lanes);
  const bool of_keys = blockIdx.x < key_blocks;
  const uint32_t block = of_keys ? blockIdx.x : blockIdx.x - key_blocks, chunks = of_keys ? key_chunks : query_chunks;
  const int64_t heads = of_keys ? size.kv_heads : size.heads, tokens = of_keys ? size.kv_tokens : size.tokens;
  const int64_t head = block / chunks, batch = head / heads;
  const int64_t kv_head = of_keys ? head : batch * size.kv_heads + head % heads / (size.heads / size.kv_heads);
  for (int d = threadIdx.x; d < size.dims; d += kThreads) {
    const int64_t* const sums = args.sums + kv_head * 2 * size.dims + d;
    const float mean = common_part(sums[0], sums[size.dims], size.kv_tokens);
    common[d] = static_cast<float>(static_cast<__nv_fp8_e4m3>(mean));
  }
  __syncthreads();
  if (blockIdx.x == 0 && threadIdx.x == 0) args.apart_scales[kK].scale_inv = 2 * args.scales[kK].scale_inv;
  float apart[kCodes];
#pragma unroll
  for (int i = 0; i < kCodes; ++i) apart[i] = at.has_codes ? common[at.pack * kCodes + i] : 0.0f;

  const int64_t step = heads * size.dims, first = batch * tokens * step + head % heads * size.dims + at.pack * kCodes;
  const int64_t begin = int64_t{block % chunks} * kTokens, end = min(begin + kTokens, tokens);
  const float q_scale_inv = args.scales[kQ].scale_inv, k_scale_inv = args.scales[kK].scale_inv;
  // All threads of a warp go through the loop together, since they add up what they have of a row.
#pragma unroll 4
  for (int64_t row = begin; row < end; row += at.rows) {
    const int64_t t = row + at.row;
    const bool is_there = at.has_codes && t < end;
    float values[kCodes]{};
    if (is_there) load_codes(values, (of_keys ? args.k : args.q) + first + t * step);
    if (of_keys) {
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
    for (int lane = lanes / 2; lane > 0; lane /= 2) score += __shfl_xor_sync(0xFFFFFFFF, score, lane);
    if (is_there && at.pack == 0) {
      args.shifted[head * tokens + t] =
          args.lse[head * tokens + t] - rescaled(score, q_scale_inv, k_scale_inv) * size.scale;
    }
  }
}

void launch_centre_keys(const CentreArgs& args, cudaStream_t stream) {
  const AttentionSize& size = args.size;
  const int lanes = lanes_for(size.dims);
  const uint32_t key_chunks = blocks_for(size.kv_tokens, kTokens), query_chunks = blocks_for(size.tokens, kTokens);
  const uint32_t key_blocks = blocks_for(size.batch * size.kv_heads * key_chunks, 1);
  launch(sum_keys_kernel, key_blocks, kThreads, stream, args, lanes, key_chunks);
  launch(centre_keys_kernel, blocks_for(key_blocks + size.batch * size.heads * query_chunks, 1), kThreads, stream, args,
         lanes, key_blocks, key_chunks, query_chunks);
}

[[maybe_unused]] const bool filled = fill<launch_centre_keys>(cuda_kernels().centre_keys);

}  // namespace
}  // namespace torch_fp8::cuda
