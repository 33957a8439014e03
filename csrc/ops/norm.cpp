// norm_cast, norm_backward: RMSNorm and LayerNorm, with what stands before them (a residual that is added) and behind
// (the cast of the layer that reads them) in one pass. frozen_norm: the same for layers that are not trained.
#include <algorithm>
#include <cmath>

#include <ATen/ATen.h>
#include <ATen/record_function.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>

#include "ops/cast_plan.h"
#include "ops/producers.h"
#include "torch_fp8/ops.h"

namespace torch_fp8 {
namespace {

using OptionalTensor = c10::optional<at::Tensor>;

// (..., K) as (M, K), as it lies or, where packs of 8 could be read if it lay otherwise, copied.
at::Tensor as_rows(const at::Tensor& t) {
  constexpr int64_t kPack = 8;
  const at::Tensor rows = t.reshape({leading_size(t.sizes()), t.size(-1)});
  const bool in_packs = rows.stride(1) == 1 && rows.stride(0) % kPack == 0 && is_aligned(rows.const_data_ptr());
  return in_packs || rows.size(1) % kPack != 0 ? rows : rows.clone(at::MemoryFormat::Contiguous);
}

OptionalTensor as_rows(const OptionalTensor& t) { return t ? OptionalTensor(as_rows(*t)) : c10::nullopt; }
Matrix matrix_of(const OptionalTensor& t) { return t ? torch_fp8::matrix_of(*t) : Matrix{}; }

void check_x(const at::Tensor& x) {
  type_of(x.scalar_type(), "x");
  TORCH_CHECK(x.dim() >= 1, "torch_fp8: x must have at least one dimension, got a scalar; use x.reshape(1)");
  check_strided(x, "x");
}

void check_parameter(const OptionalTensor& parameter, const char* name, const at::Tensor& x) {
  if (!parameter) return;
  TORCH_CHECK(parameter->dim() == 1 && parameter->size(0) == x.size(-1), "torch_fp8: ", name, " must have shape [",
              x.size(-1), "], one element for each column of x, got ", parameter->sizes());
  TORCH_CHECK_TYPE(parameter->scalar_type() == x.scalar_type() || parameter->scalar_type() == at::kFloat,
                   "torch_fp8: ", name, " must be ", x.scalar_type(), " as x is, or float32, got ",
                   parameter->scalar_type());
  check_strided(*parameter, name);
  check_same_device(x, "x", *parameter, name);
}

OptionalTensor dense(const OptionalTensor& parameter) {
  return parameter ? OptionalTensor(parameter->contiguous()) : c10::nullopt;
}

Vector vector_of(const OptionalTensor& t) {
  return t ? Vector{t->const_data_ptr(), type_of(t->scalar_type(), "gain")} : Vector{};
}

// The mean, where it is not 0, and the reciprocal of the standard deviation of each row.
c10::SymDimVector stats_size(c10::SymInt rows, bool layer_norm) {
  return layer_norm ? c10::SymDimVector{2, rows} : c10::SymDimVector{rows};
}

void* data_of(const at::Tensor& t) { return t.numel() ? t.data_ptr() : nullptr; }

void check_norm(const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& gain,
                const OptionalTensor& bias, double eps, double gain_offset) {
  check_x(x);
  if (residual) check_like(*residual, "residual", x, "x");
  check_parameter(gain, "gain", x);
  check_parameter(bias, "bias", x);
  TORCH_CHECK_VALUE(std::isfinite(eps) && eps >= 0, "torch_fp8: eps must be 0 or a positive number, got ", eps);
  TORCH_CHECK_VALUE(std::isfinite(gain_offset), "torch_fp8: gain_offset must be a finite number, got ", gain_offset);
}

// What a kernel reads and writes, and what keeps it alive.
struct NormCall {
  at::Tensor x;  // (M, K)
  OptionalTensor residual, gain, bias;
  at::Tensor y = {}, sum = {}, stats = {};
  NormArgs args = {};
};

NormCall norm_call(const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& gain,
                   const OptionalTensor& bias, double eps, bool layer_norm, double gain_offset, bool wants_y) {
  const auto like_x = [&x](bool wanted) {
    return wanted ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  };
  NormCall call{.x = as_rows(x), .residual = as_rows(residual), .gain = dense(gain), .bias = dense(bias)};
  call.y = like_x(wants_y), call.sum = like_x(residual.has_value());
  call.stats = at::empty_symint(stats_size(call.x.size(0), layer_norm), x.options().dtype(at::kFloat));
  NormArgs& args = call.args;
  args.layer_norm = layer_norm, args.eps = static_cast<float>(eps);
  args.cast.x = torch_fp8::matrix_of(call.x), args.residual = matrix_of(call.residual);
  args.gain = vector_of(call.gain), args.bias = vector_of(call.bias);
  args.gain_offset = static_cast<float>(gain_offset);
  args.sum = data_of(call.sum), args.y = data_of(call.y), args.stats = static_cast<float*>(data_of(call.stats));
  return call;
}

void check_input_slot(const OptionalTensor& input_slot, const at::Tensor& x) {
  if (!input_slot) return;
  check_slots(*input_slot, 1);
  check_same_device(x, "x", *input_slot, "input_slot");
}

// A tensor that counts its writes in inference mode too, where others do not: its reader asks.
template <class Make>
auto counting_writes(const Make& make) {
  const bool in_inference = c10::InferenceMode::is_enabled();
  c10::optional<c10::InferenceMode> out_of_it;
  if (in_inference) out_of_it.emplace(false);
  return make();
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> frozen_norm(
    const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& gain, const OptionalTensor& bias,
    double eps, bool layer_norm, double gain_offset, const OptionalTensor& input_slot, bool codes) {
  check_norm(x, residual, gain, bias, eps, gain_offset);
  check_input_slot(input_slot, x);
  RECORD_FUNCTION("torch_fp8::frozen_norm", std::vector<c10::IValue>());
  const c10::DeviceGuard on_device(x.device());
  const NoAutocast no_autocast;
  NormCall call = norm_call(x, residual, gain, bias, eps, layer_norm, gain_offset, /*wants_y=*/false);
  call.y = counting_writes([&] { return at::empty(x.sizes(), x.options()); });
  call.args.y = data_of(call.y);
  const int64_t rows = call.x.size(0), cols = call.x.size(1);
  // Kernels of whole tiles write rows of padding, which are not given away.
  const auto fp8 = x.options().dtype(at::kFloat8_e4m3fn);
  const at::Tensor q = codes ? at::empty({padded(rows), padded(cols)}, fp8) : at::empty({0, 0}, fp8);
  const at::Tensor scale = at::empty({codes && !input_slot ? rows : 0}, x.options().dtype(at::kFloat));
  if (x.numel()) {
    kernels_of(x).norm_rows({call.args, input_slot ? slots_of(*input_slot) : nullptr, static_cast<uint8_t*>(data_of(q)),
                             static_cast<float*>(data_of(scale))});
  }
  return {call.y, call.sum, q.narrow(0, 0, codes ? rows : 0), scale};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_cast(
    const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& gain, const OptionalTensor& bias,
    double eps, bool layer_norm, double gain_offset, const OptionalTensor& slots, int64_t role, at::IntArrayRef casts,
    int64_t history, bool training, bool record, bool rowwise, bool columnwise, bool wants_y) {
  check_norm(x, residual, gain, bias, eps, gain_offset);
  Cast cast;
  if (slots) {
    check_role(*slots, "slots", x, "x", casts, role);
    cast = Cast::unpacked(casts[static_cast<size_t>(role)]);
    TORCH_CHECK_VALUE(cast.format == Format::kE4M3, "torch_fp8: what a norm makes is cast to E4M3; role ", role,
                      " is cast to E5M2");
  }
  RECORD_FUNCTION("torch_fp8::norm_cast", std::vector<c10::IValue>());
  const c10::DeviceGuard on_device(x.device());
  const NoAutocast no_autocast;
  const NormCall call = norm_call(x, residual, gain, bias, eps, layer_norm, gain_offset, wants_y);
  const at::Tensor &y = call.y, &sum = call.sum, &stats = call.stats;
  NormArgs args = call.args;
  const auto run = [&](const QuantizeArgs& codes) {
    args.cast = codes;
    if (x.numel()) kernels_of(x).norm(args);
  };
  if (!slots) {
    run(args.cast);
    return {y, sum, nothing(x), nothing(x), nothing(x), stats};
  }
  QuantizeOptions options = how(casts, static_cast<int>(role), history, training, record);
  options.rowwise = rowwise, options.columnwise = columnwise;
  CastPlan plan = plan_cast(call.x, *slots, role, cast.format, options);
  if (is_own(plan)) {
    run(amax_only(plan)), scale_by_own(plan);
    // All but the codes is made: the second pass makes them of what the first has added up.
    if (residual) plan.steps.cast.x = torch_fp8::matrix_of(sum.view(call.x.sizes()));
    args.residual = {}, args.sum = args.y = nullptr;
  }
  run(plan.steps.cast);
  const auto [q, q_t, scale_inv] = codes_of(plan);
  return {y, sum, q, q_t, scale_inv, stats};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_backward(const at::Tensor& dy, const at::Tensor& x,
                                                             const OptionalTensor& dsum, const OptionalTensor& gain,
                                                             const at::Tensor& stats, bool layer_norm,
                                                             double gain_offset, bool wants_dgain, bool wants_dbias) {
  check_x(x);
  check_like(dy, "dy", x, "x");
  if (dsum) check_like(*dsum, "dsum", x, "x");
  check_parameter(gain, "gain", x);
  TORCH_CHECK_VALUE(std::isfinite(gain_offset), "torch_fp8: gain_offset must be a finite number, got ", gain_offset);
  const int64_t rows = leading_size(x.sizes()), cols = x.size(-1);
  TORCH_CHECK(stats.scalar_type() == at::kFloat && stats.numel() == (layer_norm ? 2 : 1) * rows,
              "torch_fp8: stats must be what norm_cast gave, float32 of shape ", layer_norm ? "[2, " : "[", rows,
              "], got ", stats.scalar_type(), " ", stats.sizes());
  check_strided(stats, "stats");
  check_same_device(x, "x", stats, "stats");
  RECORD_FUNCTION("torch_fp8::norm_backward", std::vector<c10::IValue>());
  const c10::DeviceGuard on_device(x.device());
  const NoAutocast no_autocast;
  const at::Tensor dy_2d = as_rows(dy), x_2d = as_rows(x), dense_stats = stats.contiguous();
  const OptionalTensor dsum_2d = as_rows(dsum), dense_gain = dense(gain);
  const at::Tensor dx = at::empty(x.sizes(), x.options());
  const int64_t parts = norm_parts(rows, cols);
  const auto sums = [&](bool wanted) { return at::empty({wanted ? parts : 0, cols}, x.options().dtype(at::kFloat)); };
  const at::Tensor dgain_parts = sums(wants_dgain), dbias_parts = sums(wants_dbias);
  if (x.numel()) {
    kernels_of(x).norm_backward(
        {layer_norm, static_cast<float>(gain_offset), torch_fp8::matrix_of(dy_2d), torch_fp8::matrix_of(x_2d),
         matrix_of(dsum_2d), vector_of(dense_gain), static_cast<const float*>(dense_stats.const_data_ptr()),
         dx.data_ptr(), static_cast<float*>(data_of(dgain_parts)), static_cast<float*>(data_of(dbias_parts)), parts});
  }
  const at::ScalarType dtype = gain ? gain->scalar_type() : x.scalar_type();
  const auto added = [&](const at::Tensor& of_parts, bool wanted) {
    return wanted ? sum_columns(of_parts, cols, dtype) : at::empty({0}, x.options().dtype(dtype));
  };
  return {dx, added(dgain_parts, wants_dgain), added(dbias_parts, wants_dbias)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_cast_meta(
    const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor&, const OptionalTensor&, double,
    bool layer_norm, double, const OptionalTensor& slots, int64_t role, at::IntArrayRef casts, int64_t history,
    bool training, bool record, bool rowwise, bool columnwise, bool wants_y) {
  const auto like_x = [&](bool wanted) {
    return wanted ? at::empty_symint(x.sym_sizes(), x.options()) : at::empty({0}, x.options());
  };
  const at::Tensor stats =
      at::empty_symint(stats_size(leading_size_symbolic(x), layer_norm), x.options().dtype(at::kFloat));
  if (!slots) return {like_x(wants_y), like_x(residual.has_value()), nothing(x), nothing(x), nothing(x), stats};
  const auto [q, q_t, scale_inv] = cast_meta(x, *slots, role, casts, history, training, record, rowwise, columnwise);
  return {like_x(wants_y), like_x(residual.has_value()), q, q_t, scale_inv, stats};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> frozen_norm_meta(
    const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor&, const OptionalTensor&, double, bool,
    double, const OptionalTensor& input_slot, bool codes) {
  const c10::SymInt rows = leading_size_symbolic(x), cols = padded_symbolic(x.sym_size(-1));
  const at::Tensor y = counting_writes([&] { return at::empty_symint(x.sym_sizes(), x.options()); });
  const at::Tensor sum = residual ? at::empty_symint(x.sym_sizes(), x.options()) : at::empty({0}, x.options());
  const c10::SymInt none = 0;
  const at::Tensor q =
      at::empty_symint({codes ? rows : none, codes ? cols : none}, x.options().dtype(at::kFloat8_e4m3fn));
  return {y, sum, q, at::empty_symint({codes && !input_slot ? rows : none}, x.options().dtype(at::kFloat))};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_backward_meta(const at::Tensor&, const at::Tensor& x,
                                                                  const OptionalTensor&, const OptionalTensor& gain,
                                                                  const at::Tensor&, bool, double, bool wants_dgain,
                                                                  bool wants_dbias) {
  const auto like_gain = [&](bool wanted) {
    return at::empty_symint({wanted ? x.sym_size(-1) : c10::SymInt(0)},
                            x.options().dtype(gain ? gain->scalar_type() : x.scalar_type()));
  };
  return {at::empty_symint(x.sym_sizes(), x.options()), like_gain(wants_dgain), like_gain(wants_dbias)};
}

}  // namespace torch_fp8
