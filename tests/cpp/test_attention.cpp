// FP8 attention from C++: beside PyTorch's in 16 bits, step by step.
#include <cmath>

#include <torch/torch.h>

#include "oracle.h"
#include "torch_fp8/torch_fp8.h"

namespace torch_fp8::tests {
namespace {

struct Given {
  at::Tensor q, k, v, dy;
};

Given given(int64_t dims = 128) {
  torch::manual_seed(0);
  const auto heads = [&](int64_t n) {
    return torch::randn({2, 40, n, dims}).to(at::kBFloat16).transpose(1, 2).detach().requires_grad_();
  };
  return {heads(4), heads(2), heads(2), torch::randn({2, 4, 40, dims}).to(at::kBFloat16)};
}

double error(const at::Tensor& a, const at::Tensor& b) {
  return ((a.to(at::kDouble) - b.to(at::kDouble)).norm() / b.to(at::kDouble).norm()).item<double>();
}

TEST(Attention, IsPyTorchsButForTheCasts) {
  for (const AttentionMode mode : {AttentionMode::kFp8Forward, AttentionMode::kFp8}) {
    const AttentionOptions options;
    const auto memo = new_attention_memo(options);
    const at::Tensor slots = new_attention_slots(at::kCPU), history = torch::zeros({kAttentionRoles, 4});
    std::vector<double> targets;
    std::vector<int64_t> powers_of_two;
    for (int role = 0; role < kAttentionRoles; ++role) {
      const Cast cast = options.cast(static_cast<AttentionRole>(role));
      targets.push_back(cast.target()), powers_of_two.push_back(cast.power_of_two);
    }
    for (int step = 0; step < 2; ++step) {  // by own amaxes, and by the history
      auto [q, k, v, dy] = given();
      const at::Tensor y = scaled_dot_product_attention(q, k, v, slots, options, memo, /*training=*/true,
                                                        /*causal=*/true, c10::nullopt, mode);
      y.backward(dy);
      auto [q2, k2, v2, dy2] = given();
      const at::Tensor exact = at::scaled_dot_product_attention(q2, k2, v2, {}, 0.0, /*is_causal=*/true, c10::nullopt,
                                                                /*enable_gqa=*/true);
      exact.backward(dy2);
      EXPECT_LT(error(y, exact), 0.065);
      const double bound = mode == AttentionMode::kFp8 ? 0.12 : 0.065;
      EXPECT_LT(error(q.grad(), q2.grad()), bound);
      EXPECT_LT(error(k.grad(), k2.grad()), bound);
      EXPECT_LT(error(v.grad(), v2.grad()), bound);
      EXPECT_FLOAT_EQ(slots[kQ][2].item<float>(), q.abs().max().item<float>());
      EXPECT_EQ(slots[kGradP][2].item<float>() > 0, mode == AttentionMode::kFp8);
      update_scales_({slots}, {history}, targets, powers_of_two);
      end_step(*memo);
      EXPECT_EQ(slots[kQ][1].item<float>(), std::exp2(std::floor(std::log2(448 / q.abs().max().item<float>()))));
      EXPECT_FLOAT_EQ(slots[kV][1].item<float>(), 448 / v.abs().max().item<float>());
      EXPECT_EQ(slots[kP][1].item<float>(), 256);
    }
  }
}

TEST(Attention, RefusesInWords) {
  const AttentionOptions options;
  const at::Tensor slots = new_attention_slots(at::kCPU);
  const auto attend = [&](const Given& g, AttentionMode mode) {
    return scaled_dot_product_attention(g.q, g.k, g.v, slots, options, new_attention_memo(options), true, true,
                                        c10::nullopt, mode);
  };
  EXPECT_THROW(attend(given(64), AttentionMode::kFp8), c10::Error);
  EXPECT_NO_THROW(attend(given(64), AttentionMode::kFp8Forward));
  EXPECT_THROW(attend(given(24), AttentionMode::kFp8Forward), c10::Error);
  EXPECT_FLOAT_EQ(slots[kP][0].item<float>(), 1.0f / 256);
}

}  // namespace
}  // namespace torch_fp8::tests
