// From an amax to a scale, against float64.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "torch_fp8/scale.h"

namespace {

using torch_fp8::float_of;
using torch_fp8::kExact;
using torch_fp8::scale_for;

constexpr float kMaxFloat = std::numeric_limits<float>::max();
constexpr float kMinSubnormal = std::numeric_limits<float>::denorm_min();

// fp8_max / 2^margin of both formats and every margin.
std::vector<float> targets() {
  std::vector<float> all;
  for (int margin = 0; margin <= 31; ++margin) {
    all.push_back(std::ldexp(448.0f, -margin));
    all.push_back(std::ldexp(57344.0f, -margin));
  }
  return all;
}

// Usable amaxes of every exponent, with the mantissas around 1, 1.75 (both formats' maxima) and 2, and random ones.
std::vector<float> amaxes() {
  std::mt19937 random(0);
  std::vector<float> all;
  for (uint32_t exponent = 0; exponent < 255; ++exponent) {
    for (const uint32_t mantissa : {0x000000u, 0x000001u, 0x5FFFFFu, 0x600000u, 0x600001u, 0x7FFFFFu,
                                    static_cast<uint32_t>(random() & 0x7FFFFF)}) {
      if (exponent + mantissa > 0) all.push_back(float_of(exponent << 23 | mantissa));
    }
  }
  return all;
}

TEST(Scale, MapsTheAmaxToTheTarget) {
  for (const float target : targets()) {
    for (const float amax : amaxes()) {
      // Rounding a quotient of floats first to float64, then to float32, is the same as rounding it once.
      const double exact = static_cast<double>(target) / amax;
      const auto expected = static_cast<float>(std::clamp(exact, std::ldexp(1.0, -126), std::ldexp(1.0, 126)));
      ASSERT_EQ(scale_for(amax, target, kExact), expected) << target << " / " << amax;
    }
  }
}

TEST(Scale, AndItsReciprocalAreNormalNumbers) {
  for (const int margin : {kExact, 0, 31}) {
    for (const float amax : amaxes()) {
      const float scale = scale_for(amax, 448.0f, margin);
      ASSERT_TRUE(std::isnormal(scale) && std::isnormal(1 / scale)) << amax;
    }
  }
  EXPECT_EQ(scale_for(kMinSubnormal, 448.0f, kExact), std::ldexp(1.0f, 126));
  EXPECT_EQ(scale_for(kMaxFloat, std::ldexp(448.0f, -31), kExact), std::ldexp(1.0f, -126));
}

TEST(Scale, RoundsDownToAPowerOfTwoClippedBeforeTheMarginAndAfterIt) {
  for (const double max : {448.0, 57344.0}) {
    for (int margin = 0; margin < 32; ++margin) {
      const auto target = static_cast<float>(std::ldexp(max, -margin));
      for (const float amax : amaxes()) {
        const double b = std::clamp(std::floor(std::log2(max / amax)), -31.0, 31.0) - margin;
        const auto expected = static_cast<float>(std::exp2(std::clamp(b, -31.0, 31.0)));
        ASSERT_EQ(scale_for(amax, target, margin), expected) << max << " / " << amax << ", " << margin;
      }
    }
  }
}

TEST(Scale, PowerOfTwoAtItsBoundaries) {
  EXPECT_EQ(scale_for(1.75f, 448.0f, 0), 256.0f);  // 448 / 1.75, and no value is lost to saturation
  EXPECT_EQ(scale_for(std::nextafter(1.75f, 2.0f), 448.0f, 0), 128.0f);
  EXPECT_EQ(scale_for(1.0f, 448.0f, 0), 256.0f);
  EXPECT_EQ(scale_for(2.0f, 57344.0f, 0), 16384.0f);
  EXPECT_EQ(scale_for(kMinSubnormal, 448.0f, 0), std::ldexp(1.0f, 31));
  EXPECT_EQ(scale_for(kMaxFloat, 448.0f, 0), std::ldexp(1.0f, -31));
}

TEST(Scale, IsUnfitBeyondItsBounds) {
  using torch_fp8::Format, torch_fp8::is_unfit;
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for (const auto& [format, max] : {std::pair{Format::kE4M3, 448.0f}, {Format::kE5M2, 57344.0f}}) {
    for (const int margin : {0, 3, 31}) {
      const float target = std::ldexp(max, -margin), high = max * 2, low = target / 32;
      for (const float scale : {1.0f, 0x1p-20f, 0x1p20f}) {
        for (const float fit : {high, low, target, max}) EXPECT_FALSE(is_unfit(scale, fit / scale, format, target));
        for (const float unfit : {std::nextafter(high, inf), std::nextafter(low, 0.0f)}) {
          EXPECT_TRUE(is_unfit(scale, unfit / scale, format, target)) << unfit;
        }
      }
      EXPECT_TRUE(is_unfit(0x1p126f, 0x1p10f, format, target)) << "the product is beyond float32";
      for (const float amax : {0.0f, -0.0f, -1e30f, inf, -inf, nan}) EXPECT_FALSE(is_unfit(1.0f, amax, format, target));
    }
  }
}

TEST(Scale, ProductsOfScalesBeyondFloat32) {
  using torch_fp8::rescaled;
  EXPECT_EQ(rescaled(0.0f, 1e30f, 1e30f), 0.0f);
  EXPECT_EQ(rescaled(0x1p-18f, 0x1p70f, 0x1p70f), 0x1p122f);
  EXPECT_EQ(rescaled(1.0f, 0x1p70f, 0x1p70f), std::numeric_limits<float>::infinity());
  EXPECT_EQ(rescaled(3.0f, 0.1f, 0.7f), 3.0f * (0.1f * 0.7f));
}

TEST(Scale, UsableAmaxesArePositiveAndFinite) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for (const float amax : {kMinSubnormal, std::numeric_limits<float>::min(), 1.0f, kMaxFloat}) {
    EXPECT_TRUE(torch_fp8::is_usable(amax)) << amax;
  }
  for (const float amax : {0.0f, -0.0f, -kMinSubnormal, -1.0f, inf, -inf, nan, -nan}) {
    EXPECT_FALSE(torch_fp8::is_usable(amax)) << amax;
  }
}

}  // namespace
