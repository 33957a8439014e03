// The autograd function of the FP8 linear layer, over linear_forward and linear_backward (call.h).
#include <cmath>

#include <ATen/ATen.h>

#include "call.h"
#include "siblings.h"
#include "torch_fp8/linear.h"

namespace torch_fp8 {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const c10::optional<at::Tensor>& bias, const Call& call) {
    ctx->set_materialize_grads(false);
    const ForwardResult made = forward_of(x, weight, bias, call);
    variable_list tensors;
    tensors.reserve(kSaved);
    save(call, x, weight, made, "", tensors, ctx->saved_data);
    ctx->save_for_backward(std::move(tensors));
    return std::get<0>(made);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(4);  // x, weight, bias, call
    const at::Tensor& dy = grads[0];
    if (!dy.defined()) return result;
    check_not_differentiated_again();
    auto& data = ctx->saved_data;
    const Numbers n = numbers_of(data, "");
    const WantedGradients wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                 n.has_bias && ctx->needs_input_grad(2)};
    const int64_t sum = data.count("sum") && wanted.x && can_sum() ? data["sum"].toInt() : 0;
    const at::Tensor dx_sum = sum ? sum_so_far(sum) : at::Tensor();
    Gradients made = backward_of(data, "", n, ctx->get_saved_variables(), dy, {}, wanted, dx_sum);
    if (sum && made.x.defined()) begin_sum(sum, made.x);
    result[0] = std::move(made.x), result[1] = std::move(made.weight), result[2] = std::move(made.bias);
    return result;
  }
};

}  // namespace

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
  if (!call.is_differentiable()) return std::get<0>(forward_of(x, weight, bias, call));
  return LinearFunction::apply(x, weight, bias, call);
}

at::Tensor new_slots(c10::Device device, int64_t bias, int64_t grad_bias) {
  at::Tensor slots = at::zeros({kRoles, 4}, at::TensorOptions(at::kFloat).device(at::kCPU));
  for (int role = 0; role < kRoles; ++role) {
    const int64_t b = role == kGradOutput ? grad_bias : bias;
    slots[role][0] = std::ldexp(1.0, static_cast<int>(-b));
    slots[role][1] = std::ldexp(1.0, static_cast<int>(b));
  }
  return slots.to(device);
}

}  // namespace torch_fp8
