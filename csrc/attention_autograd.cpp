// The gradient of attention: a registration with the dispatcher, so that eager mode and traces follow the same formula.
// It has no rules: attention_forward and attention_backward have them.
#include <cmath>

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include "call.h"
#include "check.h"
#include "memo.h"
#include "ops/attention.h"
#include "transforms.h"

namespace torch_fp8 {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Attention {
  const at::Tensor &slots, &grad_slots;
  at::IntArrayRef casts;
  int64_t history;
  bool training, record, causal;
  double scale;
  bool shared_scale, fp8_backward, expand;
};

struct AttentionFunction : torch::autograd::Function<AttentionFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const Attention& a) {
    static const auto forward_op = op<decltype(attention_forward)>("torch_fp8::attention_forward");
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, q_codes, k_codes, v_codes, o_codes, scales, lse] =
        forward_op.call(q, k, v, a.slots, a.casts, a.history, a.training, a.record, a.causal, a.scale, a.shared_scale);
    ctx->save_for_backward({q_codes, k_codes, v_codes, o_codes, scales, lse});
    auto& data = ctx->saved_data;
    // Held past autograd's version check: a scaling update between forward and backward is nothing unusual.
    data["slots"] = a.grad_slots;
    data["casts"] = c10::List<int64_t>(a.casts);
    data["history"] = a.history, data["training"] = a.training, data["record"] = a.record, data["causal"] = a.causal;
    data["scale"] = a.scale, data["fp8"] = a.fp8_backward, data["expand"] = a.expand;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(4);  // q, k, v, a
    if (!grads[0].defined()) return result;
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "torch_fp8: the backward of an FP8 attention cannot be differentiated again (create_graph=True); use "
                "mode=\"16bit\" for that");
    static const auto backward_op = op<decltype(attention_backward)>("torch_fp8::attention_backward");
    auto& data = ctx->saved_data;
    const variable_list saved = ctx->get_saved_variables();
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [dq, dk, dv] = backward_op.call(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5],
                                         data["slots"].toTensor(), data["casts"].toIntVector(), data["history"].toInt(),
                                         data["training"].toBool(), data["record"].toBool(), data["causal"].toBool(),
                                         data["scale"].toDouble(), data["fp8"].toBool(), data["expand"].toBool());
    result[0] = std::move(dq), result[1] = std::move(dk), result[2] = std::move(dv);
    return result;
  }
};

}  // namespace

at::Tensor attention_autograd(c10::DispatchKeySet keys, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                              const at::Tensor& slots, const at::Tensor& grad_slots, at::IntArrayRef casts,
                              int64_t history, bool training, bool record, bool causal, double scale, bool shared_scale,
                              bool fp8_backward, bool expand) {
  using torch::autograd::compute_requires_grad, torch::autograd::isFwGradDefined;
  TORCH_CHECK(!isFwGradDefined(q) && !isFwGradDefined(k) && !isFwGradDefined(v),
              "torch_fp8: an FP8 attention has no forward-mode derivative; use loss.backward(), or mode=\"16bit\"");
  if (!compute_requires_grad(q, k, v)) {
    static const auto attention_op = op<decltype(attention)>("torch_fp8::attention");
    const at::AutoDispatchBelowADInplaceOrView guard;
    return attention_op.redispatch(keys & c10::after_ADInplaceOrView_keyset, q, k, v, slots, grad_slots, casts, history,
                                   training, record, causal, scale, shared_scale, fp8_backward, expand);
  }
  check_no_transform("an FP8 attention gives its inputs");
  TORCH_CHECK(!fp8_backward || q.dim() != 4 || q.sym_size(3) == kAttentionBackwardDims,
              "torch_fp8: the backward pass of FP8 attention takes a head_dim of ", kAttentionBackwardDims,
              " alone, got ", q.sym_size(3), "; use mode=\"fp8_forward\" or \"16bit\"");
  return AttentionFunction::apply(q, k, v,
                                  Attention{slots, grad_slots, casts, history, training, record, causal, scale,
                                            shared_scale, fp8_backward, expand});
}

at::Tensor new_attention_slots(c10::Device device, double p_scale, int64_t bias, int64_t grad_bias) {
  at::Tensor slots = at::empty({kAttentionRoles, 4}, at::TensorOptions().dtype(at::kFloat).device(at::kCPU));
  for (int role = 0; role < kAttentionRoles; ++role) {
    const auto of_bias = std::ldexp(1.0f, static_cast<int>(role < kGradO ? bias : grad_bias));
    const float scale = role == kP && p_scale > 0 ? static_cast<float>(p_scale) : of_bias;
    slots_of(slots)[role] = {1 / scale, scale, 0, 0};
  }
  return slots.to(device);
}

std::shared_ptr<LayerMemo> new_attention_memo(const AttentionOptions& options) {
  std::vector<MemoRole> roles;
  for (const char* name : {"q", "k", "v", "P", "o", "grad_o", "grad_P", "grad_q", "grad_k", "grad_v"}) {
    roles.push_back({name});
  }
  roles[kP].constant = static_cast<float>(options.p_scale);
  return new_memo(std::move(roles));
}

void end_step(LayerMemo& memo) { memo.end_step(nullptr); }

at::Tensor scaled_dot_product_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                        const at::Tensor& slots, const AttentionOptions& options,
                                        const std::shared_ptr<LayerMemo>& memo, bool training, bool causal,
                                        c10::optional<double> scale, AttentionMode mode, bool expand) {
  static const auto attention_op = op<decltype(attention)>("torch_fp8::attention");
  std::array<int64_t, kAttentionRoles> casts;
  for (int role = 0; role < kAttentionRoles; ++role)
    casts[static_cast<size_t>(role)] = options.cast(static_cast<AttentionRole>(role)).packed();
  const bool grads = at::GradMode::is_enabled();
  int64_t delayed = 0;  // the roles that are cast now by a history, if they have one
  const bool wants_grad = grads && (q.requires_grad() || k.requires_grad() || v.requires_grad());
  for (int role = 0; role < (wants_grad && training && mode == AttentionMode::kFp8 ? kAttentionRoles : kGradO); ++role)
    delayed |= int64_t{Cast::unpacked(casts[static_cast<size_t>(role)]).scaling == Scaling::kDelayed} << role;
  const int64_t history = delayed ? memo->history(slots, delayed) : 0;
  if (training && grads) memo->note_forward(stream_of(q)), memo->note_used_roles(delayed);
  return attention_op.call(q, k, v, slots, slots, casts, history, training,
                           training && grads && options.recipe.scaling != Scaling::kConstant, causal,
                           scale.value_or(1 / std::sqrt(static_cast<double>(q.size(-1)))), options.shared_scale,
                           mode == AttentionMode::kFp8, expand);
}

}  // namespace torch_fp8
