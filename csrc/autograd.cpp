// The autograd function of the FP8 linear layer, and what the host remembers between calls.
#include "torch_fp8/linear.h"

#include <cmath>

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include "check.h"

namespace torch_fp8 {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// How a role is quantised now: by its slot, or by its own amax where the recipe says so or there is no history yet.
QuantizeOptions how(const LinearOptions& options, int role, LayerMemo& memo, const at::Tensor& slots, bool record) {
  QuantizeOptions q;
  q.own_amax =
      options.scaling == Scaling::kCurrent || (options.scaling == Scaling::kDelayed && !memo.has_history(role, slots));
  q.power_of_two = options.power_of_two;
  q.margin = options.margin_of(role);
  q.record = record;
  return q;
}

// The primitives go through the dispatcher, below autograd: tracing and fake tensors see them, and eager mode does not
// pay for bookkeeping that the function below replaces.
Quantized call_quantize(const at::Tensor& x, const at::Tensor& slots, int role, const LinearOptions& options,
                        const QuantizeOptions& q) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_fp8::quantize", "")
                             .typed<std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
                                 const at::Tensor&, const at::Tensor&, int64_t, at::ScalarType, bool, bool, int64_t,
                                 bool, bool, bool, c10::optional<at::ScalarType>)>();
  auto [codes, codes_t, scale_inv, dbias] = op.call(x, slots, role, options.dtype(role), q.own_amax, q.power_of_two,
                                                    q.margin, q.record, q.rowwise, q.columnwise, q.dbias);
  return {std::move(codes), std::move(codes_t), std::move(scale_inv), std::move(dbias)};
}

at::Tensor call_gemm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& a_scale_inv,
                     const at::Tensor& b_scale_inv, const c10::optional<at::Tensor>& bias, c10::SymIntArrayRef size,
                     at::ScalarType dtype, bool fast_accum) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("torch_fp8::gemm", "")
          .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                            const c10::optional<at::Tensor>&, c10::SymIntArrayRef, at::ScalarType, bool)>();
  return op.call(a, b, a_scale_inv, b_scale_inv, bias, size, dtype, fast_accum);
}

void call_gemm_accumulate(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
                          const at::Tensor& a_scale_inv, const at::Tensor& b_scale_inv, bool fast_accum) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_fp8::gemm_accumulate_", "")
                             .typed<void(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                         const at::Tensor&, bool)>();
  op.call(out, a, b, a_scale_inv, b_scale_inv, fast_accum);
}

// What backward needs of one call besides the tensors that autograd saves.
struct Call : torch::CustomClassHolder {
  // The slots are mutated by design between forward and backward, so they are held past autograd's version check; the
  // scales that the saved codes need travel with those.
  at::Tensor slots;
  LinearOptions options;
  std::shared_ptr<LayerMemo> memo;
  Quantized weight;
  QuantizeOptions how_x, how_weight, how_grad;
  at::ScalarType x_dtype, weight_dtype, y_dtype;
  c10::optional<at::ScalarType> bias_dtype;
  std::vector<c10::SymInt> x_size, weight_size, y_size;
  at::Tensor main_grad;  // or undefined
  bool dummy_grad;
  bool used_in_training;
};

// y, and x in FP8.
std::pair<at::Tensor, Quantized> fprop(const at::Tensor& x, const c10::optional<at::Tensor>& bias, const Call& call) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  Quantized q = call_quantize(x, call.slots, kInput, call.options, call.how_x);
  auto y_bias = bias;
  if (bias && bias->scalar_type() != call.y_dtype) y_bias = bias->to(call.y_dtype);
  at::Tensor y = call_gemm(q.q, call.weight.q, q.scale_inv, call.weight.scale_inv, y_bias, call.y_size, call.y_dtype,
                           call.options.fast_fprop);
  return {std::move(y), std::move(q)};
}

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const c10::optional<at::Tensor>& bias, const c10::intrusive_ptr<Call>& call) {
    ctx->set_materialize_grads(false);
    auto [y, q] = fprop(x, bias, *call);
    const auto kept = [](const at::Tensor& t, bool wanted) { return wanted ? t : at::Tensor(); };
    const bool for_x = x.requires_grad(), for_weight = weight.requires_grad(), gathered = call->memo->gathered();
    ctx->save_for_backward({kept(q.q_t, for_weight), kept(q.scale_inv, for_weight),
                            kept(call->weight.q_t, for_x && !gathered),
                            kept(call->weight.scale_inv, for_x && !gathered), kept(weight, for_x && gathered)});
    call->weight = {};  // saved where it is wanted; the row-major copy is not
    ctx->saved_data["call"] = c10::IValue::make_capsule(call);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(4);  // x, weight, bias, call
    const at::Tensor& dy = grads[0];
    if (!dy.defined()) return result;
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "torch_fp8: the backward of an FP8 linear layer cannot be differentiated again (create_graph=True); "
                "run the layer in 16 bits for that: with torch_fp8.disabled(model)");
    const auto capsule = ctx->saved_data["call"].toCapsule();
    const Call& call = static_cast<const Call&>(*capsule);
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &x_t = saved[0], &x_scale_inv = saved[1];
    const bool need_x = ctx->needs_input_grad(0), need_weight = ctx->needs_input_grad(1);

    at::AutoDispatchBelowADInplaceOrView below_autograd;
    QuantizeOptions how_grad = call.how_grad;
    how_grad.rowwise = need_x;
    how_grad.columnwise = need_weight;
    if (call.bias_dtype && ctx->needs_input_grad(2)) how_grad.dbias = call.bias_dtype;
    Quantized g = call_quantize(dy, call.slots, kGradOutput, call.options, how_grad);
    if (call.used_in_training) call.memo->note_used(kGradOutput);

    if (need_x) {
      at::Tensor weight_t = saved[2], weight_scale_inv = saved[3];
      if (saved[4].defined()) {
        Quantized w = call_quantize(saved[4], call.slots, kWeight, call.options, call.how_weight);
        weight_t = w.q_t, weight_scale_inv = w.scale_inv;
      }
      result[0] = call_gemm(g.q, weight_t, g.scale_inv, weight_scale_inv, {}, call.x_size, call.x_dtype,
                            call.options.fast_dgrad);
      g.q.reset();  // its memory serves the weight's gradient
    }
    if (need_weight && call.main_grad.defined()) {
      call_gemm_accumulate(call.main_grad, g.q_t, x_t, g.scale_inv, x_scale_inv, call.options.fast_wgrad);
      if (call.dummy_grad) result[1] = at::empty_symint(call.weight_size, dy.options().dtype(call.weight_dtype));
    } else if (need_weight) {
      result[1] = call_gemm(g.q_t, x_t, g.scale_inv, x_scale_inv, {}, call.weight_size, call.weight_dtype,
                            call.options.fast_wgrad);
    }
    if (how_grad.dbias) result[2] = g.dbias;
    return result;
  }
};

// Functorch and forward mode would fail too, but in words that name nothing.
void check_no_transform(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK(
      !c10::impl::tls_local_dispatch_key_set().included_.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode),
      "torch_fp8: an FP8 linear layer cannot run under torch.func's transforms (grad, vjp, vmap, jvp, ...); use "
      "loss.backward() or torch.autograd.grad, or run the layer in 16 bits: with torch_fp8.disabled(model)");
  TORCH_CHECK(!x._fw_grad(0).defined() && !weight._fw_grad(0).defined(),
              "torch_fp8: an FP8 linear layer has no forward-mode derivative; use loss.backward(), or run the layer in "
              "16 bits: with torch_fp8.disabled(model)");
}

void check_linear(const at::Tensor& x, const at::Tensor& weight, const c10::optional<at::Tensor>& bias,
                  const at::Tensor& slots, bool autocast) {
  type_of(x.scalar_type(), "the input");
  type_of(weight.scalar_type(), "the weight");
  TORCH_CHECK(weight.dim() == 2, "torch_fp8: the weight must be a matrix (out_features, in_features), got ",
              weight.sym_sizes());
  check_input(x, weight);
  check_same_device(weight, "the weight", slots, "the layer's scaling state");
  TORCH_CHECK_TYPE(autocast || x.scalar_type() == weight.scalar_type(), "torch_fp8: the input is ", x.scalar_type(),
                   " but the weight is ", weight.scalar_type(), "; cast one of them, or use torch.autocast");
  if (!bias) return;
  check_bias(*bias, weight);
  TORCH_CHECK_TYPE(autocast || bias->scalar_type() == weight.scalar_type(), "torch_fp8: the bias is ",
                   bias->scalar_type(), " but the weight is ", weight.scalar_type(), "; cast one of them");
}

bool wants_grad(const c10::optional<at::Tensor>& t) { return t && t->requires_grad(); }

// Meta and fake tensors hold no values; what is traced with them is the steady path.
bool has_values(const at::Tensor& t) { return !t.is_meta() && !t.key_set().has(c10::DispatchKey::Python); }

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

}  // namespace

double LinearOptions::target(int role) const {
  const Format format = dtype(role) == at::kFloat8_e5m2 ? Format::kE5M2 : Format::kE4M3;
  return std::ldexp(static_cast<double>(max_of(format)), -static_cast<int>(margin_of(role)));
}

bool LayerMemo::has_history(int role, const at::Tensor& slots) {
  if (!known_) {
    if (!has_values(slots)) return true;
    check_slots(slots, kRoles);
    TORCH_CHECK(!slots.is_cuda() || !cuda::is_capturing(),
                "torch_fp8: a CUDA graph is being captured before this layer's first scaling update, so its first "
                "step, scaled by each tensor's own amax, would be replayed for ever; run at least two training steps "
                "(forward, backward, optimizer.step()) before the capture");
    const at::Tensor cursors = slots.select(1, 3).cpu();
    for (int r = 0; r < kRoles; ++r) has_history_[r] = cursors[r].item<float>() > 0;
    known_ = true;
  }
  TORCH_CHECK(has_history_[role] || !slots.is_cuda() || !cuda::is_capturing(),
              "torch_fp8: a CUDA graph is being captured while this layer's ",
              role == kInput    ? "input"
              : role == kWeight ? "weight"
                                : "output gradient",
              " has no amax history; run training steps until it has seen a value other than zero, then capture");
  return has_history_[role];
}

void LayerMemo::forget() {
  used_.store(0, std::memory_order_relaxed);
  weight_ = {};
  known_ = false;
  updates_ = 0;
}

void LayerMemo::after_update() {
  const uint8_t used = used_.exchange(0, std::memory_order_relaxed);
  weight_ = {};
  ++updates_;
  for (int role = 0; role < kRoles; ++role) {
    if (used >> role & 1 && !has_history_[role]) known_ = false;  // it may have one now
  }
}

bool LayerMemo::Weight::is_of(const at::Tensor& weight, const cuda::StreamState& now) const {
  return impl._unsafe_get_target() == weight.unsafeGetTensorImpl() &&
         storage._unsafe_get_target() == weight.storage().unsafeGetStorageImpl() && data == weight.const_data_ptr() &&
         version == weight._version() && made_on == now;
}

Quantized LayerMemo::quantized_weight(const at::Tensor& weight, const at::Tensor& slots, const LinearOptions& options,
                                      bool transposed, bool training, bool record) {
  const cuda::StreamState now = weight.is_cuda() ? cuda::current_stream() : cuda::StreamState{};
  if (training && now.capture != 0) captured_ = true;
  const bool keep = training && !gathered_ && has_values(weight) && !weight.is_inference();
  const bool has_what_is_asked =
      (!transposed || weight_.quantized.q_t.numel() == weight_.quantized.q.numel()) && (!record || weight_.recorded);
  if (keep && has_what_is_asked && weight_.is_of(weight, now)) return weight_.quantized;
  QuantizeOptions q = how(options, kWeight, *this, slots, record);
  q.columnwise = transposed && !gathered_;
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  Quantized quantized = call_quantize(weight, slots, kWeight, options, q);
  if (record) note_used(kWeight);
  if (keep) {
    weight_ = {quantized,
               decltype(weight_.impl)(weight.getIntrusivePtr()),
               weight.storage().getWeakStorageImpl(),
               weight.const_data_ptr(),
               weight._version(),
               now,
               record};
  }
  return quantized;
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const c10::optional<at::Tensor>& bias,
                  const at::Tensor& slots, const LinearOptions& options, const std::shared_ptr<LayerMemo>& memo,
                  bool training, const c10::optional<at::Tensor>& main_grad, bool dummy_grad) {
  const auto device = x.device().type();
  const bool autocast = at::autocast::is_autocast_available(device) && at::autocast::is_autocast_enabled(device);
  check_no_transform(x, weight);
  check_linear(x, weight, bias, slots, autocast);
  const auto y_dtype = autocast ? at::autocast::get_autocast_dtype(device) : x.scalar_type();
  type_of(y_dtype, "the autocast dtype");
  if (main_grad) check_main_grad(*main_grad, weight);

  const bool grad_mode = at::GradMode::is_enabled();
  const bool grad_x = grad_mode && x.requires_grad(), grad_weight = grad_mode && weight.requires_grad();
  const bool differentiable = grad_x || grad_weight || (grad_mode && wants_grad(bias));
  const bool used_in_training = training && grad_mode;
  const bool record = used_in_training && options.scaling != Scaling::kConstant;

  auto call = c10::make_intrusive<Call>();
  call->weight = memo->quantized_weight(weight, slots, options, /*transposed=*/grad_x, used_in_training, record);
  call->how_x = how(options, kInput, *memo, slots, record);
  call->how_x.columnwise = grad_weight;
  if (used_in_training) memo->note_used(kInput);
  call->slots = slots;
  call->options = options;
  call->y_dtype = y_dtype;
  call->y_size = x.sym_sizes().vec();
  call->y_size.back() = weight.sym_size(0);
  if (!differentiable) return fprop(x, bias, *call).first;

  call->memo = memo;
  if (main_grad) call->main_grad = *main_grad;
  call->dummy_grad = dummy_grad;
  call->how_grad = how(options, kGradOutput, *memo, slots, record);
  if (memo->gathered()) {
    call->how_weight = how(options, kWeight, *memo, slots, /*record=*/false);
    call->how_weight.rowwise = false;
    call->how_weight.columnwise = true;
  }
  call->used_in_training = used_in_training;
  call->x_dtype = x.scalar_type();
  call->weight_dtype = weight.scalar_type();
  if (bias) call->bias_dtype = bias->scalar_type();
  if (grad_x) call->x_size = x.sym_sizes().vec();
  if (grad_weight) call->weight_size = weight.sym_sizes().vec();
  return LinearFunction::apply(x, weight, bias, call);
}

at::Tensor new_slots(c10::Device device, int64_t bias, int64_t grad_bias) {
  at::Tensor slots = at::zeros({kRoles, 4}, at::kFloat);
  for (int role = 0; role < kRoles; ++role) {
    const int64_t b = role == kGradOutput ? grad_bias : bias;
    slots[role][0] = std::ldexp(1.0, static_cast<int>(-b));
    slots[role][1] = std::ldexp(1.0, static_cast<int>(b));
  }
  return slots.to(device);
}

}  // namespace torch_fp8
