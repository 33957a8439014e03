// The two OCP FP8 formats (arXiv 2209.05433, table 1) and their codec, written to be checked by eye.
// No torch, no CUDA: the CPU backend encodes with it, and the tests hold the GPU's own conversion to it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__CUDACC__)
#define TORCH_FP8_HOST_DEVICE __host__ __device__
#else
#define TORCH_FP8_HOST_DEVICE
#endif

namespace torch_fp8 {

enum class Format : uint8_t { kE4M3, kE5M2 };

struct E4M3 {  // no Inf; NaN is the code with every exponent and mantissa bit set
  static constexpr int kMantissaBits = 3;
  static constexpr int kExponentBias = 7;
  static constexpr float kMax = 448.0f;
  static constexpr uint8_t kMaxCode = 0x7E;
};

struct E5M2 {  // IEEE-like: exponent 31 holds Inf (mantissa 0) and NaN
  static constexpr int kMantissaBits = 2;
  static constexpr int kExponentBias = 15;
  static constexpr float kMax = 57344.0f;
  static constexpr uint8_t kMaxCode = 0x7B;
};

// What the hardware writes for NaN in either format, whatever its sign. Inf is written so too, in E5M2 as well: E4M3
// has no Inf, and one code for what is not finite needs one rule.
constexpr uint8_t kNaNCode = 0x7F;

TORCH_FP8_HOST_DEVICE constexpr float max_of(Format format) {
  return format == Format::kE4M3 ? E4M3::kMax : E5M2::kMax;
}

// Half of the smallest subnormal: what is not larger in magnitude rounds to zero.
TORCH_FP8_HOST_DEVICE constexpr float half_smallest_of(Format format) {
  return format == Format::kE4M3 ? 0x1p-10f : 0x1p-17f;
}

TORCH_FP8_HOST_DEVICE inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

TORCH_FP8_HOST_DEVICE inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// |x| as an integer that orders like it, with NaN, whatever its payload, as the largest of all: what amaxes compare.
TORCH_FP8_HOST_DEVICE inline uint32_t magnitude(float x) {
  const uint32_t bits = bits_of(x) & 0x7FFFFFFF;
  return bits > 0x7F800000 ? 0x7FC00000 : bits;
}

TORCH_FP8_HOST_DEVICE inline bool is_finite(float x) { return (bits_of(x) & 0x7FFFFFFF) < 0x7F800000; }

// x * scale, a float32 product, rounded to nearest even. A finite x saturates to +-max, even where the product is
// beyond float32. An x that is Inf or NaN becomes NaN: who looks for an overflow behind a layer must find it there.
template <class F>
uint8_t encode(float x, float scale = 1.0f) {
  constexpr int kShift = 23 - F::kMantissaBits;  // mantissa bits that do not fit
  constexpr uint32_t kRebias = (127 - F::kExponentBias) << F::kMantissaBits;
  const float min_normal = std::ldexp(1.0f, 1 - F::kExponentBias);
  const float min_subnormal = std::ldexp(min_normal, -F::kMantissaBits);

  if (!is_finite(x)) return kNaNCode;
  const float scaled = x * scale;
  const uint8_t sign = static_cast<uint8_t>(bits_of(scaled) >> 31 << 7);
  const uint32_t magnitude = bits_of(scaled) & 0x7FFFFFFF;
  if (magnitude >= bits_of(F::kMax)) return sign | F::kMaxCode;
  if (magnitude < bits_of(min_normal)) {
    // A subnormal code counts min_subnormals; rounding up to the next binade gives the first normal code by itself.
    return sign | static_cast<uint8_t>(std::lrintf(float_of(magnitude) / min_subnormal));
  }
  const uint32_t half_ulp_to_even = (1u << (kShift - 1)) - 1 + ((magnitude >> kShift) & 1);
  return sign | static_cast<uint8_t>(((magnitude + half_ulp_to_even) >> kShift) - kRebias);
}

template <class F>
float decode(uint8_t code) {
  const float sign = code & 0x80 ? -1.0f : 1.0f;
  const int magnitude = code & 0x7F;
  if (magnitude > F::kMaxCode) {
    const bool is_inf = F::kMantissaBits == 2 && magnitude == 0x7C;
    return is_inf ? sign * std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
  }
  const int exponent = magnitude >> F::kMantissaBits;
  const int mantissa = magnitude & ((1 << F::kMantissaBits) - 1);
  const int hidden_bit = exponent > 0 ? 1 << F::kMantissaBits : 0;
  const int binade = (exponent > 0 ? exponent : 1) - F::kExponentBias - F::kMantissaBits;
  return sign * std::ldexp(static_cast<float>(hidden_bit + mantissa), binade);
}

}  // namespace torch_fp8
