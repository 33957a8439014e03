// The autograd function of the FP8 linear layer. It has no rules: linear_forward and linear_backward have them. What it
// does is host work: which codes are there already, and what is kept for whom.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include "check.h"
#include "memo.h"
#include "ops/linear.h"
#include "siblings.h"
#include "torch_fp8/linear.h"

namespace torch_fp8 {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The ops go through the dispatcher, below autograd: tracing and fake tensors see them, and eager mode does not pay for
// bookkeeping that the function below replaces.
template <class Schema>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Schema>();
}

// Tensors that the dispatcher would hand straight to the op of their backend: no subclass, mode, trace or transform
// sees them, and autocast has nothing to say.
bool is_plain(const at::Tensor& a, const at::Tensor& b) {
  const auto keys =
      c10::impl::computeDispatchKeySet(a.key_set() | b.key_set(), c10::DispatchKeySet(c10::DispatchKeySet::FULL)) -
      (c10::autocast_dispatch_keyset | c10::DispatchKeySet(c10::DispatchKey::BackendSelect));
  const auto first = keys.highestPriorityTypeId();
  return first == c10::DispatchKey::CPU || first == c10::DispatchKey::CUDA;
}

// What backward needs of one call besides tensors: as text, which compiled autograd can carry.
struct Numbers {
  std::array<int64_t, kRoles> casts;
  int64_t history = 0, memo = 0, in_features = 0;
  Gemms fp8, fast_accum;
  bool training = false, record = false, dummy_grad = false, has_bias = false;
  at::ScalarType x_dtype, weight_dtype, bias_dtype;
};
static_assert(std::is_trivially_copyable_v<Numbers>);

struct Call : Numbers {
  // The slots are mutated by design between forward and backward, so they are held past autograd's version check; the
  // scales that the saved codes need travel with those.
  at::Tensor slots, main_grad;
  int64_t sum = 0;
  bool gathered, grad_x, grad_weight;
  c10::optional<at::ScalarType> autocast;
  c10::SmallVector<at::Tensor, 3> x_codes, weight_codes;  // given, or empty
};

Codes cast_of(const at::Tensor& t, int role, const Call& call, bool rowwise, bool columnwise) {
  static const auto cast_op = op<decltype(cast)>("torch_fp8::cast");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  auto [q, q_t, scale_inv] =
      cast_op.call(t, call.slots, role, call.casts, call.history, call.training, call.record, rowwise, columnwise);
  return {std::move(q), std::move(q_t), std::move(scale_inv)};
}

ForwardResult forward_of(const at::Tensor& x, const at::Tensor& weight, const c10::optional<at::Tensor>& bias,
                         const Call& call) {
  static const auto forward_op = op<decltype(linear_forward)>("torch_fp8::linear_forward");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto run = [&](const auto& forward) {
    return forward(x, weight, bias, call.slots, call.x_codes, call.weight_codes, call.casts, call.history, call.fp8,
                   call.fast_accum, call.training, call.record, call.grad_x, call.grad_weight, call.gathered,
                   call.autocast);
  };
  if (is_plain(x, weight)) return run(forward_only);
  return run([&](auto&&... arguments) { return forward_op.call(arguments...); });
}

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const c10::optional<at::Tensor>& bias, const Call& call) {
    ctx->set_materialize_grads(false);
    auto [y, x_t, x_scale_inv, weight_t, weight_scale_inv] = forward_of(x, weight, bias, call);
    if (!call.x_codes.empty()) x_t = call.x_codes[1], x_scale_inv = call.x_codes[2];
    if (!call.weight_codes.empty()) weight_t = call.weight_codes[1], weight_scale_inv = call.weight_codes[2];
    const auto kept = [](const at::Tensor& t, bool wanted) { return wanted ? t : at::Tensor(); };
    const bool fp8_x = call.grad_x && call.fp8[1], fp8_weight = call.grad_weight && call.fp8[2];
    const bool needs_weight = call.grad_x && (call.gathered || !call.fp8[1]);
    at::Tensor x_16 = kept(x, call.grad_weight && !call.fp8[2]);
    if (x_16.defined() && call.autocast) x_16 = x_16.detach().to(*call.autocast);  // as nn.Linear keeps it
    ctx->save_for_backward({kept(x_t, fp8_weight), kept(x_scale_inv, fp8_weight),
                            kept(weight_t, fp8_x && !call.gathered), kept(weight_scale_inv, fp8_x && !call.gathered),
                            x_16, kept(weight, needs_weight)});

    auto& saved = ctx->saved_data;
    const Numbers& numbers = call;
    std::string text(2 * sizeof numbers, '\0');  // in letters: a string of Python's is no string of bytes
    const auto* const bytes = reinterpret_cast<const unsigned char*>(&numbers);
    for (size_t i = 0; i < sizeof numbers; ++i)
      text[2 * i] = 'a' + (bytes[i] >> 4), text[2 * i + 1] = 'a' + (bytes[i] & 15);
    saved["numbers"] = std::move(text);
    saved["slots"] = call.slots;
    if (weight.sym_size(1).is_symbolic()) saved["in_features"] = weight.sym_size(1);
    if (call.main_grad.defined()) saved["main_grad"] = call.main_grad;
    if (call.sum != 0) saved["sum"] = call.sum;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(4);  // x, weight, bias, call
    const at::Tensor& dy = grads[0];
    if (!dy.defined()) return result;
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "torch_fp8: the backward of an FP8 linear layer cannot be differentiated again (create_graph=True); "
                "run the layer in 16 bits for that: with torch_fp8.disabled(model)");
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
    const at::Tensor main_grad = held("main_grad");
    const int64_t sum = data.count("sum") && grad_x && can_sum() ? data["sum"].toInt() : 0;
    const at::Tensor dx_sum = sum ? sum_so_far(sum) : at::Tensor();

    const variable_list saved = ctx->get_saved_variables();
    const auto optional = [](const at::Tensor& t) { return t.defined() ? c10::optional<at::Tensor>(t) : c10::nullopt; };
    static const auto backward_op = op<std::tuple<at::Tensor, at::Tensor, at::Tensor>(
        const at::Tensor&, at::TensorList, const c10::optional<at::Tensor>&, const c10::optional<at::Tensor>&,
        const c10::optional<at::Tensor>&, const c10::optional<at::Tensor>&, const c10::optional<at::Tensor>&,
        const c10::optional<at::Tensor>&, const at::Tensor&, const c10::optional<at::Tensor>&,
        const c10::optional<at::Tensor>&, at::IntArrayRef, int64_t, Gemms, Gemms, bool, bool, bool, bool,
        c10::optional<at::ScalarType>, c10::SymInt, at::ScalarType, at::ScalarType, bool)>(
        "torch_fp8::linear_backward");
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto run = [&](const auto& backward, auto in_features) {
      return backward(dy, at::TensorList(), optional(saved[0]), optional(saved[1]), optional(saved[2]),
                      optional(saved[3]), optional(saved[4]), optional(saved[5]), held("slots"), optional(main_grad),
                      optional(dx_sum), n.casts, n.history, n.fp8, n.fast_accum, n.training, n.record, grad_x,
                      grad_weight, dbias, in_features, n.x_dtype, n.weight_dtype, n.dummy_grad);
    };
    const auto through_the_dispatcher = [&](auto&&... arguments) { return backward_op.call(arguments...); };
    const auto symbolic = data.find("in_features");
    auto [dx, dw, db] = is_plain(dy, held("slots"))
                            ? run(backward_only, n.in_features)
                            : run(through_the_dispatcher,
                                  symbolic == data.end() ? c10::SymInt(n.in_features) : symbolic->second.toSymInt());
    if (const auto memo = LayerMemo::find(n.memo)) {
      if (n.training && ((grad_x && n.fp8[1]) || (grad_weight && n.fp8[2]))) memo->note_used(kGradOutput);
      if (grad_weight) memo->note_weight_grad();
    }
    if (grad_x && !dx_sum.defined()) {
      if (sum) begin_sum(sum, dx);
      result[0] = std::move(dx);
    }
    if (grad_weight && (!main_grad.defined() || n.dummy_grad)) result[1] = std::move(dw);
    if (dbias) result[2] = std::move(db);
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

bool wants_grad(const c10::optional<at::Tensor>& t) { return t && t->requires_grad(); }

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
void share_input(at::Tensor& x, const LinearOptions& options, LayerMemo& memo, const Place& place,
                 const cuda::StreamState& now, Call& call) {
  const bool rowwise = call.fp8[0], columnwise = call.grad_weight && call.fp8[2];
  if (!rowwise && !columnwise) return;
  const bool by_history = options.scaling == Scaling::kDelayed && (call.history >> kInput & 1);
  const Siblings::Wanted wanted{call.casts[kInput], by_history, call.record, rowwise, columnwise, memo.updates(), now};
  Siblings& siblings = *place.siblings;
  if (auto shared = siblings.take(x, place.member, wanted)) {
    call.x_codes = {shared->codes.q, shared->codes.q_t, shared->codes.scale_inv};
    call.sum = shared->sum;
    x = shared->x;
    return;
  }
  siblings.note_cast(place.member);
  if (!siblings.has_takers(place.member, wanted)) return;
  Siblings::Shared shared{cast_of(x, kInput, call, rowwise, columnwise), x};
  // A GEMM adds to float32 and bfloat16.
  if (call.grad_x && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16)) {
    shared.sum = new_sum();
    shared.x = fork_gradient(x, shared.sum);
  }
  siblings.offer(x, place.member, wanted, shared);
  call.x_codes = {shared.codes.q, shared.codes.q_t, shared.codes.scale_inv};
  call.sum = shared.sum;
  x = shared.x;
}

}  // namespace

at::Tensor linear(const at::Tensor& x_given, const at::Tensor& weight, const c10::optional<at::Tensor>& bias,
                  const at::Tensor& slots, const LinearOptions& options, const std::shared_ptr<LayerMemo>& memo,
                  bool training, const c10::optional<at::Tensor>& main_grad, bool dummy_grad, const Place& place) {
  at::Tensor x = x_given;
  const auto device = x.device().type();
  check_no_transform(x, weight);
  Call call;
  if (at::autocast::is_autocast_available(device) && at::autocast::is_autocast_enabled(device)) {
    call.autocast = at::autocast::get_autocast_dtype(device);
  }
  check_layer(x, weight, bias, slots, call.autocast);
  if (main_grad) check_main_grad(*main_grad, weight), call.main_grad = *main_grad;

  const bool grad_mode = at::GradMode::is_enabled();
  const bool steps = training && grad_mode;  // the call belongs to a training step
  const cuda::StreamState now = steps ? stream_of(weight) : cuda::StreamState{};
  call.slots = slots;
  for (int role = 0; role < kRoles; ++role) call.casts[static_cast<size_t>(role)] = options.cast(role).packed();
  call.fp8 = options.fp8_gemms(), call.fast_accum = options.fast_accum();
  call.training = training;
  call.record = steps && options.scaling != Scaling::kConstant;
  call.grad_x = grad_mode && x.requires_grad(), call.grad_weight = grad_mode && weight.requires_grad();
  call.gathered = memo->gathered();
  call.dummy_grad = dummy_grad;
  call.memo = memo->number();
  call.x_dtype = x.scalar_type(), call.weight_dtype = weight.scalar_type();
  call.has_bias = bias.has_value();
  if (bias) call.bias_dtype = bias->scalar_type();
  const c10::SymInt in_features = weight.sym_size(1);
  if (!in_features.is_symbolic()) call.in_features = in_features.as_int_unchecked();
  const bool differentiable = call.grad_x || call.grad_weight || (grad_mode && wants_grad(bias));
  const int64_t forward_roles = 1 << kInput | (training ? 1 << kWeight : 0);
  if (options.scaling == Scaling::kDelayed) {
    call.history = memo->history(slots, forward_roles | (differentiable && training ? 1 << kGradOutput : 0));
  }
  // A weight that somebody else has changed is one without a history, until the next update.
  if (training && memo->weight_was_changed(weight)) call.history &= ~(int64_t{1} << kWeight);
  if (steps) {
    memo->note_forward(now);
    memo->note_used(kInput);
    memo->note_used(kWeight);
    call.weight_codes = weight_codes(weight, *memo, now, call);
  }
  if (place.siblings != nullptr && steps) share_input(x, options, *memo, place, now, call);
  if (!differentiable) return std::get<0>(forward_of(x, weight, bias, call));
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
