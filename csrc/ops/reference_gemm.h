#pragma once

#include <c10/core/Device.h>

#include "kernels.h"

namespace torch_fp8 {

// gemm by plain PyTorch on the device that the pointers belong to: codes to float32, a float32 matrix product, one
// rounding at the end. Products of FP8 codes are exact in float32, so the only error besides the output's rounding is
// that of a float32 sum. This is the CPU backend, and CUDA's last resort.
void reference_gemm(const GemmArgs& args, c10::Device device);

}  // namespace torch_fp8
