// What the kernels of norms share.
#pragma once

#include "cuda/common/block.cuh"
#include "cuda/common/decode.cuh"

namespace torch_fp8::cuda {

// Sums over neighbouring lanes, the same bits in each of them.
template <int kLanes>
__device__ float sum_of_lanes(float x) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xFFFFFFFF, x, lanes);
  return x;
}
__device__ inline float warp_sum(float x) { return sum_of_lanes<32>(x); }

// A pack as the words that it is loaded and stored as: as elements, 16-bit ones take a register each.
template <class T>
struct Words {
  uint4 of[sizeof(Pack<T>) / sizeof(uint4)];
};
template <class T>
__device__ void unpack(Words<T> words, float (&x)[kPackSize]) {
#pragma unroll
  for (int j = 0; j < kPackSize; j += 2) {
    if constexpr (sizeof(T) == sizeof(float)) {
      x[j] = __uint_as_float(word(words.of[j / 4], j % 4)),
      x[j + 1] = __uint_as_float(word(words.of[j / 4], j % 4 + 1));
    } else {
      const float2 pair = to_float2(word(words.of[0], j / 2), T{});
      x[j] = pair.x, x[j + 1] = pair.y;
    }
  }
}
__device__ inline uint32_t pair_bits(float a, float b, __half) { return bits_of(__floats2half2_rn(a, b)); }
__device__ inline uint32_t pair_bits(float a, float b, __nv_bfloat16) { return bits_of(__floats2bfloat162_rn(a, b)); }
template <class T>
__device__ Words<T> words_of(const float (&x)[kPackSize]) {
  if constexpr (sizeof(T) == sizeof(float)) {
    const auto bits = [&x](int j) { return __float_as_uint(x[j]); };
    return {make_uint4(bits(0), bits(1), bits(2), bits(3)), make_uint4(bits(4), bits(5), bits(6), bits(7))};
  } else {
    const auto bits = [&x](int j) { return pair_bits(x[j], x[j + 1], T{}); };
    return {make_uint4(bits(0), bits(2), bits(4), bits(6))};
  }
}

__device__ inline void load_floats(const float* source, float (&out)[kPackSize]) {
  const float4 low = *reinterpret_cast<const float4*>(source), high = *reinterpret_cast<const float4*>(source + 4);
  out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
  out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
}

__device__ inline void store_floats(float* target, const float (&x)[kPackSize]) {
  *reinterpret_cast<float4*>(target) = make_float4(x[0], x[1], x[2], x[3]);
  *reinterpret_cast<float4*>(target + 4) = make_float4(x[4], x[5], x[6], x[7]);
}

// As it lies in memory: so many can be on their way before the first is converted.
template <class T>
__device__ uint32_t parameter_bits(const Vector& v, int64_t col) {
  return v.type == Type::kFloat32 ? static_cast<const uint32_t*>(v.data)[col]
                                  : static_cast<const uint16_t*>(v.data)[col];
}
template <class T>
__device__ float parameter_of(const Vector& v, uint32_t bits) {
  if constexpr (sizeof(T) < sizeof(float)) {
    if (v.type != Type::kFloat32) return to_float2(bits, T{}).x;
  }
  return __uint_as_float(bits);
}
template <class T>
__device__ float parameter(const Vector& v, int64_t col) {
  return parameter_of<T>(v, parameter_bits<T>(v, col));
}
template <class T>
__device__ float gain_at(const Vector& gain, float offset, int64_t col) {
  return gain.data ? parameter<T>(gain, col) + offset : 1.0f;
}

__device__ inline float normalised(float x, float mean, float rstd) { return (x - mean) * rstd; }
__device__ inline float reciprocal_deviation(float squares, int64_t cols, float eps) {
  return __frsqrt_rn(squares / static_cast<float>(cols) + eps);
}

// mean is 0 where there is none.
struct Stats {
  float mean, rstd;
};
__device__ inline Stats stats_of(const float* stats, bool layer_norm, int64_t rows, int64_t row) {
  return layer_norm ? Stats{stats[row], stats[rows + row]} : Stats{0.0f, stats[row]};
}
__device__ inline void store_stats(float* stats, bool layer_norm, int64_t rows, int64_t row, float mean, float rstd) {
  if (layer_norm) stats[row] = mean;
  stats[layer_norm ? rows + row : row] = rstd;
}

// `count` bytes, a multiple of 16, to shared memory; the barrier, which expects them, counts them.
__device__ inline void fetch(uint32_t target, const void* source, int count, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
               "l"(source), "r"(count), "r"(barrier)
               : "memory");
}

// Any size, type and layout.
void launch_norm_any(const NormArgs& args, cudaStream_t stream);
void launch_norm_backward_any(const NormBackwardArgs& args, cudaStream_t stream);

}  // namespace torch_fp8::cuda
