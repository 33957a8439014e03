#include "kernels.h"

#include <ATen/core/Tensor.h>

#include "build_config.h"

namespace torch_fp8 {
namespace {

constexpr bool kHasCuda = sizeof TORCH_FP8_CUDA_VERSION > 1;

void check_built() {
  TORCH_CHECK(kHasCuda, "torch_fp8: this library was built for the CPU only (", TORCH_FP8_NO_CUDA_REASON,
              ") but was given CUDA tensors; reinstall it where a CUDA PyTorch and nvcc of its CUDA "
              "version are found, or move the model to the CPU");
}

// On the meta device an op goes the way that it would go on a GPU, and nothing is computed.
const Kernels& meta_kernels() {
  static const Kernels table = [] {
    Kernels none{};
    none.amax = [](const Matrix&, float*) {};
    none.scale_from_amax = [](const float*, Slot*, float, int) {};
    none.quantize = [](const QuantizeArgs&) {};
    none.activate = [](const ActivationArgs&) {};
    none.activate_rows = [](const ActivationRowsArgs&) {};
    none.activate_backward = [](const ActivationBackwardArgs&) {};
    none.norm = [](const NormArgs&) {};
    none.norm_backward = [](const NormBackwardArgs&) {};
    none.quantize_rows = [](const QuantizeRowsArgs&) {};
    none.quantize_groups = [](const QuantizeGroupsArgs&) {};
    none.add_column_sums = [](const ColumnSums&) {};
    none.recast = [](const RecastArgs&) {};
    none.gemm = [](const GemmArgs&) {};
    none.rescale = [](const RescaleArgs&) {};
    none.dequantize = [](const DequantizeArgs&) {};
    none.transpose = [](const TransposeArgs&) {};
    none.skinny = [](const SkinnyArgs&) {};
    none.attention = [](const AttentionArgs&) {};
    none.attention_backward = [](const AttentionBackwardArgs&) {};
    none.role_amaxes = [](const RoleAmaxesArgs&) {};
    none.dequantize_heads = [](const DequantizeHeadsArgs&) {};
    none.centre_keys = [](const CentreArgs&) {};
    none.skinny_fp8 = [](const SkinnyFp8Args&) {};
    return none;
  }();
  return table;
}

}  // namespace

Kernels& cpu_kernels() {
  static Kernels table{};
  return table;
}

Kernels& cuda_kernels() {
  static Kernels table{};
  return table;
}

const Kernels& kernels(bool on_cuda) {
  if (!on_cuda) return cpu_kernels();
  check_built();
  return cuda_kernels();
}

const Kernels& kernels_of(const at::Tensor& tensor) {
  return tensor.is_meta() ? meta_kernels() : kernels(tensor.is_cuda());
}

void norm_and_quantize(const Kernels& kernels, const NormRowsArgs& args) {
  kernels.norm(args.norm);
  if (!args.q) return;
  Matrix y = args.norm.cast.x;
  y.data = args.norm.y, y.row_stride = y.cols, y.col_stride = 1;
  if (args.slot) {
    kernels.quantize({y, Format::kE4M3, args.slot, args.q, nullptr, nullptr, nullptr, nullptr});
  } else {
    kernels.quantize_rows({y, args.q, args.scale_inv, nullptr});
  }
}

namespace cuda {

const char* toolkit_version() { return TORCH_FP8_CUDA_VERSION; }
const char* why_absent() { return TORCH_FP8_NO_CUDA_REASON; }

size_t cublaslt_version() { return kHasCuda ? kernels(/*on_cuda=*/true).cublaslt_version() : 0; }

void check_capability(int major, int minor, const std::string& name) {
  check_built();
  TORCH_CHECK(major == 9 && minor == 0,
              "torch_fp8: the FP8 kernels are built for Hopper (compute capability 9.0, "
              "H100 or H200), but ",
              name, " has ", major, ".", minor,
              "; keep the model in 16 bits there "
              "(torch_fp8.revert(model)) or run it on a Hopper GPU");
}

}  // namespace cuda

}  // namespace torch_fp8
