// The LibTorch module beside torch::nn::Linear and beside the function it wraps.
#include <sstream>
#include <string>

#include <torch/torch.h>

#include "oracle.h"
#include "siblings.h"
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
  const auto own = nn::LinearOptions(kOut, kOut).recipe(constant).constant_bias(2).constant_weight_bias(7);
  EXPECT_TRUE(same_bits(nn::Linear(own)->slots, new_slots(at::kCPU, 1, -1, /*weight_bias=*/6)));
  const at::Tensor slots = nn::Linear(nn::LinearOptions(own).constant_grad_bias(20))->slots;
  EXPECT_TRUE(same_bits(slots.select(1, 1), torch::tensor({2.0f, 64.0f, 131072.0f})));
  nn::update_scales(torch::nn::Sequential(torch::nn::Linear(kIn, kOut)).operator*());  // none: nothing to do
}

TEST_F(Module, SaysWhatItIs) {
  std::ostringstream text;
  text << nn::Linear(nn::LinearOptions(kIn, kOut).bias(false));
  EXPECT_EQ(text.str(), "torch_fp8::nn::Linear(in_features=24, out_features=16, bias=false)");
  EXPECT_TRUE(throws<c10::ValueError>([] { nn::Linear(nn::LinearOptions(kIn, kOut).amax_history_len(0)); },
                                      "amax_history_len must be positive, got 0"));
}

// ---- norms and MLPs -------------------------------------------------------------------------------------------------

struct HalfBlock {
  explicit HalfBlock(const nn::MLPOptions& options) : norm(options.hidden_size()), mlp(options) {
    model->push_back(norm), model->push_back(mlp);
    model->to(torch::kBFloat16);
  }
  explicit HalfBlock(const std::shared_ptr<torch::nn::Module>& copied)
      : norm(std::dynamic_pointer_cast<nn::RMSNormImpl>(copied->children()[0])),
        mlp(std::dynamic_pointer_cast<nn::MLPImpl>(copied->children()[1])),
        model(std::dynamic_pointer_cast<torch::nn::SequentialImpl>(copied)) {}

  // Loss and gradient of the input, in a step of training or, without update, a micro-batch.
  std::pair<float, at::Tensor> step(const at::Tensor& given, bool feeds = true, bool update = true) {
    const at::Tensor x = given.to(torch::kBFloat16).requires_grad_();
    model->zero_grad();
    const auto [y, sum] =
        norm->with_sum(x, c10::nullopt, feeds ? mlp->readers() : std::vector<torch_fp8::nn::Linear>());
    const at::Tensor loss = mlp->forward(y, sum).to(at::kFloat).square().mean();
    loss.backward();
    if (update) {
      const at::NoGradGuard no_grad;
      for (at::Tensor& p : model->parameters()) p.sub_(p.grad(), 0.1);
      nn::update_scales(*model);
    }
    return {loss.item<float>(), x.grad()};
  }

  nn::RMSNorm norm;
  nn::MLP mlp;
  torch::nn::Sequential model;
};

void expect_equal(const std::pair<float, at::Tensor>& a, const std::pair<float, at::Tensor>& b) {
  EXPECT_EQ(a.first, b.first);
  EXPECT_TRUE(same_bits(a.second, b.second));
}

std::vector<nn::MLPOptions> mlp_options() {
  return {nn::MLPOptions(32, 48), nn::MLPOptions(32, 48).gated(false).activation("gelu_tanh").bias(true),
          nn::MLPOptions(32, 48).activation("xielu").recipe({.scaling = Scaling::kCurrent})};
}

at::Tensor batch() { return torch::randn({12, 32}); }

TEST_F(Module, ALayersCastOfANormIsTheNormsOwn) {
  for (const auto& options : mlp_options()) {
    HalfBlock block(options);
    const auto readers = block.mlp->readers();
    for (int i = 0; i < 3; ++i) block.step(batch());
    const at::Tensor x = batch();
    HalfBlock apart(block.model->clone());
    const auto [fed, dx] = block.step(x);
    const auto [cast, dx_apart] = apart.step(x, /*feeds=*/false);
    EXPECT_NE(fed, cast) << "codes of what was never rounded";
    EXPECT_NEAR(fed, cast, 0.02 * cast);
    EXPECT_TRUE(at::allclose(dx, dx_apart, 0.1, 0.1 * dx_apart.abs().max().item<double>()));
    for (const auto& reader : readers) EXPECT_TRUE(reader->place.siblings->reads_norms);
    EXPECT_EQ(readers.front()->place.siblings->size(), readers.size());
    EXPECT_TRUE(same_bits(readers.front()->slots[0], readers.back()->slots[0]));
  }
}

TEST_F(Module, CopiesAndFilesOfAnMlpGoOnBitForBit) {
  for (const auto& options : mlp_options()) {
    HalfBlock block(options), loaded(options);
    for (int i = 0; i < 3; ++i) block.step(batch()), loaded.step(batch());
    HalfBlock copy(block.model->clone());
    std::stringstream file;
    torch::save(block.model, file);
    torch::load(loaded.model, file);
    for (int i = 0; i < 3; ++i) {
      const at::Tensor x = batch();
      const auto mine = block.step(x);
      expect_equal(copy.step(x), mine);
      expect_equal(loaded.step(x), mine);
    }
    EXPECT_FALSE(copy.mlp->up_proj->weight.is_alias_of(block.mlp->up_proj->weight));
    EXPECT_NE(copy.mlp->up_proj->memo, block.mlp->up_proj->memo);
    if (options.gated()) {
      EXPECT_NE(copy.mlp->up_proj->place.siblings, block.mlp->up_proj->place.siblings);
      EXPECT_EQ(copy.mlp->up_proj->place.siblings, copy.mlp->gate_proj->place.siblings);
    }
  }
}

TEST_F(Module, WhatIsMadeAgainInBackwardIsTheSame) {
  for (const auto& options : mlp_options()) {
    torch::manual_seed(1);
    HalfBlock kept(options);
    torch::manual_seed(1);
    HalfBlock again(nn::MLPOptions(options).recompute(true));
    for (int i = 0; i < 4; ++i) {
      const at::Tensor x = batch();
      expect_equal(again.step(x, true, i % 2 == 1), kept.step(x, true, i % 2 == 1));
    }
  }
}

TEST_F(Module, LayersThatAreUpdatedApartCastApart) {
  HalfBlock block(mlp_options()[0]);
  for (int i = 0; i < 3; ++i) block.step(batch());
  const auto& siblings = *block.mlp->up_proj->place.siblings;
  EXPECT_EQ(siblings.follows(), (std::vector<int>{-1, 0}));
  block.step(3 * batch(), true, /*update=*/false);
  nn::update_scales(*block.mlp->up_proj);
  EXPECT_EQ(siblings.follows(), (std::vector<int>{-1, -1}));
  EXPECT_FALSE(same_bits(block.mlp->up_proj->slots[0], block.mlp->gate_proj->slots[0]));
}

TEST_F(Module, ANormWhoseCodesNobodyReadsCastsNoMore) {
  HalfBlock block(mlp_options()[0]);
  for (int i = 0; i < 3; ++i) block.step(batch());
  const auto [y, sum] = block.norm->with_sum(batch().to(torch::kBFloat16), c10::nullopt, block.mlp->readers());
  block.mlp->forward(y + 1000).sum().backward();
  const at::Tensor scale = block.mlp->up_proj->slots[0][1].clone();
  nn::update_scales(*block.model);
  EXPECT_FALSE(block.mlp->up_proj->place.siblings->reads_norms);
  block.step(batch());
}

TEST_F(Module, NormsStartAndComputeAsTorchsDo) {
  const at::Tensor x = batch(), gain = torch::rand({32}), bias = torch::rand({32});
  for (const bool affine : {true, false}) {
    nn::LayerNorm norm(nn::NormOptions(32).elementwise_affine(affine).eps(1e-3));
    nn::RMSNorm rms(nn::NormOptions(32).elementwise_affine(affine).eps(1e-3));
    EXPECT_EQ(norm->parameters().size(), affine ? 2 : 0);
    EXPECT_EQ(rms->parameters().size(), affine ? 1 : 0);
    const at::NoGradGuard no_grad;
    c10::optional<at::Tensor> weight, shift;
    if (affine) {
      norm->weight.copy_(gain), norm->bias.copy_(bias), rms->weight.copy_(gain);
      weight = gain, shift = bias;
    }
    EXPECT_TRUE(at::allclose(norm->forward(x), at::layer_norm(x, {32}, weight, shift, 1e-3), 1e-5, 1e-5));
    EXPECT_TRUE(at::allclose(rms->forward(x), at::rms_norm(x, {32}, weight, 1e-3), 1e-5, 1e-5));
  }
  EXPECT_FALSE(nn::LayerNorm(nn::NormOptions(32).bias(false))->bias.defined());
}

TEST_F(Module, SaysWhatIsNoMlp) {
  EXPECT_TRUE(throws<c10::ValueError>([] { nn::MLP(nn::MLPOptions(32, 48).activation("swish")); },
                                      "activation must be one of silu, gelu, gelu_tanh, xielu, relu_squared, got"));
  EXPECT_TRUE(throws<c10::ValueError>([] { nn::share_input({nn::Linear(32, 16)}); }, "two or more layers, got 1"));
  EXPECT_TRUE(throws<c10::ValueError>([] { nn::share_input({nn::Linear(32, 16), nn::Linear(16, 16)}); },
                                      "must have one in_features"));
  const nn::Linear twice(32, 16);
  EXPECT_TRUE(throws<c10::ValueError>([&] { nn::share_input({twice, twice}); }, "different layers"));
  std::ostringstream text;
  text << nn::MLP(32, 48) << nn::RMSNorm(32);
  EXPECT_NE(text.str().find("torch_fp8::nn::MLP(silu)"), std::string::npos) << text.str();
  EXPECT_NE(text.str().find("RMSNorm(32, eps=1e-05, elementwise_affine=true)"), std::string::npos) << text.str();
}

}  // namespace
}  // namespace torch_fp8::tests
