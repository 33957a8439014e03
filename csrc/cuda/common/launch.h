// How a launcher becomes a row of the table of kernels, and how CUDA's errors become exceptions. No torch here and in
// the .cu files.
#pragma once

#include <stdexcept>
#include <string>

#include <cuda_runtime_api.h>

#include "kernels.h"

namespace torch_fp8::cuda {

// The current stream of the current device, which must be one this build runs on (stream.cpp).
cudaStream_t checked_stream();

// The row calls the launcher with the current stream behind its arguments.
template <auto kLaunch, class... Arguments>
bool fill(void (*&row)(Arguments...)) {
  row = [](Arguments... arguments) { kLaunch(arguments..., checked_stream()); };
  return true;
}

// A failed call also leaves its error with the thread, where PyTorch's next check would find it again.
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string("torch_fp8: ") + what + " failed: " + cudaGetErrorString(status));
}

}  // namespace torch_fp8::cuda
