// The autograd function of a norm, over norm_cast and norm_backward, and the handing over of what it cast.
#include "torch_fp8/norm.h"

#include <ATen/ATen.h>

#include "call.h"
#include "check.h"
#include "siblings.h"
#include "transforms.h"

namespace torch_fp8 {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = c10::optional<at::Tensor>;

struct NormCall : NormOptions {
  c10::optional<Call> reader;
  bool columnwise = false;
  Codes codes;  // made for the reader
};

struct NormFunction : torch::autograd::Function<NormFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const OptionalTensor& residual,
                               const OptionalTensor& gain, const OptionalTensor& bias, NormCall& call) {
    ctx->set_materialize_grads(false);
    static const auto norm_op = op<decltype(norm_cast)>("torch_fp8::norm_cast");
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const Call none{}, &reader = call.reader ? *call.reader : none;
    auto [y, sum, q, q_t, scale_inv, stats] =
        norm_op.call(x, residual, gain, bias, call.eps, call.layer_norm, call.gain_offset,
                     call.reader ? OptionalTensor(reader.slots) : c10::nullopt, kInput, reader.casts, reader.history,
                     reader.training, reader.record, call.reader.has_value(), call.columnwise && !call.recompute,
                     /*wants_y=*/true);
    call.codes = {q, q_t, scale_inv};
    ctx->save_for_backward({residual ? sum : x, gain.value_or(at::Tensor()), stats});
    ctx->saved_data["layer_norm"] = call.layer_norm;
    ctx->saved_data["gain_offset"] = call.gain_offset;
    ctx->saved_data["has_residual"] = residual.has_value();
    ctx->saved_data["has_bias"] = bias.has_value();
    return {y, residual ? sum : x};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(5);  // x, residual, gain, bias, call
    check_not_differentiated_again();
    auto& data = ctx->saved_data;
    const bool has_residual = data["has_residual"].toBool(), has_bias = data["has_bias"].toBool();
    const at::Tensor &dy = grads[0], &dsum = grads[1];
    const auto hand_on = [&](const at::Tensor& dx) {
      result[0] = dx;
      if (has_residual) result[1] = dx;
    };
    if (!dy.defined()) {
      if (dsum.defined()) hand_on(dsum);
      return result;
    }
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &gain = saved[1], &stats = saved[2];
    const auto optional = [](const at::Tensor& t) { return t.defined() ? OptionalTensor(t) : c10::nullopt; };
    size_t input = has_residual ? 2 : 1;  // the engine counts the inputs that were given
    const bool wants_gain = gain.defined() && ctx->needs_input_grad(input);
    if (gain.defined()) ++input;
    const bool wants_bias = has_bias && ctx->needs_input_grad(input);
    static const auto backward_op = op<decltype(norm_backward)>("torch_fp8::norm_backward");
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [dx, dgain, dbias] =
        backward_op.call(dy, x, optional(dsum), optional(gain), stats, data["layer_norm"].toBool(),
                         data["gain_offset"].toDouble(), wants_gain, wants_bias);
    hand_on(dx);
    if (wants_gain) result[2] = std::move(dgain);
    if (wants_bias) result[3] = std::move(dbias);
    return result;
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor> norm(const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& gain,
                                        const OptionalTensor& bias, const NormOptions& options,
                                        const LinearLayer* reader) {
  check_no_transform("a norm gives its input");
  TORCH_CHECK(!x._fw_grad(0).defined() && !(residual && residual->_fw_grad(0).defined()),
              "torch_fp8: a norm that hands over FP8 codes has no forward-mode derivative; use loss.backward()");
  NormCall call{options, {}, false, {}};
  const bool steps = reader && reader->training && at::GradMode::is_enabled() && reader->place.siblings;
  const bool differentiable = x.requires_grad() || (residual && residual->requires_grad()) ||
                              (gain && gain->requires_grad()) || (bias && bias->requires_grad());
  Siblings::Wanted wanted{};
  if (steps) {
    Call of_reader = begin_call(*reader, x.scalar_type(), differentiable, autocast_dtype(x));
    const bool rowwise = of_reader.fp8[0];
    call.columnwise = of_reader.grad_weight && of_reader.fp8[2];
    const bool by_history = reader->options.scaling == Scaling::kDelayed && (of_reader.history >> kInput & 1);
    // What has no history records for itself, so each layer casts.
    const bool shared = by_history || reader->options.scaling != Scaling::kDelayed;
    wanted = {of_reader.casts[kInput],   by_history,
              of_reader.record,          rowwise,
              call.columnwise,           reader->memo.updates(),
              stream_of(reader->weight), call.recompute ? saving_hooks() : nullptr};
    if (rowwise && shared) call.reader = std::move(of_reader);
  }
  const variable_list made = NormFunction::apply(x, residual, gain, bias, call);
  const at::Tensor& y = made[0];
  if (call.reader) {
    Siblings::Shared shared{call.codes, y};
    if (call.recompute && call.columnwise) {
      shared.source = Normed{made[1], gain.value_or(at::Tensor()), bias.value_or(at::Tensor()), options};
    }
    // A GEMM adds to float32 and bfloat16.
    if (y.requires_grad() && reader->place.siblings->size() > 1 && y.scalar_type() != at::kHalf) {
      shared.sum = new_sum();
      shared.x = fork_gradient(y, shared.sum);
    }
    reader->place.siblings->offer(y, reader->place.member, wanted, shared, /*made_outside=*/true);
  }
  return {y, made[1]};
}

}  // namespace torch_fp8
