// cuda:: as kernels.h declares it: the device is checked, the current stream found, the kernel launched.
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <c10/cuda/CUDAStream.h>
#include <cublasLt.h>

#include "cuda/common/launch.h"
#include "torch_fp8/kernels.h"

namespace torch_fp8::cuda {
namespace {

// The current stream of the current device, which must be one this build runs on.
cudaStream_t stream() {
  const cudaDeviceProp* device = at::cuda::getCurrentDeviceProperties();
  if (device->major != 9 || device->minor != 0) check_capability(device->major, device->minor, device->name);
  return c10::cuda::getCurrentCUDAStream();
}

}  // namespace

void check_capability(int major, int minor, const std::string& name) {
  TORCH_CHECK(major == 9 && minor == 0,
              "torch_fp8: the FP8 kernels are built for Hopper (compute capability 9.0, "
              "H100 or H200), but ",
              name, " has ", major, ".", minor,
              "; keep the model in 16 bits there "
              "(torch_fp8.revert(model)) or run it on a Hopper GPU");
}

StreamState current_stream() {
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  cudaStreamCaptureStatus status;
  unsigned long long capture = 0;
  check(cudaStreamGetCaptureInfo(stream, &status, &capture), "cudaStreamGetCaptureInfo");
  return {stream, status == cudaStreamCaptureStatusActive ? capture : 0};
}

void amax(const Matrix& x, float* parts) { launch_amax(x, parts, stream()); }

void scale_from_amax(const float* parts, Slot* slot, float target, bool power_of_two) {
  launch_scale_from_amax(parts, slot, target, power_of_two, stream());
}

void quantize(const QuantizeArgs& args) { launch_quantize(args, stream()); }

void quantize_rows(const QuantizeRowsArgs& args) { launch_quantize_rows(args, stream()); }
void quantize_groups(const QuantizeGroupsArgs& args) { launch_quantize_groups(args, stream()); }

void rescale(const RescaleArgs& args) { launch_rescale(args, stream()); }

void dequantize(const DequantizeArgs& args) { launch_dequantize(args, stream()); }

void skinny(const SkinnyArgs& args) { launch_skinny(args, stream()); }
void skinny_fp8(const SkinnyFp8Args& args) { launch_skinny_fp8(args, stream()); }

void count_losses(const LossArgs& args) { launch_count_losses(args, stream()); }

void add_column_sums(const ColumnSums& sums) { launch_add_column_sums(sums, stream()); }

void update_scales(const LayerState* layers, int64_t count) {
  // The layers travel in the kernel's arguments, which a graph keeps; only a model too large for that is sent through
  // memory, which a graph would read again after it was reused.
  if (count <= kInlineLayers || is_capturing()) {
    for (int64_t i = 0; i < count; i += kInlineLayers) {
      launch_update_scales(layers + i, static_cast<int>(std::min<int64_t>(kInlineLayers, count - i)), stream());
    }
    return;
  }
  const int64_t bytes = count * static_cast<int64_t>(sizeof(LayerState));
  const at::Tensor host = at::empty({bytes}, at::TensorOptions().dtype(at::kByte).pinned_memory(true));
  std::memcpy(host.data_ptr(), layers, static_cast<size_t>(bytes));
  const at::Tensor device = host.to(at::kCUDA, /*non_blocking=*/true);
  launch_update_scales_table(static_cast<const LayerState*>(device.const_data_ptr()), count, stream());
}

const char* toolkit_version() {
  static const std::string version =
      std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  return version.c_str();
}

const char* why_absent() { return ""; }
size_t cublaslt_version() { return cublasLtGetVersion(); }

}  // namespace torch_fp8::cuda
