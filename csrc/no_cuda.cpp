// cuda:: in a library built without CUDA: each function says so. CMake compiles this file in place of csrc/cuda/.
#include <stdexcept>

#include "build_config.h"
#include "torch_fp8/kernels.h"

namespace torch_fp8::cuda {
namespace {

[[noreturn]] void refuse() {
  throw std::runtime_error(std::string("torch_fp8: this library was built for the CPU only (") + why_absent() +
                           ") but was given CUDA tensors; reinstall it where a CUDA PyTorch and nvcc of its CUDA "
                           "version are found, or move the model to the CPU");
}

}  // namespace

void amax(const Matrix&, float*) { refuse(); }
void scale_from_amax(const float*, Slot*, float, bool) { refuse(); }
void quantize(const QuantizeArgs&) { refuse(); }
void count_losses(const LossArgs&) { refuse(); }
void quantize_rows(const QuantizeRowsArgs&) { refuse(); }
void quantize_groups(const QuantizeGroupsArgs&) { refuse(); }
void rescale(const RescaleArgs&) { refuse(); }
void skinny(const SkinnyArgs&) { refuse(); }
void skinny_fp8(const SkinnyFp8Args&) { refuse(); }
void add_column_sums(const ColumnSums&) { refuse(); }
void dequantize(const DequantizeArgs&) { refuse(); }
void gemm(const GemmArgs&) { refuse(); }
void update_scales(const LayerState*, int64_t) { refuse(); }
std::vector<TimedAlgorithm> time_algorithms(const GemmProblem&, int) { refuse(); }
void check_algorithm(const GemmProblem&, const std::string&) { refuse(); }
void use_algorithms(const std::vector<std::pair<GemmProblem, std::string>>&) { refuse(); }
void forget_algorithms() {}
void check_capability(int, int, const std::string&) { refuse(); }
StreamState current_stream() { return {}; }
const char* toolkit_version() { return ""; }
const char* why_absent() { return TORCH_FP8_NO_CUDA_REASON; }
size_t cublaslt_version() { return 0; }

}  // namespace torch_fp8::cuda
