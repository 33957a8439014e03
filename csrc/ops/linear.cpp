// linear_forward, linear_backward: a linear layer with every rule inside: what is checked, how each role is cast, which
// GEMMs run, in FP8 or in 16 bits, and which gradients they make.
#include <cmath>

#include <ATen/ATen.h>
#include <ATen/record_function.h>
#include <c10/core/DeviceGuard.h>

#include "check.h"
#include "ops/linear.h"
#include "ops/record.h"

namespace torch_fp8 {
namespace {

enum Gemm : int { kFprop, kDgrad, kWgrad };
using OptionalTensor = c10::optional<at::Tensor>;

// Profiles name what a layer casts.
constexpr const char* kCastNames[kRoles] = {"torch_fp8::cast_input", "torch_fp8::cast_weight",
                                            "torch_fp8::cast_grad_output"};

ToQuantize as_role(const at::Tensor& t, const at::Tensor& slots, at::IntArrayRef casts, int role,
                   const QuantizeOptions& options) {
  return {t, slots, role, Cast::unpacked(casts[static_cast<size_t>(role)]).dtype(), options};
}

Quantized cast_role(const ToQuantize& t) {
  RECORD_FUNCTION(kCastNames[t.role], std::vector<c10::IValue>());
  return quantize_only(t.x, t.slots, t.role, t.dtype, t.options);
}

std::pair<Quantized, Quantized> cast_both(const ToQuantize& first, const ToQuantize& second) {
  RECORD_FUNCTION(kCastNames[first.role], std::vector<c10::IValue>());
  const auto inside = [&] {
    RECORD_FUNCTION(kCastNames[second.role], std::vector<c10::IValue>());
    return quantize_both(first, second);
  };
  return inside();
}

void check_recipe(at::IntArrayRef casts, const Gemms& fp8) {
  TORCH_CHECK_VALUE(casts.size() == kRoles, "torch_fp8: a linear layer has ", int(kRoles), " casts, got ",
                    casts.size());
  TORCH_CHECK_VALUE(fp8[kFprop] || fp8[kDgrad] || fp8[kWgrad],
                    "torch_fp8: a recipe must run at least one of fprop, dgrad and wgrad in FP8; use nn.Linear for a "
                    "layer in 16 bits");
}

// Codes that came from elsewhere belong to a tensor of this shape.
void check_codes(const OptionalTensor& codes, const char* name, c10::SymInt rows, c10::SymInt cols) {
  TORCH_CHECK(codes && codes->dim() == 2 && codes->sym_size(0) == padded_symbolic(rows) &&
                  codes->sym_size(1) == padded_symbolic(cols),
              "torch_fp8: ", name, " must be the codes of a tensor of shape [", rows, ", ", cols, "], padded to [",
              padded_symbolic(rows), ", ", padded_symbolic(cols), "], got ",
              codes ? c10::str("shape ", codes->sym_sizes()) : std::string("none"),
              "; torch.ops.torch_fp8.quantize gives them");
}

c10::SymInt rows_of(const at::Tensor& x) {
  c10::SymInt rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows = rows * x.sym_size(i);
  return rows;
}

void check_given(at::TensorList codes, const char* name, const at::Tensor& t, bool rowwise, bool columnwise) {
  TORCH_CHECK_VALUE(codes.empty() || codes.size() == 3, "torch_fp8: ", name,
                    " must be empty or {q, q_t, scale_inv}, got ", codes.size(), " tensors");
  if (codes.empty()) return;
  const c10::SymInt rows = rows_of(t), cols = t.sym_size(-1);
  if (rowwise) check_codes(codes[0], name, rows, cols);
  if (columnwise) check_codes(codes[1], name, cols, rows);
}

// (..., K) as (M, K), in a 16-bit GEMM's dtype.
at::Tensor matrix_in(const at::Tensor& t, at::ScalarType dtype) {
  return t.reshape({leading_size(t.sizes()), t.size(-1)}).to(dtype);
}

// One of the three products out (size) = a . b^T; added to sum, where there is one, and then without elements.
at::Tensor multiply(Gemm which, const Codes& a, const Codes& b, at::IntArrayRef size, at::ScalarType dtype,
                    const Gemms& fast_accum, const OptionalTensor& bias, const OptionalTensor& sum,
                    const OptionalTensor& addend = {}) {
  constexpr const char* kNames[] = {"torch_fp8::fprop", "torch_fp8::dgrad", "torch_fp8::wgrad"};
  RECORD_FUNCTION(kNames[which], std::vector<c10::IValue>());
  if (!sum) return gemm(a.q, b.q, a.scale_inv, b.scale_inv, bias, size, dtype, fast_accum[which], addend);
  gemm_accumulate_(*sum, a.q, b.q, a.scale_inv, b.scale_inv, fast_accum[which]);
  return {};
}

at::Tensor filled(const at::Tensor& t, const at::Tensor& like) { return t.defined() ? t : nothing(like); }

}  // namespace

QuantizeOptions how(const Cast& cast, bool has_scale, bool record) {
  QuantizeOptions q;
  q.own_amax = cast.scaling == Scaling::kCurrent || (cast.scaling == Scaling::kDelayed && !has_scale);
  q.power_of_two = cast.power_of_two;
  q.margin = cast.margin;
  q.record = record && cast.scaling != Scaling::kConstant;
  q.rowwise = false;
  return q;
}

// How a role is cast now. In training a delayed scale is that of the role's history, once it has one. In evaluation the
// weight and the gradient are scaled by their own amax: the one may have been exchanged, and the other belongs to
// another loss than the history. recast: a weight that left its scale's range, since somebody wrote to it, is cast
// again by its own amax (is_unfit in scale.h).
QuantizeOptions how(at::IntArrayRef casts, int role, int64_t history, bool training, bool record) {
  const Cast cast = Cast::unpacked(casts[role]);
  QuantizeOptions q = how(cast, (history >> role & 1) && (training || role == kInput), record);
  q.recast = role == kWeight && cast.scaling == Scaling::kDelayed && !q.own_amax;
  return q;
}

void check_layer(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, const at::Tensor& slots,
                 c10::optional<at::ScalarType> autocast) {
  type_of(x.scalar_type(), "the input");
  type_of(weight.scalar_type(), "the weight");
  if (autocast) type_of(*autocast, "the autocast dtype");
  TORCH_CHECK(weight.dim() == 2, "torch_fp8: the weight must be a matrix (out_features, in_features), got ",
              weight.sym_sizes());
  check_input(x, weight);
  check_same_device(weight, "the weight", slots, "the layer's scaling state");
  // A float32 parameter is a master of the 16-bit one: it is quantised, or rounded, from the values that it has.
  TORCH_CHECK_TYPE(autocast || weight.scalar_type() == at::kFloat || x.scalar_type() == weight.scalar_type(),
                   "torch_fp8: the input is ", x.scalar_type(), " but the weight is ", weight.scalar_type(),
                   "; cast one of them, or use torch.autocast");
  if (!bias) return;
  check_bias(*bias, weight);
  TORCH_CHECK_TYPE(autocast || bias->scalar_type() == at::kFloat || bias->scalar_type() == weight.scalar_type(),
                   "torch_fp8: the bias is ", bias->scalar_type(), " but the weight is ", weight.scalar_type(),
                   "; cast one of them");
}

void check_residual(const at::Tensor& residual, const at::Tensor& x, const at::Tensor& weight,
                    c10::optional<at::ScalarType> autocast) {
  auto size = x.sym_sizes().vec();
  size.back() = weight.sym_size(0);
  const at::ScalarType dtype = autocast.value_or(x.scalar_type());
  TORCH_CHECK_TYPE(residual.scalar_type() == dtype, "torch_fp8: the residual is ", residual.scalar_type(),
                   " but the output is ", dtype, "; cast it");
  TORCH_CHECK(residual.sym_sizes() == c10::SymIntArrayRef(size),
              "torch_fp8: the residual must have the output's shape ", c10::SymIntArrayRef(size), ", got ",
              residual.sym_sizes());
  check_same_device(weight, "the weight", residual, "the residual");
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> cast(const at::Tensor& t, const at::Tensor& slots, int64_t role,
                                                    at::IntArrayRef casts, int64_t history, bool training, bool record,
                                                    bool rowwise, bool columnwise) {
  TORCH_CHECK_INDEX(role >= 0 && role < static_cast<int64_t>(casts.size()) && role < kRoles,
                    "torch_fp8: role must be in [0, ", int(kRoles), "), got ", role);
  QuantizeOptions options = how(casts, static_cast<int>(role), history, training, record);
  options.rowwise = rowwise, options.columnwise = columnwise;
  Quantized q = cast_role(as_role(t, slots, casts, static_cast<int>(role), options));
  return {filled(q.q, t), filled(q.q_t, t), q.scale_inv};
}

ForwardResult forward_only(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                           const at::Tensor& slots, at::TensorList x_codes, at::TensorList weight_codes,
                           at::IntArrayRef casts, int64_t history, Gemms fp8, Gemms fast_accum, bool training,
                           bool record, bool grad_x, bool grad_weight, bool gathered,
                           c10::optional<at::ScalarType> autocast, const OptionalTensor& residual) {
  const bool x_t = grad_weight && fp8[kWgrad], weight_t = grad_x && fp8[kDgrad] && !gathered;
  const NoAutocast no_autocast;
  const at::ScalarType dtype = autocast.value_or(x.scalar_type());

  const auto wanted = [&](const at::Tensor& t, int role, bool columnwise) {
    QuantizeOptions options = how(casts, role, history, training, record);
    options.rowwise = fp8[kFprop], options.columnwise = columnwise;
    return as_role(t, slots, casts, role, options);
  };
  const auto given = [](at::TensorList codes) { return Codes{codes[0], codes[1], codes[2]}; };
  const bool casts_x = x_codes.empty() && (fp8[kFprop] || x_t);
  const bool casts_weight = weight_codes.empty() && (fp8[kFprop] || weight_t);
  // The weight comes first: whether it must be cast again is found out while the input is being cast.
  Codes wq, xq;
  if (casts_x && casts_weight) {
    std::tie(wq, xq) = cast_both(wanted(weight, kWeight, weight_t), wanted(x, kInput, x_t));
  } else {
    if (casts_weight) wq = cast_role(wanted(weight, kWeight, weight_t));
    if (casts_x) xq = cast_role(wanted(x, kInput, x_t));
  }
  if (!weight_codes.empty()) wq = given(weight_codes);
  if (!x_codes.empty()) xq = given(x_codes);

  const OptionalTensor y_bias = bias ? OptionalTensor(bias->to(dtype)) : c10::nullopt;
  at::Tensor y;
  if (fp8[kFprop]) {
    std::vector<int64_t> size = x.sizes().vec();
    size.back() = weight.size(0);
    y = multiply(kFprop, xq, wq, size, dtype, fast_accum, y_bias, {}, residual);
  } else {
    y = at::linear(x.to(dtype), weight.to(dtype), y_bias);
    if (residual) y.add_(*residual);
  }
  const auto made = [&](const at::Tensor& t, at::TensorList given, bool wanted) {
    return wanted && given.empty() ? t : at::Tensor();
  };
  return {y, made(xq.q_t, x_codes, x_t), made(xq.scale_inv, x_codes, x_t), made(wq.q_t, weight_codes, weight_t),
          made(wq.scale_inv, weight_codes, weight_t)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_forward(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, const at::Tensor& slots,
    at::TensorList x_codes, at::TensorList weight_codes, at::IntArrayRef casts, int64_t history, Gemms fp8,
    Gemms fast_accum, bool training, bool record, bool grad_x, bool grad_weight, bool gathered,
    c10::optional<at::ScalarType> autocast, const OptionalTensor& residual) {
  check_recipe(casts, fp8);
  check_layer(x, weight, bias, slots, autocast);
  if (residual) check_residual(*residual, x, weight, autocast);
  check_given(x_codes, "x_codes", x, fp8[kFprop], grad_weight && fp8[kWgrad]);
  check_given(weight_codes, "weight_codes", weight, fp8[kFprop], grad_x && fp8[kDgrad] && !gathered);
  auto [y, x_t, x_scale_inv, weight_t, weight_scale_inv] =
      forward_only(x, weight, bias, slots, x_codes, weight_codes, casts, history, fp8, fast_accum, training, record,
                   grad_x, grad_weight, gathered, autocast, residual);
  return {y, filled(x_t, x), filled(x_scale_inv, x), filled(weight_t, x), filled(weight_scale_inv, x)};
}

BackwardResult backward_only(const at::Tensor& dy, at::TensorList dy_codes, const OptionalTensor& x_t,
                             const OptionalTensor& x_scale_inv, const OptionalTensor& weight_t,
                             const OptionalTensor& weight_scale_inv, const OptionalTensor& x,
                             const OptionalTensor& weight, const at::Tensor& slots, const OptionalTensor& main_grad,
                             const OptionalTensor& dx_sum, at::IntArrayRef casts, int64_t history, Gemms fp8,
                             Gemms fast_accum, bool training, bool record, bool grad_x, bool grad_weight,
                             c10::optional<at::ScalarType> dbias_dtype, int64_t in_features, at::ScalarType x_dtype,
                             at::ScalarType weight_dtype, bool dummy_grad) {
  check_recipe(casts, fp8);
  type_of(dy.scalar_type(), "the output's gradient");
  TORCH_CHECK(dy.dim() >= 1, "torch_fp8: the output's gradient must have at least one dimension, got a scalar");
  const int64_t rows = leading_size(dy.sizes()), out_features = dy.size(-1);
  const bool fp8_x = grad_x && fp8[kDgrad], fp8_weight = grad_weight && fp8[kWgrad];
  if (fp8_weight) check_codes(x_t, "x_t", in_features, rows);
  if (fp8_x && !weight) check_codes(weight_t, "weight_t", in_features, out_features);
  TORCH_CHECK(!grad_x || fp8[kDgrad] || weight, "torch_fp8: a dgrad in 16 bits needs the weight");
  TORCH_CHECK(!grad_weight || fp8[kWgrad] || x, "torch_fp8: a wgrad in 16 bits needs the input");
  const NoAutocast no_autocast;

  const bool transposes = fp8_weight && dy_codes.size() == 3 && dy_codes[1].dim() != 2;
  check_given(dy_codes, "dy_codes", dy, fp8_x || transposes, fp8_weight && !transposes);
  TORCH_CHECK_VALUE(dy_codes.empty() || (fp8_x == grad_x && fp8_weight == grad_weight && !dbias_dtype),
                    "torch_fp8: dy_codes are all that is given of dy, so no GEMM can run in 16 bits and no gradient of "
                    "a bias be summed");
  Quantized g;
  const bool sums_by_cast = dbias_dtype && (fp8_x || fp8_weight);
  if (!dy_codes.empty()) {
    g.q = dy_codes[0], g.q_t = dy_codes[1], g.scale_inv = dy_codes[2];
  } else if (fp8_x || fp8_weight) {
    QuantizeOptions options = how(casts, kGradOutput, history, training, record);
    options.rowwise = fp8_x, options.columnwise = fp8_weight;
    if (sums_by_cast) options.dbias = dbias_dtype;
    g = cast_role(as_role(dy, slots, casts, kGradOutput, options));
  }

  at::Tensor dx, dw, dbias;
  std::vector<int64_t> x_size = dy.sizes().vec();
  x_size.back() = in_features;
  if (fp8_x) {
    Codes w;
    if (weight) {  // gathered for the time of this backward: its codes are made here and end here
      QuantizeOptions options = how(casts, kWeight, history, training, /*record=*/false);
      options.columnwise = true;
      w = cast_role(as_role(*weight, slots, casts, kWeight, options));
    } else {
      w = {{}, *weight_t, *weight_scale_inv};
    }
    dx = multiply(kDgrad, g, {w.q_t, {}, w.scale_inv}, x_size, x_dtype, fast_accum, {}, dx_sum);
    if (!transposes) g.q.reset();  // its memory serves the weight's gradient
  } else if (grad_x) {
    const at::Tensor product = at::mm(matrix_in(dy, dy.scalar_type()), weight->to(dy.scalar_type()));
    if (dx_sum) {
      dx_sum->add_(product.view(x_size));
    } else {
      dx = product.view(x_size).to(x_dtype);
    }
  }

  if (fp8_weight) {
    if (transposes) g.q_t = transpose_codes(g.q);
    const std::array<int64_t, 2> size{out_features, in_features};
    dw = multiply(kWgrad, {g.q_t, {}, g.scale_inv}, {*x_t, {}, *x_scale_inv}, size, weight_dtype, fast_accum, {},
                  main_grad);
  } else if (grad_weight) {
    const at::Tensor product = at::mm(matrix_in(dy, dy.scalar_type()).t(), matrix_in(*x, dy.scalar_type()));
    if (main_grad) {
      main_grad->add_(product);
    } else {
      dw = product.to(weight_dtype);
    }
  }
  if (grad_weight && main_grad && dummy_grad) {
    dw = at::empty({out_features, in_features}, dy.options().dtype(weight_dtype));
  }
  if (sums_by_cast) {
    dbias = g.dbias;
  } else if (dbias_dtype) {
    dbias = matrix_in(dy, dy.scalar_type()).sum(0, /*keepdim=*/false, at::kFloat).to(*dbias_dtype);
  }
  return {dx, dw, dbias};
}

BackwardResult linear_backward(const at::Tensor& dy, at::TensorList dy_codes, const OptionalTensor& x_t,
                               const OptionalTensor& x_scale_inv, const OptionalTensor& weight_t,
                               const OptionalTensor& weight_scale_inv, const OptionalTensor& x,
                               const OptionalTensor& weight, const at::Tensor& slots, const OptionalTensor& main_grad,
                               const OptionalTensor& dx_sum, at::IntArrayRef casts, int64_t history, Gemms fp8,
                               Gemms fast_accum, bool training, bool record, bool grad_x, bool grad_weight,
                               c10::optional<at::ScalarType> dbias_dtype, int64_t in_features, at::ScalarType x_dtype,
                               at::ScalarType weight_dtype, bool dummy_grad) {
  auto [dx, dw, dbias] = backward_only(dy, dy_codes, x_t, x_scale_inv, weight_t, weight_scale_inv, x, weight, slots,
                                       main_grad, dx_sum, casts, history, fp8, fast_accum, training, record, grad_x,
                                       grad_weight, dbias_dtype, in_features, x_dtype, weight_dtype, dummy_grad);
  return {filled(dx, dy), filled(dw, dy), filled(dbias, dy)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> cast_meta(const at::Tensor& t, const at::Tensor&, int64_t role,
                                                         at::IntArrayRef casts, int64_t, bool, bool, bool rowwise,
                                                         bool columnwise) {
  const auto fp8 = t.options().dtype(Cast::unpacked(casts.at(static_cast<size_t>(role))).dtype());
  const c10::SymInt rows = padded_symbolic(rows_of(t)), cols = padded_symbolic(t.sym_size(-1));
  return {rowwise ? at::empty_symint({rows, cols}, fp8) : nothing(t),
          columnwise ? at::empty_symint({cols, rows}, fp8) : nothing(t), at::empty({1}, t.options().dtype(at::kFloat))};
}

// What tracing sees. It checks nothing: the op itself does when the graph runs, in the words and types of eager mode,
// which a tracer would wrap into its own.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_forward_meta(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, const at::Tensor& slots,
    at::TensorList x_codes, at::TensorList weight_codes, at::IntArrayRef casts, int64_t history, Gemms fp8,
    Gemms fast_accum, bool training, bool record, bool grad_x, bool grad_weight, bool gathered,
    c10::optional<at::ScalarType> autocast, const OptionalTensor& residual) {
  if (GemmRecord::is_open()) {
    return linear_forward(x, weight, bias, slots, x_codes, weight_codes, casts, history, fp8, fast_accum, training,
                          record, grad_x, grad_weight, gathered, autocast, residual);
  }
  const bool x_t = grad_weight && fp8[kWgrad], weight_t = grad_x && fp8[kDgrad] && !gathered;
  TORCH_CHECK(x.dim() >= 1 && weight.dim() == 2,
              "torch_fp8: the input must have at least one dimension and the weight two");
  const auto transposed = [&](const at::Tensor& t, int role, at::TensorList given, bool wanted) {
    if (!wanted || !given.empty()) return nothing(x);
    return at::empty_symint({padded_symbolic(t.sym_size(-1)), padded_symbolic(rows_of(t))},
                            x.options().dtype(Cast::unpacked(casts[role]).dtype()));
  };
  const auto scale = [&](at::TensorList given, bool wanted) {
    return at::empty({wanted && given.empty() ? 1 : 0}, x.options().dtype(at::kFloat));
  };
  auto size = x.sym_sizes().vec();
  size.back() = weight.sym_size(0);
  return {at::empty_symint(size, x.options().dtype(autocast.value_or(x.scalar_type()))),
          transposed(x, kInput, x_codes, x_t), scale(x_codes, x_t), transposed(weight, kWeight, weight_codes, weight_t),
          scale(weight_codes, weight_t)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward_meta(
    const at::Tensor& dy, at::TensorList dy_codes, const OptionalTensor& x_t, const OptionalTensor& x_scale_inv,
    const OptionalTensor& weight_t, const OptionalTensor& weight_scale_inv, const OptionalTensor& x,
    const OptionalTensor& weight, const at::Tensor& slots, const OptionalTensor& main_grad,
    const OptionalTensor& dx_sum, at::IntArrayRef casts, int64_t history, Gemms fp8, Gemms fast_accum, bool training,
    bool record, bool grad_x, bool grad_weight, c10::optional<at::ScalarType> dbias_dtype, c10::SymInt in_features,
    at::ScalarType x_dtype, at::ScalarType weight_dtype, bool dummy_grad) {
  if (GemmRecord::is_open()) {
    return linear_backward(dy, dy_codes, x_t, x_scale_inv, weight_t, weight_scale_inv, x, weight, slots, main_grad,
                           dx_sum, casts, history, fp8, fast_accum, training, record, grad_x, grad_weight, dbias_dtype,
                           in_features.expect_int(), x_dtype, weight_dtype, dummy_grad);
  }
  const auto empty = [&](bool wanted, c10::SymIntArrayRef size, at::ScalarType dtype) {
    return wanted ? at::empty_symint(size, dy.options().dtype(dtype)) : nothing(dy);
  };
  auto x_size = dy.sym_sizes().vec();
  x_size.back() = in_features;
  return {empty(grad_x && !dx_sum, x_size, x_dtype),
          empty(grad_weight && (!main_grad || dummy_grad), {dy.sym_size(-1), in_features}, weight_dtype),
          empty(dbias_dtype.has_value(), {dy.sym_size(-1)}, dbias_dtype.value_or(at::kFloat))};
}

double Cast::target() const { return std::ldexp(static_cast<double>(max_of(format)), -static_cast<int>(margin)); }

int64_t Cast::packed() const {
  return margin << 4 | static_cast<int64_t>(scaling) << 2 | int64_t{power_of_two} << 1 | (format == Format::kE5M2);
}

Cast Cast::unpacked(int64_t packed) {
  TORCH_CHECK_VALUE(packed >= 0 && packed >> 4 <= kMaxBias && (packed >> 2 & 3) <= 2,
                    "torch_fp8: a packed cast is margin << 4 | scaling << 2 | power_of_two << 1 | E5M2, got ", packed);
  return {packed & 1 ? Format::kE5M2 : Format::kE4M3, static_cast<Scaling>(packed >> 2 & 3), (packed >> 1 & 1) != 0,
          packed >> 4};
}

Cast LinearOptions::cast(int role) const {
  const bool gradient = role == kGradOutput;
  return {gradient && !e4m3_gradients ? Format::kE5M2 : Format::kE4M3, scaling, power_of_two,
          gradient ? grad_margin : margin};
}

}  // namespace torch_fp8
