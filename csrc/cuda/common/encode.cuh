// Codes from floats, by the hardware's own conversion: round to nearest even, saturate, NaN stays NaN.
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

}  // namespace torch_fp8::cuda
