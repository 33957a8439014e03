// What the library must compute, in a few lines of plain PyTorch that share no code with it.
#pragma once

#include <gtest/gtest.h>

#include <limits>
#include <string>

#include <ATen/ATen.h>

#include "torch_fp8/linear.h"

namespace torch_fp8::tests {

constexpr auto kE4M3Type = at::kFloat8_e4m3fn;
constexpr auto kE5M2Type = at::kFloat8_e5m2;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

inline float max_of(at::ScalarType fp8) { return fp8 == kE4M3Type ? 448.0f : 57344.0f; }

inline at::Tensor every_bfloat16() { return at::arange(1 << 16, at::kInt).to(at::kShort).view(at::kBFloat16); }

// (x * scale) in FP8, as bytes: float32 product, saturated, rounded to nearest even by PyTorch; 0x7F, a NaN, where x is
// not finite.
inline at::Tensor codes(const at::Tensor& x, float scale, at::ScalarType fp8) {
  const at::Tensor scaled = (x.to(at::kFloat) * scale).clamp(-max_of(fp8), max_of(fp8));
  return scaled.to(fp8).view(at::kByte).masked_fill(at::isfinite(x).logical_not(), 0x7F);
}

inline float amax_of(const at::Tensor& x) { return x.numel() ? x.abs().max().item<float>() : 0.0f; }

// The scale of a tensor that is scaled by its own amax.
inline float own_scale(const at::Tensor& x, at::ScalarType fp8) { return max_of(fp8) / amax_of(x.detach()); }

// x after its way through FP8, in float64.
inline at::Tensor quantised(const at::Tensor& x, float scale, at::ScalarType fp8) {
  return codes(x.detach(), scale, fp8).view(fp8).to(at::kDouble) * (1.0f / scale);
}

// Half a unit in the last place of an output, relative.
inline double rounding(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? 0x1p-8 : dtype == at::kHalf ? 0x1p-11 : 0x1p-24;
}

// Error of a sum of k products and of its scaling, in parts of the sum of their magnitudes. Scaling: four float32
// roundings, for the scales, the bias and what is added to. CPU: k additions of half a unit in the last place. Hopper:
// the tensor core aligns the 32 products of an instruction to the largest and cuts them off 13 bits below it
// (DeepSeek-V3 report, 3.3.2). Each may lose 2^-13 of the largest, which on random data adds up to 2^-12 of their
// magnitudes an instruction.
inline double accumulation(c10::Device device, int64_t k) {
  return 4 * 0x1p-24 + (device.is_cpu() ? static_cast<double>(k) * 0x1p-24 : static_cast<double>(k / 32 + 1) * 0x1p-12);
}

// |actual - (product + added)| stays within that error and a rounding, in actual's dtype, of `rounded`.
inline testing::AssertionResult is_near(const at::Tensor& actual, const at::Tensor& a, const at::Tensor& b,
                                        const at::Tensor& added, const at::Tensor& rounded) {
  const at::Tensor expected = at::mm(a, b.t()) + added;
  const at::Tensor magnitude = at::mm(a.abs(), b.abs().t()) + added.abs();
  // 2^-24: float16 ends in subnormals, where half a unit is 2^-25.
  const at::Tensor bound =
      magnitude * accumulation(actual.device(), a.size(1)) + rounded * rounding(actual.scalar_type()) + 0x1p-24;
  const at::Tensor error = (actual.detach().cpu().reshape(expected.sizes()).to(at::kDouble) - expected).abs();
  if (error.le(bound).all().item<bool>()) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "off by " << (error / bound).max().item<double>() << " times the bound";
}

// a . b^T + added, rounded once.
inline testing::AssertionResult is_product(const at::Tensor& actual, const at::Tensor& a, const at::Tensor& b,
                                           const at::Tensor& added = at::zeros({1}, at::kDouble)) {
  return is_near(actual, a, b, added, (at::mm(a, b.t()) + added).abs());
}

// The same, where a . b^T was rounded before it was added.
inline testing::AssertionResult is_sum_of_rounded_parts(const at::Tensor& actual, const at::Tensor& a,
                                                        const at::Tensor& b, const at::Tensor& added) {
  const at::Tensor product = at::mm(a, b.t());
  return is_near(actual, a, b, added, product.abs() + (product + added).abs());
}

// Equal to the bit, NaN included.
inline testing::AssertionResult same_bits(const at::Tensor& a, const at::Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes()) {
    return testing::AssertionFailure() << a.scalar_type() << " " << a.sizes() << " against " << b.scalar_type() << " "
                                       << b.sizes();
  }
  const auto bytes = [](const at::Tensor& t) { return t.detach().cpu().contiguous().view({-1}).view(at::kByte); };
  const int64_t different = bytes(a).ne(bytes(b)).sum().item<int64_t>();
  if (different == 0) return testing::AssertionSuccess();
  return testing::AssertionFailure() << different << " of " << a.nbytes() << " bytes differ";
}

// The call throws an error that says `message`.
template <class Error = c10::Error, class Call>
testing::AssertionResult throws(Call&& call, const std::string& message) {
  try {
    call();
  } catch (const Error& error) {
    const std::string what = error.what();
    if (what.find(message) != std::string::npos) return testing::AssertionSuccess();
    return testing::AssertionFailure() << "the message is: " << what.substr(0, 400);
  }
  return testing::AssertionFailure() << "nothing was thrown";
}

// Slots of three roles with this scale.
inline at::Tensor slots_with(float scale) {
  at::Tensor slots = at::zeros({kRoles, 4});
  slots.select(1, 0).fill_(1.0f / scale);
  slots.select(1, 1).fill_(scale);
  return slots;
}

inline float amax_in(const at::Tensor& slots, int role) { return slots[role][2].item<float>(); }

}  // namespace torch_fp8::tests
