// What tracing needs to know of the ops: the shapes and dtypes of their results, with symbolic sizes.
#include <tuple>

#include <ATen/ATen.h>

#include "check.h"
#include "ops/record.h"
#include "torch_fp8/ops.h"

namespace torch_fp8 {
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantize_meta(const at::Tensor& x, const at::Tensor&,
                                                                         int64_t, at::ScalarType dtype, bool, bool,
                                                                         int64_t, bool, bool rowwise, bool columnwise,
                                                                         c10::optional<at::ScalarType> dbias, bool) {
  TORCH_CHECK(x.dim() >= 1, "torch_fp8: x must have at least one dimension, got a scalar");
  c10::SymInt rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows = rows * x.sym_size(i);
  const c10::SymInt cols = x.sym_size(-1);
  const c10::SymInt padded_rows = padded_symbolic(rows), padded_cols = padded_symbolic(cols);
  const auto empty = [&](c10::SymIntArrayRef size, at::ScalarType type) {
    return at::empty_symint(size, x.options().dtype(type));
  };
  return {rowwise ? empty({padded_rows, padded_cols}, dtype) : empty({0}, dtype),
          columnwise ? empty({padded_cols, padded_rows}, dtype) : empty({0}, dtype), empty({1}, at::kFloat),
          dbias ? empty({cols}, *dbias) : empty({0}, at::kFloat)};
}

at::Tensor gemm_meta(const at::Tensor& a, const at::Tensor& b, const at::Tensor& a_scale_inv,
                     const at::Tensor& b_scale_inv, const c10::optional<at::Tensor>& bias, c10::SymIntArrayRef size,
                     at::ScalarType dtype, bool fast_accum, const c10::optional<at::Tensor>& addend) {
  if (GemmRecord::is_open()) {
    return gemm(a, b, a_scale_inv, b_scale_inv, bias, C10_AS_INTARRAYREF_SLOW(size), dtype, fast_accum, addend);
  }
  return at::empty_symint(size, a.options().dtype(dtype));
}

void gemm_accumulate_meta(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
                          const at::Tensor& a_scale_inv, const at::Tensor& b_scale_inv, bool fast_accum) {
  if (GemmRecord::is_open()) gemm_accumulate_(out, a, b, a_scale_inv, b_scale_inv, fast_accum);
}

}  // namespace torch_fp8
