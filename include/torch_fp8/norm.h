// RMSNorm and LayerNorm whose result is handed to FP8 layers as codes, made in the same pass.
#pragma once

#include <tuple>

#include "torch_fp8/mlp.h"

namespace torch_fp8 {

struct NormOptions {
  double eps = 1e-6;
  bool layer_norm = false;   // else RMSNorm
  double gain_offset = 0.0;  // added to the gain: 1 in Gemma
  bool recompute = false;    // the readers' backward makes the transpose of y's codes again instead of keeping it
};

// y, sum: the norm of sum = x + residual, both of x's shape (..., K) and dtype; without a residual sum is x. Whoever
// goes on with sum in the place of x has the gradients of both added in the norm's own backward. gain and bias (K), of
// x's dtype or float32. reader: one of the layers that read y, which take y's codes where its place says so
// (siblings.h); null: there are none. They read y itself wherever they find that it is not what was cast.
std::tuple<at::Tensor, at::Tensor> norm(const at::Tensor& x, const c10::optional<at::Tensor>& residual,
                                        const c10::optional<at::Tensor>& gain, const c10::optional<at::Tensor>& bias,
                                        const NormOptions& options, const LinearLayer* reader);

}  // namespace torch_fp8
