// update_scales_: check, gather the layers' pointers, run on their backend.
#include <vector>

#include <c10/core/DeviceGuard.h>

#include "check.h"
#include "torch_fp8/ops.h"

namespace torch_fp8 {
namespace {

void check_history(const at::Tensor& history, const at::Tensor& slots) {
  TORCH_CHECK(history.scalar_type() == at::kFloat && history.dim() == 2 && history.size(0) == kRoles &&
                  history.size(1) > 0 && history.is_contiguous(),
              "torch_fp8: a history must be a contiguous float32 tensor of shape (", int(kRoles), ", length), got ",
              history.scalar_type(), " ", history.sizes());
  check_same_device(slots, "its slots tensor", history, "a history");
}

}  // namespace

void update_scales_(at::TensorList slots, at::TensorList histories, at::ArrayRef<double> targets,
                    at::IntArrayRef power_of_two) {
  const size_t count = slots.size();
  TORCH_CHECK(histories.size() == count && targets.size() == count * kRoles && power_of_two.size() == count,
              "torch_fp8: ", count, " layers need as many histories, ", int(kRoles),
              " targets each and one power_of_two, got ", histories.size(), ", ", targets.size(), " and ",
              power_of_two.size());
  std::vector<LayerState> layers(count);
  for (size_t i = 0; i < count; ++i) {
    check_slots(slots[i], kRoles);
    check_history(histories[i], slots[i]);
    check_same_device(slots[0], "the first layer", slots[i], "another layer");
    LayerState& layer = layers[i];
    layer.slots = slots_of(slots[i]);
    layer.history = histories[i].data_ptr<float>();
    layer.length = static_cast<int32_t>(histories[i].size(1));
    layer.power_of_two = power_of_two[i] != 0;
    for (int role = 0; role < kRoles; ++role) {
      const double target = targets[i * kRoles + role];
      TORCH_CHECK_VALUE(target > 0 && target <= E5M2::kMax, "torch_fp8: a target must be in (0, ", E5M2::kMax,
                        "], got ", target);
      layer.target[role] = static_cast<float>(target);
    }
  }
  if (count == 0) return;
  const c10::DeviceGuard guard(slots[0].device());
  kernels_of(slots[0]).update_scales(layers.data(), static_cast<int64_t>(count));
}

}  // namespace torch_fp8
