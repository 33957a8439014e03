// update_scales_: check, gather the roles' pointers, run on their backend.
#include <vector>

#include <c10/core/DeviceGuard.h>

#include "check.h"
#include "torch_fp8/ops.h"

namespace torch_fp8 {
namespace {

void check_history(const at::Tensor& history, const at::Tensor& slots) {
  TORCH_CHECK(history.scalar_type() == at::kFloat && history.dim() == 2 && history.size(0) == slots.size(0) &&
                  history.size(1) > 0 && history.is_contiguous(),
              "torch_fp8: a history must be a contiguous float32 tensor of shape (", slots.size(0), ", length), got ",
              history.scalar_type(), " ", history.sizes());
  check_same_device(slots, "its slots tensor", history, "a history");
}

}  // namespace

void update_scales_(at::TensorList slots, at::TensorList histories, at::ArrayRef<double> targets,
                    at::IntArrayRef power_of_two) {
  const size_t count = slots.size();
  TORCH_CHECK(histories.size() == count, "torch_fp8: ", count, " layers need as many histories, got ",
              histories.size());
  size_t roles_of_all = 0;
  for (size_t i = 0; i < count; ++i) {
    check_slots(slots[i], 0);
    check_history(histories[i], slots[i]);
    check_same_device(slots[0], "the first layer", slots[i], "another layer");
    roles_of_all += static_cast<size_t>(slots[i].size(0));
  }
  const bool one_a_layer = power_of_two.size() == count;
  TORCH_CHECK(targets.size() == roles_of_all && (one_a_layer || power_of_two.size() == roles_of_all),
              "torch_fp8: ", count, " layers with ", roles_of_all, " roles need a target for each role and a ",
              "power_of_two for each role or layer, got ", targets.size(), " and ", power_of_two.size());

  std::vector<RoleState> states;
  states.reserve(roles_of_all);
  for (size_t i = 0; i < count; ++i) {
    const auto length = static_cast<int32_t>(histories[i].size(1));
    float* const history = histories[i].data_ptr<float>();
    for (int64_t role = 0; role < slots[i].size(0); ++role) {
      const size_t index = states.size();
      const double target = targets[index];
      TORCH_CHECK_VALUE(target > 0 && target <= E5M2::kMax, "torch_fp8: a target must be in (0, ", E5M2::kMax,
                        "], got ", target);
      RoleState state{};
      state.slot = slots_of(slots[i]) + role;
      state.history = history + role * length;
      state.length = length;
      const int64_t rounding = power_of_two[one_a_layer ? i : index];
      TORCH_CHECK_VALUE(rounding >= 0 && rounding <= 32,
                        "torch_fp8: a power_of_two must be 0, or 1 + a margin from 0 to 31, got ", rounding);
      state.margin = static_cast<int32_t>(rounding) - 1;
      state.target = static_cast<float>(target);
      states.push_back(state);
    }
  }
  if (states.empty()) return;
  const c10::DeviceGuard guard(slots[0].device());
  kernels_of(slots[0]).update_scales(states.data(), static_cast<int64_t>(states.size()));
}

}  // namespace torch_fp8
