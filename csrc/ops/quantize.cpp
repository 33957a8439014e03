// quantize and count_losses: check, allocate, run on the tensor's backend.
#include <c10/core/DeviceGuard.h>

#include "ops/cast_plan.h"

namespace torch_fp8 {
namespace {

// (..., K) as (M, K) without a copy wherever strides allow it; a vector is one row.
at::Tensor as_matrix(const at::Tensor& x) {
  if (x.dim() == 2) return x;
  return x.reshape({leading_size(x.sizes()), x.size(-1)});
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

CastPlan plan_of(const at::Tensor& x, const at::Tensor& slots, int64_t role, at::ScalarType dtype,
                 const QuantizeOptions& options) {
  const Format format = format_of(dtype, "dtype");
  check_quantize(x, slots, role, options.margin);
  at::Tensor matrix = as_matrix(x);
  // The codes of a transposed matrix are those of the matrix, transposed. So what is read is read along its memory.
  const bool transposed = matrix.stride(0) == 1 && matrix.stride(1) > 1 && !options.dbias;
  if (!transposed) return plan_cast(std::move(matrix), slots, role, format, options);
  QuantizeOptions turned = options;
  std::swap(turned.rowwise, turned.columnwise);
  CastPlan plan = plan_cast(matrix.t(), slots, role, format, turned);
  std::swap(plan.out.q, plan.out.q_t);
  return plan;
}

void scale_by_amax(CastPlan& plan) {
  kernels_of(plan.x).amax(plan.steps.cast.x, make_own(plan));
  scale_by_own(plan);
}

bool is_small(const CastPlan& plan) {
  return kernels_of(plan.x).cast_small && is_small(plan.steps.cast.x) && !plan.steps.cast.column_sums;
}

}  // namespace

void run(CastPlan& plan) {
  auto& [cast, scale_by, target, margin] = plan.steps;
  const Kernels& kernels = kernels_of(plan.x);
  if (scale_by != ScaleBy::kSlot && is_small(plan)) return kernels.cast_small({{plan.steps}, 1});
  if (scale_by == ScaleBy::kOwnAmax) scale_by_amax(plan);
  at::Tensor amax;
  if (scale_by == ScaleBy::kSlotIfFit && !cast.amax) {
    amax = at::zeros({1}, plan.x.options().dtype(at::kFloat));
    cast.amax = static_cast<float*>(amax.data_ptr());
  }
  kernels.quantize(cast);
  if (scale_by == ScaleBy::kSlotIfFit) kernels.recast({cast, target, margin});
}

Quantized quantize_only(const at::Tensor& x, const at::Tensor& slots, int64_t role, at::ScalarType dtype,
                        const QuantizeOptions& options) {
  const c10::DeviceGuard guard(x.device());
  const NoAutocast no_autocast;
  CastPlan plan = plan_of(x, slots, role, dtype, options);
  run(plan);
  if (options.dbias) plan.out.dbias = sum_columns(plan.column_sums, plan.x.size(1), *options.dbias);
  return std::move(plan.out);
}

std::pair<Quantized, Quantized> quantize_both(const ToQuantize& first, const ToQuantize& second) {
  const c10::DeviceGuard guard(first.x.device());
  const NoAutocast no_autocast;
  const auto planned = [](const ToQuantize& t) { return plan_of(t.x, t.slots, t.role, t.dtype, t.options); };
  CastPlan a = planned(first), b = planned(second);
  const QuantizeArgs &x = a.steps.cast, &y = b.steps.cast;
  if (is_small(a) && is_small(b) && x.x.type == y.x.type && x.format == y.format) {
    kernels_of(a.x).cast_small({{a.steps, b.steps}, 2});
  } else {
    run(a), run(b);
  }
  return {std::move(a.out), std::move(b.out)};
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

at::Tensor transpose_codes(const at::Tensor& codes) {
  const int64_t rows = codes.size(0), cols = codes.size(1);
  at::Tensor transpose = at::empty({padded(cols), padded(rows)}, codes.options());
  kernels_of(codes).transpose(
      {rows, cols, static_cast<const uint8_t*>(codes.const_data_ptr()), static_cast<uint8_t*>(transpose.data_ptr())});
  return transpose;
}

std::tuple<at::Tensor, at::Tensor> count_losses(const at::Tensor& x, const at::Tensor& slots, int64_t role,
                                                at::ScalarType dtype, const QuantizeOptions& options) {
  const Format format = format_of(dtype, "dtype");
  check_quantize(x, slots, role, options.margin);
  const c10::DeviceGuard guard(x.device());
  const NoAutocast no_autocast;
  QuantizeOptions only_scaled = options;
  only_scaled.rowwise = only_scaled.columnwise = only_scaled.record = false;
  CastPlan plan = plan_cast(as_matrix(x), slots, role, format, only_scaled);
  if (options.own_amax) scale_by_amax(plan);
  at::Tensor counts = at::zeros({kLosses}, x.options().dtype(at::kLong));
  at::Tensor values = at::zeros({2}, x.options().dtype(at::kFloat));
  const QuantizeArgs& cast = plan.steps.cast;
  kernels_of(x).count_losses({cast.x, format, cast.slot, counts.data_ptr<int64_t>(), values.data_ptr<float>()});
  return {counts, values};
}

}  // namespace torch_fp8
