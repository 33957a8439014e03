// Codes from floats, by the hardware's own conversion: round to nearest even, saturate, NaN stays NaN. It saturates Inf
// too, which must become NaN: a kernel learns from its maximum whether it has met one, and writes those codes again.
#pragma once

#include <cuda_fp8.h>

#include "cuda/common/block.cuh"

namespace torch_fp8::cuda {

template <Format kFormat>
constexpr __nv_fp8_interpretation_t kInterpretation = kFormat == Format::kE4M3 ? __NV_E4M3 : __NV_E5M2;

// Four scaled values as codes, the first in the lowest byte.
template <Format kFormat>
__device__ uint32_t encode4(float a, float b, float c, float d) {
  const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, kInterpretation<kFormat>);
  const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, kInterpretation<kFormat>);
  return low | high << 16;
}

template <Format kFormat>
__device__ uint2 encode8(const float (&x)[kPackSize], float scale) {
  return make_uint2(encode4<kFormat>(x[0] * scale, x[1] * scale, x[2] * scale, x[3] * scale),
                    encode4<kFormat>(x[4] * scale, x[5] * scale, x[6] * scale, x[7] * scale));
}

template <Format kFormat, class T>
__device__ void store_codes(uint8_t* q, const Pack<T>& pack, float scale) {
  float x[kPackSize];
#pragma unroll
  for (int j = 0; j < kPackSize; ++j) x[j] = to_float(pack.values[j]);
  *reinterpret_cast<uint2*>(q) = encode8<kFormat>(x, scale);
}

template <class T>
__device__ bool is_infinite(T x) {
  return raw_magnitude(to_float(x)) == kInfinity;
}

// In codes that this thread has stored. Few threads ever meet an Inf, so x is read again, in a loop that is not
// unrolled: what was loaded, kept until here, would take registers from all. scale: what each x was multiplied by, or
// null.
template <class T>
__device__ void mark_infinities(uint8_t* q, const T* x, int64_t stride, int64_t count, const float* scale = nullptr) {
#pragma unroll 1
  for (int64_t j = 0; j < count; ++j) {
    if (is_infinite(to_float(x[j * stride]) * (scale ? scale[j] : 1.0f))) q[j] = kNaNCode;
  }
}

}  // namespace torch_fp8::cuda
