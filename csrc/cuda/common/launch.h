// The kernels' launchers: what csrc/cuda/ops.cpp calls with the current stream. No torch here and in the .cu files.
#pragma once

#include <stdexcept>
#include <string>

#include <cuda_runtime_api.h>

#include "torch_fp8/kernels.h"

namespace torch_fp8::cuda {

void launch_amax(const Matrix& x, float* parts, cudaStream_t stream);
void launch_scale_from_amax(const float* parts, Slot* slot, float target, bool power_of_two, cudaStream_t stream);
void launch_quantize(const QuantizeArgs& args, cudaStream_t stream);
void launch_dequantize(const DequantizeArgs& args, cudaStream_t stream);
void launch_quantize_rows(const QuantizeRowsArgs& args, cudaStream_t stream);
void launch_quantize_groups(const QuantizeGroupsArgs& args, cudaStream_t stream);
void launch_rescale(const RescaleArgs& args, cudaStream_t stream);
void launch_skinny(const SkinnyArgs& args, cudaStream_t stream);
void launch_skinny_ring(const SkinnyArgs& args, cudaStream_t stream);  // what launch_skinny takes where it fits
void launch_skinny_fp8(const SkinnyFp8Args& args, cudaStream_t stream);
void launch_count_losses(const LossArgs& args, cudaStream_t stream);
void launch_add_column_sums(const ColumnSums& sums, cudaStream_t stream);

// As many layers as fit a kernel's 32,764 bytes of arguments.
constexpr int kInlineLayers = 1000;
// layers on the host, count <= kInlineLayers: they travel in the kernel's arguments.
void launch_update_scales(const LayerState* layers, int count, cudaStream_t stream);
// layers on the device, any count.
void launch_update_scales_table(const LayerState* layers, int64_t count, cudaStream_t stream);

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("torch_fp8: ") + what + " failed: " + cudaGetErrorString(status));
}

}  // namespace torch_fp8::cuda
