// activation_cast, activation_backward_cast: what stands between the linear layers of an MLP, made and cast in one
// pass.
#include <cmath>

#include <ATen/ATen.h>
#include <ATen/record_function.h>
#include <c10/core/DeviceGuard.h>

#include "check.h"
#include "ops/linear.h"

namespace torch_fp8 {
namespace {

using OptionalTensor = c10::optional<at::Tensor>;

Activation activation_of(int64_t activation) {
  TORCH_CHECK_VALUE(activation >= 0 && activation <= 4,
                    "torch_fp8: activation must be 0 (silu), 1 (gelu), 2 (gelu, tanh), 3 (xielu) or 4 (relu squared), "
                    "got ",
                    activation);
  return static_cast<Activation>(activation);
}

void check_xielu(const OptionalTensor& alphas, double beta, Activation activation, const at::Tensor& gate) {
  const bool needed = activation == Activation::kXielu;
  TORCH_CHECK(alphas.has_value() == needed, "torch_fp8: alphas are of activation 3 (xielu) and of no other; ",
              needed ? "give them" : "leave them out");
  TORCH_CHECK_VALUE(std::isfinite(beta), "torch_fp8: beta must be a finite number, got ", beta);
  if (!needed) return;
  TORCH_CHECK(alphas->scalar_type() == at::kFloat && alphas->dim() == 1 && alphas->size(0) == 2,
              "torch_fp8: alphas must be float32 of shape [2], those of positive and of negative values, got ",
              alphas->scalar_type(), " ", alphas->sizes(), "; use torch.cat([alpha_p, alpha_n]).float()");
  check_strided(*alphas, "alphas");
  check_same_device(gate, "gate", *alphas, "alphas");
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

Matrix matrix_of(const at::Tensor& x) {
  return {x.const_data_ptr(), type_of(x.scalar_type(), "x"), x.size(0), x.size(1), x.stride(0), 1};
}

void check_like(const at::Tensor& t, const char* name, const at::Tensor& gate) {
  TORCH_CHECK_TYPE(t.scalar_type() == gate.scalar_type(), "torch_fp8: ", name, " must have gate's dtype ",
                   gate.scalar_type(), ", got ", t.scalar_type());
  TORCH_CHECK(t.sizes() == gate.sizes(), "torch_fp8: ", name, " must have gate's shape ", gate.sizes(), ", got ",
              t.sizes());
  check_strided(t, name);
  check_same_device(gate, "gate", t, name);
}

void check_gate(const at::Tensor& gate, const OptionalTensor& up) {
  type_of(gate.scalar_type(), "gate");
  TORCH_CHECK(gate.dim() >= 1, "torch_fp8: gate must have at least one dimension, got a scalar");
  check_strided(gate, "gate");
  if (up) check_like(*up, "up", gate);
}

void check_role(const at::Tensor& slots, const char* name, const at::Tensor& gate, at::IntArrayRef casts,
                int64_t role) {
  check_slots(slots, 0);
  check_same_device(gate, "gate", slots, name);
  TORCH_CHECK_INDEX(role >= 0 && role < slots.size(0) && role < static_cast<int64_t>(casts.size()),
                    "torch_fp8: role must be in [0, ", casts.size(), "), got ", role);
}

XieluArgs xielu_of(const at::Tensor& alphas, double beta) {
  return {alphas.defined() ? static_cast<const float*>(alphas.const_data_ptr()) : nullptr, static_cast<float>(beta)};
}

// A cast of what is made of x: its results, where they go, and how it is scaled.
struct Made {
  Codes codes;
  QuantizeArgs args;
  QuantizeOptions options;
  float target;
  at::Tensor own, column_sums;
};

Made prepare(const at::Tensor& x, const at::Tensor& slots, const Cast& cast, int64_t role,
             const QuantizeOptions& options) {
  Made made{{}, {}, options, static_cast<float>(cast.target()), {}, {}};
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
  if (options.dbias) {
    made.column_sums = at::empty({(matrix.rows + kBiasRows - 1) / kBiasRows, cols}, x.options().dtype(at::kFloat));
    made.args.column_sums = static_cast<float*>(made.column_sums.data_ptr());
  }
  if (options.own_amax) made.own = at::zeros({4 + kAmaxParts}, x.options().dtype(at::kFloat));
  return made;
}

// The first of two passes, where what is made is scaled by its own amax: it writes nothing but that.
QuantizeArgs amax_only(const Made& made) {
  QuantizeArgs args = made.args;
  args.column_sums = nullptr;
  if (made.own.defined()) {
    args.q = args.q_t = nullptr, args.scale_inv = nullptr;
    args.amax = static_cast<float*>(made.own.data_ptr()) + 4;
  }
  return args;
}

void scale_by_own(Made& made) {
  if (!made.own.defined()) return;
  const float* const parts = static_cast<const float*>(made.own.data_ptr()) + 4;
  kernels_of(made.own).scale_from_amax(parts, slots_of(made.own), made.target, made.options.power_of_two);
  made.args.slot = slots_of(made.own);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> tensors(const Made& made) {
  const auto filled = [&](const at::Tensor& t) { return t.defined() ? t : nothing(made.codes.scale_inv); };
  return {filled(made.codes.q), filled(made.codes.q_t), made.codes.scale_inv};
}

// The sums of the first cols columns of parts, in dtype.
at::Tensor column_sums(const at::Tensor& parts, int64_t cols, at::ScalarType dtype) {
  at::Tensor out = at::empty({cols}, parts.options().dtype(dtype));
  kernels_of(parts).add_column_sums({static_cast<const float*>(parts.const_data_ptr()), parts.size(0), cols,
                                     parts.size(1), out.data_ptr(), type_of(dtype, "dbias")});
  return out;
}

at::Tensor dbias_of(const Made& made) {
  if (!made.column_sums.defined()) return nothing(made.codes.scale_inv);
  return column_sums(made.column_sums, made.args.x.cols, *made.options.dbias);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> activation_cast(const at::Tensor& gate, const OptionalTensor& up,
                                                               int64_t activation, const at::Tensor& slots,
                                                               int64_t role, at::IntArrayRef casts, int64_t history,
                                                               bool training, bool record, bool rowwise,
                                                               bool columnwise, const OptionalTensor& alphas,
                                                               double beta) {
  const Activation f = activation_of(activation);
  check_gate(gate, up);
  check_xielu(alphas, beta, f, gate);
  check_role(slots, "slots", gate, casts, role);
  const Cast cast = Cast::unpacked(casts[static_cast<size_t>(role)]);
  TORCH_CHECK_VALUE(cast.format == Format::kE4M3, "torch_fp8: what an activation makes is cast to E4M3");
  RECORD_FUNCTION("torch_fp8::activation_cast", std::vector<c10::IValue>());
  const c10::DeviceGuard on_device(gate.device());
  const NoAutocast no_autocast;
  QuantizeOptions options = how(casts, static_cast<int>(role), history, training, record);
  options.rowwise = rowwise, options.columnwise = columnwise;
  const at::Tensor gate_2d = as_rows(gate), up_2d = up ? as_rows(*up) : at::Tensor();
  Made made = prepare(gate_2d, slots, cast, role, options);
  const at::Tensor dense_alphas = alphas ? alphas->contiguous() : at::Tensor();
  const XieluArgs xielu = xielu_of(dense_alphas, beta);
  const auto run = [&](const QuantizeArgs& args) {
    kernels_of(gate).activate({f, xielu, args, up_2d.defined() ? matrix_of(up_2d) : Matrix{}});
  };
  if (made.own.defined()) run(amax_only(made)), scale_by_own(made);
  run(made.args);
  return tensors(made);
}

GradientCasts activation_backward_cast(const at::Tensor& dy, const at::Tensor& gate, const OptionalTensor& up,
                                       int64_t activation, const at::Tensor& gate_slots, const OptionalTensor& up_slots,
                                       int64_t role, at::IntArrayRef casts, at::IntArrayRef histories, bool training,
                                       bool record, c10::optional<at::ScalarType> dbias, const OptionalTensor& alphas,
                                       double beta) {
  const Activation f = activation_of(activation);
  check_gate(gate, up);
  check_xielu(alphas, beta, f, gate);
  check_like(dy, "dy", gate);
  check_role(gate_slots, "gate_slots", gate, casts, role);
  TORCH_CHECK(up.has_value() == up_slots.has_value(), "torch_fp8: up and up_slots come together");
  TORCH_CHECK_VALUE(histories.size() == (up ? 2 : 1), "torch_fp8: histories must be of gate and, with it, of up");
  if (up_slots) check_role(*up_slots, "up_slots", gate, casts, role);
  if (dbias) type_of(*dbias, "dbias");
  RECORD_FUNCTION("torch_fp8::activation_backward_cast", std::vector<c10::IValue>());
  const Cast cast = Cast::unpacked(casts[static_cast<size_t>(role)]);
  const c10::DeviceGuard on_device(gate.device());
  const NoAutocast no_autocast;
  const at::Tensor dy_2d = as_rows(dy), gate_2d = as_rows(gate), up_2d = up ? as_rows(*up) : at::Tensor();
  const auto prepared = [&](const at::Tensor& x, const at::Tensor& slots, int64_t history) {
    QuantizeOptions options = how(casts, static_cast<int>(role), history, training, record);
    options.rowwise = options.columnwise = true;
    options.dbias = dbias;
    return prepare(x, slots, cast, role, options);
  };
  Made of_gate = prepared(gate_2d, gate_slots, histories[0]);
  Made of_up = up ? prepared(up_2d, *up_slots, histories[1]) : Made{};
  const at::Tensor dense_alphas = alphas ? alphas->contiguous() : at::Tensor();
  const XieluArgs xielu = xielu_of(dense_alphas, beta);
  const Matrix& matrix = of_gate.args.x;
  const at::Tensor by_tile =
      alphas ? at::empty({tiles_along(matrix.rows), 2 * tiles_along(matrix.cols)}, alphas->options()) : at::Tensor();
  const auto run = [&](const QuantizeArgs& gate_args, const QuantizeArgs& up_args, float* alpha_sums) {
    kernels_of(gate).activate_backward({f, xielu, matrix_of(dy_2d), gate_args, up_args, alpha_sums});
  };
  if (of_gate.own.defined() || of_up.own.defined()) {
    run(amax_only(of_gate), amax_only(of_up), nullptr);
    scale_by_own(of_gate), scale_by_own(of_up);
  }
  run(of_gate.args, of_up.args, alphas ? static_cast<float*>(by_tile.data_ptr()) : nullptr);
  // Down the tiles, and then across them.
  const auto d_alphas = [&] {
    return alphas ? column_sums(column_sums(by_tile, by_tile.size(1), at::kFloat).view({-1, 2}), 2, at::kFloat)
                  : nothing(gate);
  };
  const auto [gate_q, gate_q_t, gate_scale_inv] = tensors(of_gate);
  const auto none = [&] { return nothing(gate); };
  if (!up) return {gate_q, gate_q_t, gate_scale_inv, none(), none(), none(), dbias_of(of_gate), none(), d_alphas()};
  const auto [up_q, up_q_t, up_scale_inv] = tensors(of_up);
  return {gate_q, gate_q_t, gate_scale_inv, up_q, up_q_t, up_scale_inv, dbias_of(of_gate), dbias_of(of_up), d_alphas()};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> activation_cast_meta(const at::Tensor& gate, const OptionalTensor&,
                                                                    int64_t, const at::Tensor& slots, int64_t role,
                                                                    at::IntArrayRef casts, int64_t history,
                                                                    bool training, bool record, bool rowwise,
                                                                    bool columnwise, const OptionalTensor&, double) {
  return cast_meta(gate, slots, role, casts, history, training, record, rowwise, columnwise);
}

GradientCasts activation_backward_cast_meta(const at::Tensor&, const at::Tensor& gate, const OptionalTensor& up,
                                            int64_t, const at::Tensor& gate_slots, const OptionalTensor&, int64_t role,
                                            at::IntArrayRef casts, at::IntArrayRef, bool, bool,
                                            c10::optional<at::ScalarType> dbias, const OptionalTensor& alphas, double) {
  const auto made = [&] { return cast_meta(gate, gate_slots, role, casts, 0, false, false, true, true); };
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
