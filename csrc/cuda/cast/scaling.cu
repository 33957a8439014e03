// The scaling update of a whole model in one launch: a block a layer, a warp a role.
#include "cuda/cast/scaling.h"

namespace torch_fp8::cuda {
namespace {

constexpr int kThreads = kRoles * 32;

// One warp; see cpu::update_scales, which this follows step by step.
__device__ void update_role(const LayerState& layer, int role) {
  Slot& slot = layer.slots[role];
  float* const history = layer.history + int64_t{role} * layer.length;
  const int lane = threadIdx.x % 32;
  const float amax = slot.amax, cursor = slot.cursor;
  __syncwarp();
  if (is_usable(amax)) {
    const int index = static_cast<int>(cursor) % layer.length;
    float largest = amax;
    for (int i = lane; i < layer.length; i += 32) {
      if (i != index) largest = fmaxf(largest, history[i]);
    }
    largest = __uint_as_float(__reduce_max_sync(0xFFFFFFFF, __float_as_uint(largest)));
    if (lane == 0) {
      history[index] = amax;
      slot.cursor = static_cast<float>(index + 1);
      slot.scale = scale_for(largest, layer.target[role], layer.power_of_two);
      slot.scale_inv = 1.0f / slot.scale;
    }
  }
  if (lane == 0) slot.amax = 0.0f;
}

struct InlineLayers {
  LayerState layers[kInlineLayers];
};
static_assert(sizeof(InlineLayers) <= 32764, "CUDA's limit of kernel arguments");

__global__ void __launch_bounds__(kThreads) update_scales_kernel(__grid_constant__ const InlineLayers table) {
  update_role(table.layers[blockIdx.x], threadIdx.x / 32);
}

__global__ void __launch_bounds__(kThreads) update_scales_table_kernel(const LayerState* layers) {
  update_role(layers[blockIdx.x], threadIdx.x / 32);
}

}  // namespace

void launch_update_scales(const LayerState* layers, int count, cudaStream_t stream) {
  InlineLayers table;
  for (int i = 0; i < count; ++i) table.layers[i] = layers[i];
  update_scales_kernel<<<count, kThreads, 0, stream>>>(table);
  check(cudaGetLastError(), "update_scales_kernel");
}

void launch_update_scales_table(const LayerState* layers, int64_t count, cudaStream_t stream) {
  update_scales_table_kernel<<<count, kThreads, 0, stream>>>(layers);
  check(cudaGetLastError(), "update_scales_table_kernel");
}

}  // namespace torch_fp8::cuda
