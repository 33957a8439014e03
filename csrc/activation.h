// The activations and their derivatives in float32: one text for host and device. exp, the reciprocal and the normal
// distribution are those of the caller, since a GPU has fast ones.
#pragma once

#include "kernels.h"

namespace torch_fp8 {

// xielu's two factors and its slope at 0.
struct Shape {
  float positive, negative, beta;
};
TORCH_FP8_HOST_DEVICE inline Shape shape_of(const XieluArgs& xielu) {
  return xielu.alphas ? Shape{xielu.alphas[0], xielu.alphas[1], xielu.beta} : Shape{};
}

struct Normal {
  float cdf, density;
};

struct Derivative {
  float value, slope;  // f(x), f'(x)
  float by_alpha;      // xielu: the derivative by alphas[x > 0 ? 0 : 1], which is all that f(x) depends on
};

// e^x - 1 and e^x - 1 - x, for x <= 0: no digit is lost where x is small. The polynomial is (e^x - 1 - x) / x^2, fitted
// at Chebyshev's points of x from -1 to 0 to 1e-7, which is the relative error.
struct ExpLess {
  float one, one_and_x;
};
template <class Math>
TORCH_FP8_HOST_DEVICE inline ExpLess exp_less(float x) {
  const float far = Math::exp(x) - 1.0f;
  float near = 0.000137424184f;
  near = near * x + 0.001324818f;
  near = near * x + 0.00830117054f;
  near = near * x + 0.0416592546f;
  near = near * x + 0.166666031f;
  near = near * x + 0.5f;
  near *= x * x;
  const bool is_near = x > -1.0f;
  return {is_near ? near + x : far, is_near ? near : far - x};
}

// f(x) and f'(x):
//   silu         x s, s = 1 / (1 + e^-x);                 s (1 + x (1 - s))
//   gelu         x P, P = erfc(-x / sqrt 2) / 2;          P + x e^(-x^2 / 2) / sqrt(2 pi)
//   gelu, tanh   x s, s = 1 / (1 + e^(-2 u)) = (1 + tanh u) / 2, u = sqrt(2 / pi) (x + 0.044715 x^3);
//                s + x s (1 - s) 2 u'
//   xielu        x > 0: p x^2 + b x;                      2 p x + b
//                else:  n (e^x - 1 - x) + b x;            n (e^x - 1) + b
//   relu^2       x > 0: x^2, else 0;                      2 x, else 0
// (arXiv 1702.03118, 1606.08415, 2411.13010, 2109.08668), written so that nothing cancels where x is negative. xielu's
// p, n, b are positive, negative and beta of its Shape. Its paper's code has e^min(x, -1e-6) for e^x, which moves f by
// less than 1e-6 n and f(0) away from 0. At -Inf the first four are NaN.
template <Activation kActivation, class Math>
TORCH_FP8_HOST_DEVICE inline Derivative differentiate(float x, const Shape& shape) {
  if constexpr (kActivation == Activation::kSilu) {
    const float s = Math::reciprocal(1.0f + Math::exp(-x));
    return {x * s, s * (1.0f + x * (1.0f - s)), 0.0f};
  } else if constexpr (kActivation == Activation::kGelu) {
    const Normal normal = Math::normal(x);
    return {x * normal.cdf, normal.cdf + x * normal.density, 0.0f};
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    const float s = Math::reciprocal(1.0f + Math::exp(-1.5957691f * (x + 0.044715f * x * x * x)));
    return {x * s, s + x * s * (1.0f - s) * 1.5957691f * (1.0f + 0.134145f * x * x), 0.0f};
  } else if constexpr (kActivation == Activation::kXielu) {
    const ExpLess less = exp_less<Math>(x);
    const bool positive = x > 0;
    const float alpha = positive ? shape.positive : shape.negative;
    const float by_alpha = positive ? x * x : less.one_and_x, slope = positive ? 2.0f * x : less.one;
    return {alpha * by_alpha + shape.beta * x, alpha * slope + shape.beta, by_alpha};
  } else {
    const float rectified = x < 0 ? 0.0f : x;  // NaN stays
    return {rectified * rectified, 2.0f * rectified, 0.0f};
  }
}

template <Activation kActivation, class Math>
TORCH_FP8_HOST_DEVICE inline float activate(float x, const Shape& shape) {
  return differentiate<kActivation, Math>(x, shape).value;
}

template <class Function>
void with_activation(Activation activation, Function&& function) {
  switch (activation) {
    case Activation::kSilu: return function(std::integral_constant<Activation, Activation::kSilu>{});
    case Activation::kGelu: return function(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh: return function(std::integral_constant<Activation, Activation::kGeluTanh>{});
    case Activation::kXielu: return function(std::integral_constant<Activation, Activation::kXielu>{});
    case Activation::kReluSquared: return function(std::integral_constant<Activation, Activation::kReluSquared>{});
  }
}

}  // namespace torch_fp8
