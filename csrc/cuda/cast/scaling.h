// The two launches of scaling.cu.
#pragma once

#include "cuda/common/launch.h"

namespace torch_fp8::cuda {

// As many roles as fit a kernel's 32,764 bytes of arguments, beside their count.
constexpr int kInlineRoles = 1364;
// roles on the host, count <= kInlineRoles: they travel in the kernel's arguments.
void launch_update_scales(const RoleState* roles, int count, cudaStream_t stream);
// roles on the device, any count.
void launch_update_scales_table(const RoleState* roles, int64_t count, cudaStream_t stream);

}  // namespace torch_fp8::cuda
