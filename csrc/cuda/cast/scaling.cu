// The scaling update of a whole model in one launch: a warp a role.
#include "cuda/cast/scaling.h"

namespace torch_fp8::cuda {
namespace {

constexpr int kWarps = 4;

// One warp; see cpu::update_scales, which this follows step by step.
__device__ void update_role(const RoleState& role) {
  Slot& slot = *role.slot;
  float* const history = role.history;
  const int lane = threadIdx.x % 32;
  const float amax = slot.amax, cursor = slot.cursor;
  __syncwarp();
  if (is_usable(amax)) {
    const int index = static_cast<int>(cursor) % role.length;
    float largest = amax;
    for (int i = lane; i < role.length; i += 32) {
      if (i != index) largest = fmaxf(largest, history[i]);
    }
    largest = __uint_as_float(__reduce_max_sync(0xFFFFFFFF, __float_as_uint(largest)));
    if (lane == 0) {
      history[index] = amax;
      slot.cursor = static_cast<float>(index + 1);
      slot.scale = scale_for(largest, role.target, role.margin);
      slot.scale_inv = 1.0f / slot.scale;
    }
  }
  if (lane == 0) slot.amax = 0.0f;
}

struct InlineRoles {
  RoleState roles[kInlineRoles];
  int count;
};
static_assert(sizeof(InlineRoles) <= 32764, "CUDA's limit of kernel arguments");

__device__ int64_t my_role() { return int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; }

__global__ void __launch_bounds__(kWarps * 32) update_scales_kernel(__grid_constant__ const InlineRoles table) {
  if (my_role() < table.count) update_role(table.roles[my_role()]);
}

__global__ void __launch_bounds__(kWarps * 32) update_scales_table_kernel(const RoleState* roles, int64_t count) {
  if (my_role() < count) update_role(roles[my_role()]);
}

uint32_t blocks_of(int64_t count) { return static_cast<uint32_t>((count + kWarps - 1) / kWarps); }

}  // namespace

void launch_update_scales(const RoleState* roles, int count, cudaStream_t stream) {
  InlineRoles table;
  for (int i = 0; i < count; ++i) table.roles[i] = roles[i];
  table.count = count;
  update_scales_kernel<<<blocks_of(count), kWarps * 32, 0, stream>>>(table);
  check(cudaGetLastError(), "update_scales_kernel");
}

void launch_update_scales_table(const RoleState* roles, int64_t count, cudaStream_t stream) {
  update_scales_table_kernel<<<blocks_of(count), kWarps * 32, 0, stream>>>(roles, count);
  check(cudaGetLastError(), "update_scales_table_kernel");
}

}  // namespace torch_fp8::cuda
