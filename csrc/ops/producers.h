// What the producers ask of their arguments: ops that make something and cast it in the same pass.
#pragma once

#include "check.h"
#include "ops/linear.h"

namespace torch_fp8 {

inline void check_like(const at::Tensor& t, const char* name, const at::Tensor& x, const char* x_name) {
  TORCH_CHECK_TYPE(t.scalar_type() == x.scalar_type(), "torch_fp8: ", name, " must have ", x_name, "'s dtype ",
                   x.scalar_type(), ", got ", t.scalar_type());
  TORCH_CHECK(t.sizes() == x.sizes(), "torch_fp8: ", name, " must have ", x_name, "'s shape ", x.sizes(), ", got ",
              t.sizes());
  check_strided(t, name);
  check_same_device(x, x_name, t, name);
}

// The slots of what is made of x.
inline void check_role(const at::Tensor& slots, const char* name, const at::Tensor& x, const char* x_name,
                       at::IntArrayRef casts, int64_t role) {
  check_slots(slots, 0);
  check_same_device(x, x_name, slots, name);
  TORCH_CHECK_INDEX(role >= 0 && role < slots.size(0) && role < static_cast<int64_t>(casts.size()),
                    "torch_fp8: role must be in [0, ", casts.size(), "), got ", role);
}

// alphas and beta are xielu's.
void check_activation(int64_t activation, const c10::optional<at::Tensor>& alphas, double beta, const at::Tensor& x,
                      const char* x_name);

// The fakes of norm.cpp's ops, which are in torch_fp8/ops.h.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_cast_meta(
    const at::Tensor& x, const c10::optional<at::Tensor>& residual, const c10::optional<at::Tensor>& gain,
    const c10::optional<at::Tensor>& bias, double eps, bool layer_norm, double gain_offset,
    const c10::optional<at::Tensor>& slots, int64_t role, at::IntArrayRef casts, int64_t history, bool training,
    bool record, bool rowwise, bool columnwise, bool wants_y);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> frozen_norm_meta(
    const at::Tensor& x, const c10::optional<at::Tensor>& residual, const c10::optional<at::Tensor>& gain,
    const c10::optional<at::Tensor>& bias, double eps, bool layer_norm, double gain_offset,
    const c10::optional<at::Tensor>& input_slot, bool codes);
std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_backward_meta(const at::Tensor& dy, const at::Tensor& x,
                                                                  const c10::optional<at::Tensor>& dsum,
                                                                  const c10::optional<at::Tensor>& gain,
                                                                  const at::Tensor& stats, bool layer_norm,
                                                                  double gain_offset, bool wants_dgain,
                                                                  bool wants_dbias);

}  // namespace torch_fp8
