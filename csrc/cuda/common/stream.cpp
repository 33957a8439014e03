#include <ATen/cuda/CUDAContextLight.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/common/launch.h"

namespace torch_fp8::cuda {

cudaStream_t checked_stream() {
  const cudaDeviceProp* device = at::cuda::getCurrentDeviceProperties();
  if (device->major != 9 || device->minor != 0) check_capability(device->major, device->minor, device->name);
  return c10::cuda::getCurrentCUDAStream();
}

namespace {

StreamState state_of_stream() {
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  cudaStreamCaptureStatus status;
  unsigned long long capture = 0;
  check(cudaStreamGetCaptureInfo(stream, &status, &capture), "cudaStreamGetCaptureInfo");
  return {stream, status == cudaStreamCaptureStatusActive ? capture : 0};
}

[[maybe_unused]] const bool filled = (cuda_kernels().current_stream = state_of_stream, true);

}  // namespace

}  // namespace torch_fp8::cuda
