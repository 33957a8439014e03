// Floats from codes and from 16-bit pairs, exactly.
#pragma once

#include <cuda_fp8.h>

#include "cuda/common/block.cuh"

namespace torch_fp8::cuda {

// The 32 bits of a pair, and back.
template <class Pair>
__device__ uint32_t bits_of(const Pair& pair) {
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <class Pair>
__device__ Pair pair_of(uint32_t bits) {
  return *reinterpret_cast<const Pair*>(&bits);
}

__device__ inline float2 to_float2(uint32_t bits, __half) { return __half22float2(pair_of<__half2>(bits)); }
__device__ inline float2 to_float2(uint32_t bits, __nv_bfloat16) {
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xFFFF0000));
}

__device__ inline uint32_t word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Two E4M3 codes as two halves, exactly.
__device__ inline uint32_t halves_of(uint32_t codes) {
  const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes), __NV_E4M3);
  return uint32_t{raw.x} | uint32_t{raw.y} << 16;
}

}  // namespace torch_fp8::cuda
