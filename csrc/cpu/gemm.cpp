#include "ops/reference_gemm.h"

namespace torch_fp8::cpu {
namespace {

void gemm(const GemmArgs& args) { reference_gemm(args, at::kCPU); }

[[maybe_unused]] const bool filled = (cpu_kernels().gemm = gemm, true);

}  // namespace
}  // namespace torch_fp8::cpu
