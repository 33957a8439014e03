// The gradient of frozen_linear: of its input, and of nothing else. A registration with the dispatcher, so that eager
// mode and traces follow the same formula. frozen_mlp has none, and says so before it computes.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include "torch_fp8/ops.h"
#include "transforms.h"

namespace torch_fp8 {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

const auto& forward_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_fp8::frozen_linear", "").typed<decltype(frozen_linear)>();
  return op;
}

void check_not_forward_mode(const at::Tensor& x) {
  TORCH_CHECK(!torch::autograd::isFwGradDefined(x),
              "torch_fp8: a FrozenLinear has no forward-mode derivative; use loss.backward(), or keep the layer in 16 "
              "bits, by the filter of torch_fp8.freeze");
}

struct FrozenFunction : torch::autograd::Function<FrozenFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const at::Tensor& weight_scale, const c10::optional<at::Tensor>& bias,
                            const c10::optional<at::Tensor>& input_slot, int64_t activations,
                            c10::optional<at::ScalarType> dtype, const c10::optional<at::Tensor>& x_codes,
                            const c10::optional<at::Tensor>& x_scale) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({weight, weight_scale});
    ctx->saved_data["activations"] = activations;
    ctx->saved_data["x_dtype"] = static_cast<int64_t>(x.scalar_type());
    const at::AutoDispatchBelowADInplaceOrView guard;
    return forward_op().call(x, weight, weight_scale, bias, input_slot, activations, dtype, x_codes, x_scale);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(9);  // of forward's arguments
    if (!grads[0].defined()) return result;
    TORCH_CHECK(
        !at::GradMode::is_enabled(),
        "torch_fp8: the backward of a FrozenLinear cannot be differentiated again (create_graph=True); keep the "
        "layer in 16 bits for that, by the filter of torch_fp8.freeze");
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("torch_fp8::frozen_linear_backward", "")
                               .typed<decltype(frozen_linear_backward)>();
    const variable_list saved = ctx->get_saved_variables();
    const at::AutoDispatchBelowADInplaceOrView guard;
    result[0] = op.call(grads[0], saved[0], saved[1], ctx->saved_data["activations"].toInt(),
                        static_cast<at::ScalarType>(ctx->saved_data["x_dtype"].toInt()));
    return result;
  }
};

}  // namespace

at::Tensor frozen_linear_autograd(c10::DispatchKeySet keys, const at::Tensor& x, const at::Tensor& weight,
                                  const at::Tensor& weight_scale, const c10::optional<at::Tensor>& bias,
                                  const c10::optional<at::Tensor>& input_slot, int64_t activations,
                                  c10::optional<at::ScalarType> dtype, const c10::optional<at::Tensor>& x_codes,
                                  const c10::optional<at::Tensor>& x_scale) {
  using torch::autograd::compute_requires_grad;
  check_not_forward_mode(x);
  if (!compute_requires_grad(x, weight, weight_scale, bias, input_slot)) {
    // Not the boxed fallback of the other ops, since the host's time decides in decoding.
    const at::AutoDispatchBelowADInplaceOrView guard;
    return forward_op().redispatch(keys & c10::after_ADInplaceOrView_keyset, x, weight, weight_scale, bias, input_slot,
                                   activations, dtype, x_codes, x_scale);
  }
  TORCH_CHECK(!compute_requires_grad(weight, weight_scale, bias, input_slot),
              "torch_fp8: a FrozenLinear computes the gradient of its input only, but one of its own tensors requires "
              "one; train an adapter beside it (LoRA), or all of the layer with fp8.Linear (torch_fp8.convert)");
  check_no_transform("a FrozenLinear gives its input");
  return FrozenFunction::apply(x, weight, weight_scale, bias, input_slot, activations, dtype, x_codes, x_scale);
}

at::Tensor frozen_mlp_autograd(c10::DispatchKeySet keys, const at::Tensor& x, at::TensorList weights,
                               at::TensorList weight_scales, const c10::List<c10::optional<at::Tensor>>& biases,
                               const c10::List<c10::optional<at::Tensor>>& input_slots, int64_t activation,
                               int64_t activations, c10::optional<at::ScalarType> dtype,
                               const c10::optional<at::Tensor>& x_codes, const c10::optional<at::Tensor>& x_scale,
                               bool up_first) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_fp8::frozen_mlp", "").typed<decltype(frozen_mlp)>();
  check_not_forward_mode(x);
  using torch::autograd::compute_requires_grad;
  bool wanted = compute_requires_grad(x, weights, weight_scales);
  for (const c10::optional<at::Tensor>& bias : biases) wanted = wanted || compute_requires_grad(bias);
  TORCH_CHECK(!wanted,
              "torch_fp8: frozen_mlp computes no gradient, but one of its tensors requires one; run it under "
              "torch.no_grad(), or its layers by frozen_linear");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.redispatch(keys & c10::after_ADInplaceOrView_keyset, x, weights, weight_scales, biases, input_slots,
                       activation, activations, dtype, x_codes, x_scale, up_first);
}

}  // namespace torch_fp8
