// The autograd function of the FP8 linear layer, over linear_forward and linear_backward (call.h).
#include <cmath>

#include <ATen/ATen.h>

#include "call.h"
#include "siblings.h"
#include "stand_in.h"
#include "torch_fp8/linear.h"

namespace torch_fp8 {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Data = decltype(AutogradContext::saved_data);

c10::optional<at::Tensor> defined(const at::Tensor& t) { return t.defined() ? c10::optional(t) : c10::nullopt; }

void keep_source(const Source& source, variable_list& tensors, Data& data) {
  if (const auto* const product = std::get_if<Product>(&source)) {
    tensors.insert(tensors.end(), {product->gate, product->up, product->alphas});
    data["activation"] = product->activation, data["beta"] = product->beta, data["halves"] = product->halves;
    return;
  }
  const auto& [x, gain, bias, options] = std::get<Normed>(source);
  tensors.insert(tensors.end(), {x, gain, bias});
  data["eps"] = options.eps, data["layer_norm"] = options.layer_norm, data["gain_offset"] = options.gain_offset;
}

c10::optional<Source> kept_source(const variable_list& tensors, size_t first, const Data& data) {
  if (const auto activation = data.find("activation"); activation != data.end()) {
    return Product{tensors[first],
                   tensors[first + 1],
                   tensors[first + 2],
                   activation->second.toInt(),
                   data.at("beta").toDouble(),
                   data.at("halves").toInt()};
  }
  if (!data.count("eps")) return {};
  const NormOptions options{data.at("eps").toDouble(), data.at("layer_norm").toBool(),
                            data.at("gain_offset").toDouble()};
  return Normed{tensors[first], tensors[first + 1], tensors[first + 2], options};
}

// The transpose of the codes made of a source, by the scale that they were made with: a slot of its own has it.
at::Tensor transpose_again(const Source& source, const at::Tensor& scale_inv, std::array<int64_t, kRoles> casts) {
  const at::Tensor slots = at::zeros({kRoles, 4}, scale_inv.options());
  slots.select(0, kInput).narrow(0, 0, 1).copy_(scale_inv);
  slots.select(0, kInput).narrow(0, 1, 1).copy_(scale_inv.reciprocal());
  Cast cast = Cast::unpacked(casts[kInput]);
  cast.scaling = Scaling::kConstant;
  casts[kInput] = cast.packed();
  if (const auto* const product = std::get_if<Product>(&source)) {
    return cast_product(*product, slots, casts, /*history=*/0, /*training=*/true, /*record=*/false, /*rowwise=*/false,
                        /*columnwise=*/true)
        .q_t;
  }
  const auto& [x, gain, bias, options] = std::get<Normed>(source);
  static const auto norm_op = op<decltype(norm_cast)>("torch_fp8::norm_cast");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return std::get<3>(norm_op.call(x, /*residual=*/{}, defined(gain), defined(bias), options.eps, options.layer_norm,
                                  options.gain_offset, slots, kInput, casts, /*history=*/0, /*training=*/true,
                                  /*record=*/false, /*rowwise=*/false, /*columnwise=*/true, /*wants_y=*/false));
}

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const c10::optional<at::Tensor>& bias, const Call& call,
                            const c10::optional<at::Tensor>& residual) {
    ctx->set_materialize_grads(false);
    const auto [y, made_x_t, made_x_scale_inv, made_weight_t, made_weight_scale_inv] =
        forward_of(x, weight, bias, call, residual);
    variable_list tensors;
    tensors.reserve(6);
    const auto keep = [&](const at::Tensor& t, bool wanted) { tensors.push_back(wanted ? t : at::Tensor()); };
    const bool fp8_x = call.grad_x && call.fp8[1] && !call.gathered, fp8_weight = call.grad_weight && call.fp8[2];
    keep(call.x_codes.empty() ? made_x_t : call.x_codes[1], fp8_weight && !call.source);
    keep(call.x_codes.empty() ? made_x_scale_inv : call.x_codes[2], fp8_weight);
    keep(call.weight_codes.empty() ? made_weight_t : call.weight_codes[1], fp8_x);
    keep(call.weight_codes.empty() ? made_weight_scale_inv : call.weight_codes[2], fp8_x);
    keep(x, call.grad_weight && !call.fp8[2]);
    if (call.autocast && tensors.back().defined()) {  // as nn.Linear keeps it
      tensors.back() = x.detach().to(*call.autocast);
    }
    keep(weight, call.grad_x && (call.gathered || !call.fp8[1]));
    auto& data = ctx->saved_data;
    if (call.source && fp8_weight) keep_source(*call.source, tensors, data);
    ctx->save_for_backward(std::move(tensors));

    const Numbers& numbers = call;
    std::string text(2 * sizeof numbers, '\0');  // in letters: a string of Python's is no string of bytes
    const auto* const bytes = reinterpret_cast<const unsigned char*>(&numbers);
    for (size_t i = 0; i < sizeof numbers; ++i)
      text[2 * i] = 'a' + (bytes[i] >> 4), text[2 * i + 1] = 'a' + (bytes[i] & 15);
    data["numbers"] = std::move(text);
    data["slots"] = call.slots;
    if (weight.sym_size(1).is_symbolic()) data["in_features"] = weight.sym_size(1);
    if (call.main_grad.defined()) data["main_grad"] = call.main_grad;
    if (call.sum != 0) data["sum"] = call.sum;
    if (residual) data["has_residual"] = true;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(5);  // x, weight, bias, call, residual
    const at::Tensor& dy = grads[0];
    if (!dy.defined()) return result;
    check_not_differentiated_again();
    auto& data = ctx->saved_data;
    Numbers n;
    const std::string& text = data["numbers"].toStringRef();
    auto* const bytes = reinterpret_cast<unsigned char*>(&n);
    for (size_t i = 0; i < sizeof n; ++i)
      bytes[i] = static_cast<unsigned char>((text[2 * i] - 'a') << 4 | (text[2 * i + 1] - 'a'));
    const bool grad_x = ctx->needs_input_grad(0), grad_weight = ctx->needs_input_grad(1);
    c10::optional<at::ScalarType> dbias;
    if (n.has_bias && ctx->needs_input_grad(2)) dbias = n.bias_dtype;
    const auto held = [&](const char* name) {
      const auto found = data.find(name);
      return found == data.end() ? at::Tensor() : found->second.toTensor();
    };
    const at::Tensor slots = held("slots"), main_grad = held("main_grad");
    const int64_t sum = data.count("sum") && grad_x && can_sum() ? data["sum"].toInt() : 0;
    SharedInBackward shared = sum ? shared_so_far(sum) : SharedInBackward{};
    const at::Tensor dx_sum = shared.dx;

    // Codes may come in place of dy.
    const HandedOver* const handed = handed_over(dy);
    c10::SmallVector<at::Tensor, 3> dy_codes;
    if (handed) {
      dy_codes = {handed->codes.q, handed->codes.q_t, handed->codes.scale_inv};
      if (dbias) result[2] = handed->column_sums.to(*dbias);
      dbias.reset();
    }

    variable_list saved = ctx->get_saved_variables();
    if (const auto source = kept_source(saved, /*first=*/6, data); source && grad_weight) {
      if (!shared.x_t.defined()) shared.x_t = transpose_again(*source, saved[1], n.casts);
      saved[0] = shared.x_t;
    }
    static const auto backward_op = op<std::tuple<at::Tensor, at::Tensor, at::Tensor>(
        const at::Tensor&, at::TensorList, const c10::optional<at::Tensor>&, const c10::optional<at::Tensor>&,
        const c10::optional<at::Tensor>&, const c10::optional<at::Tensor>&, const c10::optional<at::Tensor>&,
        const c10::optional<at::Tensor>&, const at::Tensor&, const c10::optional<at::Tensor>&,
        const c10::optional<at::Tensor>&, at::IntArrayRef, int64_t, Gemms, Gemms, bool, bool, bool, bool,
        c10::optional<at::ScalarType>, c10::SymInt, at::ScalarType, at::ScalarType, bool)>(
        "torch_fp8::linear_backward");
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto run = [&](const auto& backward, auto in_features) {
      return backward(dy, dy_codes, defined(saved[0]), defined(saved[1]), defined(saved[2]), defined(saved[3]),
                      defined(saved[4]), defined(saved[5]), slots, defined(main_grad), defined(dx_sum), n.casts,
                      n.history, n.fp8, n.fast_accum, n.training, n.record, grad_x, grad_weight, dbias, in_features,
                      n.x_dtype, n.weight_dtype, n.dummy_grad);
    };
    const auto through_the_dispatcher = [&](auto&&... arguments) { return backward_op.call(arguments...); };
    const auto symbolic = data.find("in_features");
    auto [dx, dw, db] = is_plain(dy, slots)
                            ? run(backward_only, n.in_features)
                            : run(through_the_dispatcher,
                                  symbolic == data.end() ? c10::SymInt(n.in_features) : symbolic->second.toSymInt());
    if (const auto memo = LayerMemo::find(n.memo)) {
      if (n.training && ((grad_x && n.fp8[1]) || (grad_weight && n.fp8[2]))) memo->note_used(kGradOutput);
      if (grad_weight) memo->note_weight_grad();
    }
    if (grad_x && !dx_sum.defined()) {
      shared.dx = dx;
      result[0] = std::move(dx);
    }
    if (sum) share_in_backward(sum, shared);
    if (grad_weight && (!main_grad.defined() || n.dummy_grad)) result[1] = std::move(dw);
    if (dbias) result[2] = std::move(db);
    if (data.count("has_residual")) result[4] = dy;
    return result;
  }
};

}  // namespace

at::Tensor run(const at::Tensor& x, const at::Tensor& weight, const c10::optional<at::Tensor>& bias, const Call& call,
               const c10::optional<at::Tensor>& residual) {
  const bool through_residual = residual && at::GradMode::is_enabled() && residual->requires_grad();
  if (!call.is_differentiable() && !through_residual) {
    return std::get<0>(forward_of(x, weight, bias, call, residual));
  }
  return LinearFunction::apply(x, weight, bias, call, residual);
}

at::Tensor linear(const at::Tensor& x_given, const at::Tensor& weight, const c10::optional<at::Tensor>& bias,
                  const at::Tensor& slots, const LinearOptions& options, const std::shared_ptr<LayerMemo>& memo,
                  bool training, const c10::optional<at::Tensor>& main_grad, bool dummy_grad, const Place& place) {
  at::Tensor x = x_given;
  check_no_transform(x, weight);
  const auto autocast = autocast_dtype(x);
  check_layer(x, weight, bias, slots, autocast);
  const LinearLayer layer{weight, bias, slots, options, *memo, training, main_grad, dummy_grad, place};
  Call call = begin_call(layer, x.scalar_type(), x.requires_grad(), autocast);
  find_codes(layer, call, &x);
  return run(x, weight, bias, call);
}

at::Tensor new_slots(c10::Device device, int64_t bias, int64_t grad_bias, c10::optional<int64_t> weight_bias) {
  const int64_t biases[kRoles] = {bias, weight_bias.value_or(bias), grad_bias};
  at::Tensor slots = at::zeros({kRoles, 4}, at::TensorOptions(at::kFloat).device(at::kCPU));
  for (int role = 0; role < kRoles; ++role) {
    const int64_t b = biases[role];
    slots[role][0] = std::ldexp(1.0, static_cast<int>(-b));
    slots[role][1] = std::ldexp(1.0, static_cast<int>(b));
  }
  return slots.to(device);
}

}  // namespace torch_fp8
