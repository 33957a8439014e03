// quantize: codes, transpose, padding, scales, amax and column sums.
#include <cmath>
#include <string>
#include <vector>

#include "oracle.h"
#include "torch_fp8/ops.h"

namespace torch_fp8::tests {
namespace {

constexpr int kRole = kWeight;

int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// What q must be: the codes of x, seen as a matrix, with zeros to multiples of 16.
at::Tensor padded_codes(const at::Tensor& x, float scale, at::ScalarType fp8) {
  const at::Tensor matrix = codes(x, scale, fp8).reshape({x.numel() / x.size(-1), x.size(-1)});
  const int64_t rows = matrix.size(0), cols = matrix.size(1);
  return at::constant_pad_nd(matrix, {0, padded(cols) - cols, 0, padded(rows) - rows});
}

at::Tensor bytes(const at::Tensor& q) { return q.view(at::kByte); }

template <class Test>
void for_each_type(Test&& test) {
  for (const auto dtype : {at::kFloat, at::kHalf, at::kBFloat16}) {
    for (const auto fp8 : {kE4M3Type, kE5M2Type}) {
      SCOPED_TRACE(std::string(c10::toString(dtype)) + " to " + c10::toString(fp8));
      at::manual_seed(0);
      test(dtype, fp8);
    }
  }
}

// Everything that quantize gives for x, when all of it is asked for.
void check(const at::Tensor& x, at::ScalarType fp8, float scale = 20.0f) {
  QuantizeOptions all;
  all.columnwise = true;
  all.dbias = at::kFloat;
  const at::Tensor slots = slots_with(scale), expected = padded_codes(x, scale, fp8);
  const Quantized q = quantize(x, slots, kRole, fp8, all);
  EXPECT_TRUE(same_bits(bytes(q.q), expected)) << x.sizes();
  EXPECT_TRUE(same_bits(bytes(q.q_t), expected.t())) << x.sizes();
  EXPECT_EQ(q.scale_inv.item<float>(), 1.0f / scale);
  EXPECT_EQ(amax_in(slots, kRole), amax_of(x));
  EXPECT_EQ(amax_in(slots, kInput) + amax_in(slots, kGradOutput), 0.0f);

  // A float32 sum of M values: half a unit in the last place for each addition.
  const at::Tensor values = x.reshape({-1, x.size(-1)}).to(at::kDouble);
  const at::Tensor bound = values.abs().sum(0) * static_cast<double>(values.size(0)) * 0x1p-24;
  EXPECT_TRUE((q.dbias.to(at::kDouble) - values.sum(0)).abs().le(bound).all().item<bool>()) << x.sizes();
}

TEST(Quantize, AnyShape) {
  for_each_type([](at::ScalarType dtype, at::ScalarType fp8) {
    for (const std::vector<int64_t>& size : {std::vector<int64_t>{1, 1},
                                             {7, 16},
                                             {16, 17},
                                             {17, 7},
                                             {100, 257},
                                             {257, 100},
                                             {128, 128},
                                             {5},
                                             {2, 3, 20}}) {
      check(at::randn(size).to(dtype), fp8);
    }
  });
}

TEST(Quantize, AnyStrides) {
  for_each_type([](at::ScalarType dtype, at::ScalarType fp8) {
    const at::Tensor x = at::randn({40, 60}).to(dtype);
    check(x.t(), fp8);
    check(x.slice(1, 3, 60, 7), fp8);
    check(x.narrow(0, 5, 20).narrow(1, 1, 33), fp8);
    check(x.select(0, 4).expand({24, 60}), fp8);
    check(x.select(1, 4).unsqueeze(1).expand({40, 18}), fp8);
    check(x.view({4, 10, 60}).transpose(0, 1), fp8);
    check(x.view({4, 10, 60}).permute({2, 1, 0}), fp8);
  });
}

TEST(Quantize, SaturatesWhatIsFinite) {
  for_each_type([](at::ScalarType dtype, at::ScalarType fp8) {
    at::Tensor x = at::randn({9, 21}).to(dtype);
    check(x, fp8, 1e6f);
    x[3][5] = kInf, x[8][0] = -kInf;
    const at::Tensor slots = slots_with(3.0f);
    EXPECT_TRUE(same_bits(bytes(quantize(x, slots, kRole, fp8, {}).q), padded_codes(x, 3.0f, fp8)));
    EXPECT_EQ(amax_in(slots, kRole), kInf);
    x[4][4] = kNaN;
    EXPECT_TRUE(same_bits(bytes(quantize(x, slots, kRole, fp8, {}).q), padded_codes(x, 3.0f, fp8)));
    EXPECT_TRUE(std::isnan(amax_in(slots, kRole)));
    quantize(at::ones({1, 1}), slots, kRole, fp8, {});
    EXPECT_TRUE(std::isnan(amax_in(slots, kRole))) << "a NaN must not be forgotten before the update has seen it";
  });
}

TEST(Quantize, OwnAmax) {
  for_each_type([](at::ScalarType dtype, at::ScalarType fp8) {
    const at::Tensor x = at::randn({33, 50}).to(dtype);
    for (const int margin : {0, 3, 31}) {
      QuantizeOptions own;
      own.own_amax = true;
      own.margin = margin;
      const at::Tensor slots = slots_with(1e-5f);
      const float scale = std::ldexp(max_of(fp8), -margin) / amax_of(x);
      const Quantized q = quantize(x, slots, kRole, fp8, own);
      EXPECT_TRUE(same_bits(bytes(q.q), padded_codes(x, scale, fp8))) << margin;
      EXPECT_EQ(q.scale_inv.item<float>(), 1.0f / scale);
      EXPECT_EQ(slots[kRole][1].item<float>(), 1e-5f) << "the slot's own scale is the update's to change";
      EXPECT_EQ(amax_in(slots, kRole), amax_of(x));

      own.power_of_two = true;
      const float power = std::exp2(std::floor(std::log2(scale)));
      EXPECT_TRUE(same_bits(bytes(quantize(x, slots, kRole, fp8, own).q), padded_codes(x, power, fp8))) << margin;
    }
  });
}

TEST(Quantize, OwnAmaxThatSaysNothingGivesScaleOne) {
  QuantizeOptions own;
  own.own_amax = true;
  for (const float value : {0.0f, kInf, kNaN}) {
    const at::Tensor x = at::full({2, 16}, value);
    const Quantized q = quantize(x, slots_with(5.0f), kRole, kE4M3Type, own);
    EXPECT_EQ(q.scale_inv.item<float>(), 1.0f) << value;
    EXPECT_TRUE(same_bits(bytes(q.q), padded_codes(x, 1.0f, kE4M3Type))) << value;
  }
}

TEST(Quantize, RecastsWhatDoesNotFitItsScale) {
  for_each_type([](at::ScalarType dtype, at::ScalarType fp8) {
    const at::Tensor x = at::randn({33, 50}).to(dtype);
    for (const bool record : {true, false}) {
      QuantizeOptions options;
      options.columnwise = options.recast = true;
      options.record = record;
      const float own = max_of(fp8) / amax_of(x);
      for (const auto& [scale, expected] :
           {std::pair{own, own}, {own * 1.9f, own * 1.9f}, {own * 2.1f, own}, {own / 31, own / 31}, {own / 33, own}}) {
        const at::Tensor slots = slots_with(scale);
        const Quantized q = quantize(x, slots, kRole, fp8, options);
        EXPECT_TRUE(same_bits(bytes(q.q), padded_codes(x, expected, fp8))) << scale / own;
        EXPECT_TRUE(same_bits(bytes(q.q_t), padded_codes(x, expected, fp8).t())) << scale / own;
        EXPECT_EQ(q.scale_inv.item<float>(), 1.0f / expected);
        EXPECT_EQ(slots[kRole][1].item<float>(), scale) << "the slot's own scale is the update's to change";
        EXPECT_EQ(amax_in(slots, kRole), record ? amax_of(x) : 0.0f);
      }
    }
  });
}

TEST(Quantize, AmaxIsTheLargestSinceTheUpdate) {
  const at::Tensor slots = slots_with(1.0f);
  for (const auto& [value, expected] : {std::pair{-3.0f, 3.0f}, {2.0f, 3.0f}, {4.0f, 4.0f}}) {
    quantize(at::full({2, 2}, value), slots, kRole, kE4M3Type, {});
    EXPECT_EQ(amax_in(slots, kRole), expected);
  }
  QuantizeOptions silent;
  silent.record = false;
  quantize(at::full({2, 2}, 9.0f), slots, kRole, kE4M3Type, silent);
  EXPECT_EQ(amax_in(slots, kRole), 4.0f);
}

TEST(Quantize, GivesWhatIsAskedFor) {
  QuantizeOptions options;
  options.rowwise = false;
  const Quantized none = quantize(at::ones({3, 5}), slots_with(1.0f), kRole, kE5M2Type, options);
  EXPECT_EQ(none.q.numel() + none.q_t.numel() + none.dbias.numel(), 0);
  EXPECT_EQ(none.q.scalar_type(), kE5M2Type);
  options.columnwise = true;
  options.dbias = at::kBFloat16;
  const Quantized some = quantize(at::ones({3, 5}), slots_with(1.0f), kRole, kE5M2Type, options);
  EXPECT_EQ(some.q_t.sizes(), (at::IntArrayRef{16, 16}));
  EXPECT_TRUE(same_bits(some.dbias, at::full({5}, 3.0f, at::kBFloat16)));
}

TEST(Quantize, Empty) {
  QuantizeOptions all;
  all.own_amax = all.columnwise = true;
  all.dbias = at::kFloat;
  for (const std::vector<int64_t>& size : {std::vector<int64_t>{0, 20}, {20, 0}, {0, 0}, {0}, {2, 0, 20}}) {
    const at::Tensor slots = slots_with(1.0f);
    const Quantized q = quantize(at::empty(size), slots, kRole, kE4M3Type, all);
    const int64_t rows = size.size() == 1 ? 1 : size.size() == 3 ? 0 : size[0];
    EXPECT_EQ(q.q.sizes(), (at::IntArrayRef{padded(rows), padded(size.back())})) << at::IntArrayRef(size);
    EXPECT_EQ(q.q_t.sizes(), (at::IntArrayRef{padded(size.back()), padded(rows)})) << at::IntArrayRef(size);
    EXPECT_TRUE(same_bits(q.dbias, at::zeros({size.back()}))) << at::IntArrayRef(size);
    EXPECT_EQ(amax_in(slots, kRole), 0.0f);
  }
}

TEST(Quantize, Errors) {
  const at::Tensor x = at::ones({4, 4}), slots = slots_with(1.0f);
  const auto call = [](const at::Tensor& x, const at::Tensor& slots, int64_t role = 0, at::ScalarType fp8 = kE4M3Type,
                       int64_t margin = 0) {
    return [=] {
      QuantizeOptions options;
      options.margin = margin;
      quantize(x, slots, role, fp8, options);
    };
  };
  EXPECT_TRUE(throws<c10::TypeError>(call(x.to(at::kDouble), slots), "x must be bfloat16, float16 or float32, got"));
  EXPECT_TRUE(throws<c10::TypeError>(call(x, slots, 0, at::kHalf), "must be float8_e4m3fn or float8_e5m2, got Half"));
  EXPECT_TRUE(throws(call(x.select(0, 0).select(0, 0), slots), "at least one dimension, got a scalar"));
  EXPECT_TRUE(throws(call(x.to_sparse(), slots), "must be a dense (strided) tensor, got layout Sparse"));
  EXPECT_TRUE(throws(call(x, at::ones({3, 3})), "slots must be a contiguous float32 tensor of shape (roles, 4), got"));
  EXPECT_TRUE(throws(call(x, slots.to(at::kDouble)), "got Double [3, 4]"));
  EXPECT_TRUE(throws(call(x, at::ones({4, 3}).t()), "with strides [1, 3]"));
  EXPECT_TRUE(throws(call(x, at::ones({13}).narrow(0, 1, 12).view({3, 4})), "slots must start at a 16-byte boundary"));
  EXPECT_TRUE(throws(call(x, at::empty({3, 4}, at::kMeta)), "slots is on meta but x is on cpu"));
  EXPECT_TRUE(throws<c10::IndexError>(call(x, slots, 3), "role must be in [0, 3), got 3"));
  EXPECT_TRUE(throws<c10::IndexError>(call(x, slots, -1), "role must be in [0, 3), got -1"));
  EXPECT_TRUE(throws<c10::ValueError>(call(x, slots, 0, kE4M3Type, 32), "margin must be in [0, 31], got 32"));
  EXPECT_TRUE(throws<c10::ValueError>(call(x, slots, 0, kE4M3Type, -1), "margin must be in [0, 31], got -1"));
  EXPECT_EQ(amax_in(slots, 0), 0.0f) << "errors come before anything is written";
}

}  // namespace
}  // namespace torch_fp8::tests
