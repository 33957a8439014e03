// activation_cast, activation_backward_cast: what stands between the linear layers of an MLP, made and cast in one
// pass.
#include <cmath>

#include <ATen/ATen.h>
#include <ATen/record_function.h>
#include <c10/core/DeviceGuard.h>

#include "ops/cast_plan.h"
#include "ops/producers.h"

namespace torch_fp8 {
namespace {

using OptionalTensor = c10::optional<at::Tensor>;

// (..., K) as (M, K) whose rows are 16-byte aligned and can be read in packs of 8: as it lies, or copied.
at::Tensor as_rows(const at::Tensor& t) {
  constexpr int64_t kPack = 8;
  const at::Tensor rows = t.reshape({leading_size(t.sizes()), t.size(-1)});
  const int64_t cols = rows.size(1);
  if (cols % kPack == 0 && rows.stride(1) == 1 && rows.stride(0) % kPack == 0 && is_aligned(rows.const_data_ptr())) {
    return rows;
  }
  return at::constant_pad_nd(rows, {0, (cols + kPack - 1) / kPack * kPack - cols}).contiguous().narrow(1, 0, cols);
}

// (..., 2 K), each half of which is such rows: as it lies, or a copy with zeros behind each half, (M, 2 padded(K)).
at::Tensor as_rows_of_halves(const at::Tensor& t) {
  const int64_t half = t.size(-1) / 2, behind = padded(half) - half;
  if (behind == 0) return as_rows(t);
  return at::constant_pad_nd(t.reshape({leading_size(t.sizes()), 2, half}), {0, behind}).flatten(1);
}

// Along a dimension, what lies behind each of two halves is taken out, and goes behind both as far as q is padded.
at::Tensor joined(const at::Tensor& t, int64_t dim, int64_t half) {
  return t.unflatten(dim, {2, -1}).narrow(dim + 1, 0, half).flatten(dim, dim + 1).contiguous();
}
void join(CastPlan& plan, int64_t half) {
  const auto fp8 = plan.out.q.scalar_type();
  const at::Tensor q = joined(plan.out.q.view(at::kByte), 1, half);
  plan.out.q = at::constant_pad_nd(q, {0, padded(2 * half) - 2 * half}).view(fp8);
  if (plan.out.q_t.defined()) plan.out.q_t = plan.out.q.view(at::kByte).t().contiguous().view(fp8);
  if (plan.column_sums.defined()) plan.column_sums = joined(plan.column_sums, 1, half);
}

struct Factors {
  at::Tensor gate, up;  // up: or undefined
};

Factors halves_of(const at::Tensor& both, Halves halves) {
  const c10::SymInt half = both.sym_size(-1) / 2;
  const at::Tensor first = both.narrow_symint(-1, 0, half), second = both.narrow_symint(-1, half, half);
  return halves == Halves::kGateFirst ? Factors{first, second} : Factors{second, first};
}

Factors factors_of(const at::Tensor& gate, const OptionalTensor& up, int64_t halves) {
  const auto given = static_cast<Halves>(halves);
  return given == Halves::kNone ? Factors{gate, up.value_or(at::Tensor())} : halves_of(gate, given);
}

void check_gate(const at::Tensor& gate, const OptionalTensor& up, int64_t halves) {
  type_of(gate.scalar_type(), "gate");
  TORCH_CHECK(gate.dim() >= 1, "torch_fp8: gate must have at least one dimension, got a scalar");
  check_strided(gate, "gate");
  if (up) check_like(*up, "up", gate, "gate");
  TORCH_CHECK_VALUE(
      halves >= 0 && halves <= 2,
      "torch_fp8: halves must be 0 (gate is that alone), 1 (gate and, behind it, up) or 2 (up and, behind "
      "it, gate), got ",
      halves);
  if (halves == 0) return;
  TORCH_CHECK(!up, "torch_fp8: by halves gate is up, too; leave up out");
  TORCH_CHECK(gate.size(-1) % 2 == 0, "torch_fp8: gate must have two equal halves, got ", gate.size(-1), " columns");
}

XieluArgs xielu_of(const at::Tensor& alphas, double beta) {
  return {alphas.defined() ? static_cast<const float*>(alphas.const_data_ptr()) : nullptr, static_cast<float>(beta)};
}

}  // namespace

void check_activation(int64_t activation, const OptionalTensor& alphas, double beta, const at::Tensor& x,
                      const char* x_name) {
  TORCH_CHECK_VALUE(activation >= 0 && activation <= 4,
                    "torch_fp8: activation must be 0 (silu), 1 (gelu), 2 (gelu, tanh), 3 (xielu) or 4 (relu squared), "
                    "got ",
                    activation);
  const bool needed = static_cast<Activation>(activation) == Activation::kXielu;
  TORCH_CHECK(alphas.has_value() == needed, "torch_fp8: alphas are of activation 3 (xielu) and of no other; ",
              needed ? "give them" : "leave them out");
  TORCH_CHECK_VALUE(std::isfinite(beta), "torch_fp8: beta must be a finite number, got ", beta);
  if (!needed) return;
  TORCH_CHECK(alphas->scalar_type() == at::kFloat && alphas->dim() == 1 && alphas->sym_size(0) == 2,
              "torch_fp8: alphas must be float32 of shape [2], those of positive and of negative values, got ",
              alphas->scalar_type(), " ", alphas->sym_sizes(), "; use torch.cat([alpha_p, alpha_n]).float()");
  check_strided(*alphas, "alphas");
  check_same_device(x, x_name, *alphas, "alphas");
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> activation_cast(const at::Tensor& gate, const OptionalTensor& up,
                                                               int64_t activation, const at::Tensor& slots,
                                                               int64_t role, at::IntArrayRef casts, int64_t history,
                                                               bool training, bool record, bool rowwise,
                                                               bool columnwise, const OptionalTensor& alphas,
                                                               double beta, int64_t halves) {
  check_gate(gate, up, halves);
  check_activation(activation, alphas, beta, gate, "gate");
  const auto f = static_cast<Activation>(activation);
  check_role(slots, "slots", gate, "gate", casts, role);
  const Cast cast = Cast::unpacked(casts[static_cast<size_t>(role)]);
  TORCH_CHECK_VALUE(cast.format == Format::kE4M3, "torch_fp8: what an activation makes is cast to E4M3");
  RECORD_FUNCTION("torch_fp8::activation_cast", std::vector<c10::IValue>());
  const c10::DeviceGuard on_device(gate.device());
  const NoAutocast no_autocast;
  QuantizeOptions options = how(casts, static_cast<int>(role), history, training, record);
  options.rowwise = rowwise, options.columnwise = columnwise;
  const Factors factors = factors_of(gate, up, halves);
  const at::Tensor gate_2d = as_rows(factors.gate), up_2d = factors.up.defined() ? as_rows(factors.up) : at::Tensor();
  CastPlan plan = plan_cast(gate_2d, slots, role, cast.format, options);
  const at::Tensor dense_alphas = alphas ? alphas->contiguous() : at::Tensor();
  const XieluArgs xielu = xielu_of(dense_alphas, beta);
  make_and_cast(
      [&](const QuantizeArgs& args) {
        kernels_of(gate).activate({f, xielu, args, up_2d.defined() ? matrix_of(up_2d) : Matrix{}});
      },
      plan);
  return codes_of(plan);
}

GradientCasts activation_backward_cast(const at::Tensor& dy, const at::Tensor& gate, const OptionalTensor& up,
                                       int64_t activation, const at::Tensor& gate_slots, const OptionalTensor& up_slots,
                                       int64_t role, at::IntArrayRef casts, at::IntArrayRef histories, bool training,
                                       bool record, c10::optional<at::ScalarType> dbias, const OptionalTensor& alphas,
                                       double beta, bool columnwise, int64_t halves_given) {
  check_gate(gate, up, halves_given);
  check_activation(activation, alphas, beta, gate, "gate");
  const auto f = static_cast<Activation>(activation);
  const auto halves = static_cast<Halves>(halves_given);
  const bool by_halves = halves != Halves::kNone;
  check_like(dy, "dy", factors_of(gate, up, halves_given).gate, by_halves ? "a half of gate" : "gate");
  check_role(gate_slots, "gate_slots", gate, "gate", casts, role);
  TORCH_CHECK(up.has_value() == up_slots.has_value(), "torch_fp8: up and up_slots come together");
  TORCH_CHECK_VALUE(histories.size() == (up ? 2 : 1), "torch_fp8: histories must be of gate and, with it, of up");
  if (up_slots) check_role(*up_slots, "up_slots", gate, "gate", casts, role);
  if (dbias) type_of(*dbias, "dbias");
  RECORD_FUNCTION("torch_fp8::activation_backward_cast", std::vector<c10::IValue>());
  const Cast cast = Cast::unpacked(casts[static_cast<size_t>(role)]);
  const c10::DeviceGuard on_device(gate.device());
  const NoAutocast no_autocast;
  // By halves the two gradients are one matrix for the cast: with its scale, its amax, its codes and its sums.
  const at::Tensor first_2d = by_halves ? as_rows_of_halves(gate) : as_rows(gate);
  const Factors factors = by_halves ? halves_of(first_2d, halves) : Factors{first_2d, up ? as_rows(*up) : at::Tensor()};
  const auto& [gate_2d, up_2d] = factors;
  const int64_t cols = dy.size(-1), width = gate_2d.size(1);
  const at::Tensor dy_2d = as_rows(width == cols ? dy : at::constant_pad_nd(dy, {0, width - cols}));
  const auto planned = [&](const at::Tensor& x, const at::Tensor& slots, int64_t history) {
    QuantizeOptions options = how(casts, static_cast<int>(role), history, training, record);
    options.rowwise = true, options.columnwise = columnwise;
    options.dbias = dbias;
    return plan_cast(x, slots, role, cast.format, options);
  };
  CastPlan of_gate = planned(first_2d, gate_slots, histories[0]);
  CastPlan of_up = up ? planned(up_2d, *up_slots, histories[1]) : CastPlan{};
  const at::Tensor dense_alphas = alphas ? alphas->contiguous() : at::Tensor();
  const XieluArgs xielu = xielu_of(dense_alphas, beta);
  const at::Tensor by_tile =
      alphas ? at::empty({tiles_along(gate_2d.size(0)), 2 * tiles_along(width)}, alphas->options()) : at::Tensor();
  float* const alpha_sums = alphas ? static_cast<float*>(by_tile.data_ptr()) : nullptr;
  make_and_cast(
      [&](QuantizeArgs of_gate, QuantizeArgs of_up) {
        if (by_halves) of_gate.x = matrix_of(gate_2d), of_up.x = matrix_of(up_2d);
        kernels_of(gate).activate_backward({f, xielu, matrix_of(dy_2d), of_gate, of_up, alpha_sums, halves});
      },
      of_gate, of_up);
  if (by_halves && width != cols) join(of_gate, cols);
  // Down the tiles, and then across them.
  const auto d_alphas = [&] {
    return alphas ? sum_columns(sum_columns(by_tile, by_tile.size(1), at::kFloat).view({-1, 2}), 2, at::kFloat)
                  : nothing(gate);
  };
  const auto [gate_q, gate_q_t, gate_scale_inv] = codes_of(of_gate);
  const auto none = [&] { return nothing(gate); };
  const auto dbias_of = [&](const CastPlan& plan) {
    return dbias ? sum_columns(plan.column_sums, gate.size(-1), *dbias) : none();
  };
  if (!up) return {gate_q, gate_q_t, gate_scale_inv, none(), none(), none(), dbias_of(of_gate), none(), d_alphas()};
  const auto [up_q, up_q_t, up_scale_inv] = codes_of(of_up);
  return {gate_q, gate_q_t, gate_scale_inv, up_q, up_q_t, up_scale_inv, dbias_of(of_gate), dbias_of(of_up), d_alphas()};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> activation_cast_meta(const at::Tensor& gate, const OptionalTensor&,
                                                                    int64_t, const at::Tensor& slots, int64_t role,
                                                                    at::IntArrayRef casts, int64_t history,
                                                                    bool training, bool record, bool rowwise,
                                                                    bool columnwise, const OptionalTensor&, double,
                                                                    int64_t halves) {
  return cast_meta(factors_of(gate, {}, halves).gate, slots, role, casts, history, training, record, rowwise,
                   columnwise);
}

GradientCasts activation_backward_cast_meta(const at::Tensor&, const at::Tensor& gate, const OptionalTensor& up,
                                            int64_t, const at::Tensor& gate_slots, const OptionalTensor&, int64_t role,
                                            at::IntArrayRef casts, at::IntArrayRef, bool, bool,
                                            c10::optional<at::ScalarType> dbias, const OptionalTensor& alphas, double,
                                            bool columnwise, int64_t) {
  const auto made = [&] { return cast_meta(gate, gate_slots, role, casts, 0, false, false, true, columnwise); };
  const auto none = [&] { return nothing(gate); };
  const auto sums = [&] {
    return dbias ? at::empty_symint({gate.sym_size(-1)}, gate.options().dtype(*dbias)) : none();
  };
  const auto d_alphas = [&] { return alphas ? at::empty({2}, gate.options().dtype(at::kFloat)) : none(); };
  const auto [gate_q, gate_q_t, gate_scale_inv] = made();
  if (!up) return {gate_q, gate_q_t, gate_scale_inv, none(), none(), none(), sums(), none(), d_alphas()};
  const auto [up_q, up_q_t, up_scale_inv] = made();
  return {gate_q, gate_q_t, gate_scale_inv, up_q, up_q_t, up_scale_inv, sums(), sums(), d_alphas()};
}

}  // namespace torch_fp8
