// What the producers share: ops that make something and cast it in the same pass.
#pragma once

#include "check.h"
#include "ops/linear.h"

namespace torch_fp8 {

inline Matrix matrix_of(const at::Tensor& x) {
  return {x.const_data_ptr(), type_of(x.scalar_type(), "x"), x.size(0), x.size(1), x.stride(0), x.stride(1)};
}

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

// A cast of what is made of x: its results, where they go, and how it is scaled.
struct Made {
  Codes codes;
  QuantizeArgs args;
  QuantizeOptions options;
  float target;
  at::Tensor own;
};

inline Made prepare(const at::Tensor& x, const at::Tensor& slots, const Cast& cast, int64_t role,
                    const QuantizeOptions& options) {
  Made made{{}, {}, options, static_cast<float>(cast.target()), {}};
  const Matrix matrix = matrix_of(x);
  const int64_t rows = padded(matrix.rows), cols = padded(matrix.cols);
  const auto fp8 = x.options().dtype(cast.dtype());
  if (options.rowwise) made.codes.q = at::empty({rows, cols}, fp8);
  if (options.columnwise) made.codes.q_t = at::empty({cols, rows}, fp8);
  made.codes.scale_inv = at::empty({1}, x.options().dtype(at::kFloat));
  const auto address = [](const at::Tensor& t) { return t.defined() ? static_cast<uint8_t*>(t.data_ptr()) : nullptr; };
  Slot* const slot = slots_of(slots) + role;
  made.args = {matrix,
               cast.format,
               slot,
               address(made.codes.q),
               address(made.codes.q_t),
               static_cast<float*>(made.codes.scale_inv.data_ptr()),
               options.record ? &slot->amax : nullptr,
               nullptr};
  if (options.own_amax) made.own = at::zeros({4 + kAmaxParts}, x.options().dtype(at::kFloat));
  return made;
}

// The first of two passes, where what is made is scaled by its own amax: it writes nothing but that.
inline QuantizeArgs amax_only(const Made& made) {
  QuantizeArgs args = made.args;
  if (made.own.defined()) {
    args.q = args.q_t = nullptr, args.scale_inv = nullptr;
    args.amax = static_cast<float*>(made.own.data_ptr()) + 4;
  }
  return args;
}

inline void scale_by_own(Made& made) {
  if (!made.own.defined()) return;
  const float* const parts = static_cast<const float*>(made.own.data_ptr()) + 4;
  kernels_of(made.own).scale_from_amax(parts, slots_of(made.own), made.target, made.options.power_of_two);
  made.args.slot = slots_of(made.own);
}

inline std::tuple<at::Tensor, at::Tensor, at::Tensor> tensors(const Made& made) {
  const auto filled = [&](const at::Tensor& t) { return t.defined() ? t : nothing(made.codes.scale_inv); };
  return {filled(made.codes.q), filled(made.codes.q_t), made.codes.scale_inv};
}

// The fakes of norm.cpp's ops, which are in torch_fp8/ops.h.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_cast_meta(
    const at::Tensor& x, const c10::optional<at::Tensor>& residual, const c10::optional<at::Tensor>& gain,
    const c10::optional<at::Tensor>& bias, double eps, bool layer_norm, double gain_offset,
    const c10::optional<at::Tensor>& slots, int64_t role, at::IntArrayRef casts, int64_t history, bool training,
    bool record, bool rowwise, bool columnwise, bool wants_y);
std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_backward_meta(const at::Tensor& dy, const at::Tensor& x,
                                                                  const c10::optional<at::Tensor>& dsum,
                                                                  const c10::optional<at::Tensor>& gain,
                                                                  const at::Tensor& stats, bool layer_norm,
                                                                  double gain_offset, bool wants_dgain,
                                                                  bool wants_dbias);

}  // namespace torch_fp8
