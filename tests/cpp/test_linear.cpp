// torch_fp8::linear: forward and backward against float64 on the quantised values, and what is kept between calls.
#include "torch_fp8/linear.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/autograd.h>

#include "oracle.h"

namespace torch_fp8::tests {
namespace {

struct Layer {
  Layer(int64_t in, int64_t out, at::ScalarType dtype = at::kFloat)
      : weight(at::randn({out, in}).to(dtype).requires_grad_()), bias(at::randn({out}).to(dtype).requires_grad_()) {}

  at::Tensor operator()(const at::Tensor& x, bool training = true) const {
    return linear(x, weight, bias, slots, options, memo, training);
  }

  void update() {
    update_scales_({slots}, {history}, {options.cast(0).target(), options.cast(1).target(), options.cast(2).target()},
                   {0});
    end_step(*memo, weight);
  }

  void zero_grad() {
    for (at::Tensor* parameter : {&weight, &bias}) parameter->mutable_grad().reset();
  }

  float scale(int role) const { return slots[role][1].item<float>(); }

  at::Tensor weight, bias, slots = new_slots(at::kCPU), history = at::zeros({kRoles, 4});
  LinearOptions options;
  std::shared_ptr<LayerMemo> memo = new_memo();
};

// Counts this thread's casts or GEMMs by what profiles call them; the thread that calls backward() runs a CPU graph's
// nodes itself.
class Calls {
 public:
  explicit Calls(std::vector<std::string> names) {
    names_ = std::move(names), count_ = 0;
    handle_ = at::addThreadLocalCallback(at::RecordFunctionCallback(count).scopes({at::RecordScope::FUNCTION}));
  }
  ~Calls() { at::removeCallback(handle_); }
  int since() { return std::exchange(count_, 0); }  // the last time that it was asked

 private:
  static std::unique_ptr<at::ObserverContext> count(const at::RecordFunction& function) {
    count_ += std::find(names_.begin(), names_.end(), function.name()) != names_.end();
    return nullptr;
  }
  inline static thread_local std::vector<std::string> names_;
  inline static thread_local int count_;
  at::CallbackHandle handle_;
};

class Linear : public testing::Test {
 protected:
  void SetUp() override { at::manual_seed(0); }

  static at::Tensor input(at::IntArrayRef size, at::ScalarType dtype = at::kFloat) {
    return at::randn(size).to(dtype).requires_grad_();
  }
};

// What a step gave, held to the codes that these scales of input, weight and output gradient make.
void expect_step(const Layer& layer, const at::Tensor& x, const at::Tensor& y, const at::Tensor& dy, float x_scale,
                 float weight_scale, float dy_scale) {
  const auto rows = [](const at::Tensor& t) { return t.detach().reshape({t.numel() / t.size(-1), t.size(-1)}); };
  const at::Tensor xq = quantised(rows(x), x_scale, kE4M3Type), dy_rows = rows(dy);
  const at::Tensor wq = quantised(layer.weight, weight_scale, kE4M3Type);
  const at::Tensor gq = quantised(dy_rows, dy_scale, layer.options.cast(kGradOutput).dtype());
  EXPECT_TRUE(is_product(rows(y), xq, wq, layer.bias.detach().to(at::kDouble)));
  EXPECT_TRUE(is_product(rows(x.grad()), gq, wq.t()));
  EXPECT_TRUE(is_product(layer.weight.grad(), gq.t(), xq.t()));
  // The bias gradient is a sum of dy itself: a product with ones.
  const at::Tensor ones = at::ones({1, dy_rows.size(0)}, at::kDouble);
  EXPECT_TRUE(is_product(layer.bias.grad(), dy_rows.to(at::kDouble).t(), ones));
}

TEST_F(Linear, FirstStepIsScaledByEachTensorsOwnAmax) {
  for (const auto dtype : {at::kFloat, at::kHalf, at::kBFloat16}) {
    for (const std::vector<int64_t>& batch : {std::vector<int64_t>{5}, {2, 3}, {17}, {}}) {
      for (const bool e4m3_gradients : {false, true}) {
        SCOPED_TRACE(std::string(c10::toString(dtype)) + " " + std::to_string(batch.size()));
        Layer layer(40, 23, dtype);
        layer.options.e4m3_gradients = e4m3_gradients;
        // Margins so wide that many codes are subnormal: between normal ones a margin changes no value.
        const int margin = 10, grad_margin = e4m3_gradients ? 10 : 24;
        layer.options.margin = margin, layer.options.grad_margin = grad_margin;
        auto x_size = batch, y_size = batch;
        x_size.push_back(40), y_size.push_back(23);
        const at::Tensor x = input(x_size, dtype), dy = at::randn(y_size).to(dtype), y = layer(x);
        y.backward(dy);
        EXPECT_EQ(y.scalar_type(), dtype);
        EXPECT_EQ(y.sizes(), at::IntArrayRef(y_size));
        expect_step(layer, x, y, dy, std::ldexp(own_scale(x, kE4M3Type), -margin),
                    std::ldexp(own_scale(layer.weight, kE4M3Type), -margin),
                    std::ldexp(own_scale(dy, layer.options.cast(kGradOutput).dtype()), -grad_margin));
      }
    }
  }
}

TEST_F(Linear, LaterStepsAreScaledByTheSlots) {
  Layer layer(32, 48);
  layer.options.margin = 1, layer.options.grad_margin = 2;
  for (int step = 0; step < 3; ++step) {
    const at::Tensor x = input({6, 32}), dy = at::randn({6, 48}), y = layer(x);
    y.backward(dy);
    if (step > 0) expect_step(layer, x, y, dy, layer.scale(kInput), layer.scale(kWeight), layer.scale(kGradOutput));
    layer.zero_grad();
    layer.update();
    EXPECT_EQ(layer.scale(kInput), 224.0f / layer.history[kInput].max().item<float>());
    EXPECT_EQ(layer.scale(kGradOutput), 14336.0f / layer.history[kGradOutput].max().item<float>());
  }
}

TEST_F(Linear, ARoleThatHasSeenNothingStartsItsHistoryLater) {
  Layer layer(16, 16);
  const at::Tensor zeros = at::zeros({4, 16}).requires_grad_(), dy = at::ones({4, 16});
  layer(zeros).backward(dy);
  layer.update();
  EXPECT_EQ(layer.scale(kInput), 1.0f);
  for (int step = 0; step < 3; ++step) {
    layer.zero_grad();
    const at::Tensor x = (at::randn({4, 16}) * 100).requires_grad_(), y = layer(x);
    y.backward(dy);
    const float x_scale = step == 0 ? own_scale(x, kE4M3Type) : layer.scale(kInput);
    expect_step(layer, x, y, dy, x_scale, layer.scale(kWeight), layer.scale(kGradOutput));
    layer.update();
  }
}

TEST_F(Linear, OtherScalings) {
  Layer current(32, 32), constant(32, 32);
  current.options.scaling = Scaling::kCurrent;
  constant.options.scaling = Scaling::kConstant;
  constant.slots.copy_(new_slots(at::kCPU, 3, 5));
  for (Layer* layer : {&current, &constant}) {
    const at::Tensor warm_up = input({4, 32});
    (*layer)(warm_up).sum().backward();
    layer->update();
    layer->zero_grad();
    const at::Tensor x = input({4, 32}), dy = at::randn({4, 32}), y = (*layer)(x);
    y.backward(dy);
    if (layer == &constant) {
      expect_step(*layer, x, y, dy, 8.0f, 8.0f, 32.0f);
      EXPECT_TRUE(same_bits(layer->slots, new_slots(at::kCPU, 3, 5))) << "constant scaling records nothing";
    } else {
      expect_step(*layer, x, y, dy, own_scale(x, kE4M3Type), own_scale(layer->weight, kE4M3Type),
                  own_scale(dy, kE5M2Type));
    }
  }
}

TEST_F(Linear, SavedCodesKeepTheirScale) {
  Layer layer(32, 32);
  const at::Tensor small = input({4, 32}), large = (at::randn({4, 32}) * 1000).requires_grad_();
  const at::Tensor dy = at::randn({4, 32}), y_small = layer(small), y_large = layer(large);
  const float weight_scale = own_scale(layer.weight, kE4M3Type), dy_scale = own_scale(dy, kE5M2Type);
  layer.update();  // between the forward passes and their backward passes
  layer.slots.slice(1, 0, 2).fill_(1.0f);
  y_small.backward(dy);
  expect_step(layer, small, y_small, dy, own_scale(small, kE4M3Type), weight_scale, dy_scale);
  layer.zero_grad();
  y_large.backward(dy);
  expect_step(layer, large, y_large, dy, own_scale(large, kE4M3Type), weight_scale, dy_scale);
}

TEST_F(Linear, ComputesOnlyTheGradientsThatAreNeeded) {
  Calls gemms({"torch_fp8::fprop", "torch_fp8::dgrad", "torch_fp8::wgrad"});
  for (const bool x_grad : {false, true}) {
    for (const bool weight_grad : {false, true}) {
      Layer layer(16, 16);
      layer.weight.requires_grad_(weight_grad);
      const at::Tensor x = input({4, 16}).requires_grad_(x_grad), y = layer(x);
      EXPECT_EQ(gemms.since(), 1);
      y.sum().backward();
      EXPECT_EQ(gemms.since(), x_grad + weight_grad);
      EXPECT_EQ(x.grad().defined(), x_grad);
      EXPECT_EQ(layer.weight.grad().defined(), weight_grad);
      EXPECT_TRUE(same_bits(layer.bias.grad(), at::full({16}, 4.0f)));
    }
  }
}

TEST_F(Linear, QuantisesTheWeightOnceForTheMicroBatchesOfAStep) {
  Layer layer(16, 16);
  const at::Tensor x = input({4, 16});
  Calls casts({"torch_fp8::cast_input", "torch_fp8::cast_weight"});
  const auto forwards = [&](int count) {
    casts.since();
    for (int i = 0; i < count; ++i) layer(x);
    return casts.since() - count;
  };
  EXPECT_EQ(forwards(9), 9) << "how many there will be is seen in the step before";
  layer.update();
  EXPECT_EQ(forwards(3), 1);
  {
    const at::NoGradGuard no_grad;
    layer.weight.mul_(2);
  }
  EXPECT_EQ(forwards(2), 1) << "changed in place";
  layer.weight = at::randn({16, 16}).requires_grad_();
  EXPECT_EQ(forwards(2), 1) << "another tensor";
  layer.weight.set_data(at::randn({16, 16}));
  EXPECT_EQ(forwards(1), 1) << "the same tensor with other data";
  layer(x, /*training=*/false);
  EXPECT_EQ(casts.since(), 2) << "evaluation keeps nothing and uses nothing that was kept";
  EXPECT_EQ(forwards(3), 2) << "the step before had 9 micro-batches: beyond those nothing is kept";
  layer.update();
  layer(x).sum().backward();
  EXPECT_EQ(forwards(1), 0) << "the gradient is still there";
  layer.zero_grad();
  EXPECT_EQ(forwards(1), 1) << "the gradient has been used: the weight may be another";
  layer.update();
  EXPECT_EQ(forwards(1), 1) << "another scale";
}

TEST_F(Linear, EvaluationRecordsNothing) {
  Layer layer(16, 16);
  const at::Tensor x = input({4, 16}), before = layer.slots.clone();
  layer(x, /*training=*/false).sum().backward();
  {
    const at::NoGradGuard no_grad;
    EXPECT_FALSE(layer(x).requires_grad());
  }
  {
    const c10::InferenceMode inference;
    layer(x);
  }
  EXPECT_TRUE(same_bits(layer.slots, before));
  EXPECT_EQ(used_roles(*layer.memo), 0);

  layer(x).sum().backward();  // the weight that evaluation has cached is recorded now
  EXPECT_NE(used_roles(*layer.memo), 0);
  EXPECT_EQ(amax_in(layer.slots, kInput), amax_of(x.detach()));
  EXPECT_EQ(amax_in(layer.slots, kWeight), amax_of(layer.weight.detach()));
  EXPECT_EQ(amax_in(layer.slots, kGradOutput), 1.0f);
}

TEST_F(Linear, Autocast) {
  Layer layer(16, 16);
  const at::Tensor x = input({4, 16});
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const at::Tensor y = layer(x);
  at::autocast::set_autocast_enabled(at::kCPU, false);
  EXPECT_EQ(y.scalar_type(), at::kBFloat16);
  y.sum().backward();
  EXPECT_EQ(x.grad().scalar_type(), at::kFloat);
  EXPECT_EQ(layer.weight.grad().scalar_type(), at::kFloat);
}

TEST_F(Linear, EmptyBatch) {
  Layer layer(20, 24);
  const at::Tensor x = input({0, 20}), y = layer(x);
  EXPECT_EQ(y.sizes(), (at::IntArrayRef{0, 24}));
  y.sum().backward();
  EXPECT_EQ(x.grad().sizes(), (at::IntArrayRef{0, 20}));
  EXPECT_TRUE(same_bits(layer.weight.grad(), at::zeros({24, 20})));
  EXPECT_TRUE(same_bits(layer.bias.grad(), at::zeros({24})));
}

TEST_F(Linear, BackwardTwice) {
  const Layer layer(16, 16);
  const at::Tensor x = input({4, 16}), y = layer(x), dy = at::ones({4, 16});
  EXPECT_TRUE(throws([&] { torch::autograd::grad({y}, {x}, {dy}, /*retain_graph=*/true, /*create_graph=*/true); },
                     "the backward of an FP8 linear layer cannot be differentiated again (create_graph=True)"));
  y.backward(dy);
  EXPECT_TRUE(throws([&] { y.backward(dy); }, "backward through the graph a second time"));
}

TEST_F(Linear, Errors) {
  const at::Tensor x = at::ones({4, 16});
  const auto call = [](const at::Tensor& x, auto&& change) {
    return [=] {
      Layer layer(16, 8);
      change(layer);
      layer(x);
    };
  };
  const auto nothing = [](Layer&) {};
  EXPECT_TRUE(throws<c10::TypeError>(call(x.to(at::kDouble), nothing), "the input must be bfloat16, float16 or"));
  EXPECT_TRUE(throws<c10::TypeError>(call(x, [](Layer& layer) { layer.weight = at::ones({8, 16}, at::kHalf); }),
                                     "the input is Float but the weight is Half"));
  EXPECT_TRUE(throws(call(at::ones({4, 15}), nothing), "in_features = 16, got an input of shape [4, 15]"));
  EXPECT_TRUE(throws(call(x[0][0], nothing), "in_features = 16, got an input of shape []"));
  EXPECT_TRUE(throws(call(at::empty({4, 16}, at::kMeta), nothing), "the input is on meta but the weight is on cpu"));
  EXPECT_TRUE(throws<c10::TypeError>(call(x, [](Layer& layer) { layer.weight = at::ones({8, 16}, at::kLong); }),
                                     "the weight must be bfloat16, float16 or float32, got Long"));
  EXPECT_TRUE(throws(call(x, [](Layer& layer) { layer.weight = at::ones({16}); }),
                     "the weight must be a matrix (out_features, in_features), got [16]"));
  EXPECT_TRUE(throws(call(x, [](Layer& layer) { layer.bias = at::ones({9}); }), "must have shape [8], got [9]"));
  EXPECT_TRUE(throws<c10::TypeError>(call(x, [](Layer& layer) { layer.bias = at::ones({8}, at::kHalf); }),
                                     "the bias is Half but the weight is Float"));
  EXPECT_TRUE(throws(call(x, [](Layer& layer) { layer.slots = layer.slots.to(at::kMeta); }),
                     "the layer's scaling state is on meta but the weight is on cpu"));
}

}  // namespace
}  // namespace torch_fp8::tests
