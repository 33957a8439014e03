// A record of the GEMMs that this thread asks for. While it is open, an op on tensors of the meta device goes the way
// that it would go on a GPU: so its GEMMs are found without memory and without a GPU.
#pragma once

#include <vector>

#include <ATen/core/Tensor.h>

#include "kernels.h"

namespace torch_fp8 {

class GemmRecord {
 public:
  GemmRecord();
  ~GemmRecord();
  GemmRecord(const GemmRecord&) = delete;
  GemmRecord& operator=(const GemmRecord&) = delete;

  const std::vector<GemmProblem>& problems() const { return problems_; }

  static bool is_open();
  // Asks a backend for a GEMM; every op does so by this function.
  static void run(const Kernels& kernels, const GemmArgs& args);

 private:
  std::vector<GemmProblem> problems_;
  GemmRecord* outer_;
};

// Where a tensor's data lies, as GemmArgs wants it: on the meta device an address too, since null says "no tensor".
inline const void* address_of(const at::Tensor& tensor) {
  alignas(256) static constexpr char kNowhere = 0;
  return tensor.is_meta() ? &kNowhere : tensor.const_data_ptr();
}

}  // namespace torch_fp8
