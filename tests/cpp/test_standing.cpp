// Which weights a kernel may read before the kernel in front of it has finished.
#include <gtest/gtest.h>

#include <ATen/ATen.h>

#include "ops/standing.h"

using torch_fp8::weight_stands;

namespace {

using torch_fp8::cuda::StreamState;
const int streams[2] = {};
const StreamState kEager{streams, 0}, kGraph{streams, 7}, kGraphBeside{streams + 1, 7}, kOtherGraph{streams + 1, 8};

struct Layer {
  at::Tensor weight = at::ones({4, 16}), scale = at::ones({4, 1}), bias = at::ones({4});
  bool stands(const StreamState& now) const { return weight_stands(weight, scale, bias, now); }
};

TEST(Standing, InAGraphAfterAnEagerCall) {
  const Layer layer;
  EXPECT_FALSE(layer.stands(kEager));
  EXPECT_FALSE(layer.stands(kEager));
  EXPECT_TRUE(layer.stands(kGraph));
  EXPECT_TRUE(layer.stands(kGraph));
  EXPECT_FALSE(layer.stands(kEager));
}

TEST(Standing, InAGraphAfterACallThatWaited) {
  const Layer layer;
  EXPECT_FALSE(layer.stands(kGraph));
  EXPECT_FALSE(layer.stands(kGraphBeside));
  EXPECT_TRUE(layer.stands(kGraph));
  EXPECT_TRUE(layer.stands(kOtherGraph));
}

TEST(Standing, NotBehindAWrite) {
  for (const auto part : {&Layer::weight, &Layer::scale, &Layer::bias}) {
    const Layer layer;
    layer.stands(kEager);
    EXPECT_TRUE(layer.stands(kGraph));
    (layer.*part).mul_(2);
    EXPECT_FALSE(layer.stands(kGraph));
    EXPECT_FALSE(layer.stands(kGraphBeside));
    EXPECT_TRUE(layer.stands(kGraph));
    EXPECT_TRUE(layer.stands(kOtherGraph));
  }
}

TEST(Standing, NotWithOthersInItsPlace) {
  Layer layer;
  layer.stands(kEager);
  for (const auto part : {&Layer::weight, &Layer::scale, &Layer::bias}) {
    at::Tensor& tensor = layer.*part;
    const at::Tensor before = tensor;
    tensor = at::ones(tensor.sizes());
    EXPECT_FALSE(layer.stands(kGraph));
    tensor = before;
  }
  EXPECT_FALSE(weight_stands(layer.weight, layer.scale, {}, kGraph));
}

// A tensor that lives for one call, as the cast of a bias does, mostly gets the memory of the one before it.
TEST(Standing, NotATensorInRecycledMemory) {
  const Layer layer;
  float memory[64] = {};
  for (int i = 0; i < 10; ++i) {
    const at::Tensor bias = at::from_blob(memory, {4});
    EXPECT_FALSE(weight_stands(layer.weight, layer.scale, bias, i % 2 ? kGraph : kEager));
  }
  for (int i = 0; i < 10; ++i) {
    const at::Tensor weight = at::from_blob(memory, {4, 16});
    EXPECT_FALSE(weight_stands(weight, layer.scale, {}, i % 2 ? kGraph : kEager));
  }
}

TEST(Standing, NotWhatHasNoVersion) {
  const c10::InferenceMode mode;
  const Layer layer;
  layer.stands(kEager);
  EXPECT_FALSE(layer.stands(kGraph));
  EXPECT_FALSE(layer.stands(kGraph));
}

TEST(Standing, ViewsOfOneStorageAreTold) {
  const at::Tensor flat = at::ones({2, 4, 16}), scale = at::ones({1});
  const at::Tensor first = flat[0], second = flat[1];
  weight_stands(first, scale, {}, kEager);
  EXPECT_FALSE(weight_stands(second, scale, {}, kGraph));
  EXPECT_TRUE(weight_stands(first, scale, {}, kGraph));
  flat[1].zero_();  // one version for all views
  EXPECT_FALSE(weight_stands(first, scale, {}, kGraph));
}

}  // namespace
