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
at::Tensor own_slot_of(const Matrix& matrix, const at::Tensor& x, float target, bool power_of_two) {
  const at::Tensor own = at::empty({4 + kAmaxParts}, x.options().dtype(at::kFloat));
  float* const parts = static_cast<float*>(own.data_ptr()) + 4;
  kernels_of(x).amax(matrix, parts);
  kernels_of(x).scale_from_amax(parts, slots_of(own), target, power_of_two);
  return own;
}

// A cast with its results allocated, ready to run. x is the matrix that it reads.
struct PreparedCast {
  Quantized out;
  SmallCast small;
  at::Tensor x, column_sums;
};

PreparedCast prepare(const at::Tensor& x, const at::Tensor& slots, int64_t role, at::ScalarType dtype,
                     const QuantizeOptions& options) {
  const Format format = format_of(dtype, "dtype");
  check_quantize(x, slots, role, options.margin);
  PreparedCast p;
  p.x = as_matrix(x);
  // The codes of a transposed matrix are those of the matrix, transposed. So what is read is read along its memory.
  const bool transposed = p.x.stride(0) == 1 && p.x.stride(1) > 1 && !options.dbias;
  if (transposed) p.x = p.x.t();
  at::Tensor &q = transposed ? p.out.q_t : p.out.q, &q_t = transposed ? p.out.q : p.out.q_t;
  const bool rowwise = transposed ? options.columnwise : options.rowwise;
  const bool columnwise = transposed ? options.rowwise : options.columnwise;
  const Matrix matrix = matrix_of(p.x);
  const int64_t rows = padded(matrix.rows), cols = padded(matrix.cols);
  const auto fp8 = x.options().dtype(dtype);
  const auto fp32 = x.options().dtype(at::kFloat);

  if (rowwise) q = at::empty({rows, cols}, fp8);
  if (columnwise) q_t = at::empty({cols, rows}, fp8);
  p.out.scale_inv = at::empty({1}, fp32);
  if (options.dbias) p.column_sums = at::empty({(matrix.rows + kBiasRows - 1) / kBiasRows, cols}, fp32);

  Slot* const slot = slots_of(slots) + role;
  QuantizeArgs args{matrix,  format, slot, nullptr, nullptr, static_cast<float*>(p.out.scale_inv.data_ptr()),
                    nullptr, nullptr};
  if (rowwise) args.q = static_cast<uint8_t*>(q.data_ptr());
  if (columnwise) args.q_t = static_cast<uint8_t*>(q_t.data_ptr());
  if (options.record) args.amax = &slot->amax;
  if (options.dbias) args.column_sums = static_cast<float*>(p.column_sums.data_ptr());
  const ScaleBy scale_by = options.own_amax ? ScaleBy::kOwnAmax : options.recast ? ScaleBy::kSlotIfFit : ScaleBy::kSlot;
  p.small = {args, scale_by, target_of(format, options), options.power_of_two};
  return p;
}

bool is_small(const PreparedCast& p) {
  return kernels_of(p.x).cast_small && is_small(p.small.cast.x) && !p.small.cast.column_sums;
}

// One launch where the tensor is small and would need more, else one for each step.
void run(const PreparedCast& p) {
  const auto& [cast, scale_by, target, power_of_two] = p.small;
  const Kernels& kernels = kernels_of(p.x);
  if (scale_by != ScaleBy::kSlot && is_small(p)) return kernels.cast_small({{p.small}, 1});
  QuantizeArgs args = cast;
  at::Tensor own, amax;
  if (scale_by == ScaleBy::kOwnAmax) {
    own = own_slot_of(cast.x, p.x, target, power_of_two);
    args.slot = slots_of(own);
  } else if (scale_by == ScaleBy::kSlotIfFit && !args.amax) {
    amax = at::zeros({1}, p.x.options().dtype(at::kFloat));
    args.amax = static_cast<float*>(amax.data_ptr());
  }
  kernels.quantize(args);
  if (scale_by == ScaleBy::kSlotIfFit) kernels.recast({args, target, power_of_two});
}

}  // namespace

Quantized quantize_only(const at::Tensor& x, const at::Tensor& slots, int64_t role, at::ScalarType dtype,
                        const QuantizeOptions& options) {
  const c10::DeviceGuard guard(x.device());
  const NoAutocast no_autocast;
  PreparedCast p = prepare(x, slots, role, dtype, options);
  run(p);
  if (options.dbias) {
    const Matrix& matrix = p.small.cast.x;
    p.out.dbias = at::empty({matrix.cols}, x.options().dtype(*options.dbias));
    kernels_of(x).add_column_sums({static_cast<const float*>(p.column_sums.const_data_ptr()), p.column_sums.size(0),
                                   matrix.cols, padded(matrix.cols), p.out.dbias.data_ptr(),
                                   type_of(*options.dbias, "dbias")});
  }
  return std::move(p.out);
}

std::pair<Quantized, Quantized> quantize_both(const ToQuantize& first, const ToQuantize& second) {
  const c10::DeviceGuard guard(first.x.device());
  const NoAutocast no_autocast;
  const auto prepared = [](const ToQuantize& t) { return prepare(t.x, t.slots, t.role, t.dtype, t.options); };
  PreparedCast a = prepared(first), b = prepared(second);
  const QuantizeArgs &x = a.small.cast, &y = b.small.cast;
  if (is_small(a) && is_small(b) && x.x.type == y.x.type && x.format == y.format) {
    kernels_of(a.x).cast_small({{a.small, b.small}, 2});
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
  if (options.own_amax) own = own_slot_of(matrix, x, target_of(format, options), options.power_of_two);
  const Slot* const slot = own.defined() ? slots_of(own) : slots_of(slots) + role;
  kernels_of(x).count_losses({matrix, format, slot, counts.data_ptr<int64_t>(), values.data_ptr<float>()});
  return {counts, values};
}

}  // namespace torch_fp8
