#include "ops/reference_gemm.h"

namespace torch_fp8::cpu {

void gemm(const GemmArgs& args) { reference_gemm(args, at::kCPU); }

}  // namespace torch_fp8::cpu
