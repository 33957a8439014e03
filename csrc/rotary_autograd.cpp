// The gradient of rotary: of q, k and the gains. A registration with the dispatcher, so that eager mode and traces
// follow the same formula.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include "ops/rotary.h"
#include "transforms.h"

namespace torch_fp8 {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = c10::optional<at::Tensor>;

const auto& forward_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_fp8::rotary", "").typed<decltype(rotary)>();
  return op;
}

struct RotaryFunction : torch::autograd::Function<RotaryFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
                               const OptionalTensor& cos, const OptionalTensor& sin, int64_t rotary_dims,
                               bool interleaved, bool heads_first, int64_t norm, const OptionalTensor& q_gain,
                               const OptionalTensor& k_gain, double eps, double gain_offset, bool gain_grads) {
    ctx->set_materialize_grads(false);
    const auto kept = [](const OptionalTensor& t) { return t ? *t : at::Tensor(); };
    const bool has_norm = norm != 0;
    ctx->save_for_backward(
        {has_norm ? q : at::Tensor(), has_norm ? k : at::Tensor(), kept(cos), kept(sin), kept(q_gain), kept(k_gain)});
    auto& saved = ctx->saved_data;
    saved["rotary_dims"] = rotary_dims, saved["interleaved"] = interleaved, saved["heads_first"] = heads_first;
    saved["norm"] = norm, saved["eps"] = eps, saved["gain_offset"] = gain_offset;
    saved["gain_grads"] = gain_grads;
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [q_out, k_out] = forward_op().call(q, k, cos, sin, rotary_dims, interleaved, heads_first, norm, q_gain, k_gain,
                                            eps, gain_offset);
    return {std::move(q_out), std::move(k_out)};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(13);  // of forward's arguments
    if (!grads[0].defined() && !grads[1].defined()) return result;
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "torch_fp8: the backward of rotary cannot be differentiated again (create_graph=True); use plain "
                "PyTorch for that");
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("torch_fp8::rotary_backward", "")
                               .typed<decltype(rotary_backward)>();
    const variable_list saved = ctx->get_saved_variables();
    const auto optional = [](const at::Tensor& t) { return t.defined() ? OptionalTensor(t) : c10::nullopt; };
    const auto whole = [&](const char* name) { return ctx->saved_data[name].toInt(); };
    const bool gain_grads = ctx->saved_data["gain_grads"].toBool();
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [dq, dk, dq_gain, dk_gain] =
        op.call(optional(grads[0]), optional(grads[1]), optional(saved[0]), optional(saved[1]), optional(saved[2]),
                optional(saved[3]), whole("rotary_dims"), ctx->saved_data["interleaved"].toBool(),
                ctx->saved_data["heads_first"].toBool(), whole("norm"), optional(saved[4]), optional(saved[5]),
                ctx->saved_data["eps"].toDouble(), ctx->saved_data["gain_offset"].toDouble(), gain_grads);
    if (grads[0].defined()) result[0] = std::move(dq);
    if (grads[1].defined()) result[1] = std::move(dk);
    if (gain_grads && grads[0].defined() && saved[4].defined()) result[8] = std::move(dq_gain);
    if (gain_grads && grads[1].defined() && saved[5].defined()) result[9] = std::move(dk_gain);
    return result;
  }
};

}  // namespace

RotaryResult rotary_autograd(c10::DispatchKeySet keys, const at::Tensor& q, const at::Tensor& k,
                             const OptionalTensor& cos, const OptionalTensor& sin, int64_t rotary_dims,
                             bool interleaved, bool heads_first, int64_t norm, const OptionalTensor& q_gain,
                             const OptionalTensor& k_gain, double eps, double gain_offset) {
  using torch::autograd::compute_requires_grad, torch::autograd::isFwGradDefined;
  TORCH_CHECK(!isFwGradDefined(q) && !isFwGradDefined(k),
              "torch_fp8: rotary has no forward-mode derivative; use loss.backward(), or plain PyTorch");
  TORCH_CHECK(!at::GradMode::is_enabled() || !compute_requires_grad(cos, sin),
              "torch_fp8: rotary gives cos and sin no gradient, but one of them requires one; detach() them");
  if (!compute_requires_grad(q, k, q_gain, k_gain)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return forward_op().redispatch(keys & c10::after_ADInplaceOrView_keyset, q, k, cos, sin, rotary_dims, interleaved,
                                   heads_first, norm, q_gain, k_gain, eps, gain_offset);
  }
  check_no_transform("rotary gives its inputs");
  variable_list outputs = RotaryFunction::apply(q, k, cos, sin, rotary_dims, interleaved, heads_first, norm, q_gain,
                                                k_gain, eps, gain_offset, compute_requires_grad(q_gain, k_gain));
  return {std::move(outputs[0]), std::move(outputs[1])};
}

}  // namespace torch_fp8
