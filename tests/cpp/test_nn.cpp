// The LibTorch module beside torch::nn::Linear and beside the function it wraps.
#include <sstream>
#include <string>

#include <torch/torch.h>

#include "oracle.h"
#include "torch_fp8/torch_fp8.h"

namespace torch_fp8::tests {
namespace {

constexpr int64_t kIn = 24, kOut = 16;

class Module : public testing::Test {
 protected:
  void SetUp() override { torch::manual_seed(0); }

  // A step towards zero output; its loss.
  static float step(nn::Linear& layer, torch::optim::Optimizer& optimizer, const at::Tensor& x) {
    optimizer.zero_grad();
    const at::Tensor loss = layer->forward(x).square().mean();
    loss.backward();
    optimizer.step();
    nn::update_scales(*layer);
    return loss.item<float>();
  }

  static void expect_same(const nn::Linear& a, const nn::Linear& b) {
    EXPECT_TRUE(same_bits(a->weight, b->weight));
    EXPECT_TRUE(same_bits(a->bias, b->bias));
    EXPECT_TRUE(same_bits(a->slots, b->slots));
    EXPECT_TRUE(same_bits(a->history, b->history));
  }

  static nn::Linear trained(int steps) {
    nn::Linear layer(nn::LinearOptions(kIn, kOut).amax_history_len(4));
    torch::optim::SGD optimizer(layer->parameters(), 0.1);
    for (int i = 0; i < steps; ++i) step(layer, optimizer, torch::randn({8, kIn}));
    return layer;
  }
};

TEST_F(Module, StartsAsTorchLinearDoes) {
  for (const bool bias : {true, false}) {
    torch::manual_seed(7);
    const torch::nn::Linear reference(torch::nn::LinearOptions(kIn, kOut).bias(bias));
    torch::manual_seed(7);
    nn::Linear layer(nn::LinearOptions(kIn, kOut).bias(bias));
    EXPECT_TRUE(same_bits(layer->weight, reference->weight));
    ASSERT_EQ(layer->bias.defined(), bias);
    EXPECT_TRUE(!bias || same_bits(layer->bias, reference->bias));
    EXPECT_EQ(layer->parameters().size(), reference->parameters().size());
    EXPECT_TRUE(same_bits(layer->slots, new_slots(at::kCPU)));
    EXPECT_EQ(layer->forward(torch::ones({2, 3, kIn})).sizes(), (at::IntArrayRef{2, 3, kOut}));
  }
}

TEST_F(Module, TrainsAsAHandWrittenLoopDoes) {
  torch_fp8::LinearOptions recipe;
  recipe.margin = 1;
  recipe.power_of_two = true;
  nn::Linear layer(nn::LinearOptions(kIn, kOut).recipe(recipe).amax_history_len(3));
  torch::optim::SGD optimizer(layer->parameters(), 0.1);

  const at::Tensor weight = layer->weight.detach().clone().requires_grad_();
  const at::Tensor bias = layer->bias.detach().clone().requires_grad_();
  const at::Tensor slots = new_slots(at::kCPU, -1, 0), history = torch::zeros({kRoles, 3});
  const auto memo = new_memo();
  torch::optim::SGD by_hand({weight, bias}, 0.1);

  const at::Tensor x = torch::randn({32, kIn});
  float first = 0, last = 0;
  for (int i = 0; i < 20; ++i) {
    last = step(layer, optimizer, x);
    if (i == 0) first = last;

    by_hand.zero_grad();
    const at::Tensor loss = linear(x, weight, bias, slots, recipe, memo, true).square().mean();
    loss.backward();
    by_hand.step();
    update_scales_({slots}, {history}, {224.0, 224.0, 57344.0}, {1});
    end_step(*memo, weight);

    ASSERT_EQ(loss.item<float>(), last) << i;
    ASSERT_TRUE(same_bits(layer->weight, weight)) << i;
    ASSERT_TRUE(same_bits(layer->bias, bias)) << i;
    ASSERT_TRUE(same_bits(layer->slots, slots)) << i;
    ASSERT_TRUE(same_bits(layer->history, history)) << i;
  }
  EXPECT_LT(last, first / 2);
}

TEST_F(Module, CastsLeaveTheScalingStateAsItIs) {
  torch::nn::Sequential model(trained(3));
  auto& layer = *model[0]->as<nn::Linear>();
  const at::Tensor slots = layer.slots.clone(), history = layer.history.clone();
  const at::Tensor x = torch::randn({4, kIn});
  for (const auto dtype : {torch::kBFloat16, torch::kHalf, torch::kFloat}) {
    model->to(dtype);
    EXPECT_TRUE(same_bits(layer.slots, slots)) << dtype;
    EXPECT_TRUE(same_bits(layer.history, history)) << dtype;
    EXPECT_EQ(model->forward(x.to(dtype)).scalar_type(), dtype);
    layer.slots.copy_(slots);  // forward has recorded
  }
  model->to(torch::kCPU, torch::kBFloat16);
  EXPECT_EQ(layer.weight.scalar_type(), torch::kBFloat16);
  EXPECT_TRUE(same_bits(layer.named_buffers()["slots"], slots)) << "the registered buffer is the one in use";
}

TEST_F(Module, CloneIsIndependent) {
  nn::Linear layer = trained(3);
  nn::Linear copy(std::dynamic_pointer_cast<nn::LinearImpl>(layer->clone()));
  expect_same(layer, copy);
  EXPECT_NE(layer->memo, copy->memo);
  const at::Tensor x = torch::randn({4, kIn}), before = layer->weight.detach().clone(), slots = layer->slots.clone();
  EXPECT_TRUE(same_bits(copy->forward(x), layer->forward(x)));
  layer->slots.copy_(slots);
  torch::optim::SGD optimizer(copy->parameters(), 0.1);
  step(copy, optimizer, x);
  EXPECT_TRUE(same_bits(layer->weight, before));
  EXPECT_TRUE(same_bits(layer->slots, slots));
}

TEST_F(Module, SavesAndLoadsToContinueBitForBit) {
  for (const bool in_use : {false, true}) {
    SCOPED_TRACE(in_use ? "into a module that is in use" : "into a new module");
    nn::Linear layer = trained(3), loaded(nn::LinearOptions(kIn, kOut).amax_history_len(4));
    if (in_use) loaded->forward(torch::randn({4, kIn}));  // it knows now that it has no history, and keeps its weight
    std::stringstream file;
    torch::save(layer, file);
    torch::load(loaded, file);
    expect_same(layer, loaded);
    torch::optim::SGD optimizer(layer->parameters(), 0.1), resumed(loaded->parameters(), 0.1);
    for (int i = 0; i < 5; ++i) {
      const at::Tensor x = torch::randn({8, kIn});
      ASSERT_EQ(step(layer, optimizer, x), step(loaded, resumed, x)) << i;
      expect_same(layer, loaded);
    }
  }
}

TEST_F(Module, UpdatesEveryLayerOfAModel) {
  torch_fp8::LinearOptions constant;
  constant.scaling = Scaling::kConstant;
  constant.margin = 1, constant.grad_margin = 3;
  torch::nn::Sequential model(nn::Linear(kIn, kOut), torch::nn::GELU(), nn::Linear(kOut, kOut),
                              torch::nn::Linear(kOut, kOut),
                              nn::Linear(nn::LinearOptions(kOut, kOut).recipe(constant).constant_bias(2)));
  model->forward(torch::randn({4, kIn})).sum().backward();
  nn::update_scales(*model);
  for (const size_t i : {0, 2}) {
    const auto& layer = *model[i]->as<nn::Linear>();
    EXPECT_TRUE(layer.history.select(1, 0).gt(0).all().item<bool>()) << i;
    const at::Tensor target = torch::tensor({448.0f, 448.0f, 57344.0f});
    EXPECT_TRUE(same_bits(layer.slots.select(1, 1), target / layer.history.select(1, 0))) << i;
    EXPECT_EQ(used_roles(*layer.memo), 0) << i;
  }
  EXPECT_TRUE(same_bits(model[4]->as<nn::Linear>()->slots, new_slots(at::kCPU, 1, -1)));
  nn::update_scales(torch::nn::Sequential(torch::nn::Linear(kIn, kOut)).operator*());  // none: nothing to do
}

TEST_F(Module, SaysWhatItIs) {
  std::ostringstream text;
  text << nn::Linear(nn::LinearOptions(kIn, kOut).bias(false));
  EXPECT_EQ(text.str(), "torch_fp8::nn::Linear(in_features=24, out_features=16, bias=false)");
  EXPECT_TRUE(throws<c10::ValueError>([] { nn::Linear(nn::LinearOptions(kIn, kOut).amax_history_len(0)); },
                                      "amax_history_len must be positive, got 0"));
}

}  // namespace
}  // namespace torch_fp8::tests
