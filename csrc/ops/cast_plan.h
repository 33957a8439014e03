// A cast with its results allocated, ready to run: of a matrix in memory (quantize), or of what a producer makes of it,
// whose kernel casts in the same pass.
#pragma once

#include <cmath>

#include "check.h"
#include "torch_fp8/ops.h"

namespace torch_fp8 {

struct CastPlan {
  Quantized out;           // undefined tensors for what was not asked for
  at::Tensor x;            // the matrix that is read; of what is made it says the size
  SmallCast steps;         // how it is cast, whether or not it is small
  at::Tensor own;          // the slot of what is scaled by its own amax, and behind it the parts of that amax
  at::Tensor column_sums;  // the column sums of every kBiasRows rows
};

inline Matrix matrix_of(const at::Tensor& x) {
  return {x.const_data_ptr(), type_of(x.scalar_type(), "x"), x.size(0), x.size(1), x.stride(0), x.stride(1)};
}

inline float target_of(Format format, const QuantizeOptions& options) {
  return std::ldexp(max_of(format), -static_cast<int>(options.margin));
}

// As scale_for takes it.
inline int margin_of(bool power_of_two, int64_t margin) { return power_of_two ? static_cast<int>(margin) : kExact; }

// x (M, K).
inline CastPlan plan_cast(at::Tensor x, const at::Tensor& slots, int64_t role, Format format,
                          const QuantizeOptions& options) {
  CastPlan plan;
  const Matrix matrix = matrix_of(x);
  const int64_t rows = padded(matrix.rows), cols = padded(matrix.cols);
  const auto fp8 = x.options().dtype(dtype_of(format)), fp32 = x.options().dtype(at::kFloat);
  if (options.rowwise) plan.out.q = at::empty({rows, cols}, fp8);
  if (options.columnwise) plan.out.q_t = at::empty({cols, rows}, fp8);
  plan.out.scale_inv = at::empty({1}, fp32);
  if (options.dbias) plan.column_sums = at::empty({(matrix.rows + kBiasRows - 1) / kBiasRows, cols}, fp32);

  Slot* const slot = slots_of(slots) + role;
  QuantizeArgs args{matrix,  format, slot, nullptr, nullptr, static_cast<float*>(plan.out.scale_inv.data_ptr()),
                    nullptr, nullptr};
  if (options.rowwise) args.q = static_cast<uint8_t*>(plan.out.q.data_ptr());
  if (options.columnwise) args.q_t = static_cast<uint8_t*>(plan.out.q_t.data_ptr());
  if (options.record) args.amax = &slot->amax;
  if (options.dbias) args.column_sums = static_cast<float*>(plan.column_sums.data_ptr());
  const ScaleBy scale_by = options.own_amax ? ScaleBy::kOwnAmax : options.recast ? ScaleBy::kSlotIfFit : ScaleBy::kSlot;
  plan.steps = {args, scale_by, target_of(format, options), margin_of(options.power_of_two, options.margin)};
  plan.x = std::move(x);
  return plan;
}

// Casts what lies in memory (quantize.cpp): one launch where the tensor is small and would need more, else one for each
// step.
void run(CastPlan& plan);

inline bool is_own(const CastPlan& plan) { return plan.steps.scale_by == ScaleBy::kOwnAmax; }

// Room for the slot, and the place of the amax's parts behind it.
inline float* make_own(CastPlan& plan) {
  plan.own = at::empty({4 + kAmaxParts}, plan.x.options().dtype(at::kFloat));
  return static_cast<float*>(plan.own.data_ptr()) + 4;
}

// From now on it is scaled by the amax whose parts are there.
inline void scale_by_own(CastPlan& plan) {
  Slot* const slot = slots_of(plan.own);
  const float* const parts = static_cast<const float*>(plan.own.const_data_ptr()) + 4;
  kernels_of(plan.own).scale_from_amax(parts, slot, plan.steps.target, plan.steps.margin);
  plan.steps.cast.slot = slot;
}

// The first of two passes, where what is made is scaled by its own amax: it writes nothing but that.
inline QuantizeArgs amax_only(CastPlan& plan) {
  QuantizeArgs args = plan.steps.cast;
  args.q = args.q_t = nullptr;
  args.scale_inv = args.amax = args.column_sums = nullptr;
  if (is_own(plan)) {
    args.amax = make_own(plan);
    plan.own.zero_();
  }
  return args;
}

// kernel(the arguments of each cast) makes what the plans cast: once, or twice where one is scaled by its own amax.
template <class Kernel, class... Plans>
void make_and_cast(const Kernel& kernel, Plans&... plans) {
  if ((is_own(plans) || ...)) {
    kernel(amax_only(plans)...);
    ((is_own(plans) ? scale_by_own(plans) : void()), ...);
  }
  kernel(plans.steps.cast...);
}

// The codes as an op gives them: 0 elements of what was not asked for.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor> codes_of(const CastPlan& plan) {
  const auto filled = [&](const at::Tensor& t) { return t.defined() ? t : nothing(plan.out.scale_inv); };
  return {filled(plan.out.q), filled(plan.out.q_t), plan.out.scale_inv};
}

// The sums of parts' first cols columns.
inline at::Tensor sum_columns(const at::Tensor& parts, int64_t cols, at::ScalarType dtype) {
  at::Tensor sums = at::empty({cols}, parts.options().dtype(dtype));
  kernels_of(parts).add_column_sums({static_cast<const float*>(parts.const_data_ptr()), parts.size(0), cols,
                                     parts.size(1), sums.data_ptr(), type_of(dtype, "dbias")});
  return sums;
}

}  // namespace torch_fp8
