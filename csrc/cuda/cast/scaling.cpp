// How the roles of an update reach the device.
#include "cuda/cast/scaling.h"

#include <algorithm>
#include <cstring>

#include <ATen/ATen.h>

namespace torch_fp8::cuda {
namespace {

void update_scales(const RoleState* roles, int64_t count) {
  const cudaStream_t stream = checked_stream();
  // The roles travel in the kernel's arguments, which a graph keeps; only a model too large for that is sent through
  // memory, which a graph would read again after it was reused.
  if (count <= kInlineRoles || is_capturing()) {
    for (int64_t i = 0; i < count; i += kInlineRoles) {
      launch_update_scales(roles + i, static_cast<int>(std::min<int64_t>(kInlineRoles, count - i)), stream);
    }
    return;
  }
  const int64_t bytes = count * static_cast<int64_t>(sizeof(RoleState));
  const at::Tensor host = at::empty({bytes}, at::TensorOptions().dtype(at::kByte).pinned_memory(true));
  std::memcpy(host.data_ptr(), roles, static_cast<size_t>(bytes));
  const at::Tensor device = host.to(at::kCUDA, /*non_blocking=*/true);
  launch_update_scales_table(static_cast<const RoleState*>(device.const_data_ptr()), count, stream);
}

[[maybe_unused]] const bool filled = (cuda_kernels().update_scales = update_scales, true);

}  // namespace
}  // namespace torch_fp8::cuda
