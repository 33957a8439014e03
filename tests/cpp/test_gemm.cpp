// gemm and gemm_accumulate_ against float64.
#include <vector>

#include "oracle.h"
#include "torch_fp8/ops.h"

namespace torch_fp8::tests {
namespace {

constexpr at::ScalarType kOutputs[] = {at::kFloat, at::kHalf, at::kBFloat16};

// (rows, k) codes and their scale, as quantize gives them: rows padded to 16.
struct Operand {
  Operand(int64_t rows, int64_t k, at::ScalarType fp8 = kE4M3Type)
      : codes(at::randn({(rows + 15) / 16 * 16, k}).mul_(10).to(fp8)), scale_inv(at::rand({1}) + 0.1), rows(rows) {}

  at::Tensor values() const { return codes.narrow(0, 0, rows).to(at::kDouble) * scale_inv.to(at::kDouble); }

  at::Tensor codes, scale_inv;
  int64_t rows;
};

at::Tensor product(const Operand& a, const Operand& b, at::ScalarType dtype,
                   const c10::optional<at::Tensor>& bias = {}) {
  return gemm(a.codes, b.codes, a.scale_inv, b.scale_inv, bias, {a.rows, b.rows}, dtype, /*fast_accum=*/false);
}

void accumulate(const at::Tensor& out, const Operand& a, const Operand& b) {
  gemm_accumulate_(out, a.codes, b.codes, a.scale_inv, b.scale_inv, /*fast_accum=*/false);
}

class Gemm : public testing::Test {
 protected:
  void SetUp() override { at::manual_seed(0); }
};

TEST_F(Gemm, EveryOutputTypeFormatAndShape) {
  for (const auto& [m, n, k] : {std::array<int64_t, 3>{16, 16, 16}, {1, 48, 32}, {40, 17, 64}, {257, 100, 272}}) {
    for (const auto& [a_type, b_type] :
         {std::pair{kE4M3Type, kE4M3Type}, {kE5M2Type, kE4M3Type}, {kE4M3Type, kE5M2Type}}) {
      const Operand a(m, k, a_type), b(n, k, b_type);
      for (const auto dtype : kOutputs) {
        const at::Tensor out = product(a, b, dtype);
        EXPECT_EQ(out.scalar_type(), dtype);
        EXPECT_EQ(out.sizes(), (at::IntArrayRef{m, n}));
        EXPECT_TRUE(is_product(out, a.values(), b.values())) << m << " " << n << " " << k << " " << dtype;
      }
    }
  }
}

TEST_F(Gemm, Bias) {
  for (const int64_t n : {32, 33}) {
    const Operand a(20, 64), b(n, 64);
    for (const auto dtype : kOutputs) {
      const at::Tensor bias = at::randn({n + 1}).mul_(100).to(dtype);
      const at::Tensor values = bias.to(at::kDouble);
      EXPECT_TRUE(
          is_product(product(a, b, dtype, bias.narrow(0, 0, n)), a.values(), b.values(), values.narrow(0, 0, n)));
      // At an address that is a multiple of 2 or 4 bytes only, and with gaps.
      EXPECT_TRUE(
          is_product(product(a, b, dtype, bias.narrow(0, 1, n)), a.values(), b.values(), values.narrow(0, 1, n)));
      const at::Tensor strided = at::stack({bias, bias}, 1).select(1, 0).narrow(0, 0, n);
      EXPECT_TRUE(is_product(product(a, b, dtype, strided), a.values(), b.values(), values.narrow(0, 0, n)));
    }
  }
}

TEST_F(Gemm, OutputOfAnyRank) {
  const Operand a(12, 32), b(18, 32);
  const at::Tensor flat = product(a, b, at::kFloat);
  const auto shaped = [&](at::IntArrayRef size) {
    return gemm(a.codes, b.codes, a.scale_inv, b.scale_inv, {}, size, at::kFloat, false);
  };
  EXPECT_TRUE(same_bits(shaped({2, 6, 18}), flat.view({2, 6, 18})));
  EXPECT_TRUE(same_bits(shaped({18}), flat[0]));
}

TEST_F(Gemm, Empty) {
  const Operand a(5, 0), b(20, 0), none(0, 32), some(20, 32);
  for (const auto dtype : kOutputs) {
    EXPECT_TRUE(same_bits(product(a, b, dtype), at::zeros({5, 20}, dtype)));
    const at::Tensor bias = at::randn({20}).to(dtype);
    EXPECT_TRUE(same_bits(product(a, b, dtype, bias), bias.expand({5, 20}))) << dtype;
    EXPECT_EQ(product(none, some, dtype).sizes(), (at::IntArrayRef{0, 20}));
    EXPECT_EQ(product(some, none, dtype).sizes(), (at::IntArrayRef{20, 0}));
  }
  const at::Tensor out = at::randn({5, 20}), before = out.clone();
  accumulate(out, a, b);
  EXPECT_TRUE(same_bits(out, before));
}

TEST_F(Gemm, Accumulates) {
  for (const int64_t n : {32, 33}) {
    const Operand a(20, 64), b(n, 64);
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      const at::Tensor out = at::randn({20, n}).mul_(100).to(dtype);
      const at::Tensor before = out.to(at::kDouble);
      accumulate(out, a, b);
      EXPECT_TRUE(is_product(out, a.values(), b.values(), before)) << n << " " << dtype;
    }
  }
}

TEST_F(Gemm, Errors) {
  const Operand a(16, 32), b(16, 32), e5m2(16, 32, kE5M2Type), longer(16, 48), narrow(16, 24), taller(48, 32);
  const auto call = [](const Operand& a, const Operand& b, at::ScalarType dtype = at::kFloat) {
    return [=] { product(a, b, dtype); };
  };
  EXPECT_TRUE(throws(call(e5m2, e5m2), "a and b are both float8_e5m2, which FP8 GEMMs do not take"));
  EXPECT_TRUE(throws(call(a, longer), "a and b must have as many columns"));
  EXPECT_TRUE(throws(call(a, narrow), "whose columns are a multiple of 16, got [16, 24]"));
  EXPECT_TRUE(throws<c10::TypeError>(call(a, b, at::kDouble), "the output must be bfloat16, float16 or float32, got"));
  Operand bad = a;
  bad.codes = a.codes.to(at::kFloat);
  EXPECT_TRUE(throws<c10::TypeError>(call(bad, b), "a must be float8_e4m3fn or float8_e5m2, got Float"));
  bad.codes = longer.codes.narrow(1, 0, 32);
  EXPECT_TRUE(throws(call(b, bad), "b must be a contiguous, 16-byte aligned matrix"));
  bad = a;
  bad.rows = 17;
  EXPECT_TRUE(throws(call(bad, b), "a must have at least the 17 rows that the output needs, got [16, 32]"));
  bad = a;
  bad.scale_inv = at::ones({2});
  EXPECT_TRUE(throws(call(a, bad), "b_scale_inv must be one float32, got Float [2]"));
  bad.scale_inv = at::ones({2}).narrow(0, 1, 1);
  EXPECT_TRUE(throws(call(bad, b), "a_scale_inv must lie at a 16-byte boundary"));
  EXPECT_TRUE(throws([&] { product(a, b, at::kHalf, at::ones({16})); }, "bias must be Half of shape [16], got Float"));
  EXPECT_TRUE(throws([&] { product(a, b, at::kFloat, at::ones({15})); }, "of shape [16], got Float [15]"));
}

TEST_F(Gemm, ErrorsOfAccumulation) {
  const Operand a(16, 32), b(16, 32);
  const at::Tensor out = at::zeros({20, 20});
  EXPECT_TRUE(throws<c10::TypeError>([&] { accumulate(out.to(at::kHalf), a, b); },
                                     "out must be float32 or bfloat16 to be accumulated into, got Half"));
  EXPECT_TRUE(throws([&] { accumulate(out.narrow(1, 0, 16), a, b); }, "out must be contiguous and start at a 16-byte"));
  EXPECT_TRUE(throws([&] { accumulate(out.view({400}).narrow(0, 1, 256).view({16, 16}), a, b); },
                     "out must be contiguous and start at a 16-byte"));
  EXPECT_TRUE(same_bits(out, at::zeros({20, 20})));
}

}  // namespace
}  // namespace torch_fp8::tests
