#include <algorithm>

#include "kernels.h"

namespace torch_fp8::cpu {
namespace {

void update_scales(const RoleState* roles, int64_t count) {
  for (const RoleState* role = roles; role != roles + count; ++role) {
    Slot& slot = *role->slot;
    if (is_usable(slot.amax)) {
      const int32_t index = static_cast<int32_t>(slot.cursor) % role->length;
      role->history[index] = slot.amax;
      const float largest = *std::max_element(role->history, role->history + role->length);
      slot.cursor = static_cast<float>(index + 1);
      slot.scale = scale_for(largest, role->target, role->margin);
      slot.scale_inv = 1.0f / slot.scale;
    }
    slot.amax = 0.0f;
  }
}

[[maybe_unused]] const bool filled = (cpu_kernels().update_scales = update_scales, true);

}  // namespace
}  // namespace torch_fp8::cpu
