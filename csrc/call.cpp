#include "call.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>

#include "check.h"
#include "siblings.h"
#include "torch_fp8/linear.h"

namespace torch_fp8 {
namespace {

void check_main_grad(const at::Tensor& main_grad, const at::Tensor& weight) {
  TORCH_CHECK_TYPE(main_grad.scalar_type() == at::kFloat || main_grad.scalar_type() == at::kBFloat16,
                   "torch_fp8: the weight's main_grad must be float32 or bfloat16, got ", main_grad.scalar_type());
  TORCH_CHECK(main_grad.sym_sizes() == weight.sym_sizes() && main_grad.is_contiguous() && !main_grad.requires_grad(),
              "torch_fp8: the weight's main_grad must be a contiguous tensor of the weight's shape ",
              weight.sym_sizes(), " that does not require grad, got shape ", main_grad.sym_sizes(), " with strides ",
              main_grad.sym_strides());
  check_same_device(weight, "the weight", main_grad, "its main_grad");
  TORCH_CHECK(!has_values(main_grad) || is_aligned(main_grad.const_data_ptr()),
              "torch_fp8: the weight's main_grad must start at a 16-byte boundary, got address ",
              main_grad.const_data_ptr(), "; pad the buffer it is a part of");
}

// The weight's codes for all micro-batches of a step; nothing where each forward makes its own.
c10::SmallVector<at::Tensor, 3> weight_codes(const at::Tensor& weight, LayerMemo& memo, const cuda::StreamState& now,
                                             const Call& call) {
  const bool transposed = call.grad_x && call.fp8[1];
  if (const auto kept = memo.kept_weight(weight, now, transposed, call.main_grad.defined())) {
    return {kept->q, kept->q_t, kept->scale_inv};
  }
  if (!memo.shall_keep(weight) || !(call.fp8[0] || transposed)) return {};
  const Codes codes = cast_of(weight, kWeight, call, call.fp8[0], transposed);
  memo.keep_weight(weight, now, codes);
  return {codes.q, codes.q_t, codes.scale_inv};
}

// The input's codes, where layers read one tensor together; x is then what stands for it in the graph.
void share_input(at::Tensor& x, const LinearLayer& layer, const cuda::StreamState& now, Call& call) {
  const bool rowwise = call.fp8[0], columnwise = call.grad_weight && call.fp8[2];
  if (!rowwise && !columnwise) return;
  const bool by_history = layer.options.scaling == Scaling::kDelayed && (call.history >> kInput & 1);
  const Siblings::Wanted wanted{
      call.casts[kInput], by_history,           call.record, rowwise,
      columnwise,         layer.memo.updates(), now,         layer.memo.recompute() ? saving_hooks() : nullptr};
  Siblings& siblings = *layer.place.siblings;
  if (auto shared = siblings.take(x, layer.place.member, wanted)) {
    call.x_codes = {shared->codes.q, shared->codes.q_t, shared->codes.scale_inv};
    call.sum = shared->sum, call.source = shared->source;
    x = shared->x;
    return;
  }
  siblings.note_cast(layer.place.member);
  if (!siblings.has_takers(layer.place.member, wanted)) return;
  Siblings::Shared shared{cast_of(x, kInput, call, rowwise, columnwise), x};
  // A GEMM adds to float32 and bfloat16.
  if (call.grad_x && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16)) {
    shared.sum = new_sum();
    shared.x = fork_gradient(x, shared.sum);
  }
  siblings.offer(x, layer.place.member, wanted, shared);
  call.x_codes = {shared.codes.q, shared.codes.q_t, shared.codes.scale_inv};
  call.sum = shared.sum;
  x = shared.x;
}

}  // namespace

bool is_plain(const at::Tensor& a, const at::Tensor& b) {
  const auto keys =
      c10::impl::computeDispatchKeySet(a.key_set() | b.key_set(), c10::DispatchKeySet(c10::DispatchKeySet::FULL)) -
      (c10::autocast_dispatch_keyset | c10::DispatchKeySet(c10::DispatchKey::BackendSelect));
  const auto first = keys.highestPriorityTypeId();
  return first == c10::DispatchKey::CPU || first == c10::DispatchKey::CUDA;
}

Codes cast_of(const at::Tensor& t, int role, const Call& call, bool rowwise, bool columnwise) {
  static const auto cast_op = op<decltype(cast)>("torch_fp8::cast");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  auto [q, q_t, scale_inv] =
      cast_op.call(t, call.slots, role, call.casts, call.history, call.training, call.record, rowwise, columnwise);
  return {std::move(q), std::move(q_t), std::move(scale_inv)};
}

ForwardResult forward_of(const at::Tensor& x, const at::Tensor& weight, const c10::optional<at::Tensor>& bias,
                         const Call& call, const c10::optional<at::Tensor>& residual) {
  static const auto forward_op = op<decltype(linear_forward)>("torch_fp8::linear_forward");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto run = [&](const auto& forward) {
    return forward(x, weight, bias, call.slots, call.x_codes, call.weight_codes, call.casts, call.history, call.fp8,
                   call.fast_accum, call.training, call.record, call.grad_x, call.grad_weight && !call.source,
                   call.gathered, call.autocast, residual);
  };
  if (is_plain(x, weight)) return run(forward_only);
  return run([&](auto&&... arguments) { return forward_op.call(arguments...); });
}

Codes cast_product(const Product& product, const at::Tensor& slots, at::IntArrayRef casts, int64_t history,
                   bool training, bool record, bool rowwise, bool columnwise) {
  static const auto activate = op<decltype(activation_cast)>("torch_fp8::activation_cast");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto optional = [](const at::Tensor& t) { return t.defined() ? c10::optional<at::Tensor>(t) : c10::nullopt; };
  auto [q, q_t, scale_inv] =
      activate.call(product.gate, optional(product.up), product.activation, slots, kInput, casts, history, training,
                    record, rowwise, columnwise, optional(product.alphas), product.beta, product.halves);
  return {std::move(q), std::move(q_t), std::move(scale_inv)};
}

c10::optional<at::ScalarType> autocast_dtype(const at::Tensor& x) {
  const auto device = x.device().type();
  if (!at::autocast::is_autocast_available(device) || !at::autocast::is_autocast_enabled(device)) return {};
  return at::autocast::get_autocast_dtype(device);
}

void check_no_transform(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK(
      !c10::impl::tls_local_dispatch_key_set().included_.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode),
      "torch_fp8: an FP8 linear layer cannot run under torch.func's transforms (grad, vjp, vmap, jvp, ...); use "
      "loss.backward() or torch.autograd.grad, or run the layer in 16 bits: with torch_fp8.disabled(model)");
  TORCH_CHECK(!x._fw_grad(0).defined() && !weight._fw_grad(0).defined(),
              "torch_fp8: an FP8 linear layer has no forward-mode derivative; use loss.backward(), or run the layer in "
              "16 bits: with torch_fp8.disabled(model)");
}

Call begin_call(const LinearLayer& layer, at::ScalarType x_dtype, bool grad_x, c10::optional<at::ScalarType> autocast) {
  const auto& [weight, bias, slots, options, memo, training, main_grad, dummy_grad, place] = layer;
  Call call;
  call.autocast = autocast;
  if (main_grad) check_main_grad(*main_grad, weight), call.main_grad = *main_grad;
  const bool grad_mode = at::GradMode::is_enabled();
  call.slots = slots;
  for (int role = 0; role < kRoles; ++role) call.casts[static_cast<size_t>(role)] = options.cast(role).packed();
  call.fp8 = options.fp8_gemms(), call.fast_accum = options.fast_accum();
  call.training = training;
  call.record = training && grad_mode && options.scaling != Scaling::kConstant;
  call.grad_x = grad_mode && grad_x, call.grad_weight = grad_mode && weight.requires_grad();
  call.grad_bias = grad_mode && bias && bias->requires_grad();
  call.gathered = memo.casts_again();
  call.dummy_grad = dummy_grad;
  call.memo = memo.number();
  call.x_dtype = x_dtype, call.weight_dtype = weight.scalar_type();
  call.has_bias = bias.has_value();
  if (bias) call.bias_dtype = bias->scalar_type();
  const c10::SymInt in_features = weight.sym_size(1);
  if (!in_features.is_symbolic()) call.in_features = in_features.as_int_unchecked();
  const int64_t forward_roles = 1 << kInput | (training ? 1 << kWeight : 0);
  if (options.scaling == Scaling::kDelayed) {
    call.history = memo.history(slots, forward_roles | (call.is_differentiable() && training ? 1 << kGradOutput : 0));
  }
  // A weight that somebody else has changed is one without a history, until the next update.
  if (training && memo.weight_was_changed(weight)) call.history &= ~(int64_t{1} << kWeight);
  return call;
}

void find_codes(const LinearLayer& layer, Call& call, at::Tensor* x) {
  if (!layer.training || !at::GradMode::is_enabled()) return;
  const cuda::StreamState now = stream_of(layer.weight);
  layer.memo.note_forward(now);
  layer.memo.note_used(kInput);
  layer.memo.note_used(kWeight);
  call.weight_codes = weight_codes(layer.weight, layer.memo, now, call);
  if (layer.place.siblings != nullptr && x != nullptr) share_input(*x, layer, now, call);
}

void check_not_differentiated_again() {
  TORCH_CHECK(!at::GradMode::is_enabled(),
              "torch_fp8: the backward of an FP8 linear layer cannot be differentiated again (create_graph=True); "
              "run the layer in 16 bits for that: with torch_fp8.disabled(model)");
}

}  // namespace torch_fp8
