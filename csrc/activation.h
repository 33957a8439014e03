// The activations and their derivatives in float32: one text for host and device. exp, the reciprocal and the normal
// distribution are those of the caller, since a GPU has fast ones.
#pragma once

#include "kernels.h"

namespace torch_fp8 {

struct Derivative {
  float value, slope;  // f(x), f'(x)
};

// f(x) and f'(x):
//   silu         x s, s = 1 / (1 + e^-x);                 s (1 + x (1 - s))
//   gelu         x P, P = erfc(-x / sqrt 2) / 2;          P + x e^(-x^2 / 2) / sqrt(2 pi)
//   gelu, tanh   x s, s = 1 / (1 + e^(-2 u)) = (1 + tanh u) / 2, u = sqrt(2 / pi) (x + 0.044715 x^3);
//                s + x s (1 - s) 2 u'
// (arXiv 1702.03118, 1606.08415), written so that nothing cancels where x is negative. At -Inf each is NaN.
template <Activation kActivation, class Math>
TORCH_FP8_HOST_DEVICE inline Derivative differentiate(float x) {
  if constexpr (kActivation == Activation::kSilu) {
    const float s = Math::reciprocal(1.0f + Math::exp(-x));
    return {x * s, s * (1.0f + x * (1.0f - s))};
  } else if constexpr (kActivation == Activation::kGelu) {
    const float e = Math::exp(-0.5f * x * x), p = Math::normal_cdf(x, e);
    return {x * p, p + x * e * 0.39894228f};
  } else {
    const float s = Math::reciprocal(1.0f + Math::exp(-1.5957691f * (x + 0.044715f * x * x * x)));
    return {x * s, s + x * s * (1.0f - s) * 1.5957691f * (1.0f + 0.134145f * x * x)};
  }
}

template <Activation kActivation, class Math>
TORCH_FP8_HOST_DEVICE inline float activate(float x) {
  return differentiate<kActivation, Math>(x).value;
}

template <class Function>
void with_activation(Activation activation, Function&& function) {
  switch (activation) {
    case Activation::kSilu: return function(std::integral_constant<Activation, Activation::kSilu>{});
    case Activation::kGelu: return function(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh: return function(std::integral_constant<Activation, Activation::kGeluTanh>{});
  }
}

}  // namespace torch_fp8
