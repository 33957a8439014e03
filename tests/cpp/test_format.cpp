// The codec against the formats' definition (arXiv 2209.05433, section 3) and a search for the nearest value.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "torch_fp8/format.h"

namespace {

using torch_fp8::E4M3;
using torch_fp8::E5M2;
using torch_fp8::float_of;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// A code's value, from its three fields: 2^(e - bias) * 1.m, or 2^(1 - bias) * 0.m where e is 0.
double value(E4M3, int code) {
  const int e = code >> 3 & 15, m = code & 7;
  const double magnitude = e == 0 ? std::pow(2, -6) * (m / 8.0) : std::pow(2, e - 7) * (1 + m / 8.0);
  return (code & 0x80 ? -1 : 1) * (e == 15 && m == 7 ? kNaN : magnitude);
}

double value(E5M2, int code) {
  const int e = code >> 2 & 31, m = code & 3;
  const double magnitude = e == 0 ? std::pow(2, -14) * (m / 4.0) : std::pow(2, e - 15) * (1 + m / 4.0);
  return (code & 0x80 ? -1 : 1) * (e < 31 ? magnitude : m == 0 ? kInf : kNaN);
}

template <class F>
class Format : public testing::Test {
 protected:
  // The code of the finite value nearest to x; between two equally near ones the even code.
  static uint8_t nearest(float x) {
    static const std::vector<double> values = [] {
      std::vector<double> finite;
      for (int code = 0; std::isfinite(value(F{}, code)); ++code) finite.push_back(value(F{}, code));
      return finite;
    }();
    if (!std::isfinite(x)) return 0x7F;
    const double magnitude = std::min<double>(std::fabs(x), values.back());
    const auto above = std::lower_bound(values.begin(), values.end(), magnitude);
    int code = static_cast<int>(above - values.begin());
    if (code > 0) {
      const double up = *above - magnitude, down = magnitude - *(above - 1);
      if (down < up || (down == up && code % 2 == 1)) --code;
    }
    return static_cast<uint8_t>(code | (std::signbit(x) ? 0x80 : 0));
  }

  static void expect_nearest(float x) {
    ASSERT_EQ(torch_fp8::encode<F>(x), nearest(x)) << "x = " << std::hexfloat << x;
  }
};

struct FormatName {
  template <class F>
  static std::string GetName(int) {
    return F::kMantissaBits == 3 ? "E4M3" : "E5M2";
  }
};
using Formats = testing::Types<E4M3, E5M2>;
TYPED_TEST_SUITE(Format, Formats, FormatName);

TYPED_TEST(Format, DecodesEveryCode) {
  for (int code = 0; code < 256; ++code) {
    const double expected = value(TypeParam{}, code);
    const float decoded = torch_fp8::decode<TypeParam>(static_cast<uint8_t>(code));
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(decoded)) << code;
    } else {
      EXPECT_EQ(decoded, expected) << code;
      EXPECT_EQ(std::signbit(decoded), code >= 0x80) << code;
    }
  }
}

TYPED_TEST(Format, EncodesWhatItDecodes) {
  for (int code = 0; code < 256; ++code) {
    const float x = torch_fp8::decode<TypeParam>(static_cast<uint8_t>(code));
    EXPECT_EQ(torch_fp8::encode<TypeParam>(x), std::isfinite(x) ? code : 0x7F);
  }
}

TYPED_TEST(Format, EncodesEveryBFloat16) {
  for (uint32_t bits = 0; bits < 1 << 16; ++bits) this->expect_nearest(float_of(bits << 16));
}

TYPED_TEST(Format, EncodesFloatsOfEveryExponent) {
  std::mt19937 random(0);
  for (int i = 0; i < 1 << 18; ++i) this->expect_nearest(float_of(static_cast<uint32_t>(random())));
  // Where the format's own values lie, subnormal ones too, which random bits seldom hit.
  std::uniform_real_distribution<float> exponent(-20, 18);
  for (int i = 0; i < 1 << 18; ++i) this->expect_nearest(std::exp2(exponent(random)));
}

TYPED_TEST(Format, EncodesTiesAndTheirNeighbours) {
  for (int code = 0; code < TypeParam::kMaxCode; ++code) {
    const auto tie = static_cast<float>((value(TypeParam{}, code) + value(TypeParam{}, code + 1)) / 2);
    for (const float x : {tie, std::nextafter(tie, 0.0f), std::nextafter(tie, 1e9f)}) {
      this->expect_nearest(x);
      this->expect_nearest(-x);
    }
  }
}

TYPED_TEST(Format, Saturates) {
  const float max = TypeParam::kMax, inf = std::numeric_limits<float>::infinity();
  for (const float x : {max, std::nextafter(max, inf), 1.07f * max, 2 * max, std::numeric_limits<float>::max()}) {
    for (const float scale : {1.0f, 3.0f, 0x1p126f}) {  // the product may be beyond float32
      EXPECT_EQ(torch_fp8::encode<TypeParam>(x, scale), TypeParam::kMaxCode) << x;
      EXPECT_EQ(torch_fp8::encode<TypeParam>(-x, scale), 0x80 | TypeParam::kMaxCode) << x;
    }
  }
  EXPECT_EQ(torch_fp8::decode<TypeParam>(TypeParam::kMaxCode), max);
}

TYPED_TEST(Format, MakesNaNOfWhatIsNotFinite) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for (const float x : {inf, -inf, nan, -nan}) {
    for (const float scale : {0x1p-126f, 1.0f, 0x1p126f}) EXPECT_EQ(torch_fp8::encode<TypeParam>(x, scale), 0x7F) << x;
  }
}

TYPED_TEST(Format, KeepsNaNAndTheSignOfZero) {
  for (const uint32_t nan : {0x7FC00000u, 0xFFC00000u, 0x7F800001u, 0xFF800001u, 0x7FFFFFFFu}) {
    EXPECT_EQ(torch_fp8::encode<TypeParam>(float_of(nan)), 0x7F);
  }
  EXPECT_EQ(torch_fp8::encode<TypeParam>(0.0f), 0x00);
  EXPECT_EQ(torch_fp8::encode<TypeParam>(-0.0f), 0x80);
  EXPECT_EQ(torch_fp8::encode<TypeParam>(-std::numeric_limits<float>::denorm_min()), 0x80);
}

}  // namespace
