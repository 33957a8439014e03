// update_scales_ against a list of amaxes and a division.
#include <algorithm>
#include <cmath>
#include <deque>
#include <random>
#include <vector>

#include "oracle.h"
#include "torch_fp8/ops.h"

namespace torch_fp8::tests {
namespace {

// One role of one layer, as the documentation of delayed scaling has it.
struct Role {
  size_t length;
  float target;
  bool power_of_two;
  std::deque<float> history = {};  // the usable amaxes, at most `length` of them
  float scale = 1;

  void update(float amax) {
    if (!(amax > 0 && amax < kInf)) return;
    history.push_back(amax);
    if (history.size() > length) history.pop_front();
    const float largest = *std::max_element(history.begin(), history.end());
    scale = std::clamp(target / largest, 0x1p-126f, 0x1p126f);
    if (power_of_two) scale = std::exp2(std::clamp(std::floor(std::log2(scale)), -31.0f, 31.0f));
  }

  void expect(const at::Tensor& slot, const at::Tensor& ring) const {
    EXPECT_EQ(slot[0].item<float>(), 1.0f / scale);
    EXPECT_EQ(slot[1].item<float>(), scale);
    EXPECT_EQ(slot[2].item<float>(), 0.0f) << "the amax is cleared for the next step";
    EXPECT_EQ(slot[3].item<float>() > 0, !history.empty());
    std::vector<float> held(ring.data_ptr<float>(), ring.data_ptr<float>() + length), expected(length, 0.0f);
    std::copy(history.begin(), history.end(), expected.begin());
    std::sort(held.begin(), held.end());
    std::sort(expected.begin(), expected.end());
    EXPECT_EQ(held, expected);
  }
};

TEST(UpdateScales, FollowsTheHistory) {
  constexpr size_t kSteps = 40;
  const std::vector<int64_t> lengths = {1, 3, 16, 1, 3, 16}, power_of_two = {0, 0, 0, 1, 1, 1};
  // Two formats, and a target that a margin of 4 has lowered.
  const std::array<double, kRoles> role_targets = {448.0, 28.0, 57344.0};
  std::vector<at::Tensor> slots, histories;
  std::vector<double> targets;
  std::vector<Role> roles;
  for (size_t layer = 0; layer < lengths.size(); ++layer) {
    slots.push_back(slots_with(1.0f));
    histories.push_back(at::zeros({kRoles, lengths[layer]}));
    for (const double target : role_targets) {
      targets.push_back(target);
      roles.push_back({static_cast<size_t>(lengths[layer]), static_cast<float>(target), power_of_two[layer] != 0});
    }
  }

  std::mt19937 random(0);
  std::normal_distribution<float> exponent(0, 6);
  const float special[] = {0.0f, kInf, kNaN, 1e30f, 1e-30f, std::numeric_limits<float>::denorm_min()};
  for (size_t step = 0; step < kSteps; ++step) {
    for (size_t i = 0; i < roles.size(); ++i) {
      const at::Tensor& layer = slots[i / kRoles];
      const auto role = static_cast<int64_t>(i % kRoles);
      const auto event = random() % 12;  // every second step or so, something out of the ordinary
      const float amax = event < 6 ? special[event] : std::exp2(exponent(random));
      layer[role][2] = amax;
      roles[i].update(amax);
    }
    update_scales_(slots, histories, targets, power_of_two);
    for (size_t i = 0; i < roles.size(); ++i) {
      SCOPED_TRACE("step " + std::to_string(step) + ", layer " + std::to_string(i / kRoles));
      const auto role = static_cast<int64_t>(i % kRoles);
      roles[i].expect(slots[i / kRoles][role], histories[i / kRoles][role]);
    }
  }
}

TEST(UpdateScales, LayersOfAnyRoles) {
  const std::vector<int64_t> counts = {1, 10, 3, 16};
  std::vector<at::Tensor> slots, histories;
  std::vector<double> targets;
  std::vector<int64_t> power_of_two;
  std::vector<Role> roles;
  for (const int64_t count : counts) {
    slots.push_back(at::ones({count, 4}));
    slots.back().narrow(1, 2, 2).zero_();
    histories.push_back(at::zeros({count, 2}));
    for (int64_t role = 0; role < count; ++role) {
      targets.push_back(role % 2 ? 57344.0 : 448.0);
      power_of_two.push_back(role % 3 == 0);
      roles.push_back({2, static_cast<float>(targets.back()), power_of_two.back() != 0});
    }
  }
  for (int step = 0; step < 4; ++step) {
    float amax = 1.0f;
    auto role = roles.begin();
    for (const at::Tensor& layer : slots) {
      for (int64_t i = 0; i < layer.size(0); ++i, ++role) {
        amax = (step + i) % 5 == 4 ? 0.0f : 3.0f + static_cast<float>((7 * step + 3 * i) % 11);
        layer[i][2] = amax;
        role->update(amax);
      }
    }
    update_scales_(slots, histories, targets, power_of_two);
    role = roles.begin();
    for (size_t layer = 0; layer < slots.size(); ++layer) {
      for (int64_t i = 0; i < counts[layer]; ++i, ++role) role->expect(slots[layer][i], histories[layer][i]);
    }
  }
}

TEST(UpdateScales, NoLayers) { update_scales_({}, {}, {}, {}); }

TEST(UpdateScales, Errors) {
  const at::Tensor slots = slots_with(1.0f), history = at::zeros({kRoles, 4});
  const auto call = [&](const at::Tensor& slots, const at::Tensor& history, double target = 448.0) {
    return [=] { update_scales_({slots}, {history}, {448.0, target, 448.0}, {0}); };
  };
  EXPECT_TRUE(throws([&] { update_scales_({slots, slots}, {history}, {448.0}, {}); },
                     "2 layers need as many histories, got 1"));
  EXPECT_TRUE(throws([&] { update_scales_({slots}, {history}, {448.0}, {0}); },
                     "1 layers with 3 roles need a target for each role and a power_of_two for each role or layer, "
                     "got 1 and 1"));
  EXPECT_TRUE(throws([&] { update_scales_({slots}, {history}, {448.0, 448.0, 448.0}, {0, 0}); }, "got 3 and 2"));
  EXPECT_TRUE(throws(call(at::ones({3, 3}), history), "slots must be a contiguous float32 tensor of shape (roles, 4)"));
  EXPECT_TRUE(throws(call(slots, history.narrow(0, 0, 2)), "a history must be a contiguous float32 tensor of shape"));
  EXPECT_TRUE(throws(call(slots, at::zeros({kRoles, 0})), "(3, length), got Float [3, 0]"));
  EXPECT_TRUE(throws(call(slots, history.to(at::kHalf)), "got Half [3, 4]"));
  EXPECT_TRUE(throws(call(slots, at::empty({kRoles, 4}, at::kMeta)), "a history is on meta but its slots tensor"));
  for (const double target : {0.0, -1.0, 57345.0, static_cast<double>(kNaN)}) {
    EXPECT_TRUE(throws<c10::ValueError>(call(slots, history, target), "a target must be in (0, 57344], got"));
  }
}

}  // namespace
}  // namespace torch_fp8::tests
