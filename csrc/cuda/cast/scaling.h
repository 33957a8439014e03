// The two launches of scaling.cu.
#pragma once

#include "cuda/common/launch.h"

namespace torch_fp8::cuda {

// As many layers as fit a kernel's 32,764 bytes of arguments.
constexpr int kInlineLayers = 1000;
// layers on the host, count <= kInlineLayers: they travel in the kernel's arguments.
void launch_update_scales(const LayerState* layers, int count, cudaStream_t stream);
// layers on the device, any count.
void launch_update_scales_table(const LayerState* layers, int64_t count, cudaStream_t stream);

}  // namespace torch_fp8::cuda
