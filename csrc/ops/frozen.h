// The product of a frozen layer, for the ops that hold one such layer or a stack of them.
#pragma once

#include <ATen/core/Tensor.h>

#include "kernels.h"
#include "torch_fp8/ops.h"

namespace torch_fp8 {

// What frozen_linear computes, of arguments that were checked, on the current device and without autocast. y: where it
// goes, contiguous and of dtype; a new tensor where it is undefined.
at::Tensor frozen_product(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                          WeightScale kind, const c10::optional<at::Tensor>& bias,
                          const c10::optional<at::Tensor>& input_slot, Activations activations, at::ScalarType dtype,
                          const at::Tensor& y = {});

}  // namespace torch_fp8
