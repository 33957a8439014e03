// The ops of frozen layers from C++: a norm's codes are those that the layer behind it would make.
#include <gtest/gtest.h>

#include <ATen/ATen.h>

#include "torch_fp8/ops.h"

namespace torch_fp8::tests {
namespace {

TEST(Frozen, TakesTheCodesOfANorm) {
  at::manual_seed(0);
  const at::Tensor x = at::randn({40, 72}, at::kBFloat16), gain = at::randn({72}, at::kBFloat16);
  const at::Tensor weight = at::randn({48, 72}).to(at::kFloat8_e4m3fn), scale = at::rand({48, 1});
  const at::Tensor slot = at::tensor({1 / 64.0f, 64.0f, 0.0f, 0.0f}).view({1, 4});
  for (const Activations activations : {Activations::kStatic, Activations::kToken}) {
    const bool is_static = activations == Activations::kStatic;
    const auto input_slot = is_static ? c10::optional<at::Tensor>(slot) : c10::nullopt;
    const auto [y, sum, q, of_rows] = frozen_norm(x, x, gain, {}, 1e-5, false, 0.0, input_slot);
    EXPECT_TRUE(at::equal(sum, x + x));
    const auto run = [&](const c10::optional<at::Tensor>& codes) {
      const auto scales = codes && !is_static ? c10::optional<at::Tensor>(of_rows) : c10::nullopt;
      return frozen_linear(y, weight, scale, {}, input_slot, static_cast<int64_t>(activations), {}, codes, scales);
    };
    EXPECT_TRUE(at::equal(run(q), run(c10::nullopt)));
    EXPECT_FALSE(at::equal(run(at::zeros_like(q.view(at::kByte)).view(at::kFloat8_e4m3fn)), run(q)));
  }
}

}  // namespace
}  // namespace torch_fp8::tests
