// activation_cast, activation_backward_cast: what stands between the linear layers of an MLP, made and cast in one
// pass.
#include <ATen/ATen.h>
#include <ATen/record_function.h>
#include <c10/core/DeviceGuard.h>

#include "ops/producers.h"

namespace torch_fp8 {
namespace {

using OptionalTensor = c10::optional<at::Tensor>;

Activation activation_of(int64_t activation) {
  TORCH_CHECK_VALUE(activation >= 0 && activation <= 2,
                    "torch_fp8: activation must be 0 (silu), 1 (gelu) or 2 (gelu, tanh), got ", activation);
  return static_cast<Activation>(activation);
}

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

void check_gate(const at::Tensor& gate, const OptionalTensor& up) {
  type_of(gate.scalar_type(), "gate");
  TORCH_CHECK(gate.dim() >= 1, "torch_fp8: gate must have at least one dimension, got a scalar");
  check_strided(gate, "gate");
  if (up) check_like(*up, "up", gate, "gate");
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> activation_cast(const at::Tensor& gate, const OptionalTensor& up,
                                                               int64_t activation, const at::Tensor& slots,
                                                               int64_t role, at::IntArrayRef casts, int64_t history,
                                                               bool training, bool record, bool rowwise,
                                                               bool columnwise) {
  const Activation f = activation_of(activation);
  check_gate(gate, up);
  check_role(slots, "slots", gate, "gate", casts, role);
  const Cast cast = Cast::unpacked(casts[static_cast<size_t>(role)]);
  TORCH_CHECK_VALUE(cast.format == Format::kE4M3, "torch_fp8: what an activation makes is cast to E4M3");
  RECORD_FUNCTION("torch_fp8::activation_cast", std::vector<c10::IValue>());
  const c10::DeviceGuard on_device(gate.device());
  const NoAutocast no_autocast;
  QuantizeOptions options = how(casts, static_cast<int>(role), history, training, record);
  options.rowwise = rowwise, options.columnwise = columnwise;
  const at::Tensor gate_2d = as_rows(gate), up_2d = up ? as_rows(*up) : at::Tensor();
  Made made = prepare(gate_2d, slots, cast, role, options);
  const auto run = [&](const QuantizeArgs& args) {
    kernels_of(gate).activate({f, args, up_2d.defined() ? matrix_of(up_2d) : Matrix{}});
  };
  if (made.own.defined()) run(amax_only(made)), scale_by_own(made);
  run(made.args);
  return tensors(made);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> activation_backward_cast(
    const at::Tensor& dy, const at::Tensor& gate, const OptionalTensor& up, int64_t activation,
    const at::Tensor& gate_slots, const OptionalTensor& up_slots, int64_t role, at::IntArrayRef casts,
    at::IntArrayRef histories, bool training, bool record) {
  const Activation f = activation_of(activation);
  check_gate(gate, up);
  check_like(dy, "dy", gate, "gate");
  check_role(gate_slots, "gate_slots", gate, "gate", casts, role);
  TORCH_CHECK(up.has_value() == up_slots.has_value(), "torch_fp8: up and up_slots come together");
  TORCH_CHECK_VALUE(histories.size() == (up ? 2 : 1), "torch_fp8: histories must be of gate and, with it, of up");
  if (up_slots) check_role(*up_slots, "up_slots", gate, "gate", casts, role);
  RECORD_FUNCTION("torch_fp8::activation_backward_cast", std::vector<c10::IValue>());
  const Cast cast = Cast::unpacked(casts[static_cast<size_t>(role)]);
  const c10::DeviceGuard on_device(gate.device());
  const NoAutocast no_autocast;
  const at::Tensor dy_2d = as_rows(dy), gate_2d = as_rows(gate), up_2d = up ? as_rows(*up) : at::Tensor();
  const auto prepared = [&](const at::Tensor& x, const at::Tensor& slots, int64_t history) {
    QuantizeOptions options = how(casts, static_cast<int>(role), history, training, record);
    options.rowwise = options.columnwise = true;
    return prepare(x, slots, cast, role, options);
  };
  Made of_gate = prepared(gate_2d, gate_slots, histories[0]);
  Made of_up = up ? prepared(up_2d, *up_slots, histories[1]) : Made{};
  const auto run = [&](const QuantizeArgs& gate_args, const QuantizeArgs& up_args) {
    kernels_of(gate).activate_backward({f, matrix_of(dy_2d), gate_args, up_args});
  };
  if (of_gate.own.defined() || of_up.own.defined()) {
    run(amax_only(of_gate), amax_only(of_up));
    scale_by_own(of_gate), scale_by_own(of_up);
  }
  run(of_gate.args, of_up.args);
  const auto [gate_q, gate_q_t, gate_scale_inv] = tensors(of_gate);
  if (!up) return {gate_q, gate_q_t, gate_scale_inv, nothing(gate), nothing(gate), nothing(gate)};
  const auto [up_q, up_q_t, up_scale_inv] = tensors(of_up);
  return {gate_q, gate_q_t, gate_scale_inv, up_q, up_q_t, up_scale_inv};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> activation_cast_meta(const at::Tensor& gate, const OptionalTensor&,
                                                                    int64_t, const at::Tensor& slots, int64_t role,
                                                                    at::IntArrayRef casts, int64_t history,
                                                                    bool training, bool record, bool rowwise,
                                                                    bool columnwise) {
  return cast_meta(gate, slots, role, casts, history, training, record, rowwise, columnwise);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> activation_backward_cast_meta(
    const at::Tensor&, const at::Tensor& gate, const OptionalTensor& up, int64_t, const at::Tensor& gate_slots,
    const OptionalTensor&, int64_t role, at::IntArrayRef casts, at::IntArrayRef, bool, bool) {
  const auto made = [&] { return cast_meta(gate, gate_slots, role, casts, 0, false, false, true, true); };
  const auto [gate_q, gate_q_t, gate_scale_inv] = made();
  if (!up) return {gate_q, gate_q_t, gate_scale_inv, nothing(gate), nothing(gate), nothing(gate)};
  const auto [up_q, up_q_t, up_scale_inv] = made();
  return {gate_q, gate_q_t, gate_scale_inv, up_q, up_q_t, up_scale_inv};
}

}  // namespace torch_fp8
