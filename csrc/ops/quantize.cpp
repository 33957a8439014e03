// quantize and count_losses: check, allocate, run on the tensor's backend.
#include <c10/core/DeviceGuard.h>

#include "check.h"
#include "torch_fp8/ops.h"

namespace torch_fp8 {
namespace {

// (..., K) as (M, K) without a copy wherever strides allow it; a vector is one row.
at::Tensor as_matrix(const at::Tensor& x) {
  if (x.dim() == 2) return x;
  return x.reshape({leading_size(x.sizes()), x.size(-1)});
}

Matrix matrix_of(const at::Tensor& x) {
  return {x.const_data_ptr(), type_of(x.scalar_type(), "x"), x.size(0), x.size(1), x.stride(0), x.stride(1)};
}

void check_quantize(const at::Tensor& x, const at::Tensor& slots, int64_t role, int64_t margin) {
  type_of(x.scalar_type(), "x");
  TORCH_CHECK(x.dim() >= 1, "torch_fp8: x must have at least one dimension, got a scalar; use x.reshape(1)");
  check_strided(x, "x");
  check_slots(slots, 0);
  check_same_device(x, "x", slots, "slots");
  TORCH_CHECK_INDEX(role >= 0 && role < slots.size(0), "torch_fp8: role must be in [0, ", slots.size(0), "), got ",
                    role);
  TORCH_CHECK_VALUE(margin >= 0 && margin <= kMaxBias, "torch_fp8: margin must be in [0, ", kMaxBias, "], got ",
                    margin);
}

float target_of(Format format, const QuantizeOptions& options) {
  return std::ldexp(max_of(format), -static_cast<int>(options.margin));
}

// The slot of a tensor that is scaled by itself, and behind it the parts of its amax.
at::Tensor own_slot_of(const Matrix& matrix, const at::Tensor& x, Format format, const QuantizeOptions& options) {
  const at::Tensor own = at::empty({4 + kAmaxParts}, x.options().dtype(at::kFloat));
  float* const parts = static_cast<float*>(own.data_ptr()) + 4;
  const float target = target_of(format, options);
  kernels_of(x).amax(matrix, parts);
  kernels_of(x).scale_from_amax(parts, slots_of(own), target, options.power_of_two);
  return own;
}

}  // namespace

Quantized quantize_only(const at::Tensor& x, const at::Tensor& slots, int64_t role, at::ScalarType dtype,
                        const QuantizeOptions& options) {
  const Format format = format_of(dtype, "dtype");
  check_quantize(x, slots, role, options.margin);
  const c10::DeviceGuard guard(x.device());
  const NoAutocast no_autocast;

  const at::Tensor x2 = as_matrix(x);
  const Matrix matrix = matrix_of(x2);
  const int64_t rows = padded(matrix.rows), cols = padded(matrix.cols);
  const auto fp8 = x.options().dtype(dtype);
  const auto fp32 = x.options().dtype(at::kFloat);

  Quantized out;
  if (options.rowwise) out.q = at::empty({rows, cols}, fp8);
  if (options.columnwise) out.q_t = at::empty({cols, rows}, fp8);
  out.scale_inv = at::empty({1}, fp32);
  at::Tensor column_sums;
  if (options.dbias) column_sums = at::empty({(matrix.rows + kBiasRows - 1) / kBiasRows, cols}, fp32);

  Slot* const slot = slots_of(slots) + role;
  at::Tensor own;
  if (options.own_amax) own = own_slot_of(matrix, x, format, options);
  const Slot* const source = own.defined() ? slots_of(own) : slot;

  QuantizeArgs args{matrix,  format, source, nullptr, nullptr, static_cast<float*>(out.scale_inv.data_ptr()),
                    nullptr, nullptr};
  if (options.rowwise) args.q = static_cast<uint8_t*>(out.q.data_ptr());
  if (options.columnwise) args.q_t = static_cast<uint8_t*>(out.q_t.data_ptr());
  at::Tensor scratch;
  const bool recasts = options.recast && !options.own_amax;
  if (options.record) {
    args.amax = &slot->amax;
  } else if (recasts) {
    scratch = at::zeros({1}, fp32);
    args.amax = static_cast<float*>(scratch.data_ptr());
  }
  if (options.dbias) args.column_sums = static_cast<float*>(column_sums.data_ptr());
  kernels_of(x).quantize(args);
  if (recasts) kernels_of(x).recast({args, target_of(format, options), options.power_of_two});

  if (options.dbias) {
    out.dbias = at::empty({matrix.cols}, x.options().dtype(*options.dbias));
    kernels_of(x).add_column_sums({static_cast<const float*>(column_sums.const_data_ptr()), column_sums.size(0),
                                   matrix.cols, cols, out.dbias.data_ptr(), type_of(*options.dbias, "dbias")});
  }
  return out;
}

Quantized quantize(const at::Tensor& x, const at::Tensor& slots, int64_t role, at::ScalarType dtype,
                   const QuantizeOptions& options) {
  Quantized out = quantize_only(x, slots, role, dtype, options);
  for (at::Tensor* codes : {&out.q, &out.q_t}) {
    if (!codes->defined()) *codes = at::empty({0}, x.options().dtype(dtype));
  }
  if (!out.dbias.defined()) out.dbias = nothing(x);
  return out;
}

std::tuple<at::Tensor, at::Tensor> count_losses(const at::Tensor& x, const at::Tensor& slots, int64_t role,
                                                at::ScalarType dtype, const QuantizeOptions& options) {
  const Format format = format_of(dtype, "dtype");
  check_quantize(x, slots, role, options.margin);
  const c10::DeviceGuard guard(x.device());
  const NoAutocast no_autocast;
  const at::Tensor x2 = as_matrix(x);
  const Matrix matrix = matrix_of(x2);
  at::Tensor counts = at::zeros({kLosses}, x.options().dtype(at::kLong));
  at::Tensor values = at::zeros({2}, x.options().dtype(at::kFloat));
  at::Tensor own;
  if (options.own_amax) own = own_slot_of(matrix, x, format, options);
  const Slot* const slot = own.defined() ? slots_of(own) : slots_of(slots) + role;
  kernels_of(x).count_losses({matrix, format, slot, counts.data_ptr<int64_t>(), values.data_ptr<float>()});
  return {counts, values};
}

}  // namespace torch_fp8
