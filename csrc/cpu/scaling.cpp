#include <algorithm>

#include "kernels.h"

namespace torch_fp8::cpu {
namespace {

void update_scales(const LayerState* layers, int64_t count) {
  for (const LayerState* layer = layers; layer != layers + count; ++layer) {
    for (int role = 0; role < kRoles; ++role) {
      Slot& slot = layer->slots[role];
      float* history = layer->history + int64_t{role} * layer->length;
      if (is_usable(slot.amax)) {
        const int32_t index = static_cast<int32_t>(slot.cursor) % layer->length;
        history[index] = slot.amax;
        const float largest = *std::max_element(history, history + layer->length);
        slot.cursor = static_cast<float>(index + 1);
        slot.scale = scale_for(largest, layer->target[role], layer->power_of_two);
        slot.scale_inv = 1.0f / slot.scale;
      }
      slot.amax = 0.0f;
    }
  }
}

[[maybe_unused]] const bool filled = (cpu_kernels().update_scales = update_scales, true);

}  // namespace
}  // namespace torch_fp8::cpu
