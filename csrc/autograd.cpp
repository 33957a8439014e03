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

// What backward needs of one call besides the tensors that autograd saves. It travels as whole numbers, which compiled
// autograd can carry.
struct Call {
  enum Number : size_t {
    kCasts,
    kHistory = kCasts + kRoles,
    kFlags,
    kXDtype,
    kWeightDtype,
    kBiasDtype,
    kMemo,
    kNumbers
  };
  enum Flag : int64_t { kTraining = 1, kRecord = 2, kDummyGrad = 4, kFp8 = 8, kFast = 64 };  // kFp8, kFast: three each

  // The slots are mutated by design between forward and backward, so they are held past autograd's version check; the
  // scales that the saved codes need travel with those.
  at::Tensor slots, main_grad;
  std::vector<int64_t> casts;
  int64_t history = 0, memo = 0, sum = 0;
  Gemms fp8, fast_accum;
  bool training, record, gathered, dummy_grad, grad_x, grad_weight;
  c10::optional<at::ScalarType> autocast;
  std::vector<at::Tensor> x_codes, weight_codes;  // given, or empty
};

std::array<bool, 3> bits(int64_t flags, int64_t first) {
  return {(flags & first) != 0, (flags & first << 1) != 0, (flags & first << 2) != 0};
}

int64_t flags_of(const Gemms& gemms, int64_t first) {
  return (gemms[0] ? first : 0) | (gemms[1] ? first << 1 : 0) | (gemms[2] ? first << 2 : 0);
}

Codes cast_of(const at::Tensor& t, int role, const Call& call, bool rowwise, bool columnwise) {
  static const auto cast_op = op<decltype(cast)>("torch_fp8::cast");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  auto [q, q_t, scale_inv] =
      cast_op.call(t, call.slots, role, call.casts, call.history, call.training, call.record, rowwise, columnwise);
  return {std::move(q), std::move(q_t), std::move(scale_inv)};
}

auto forward_of(const at::Tensor& x, const at::Tensor& weight, const c10::optional<at::Tensor>& bias,
                const Call& call) {
  static const auto forward_op = op<decltype(linear_forward)>("torch_fp8::linear_forward");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return forward_op.call(x, weight, bias, call.slots, call.x_codes, call.weight_codes, call.casts, call.history,
                         call.fp8, call.fast_accum, call.training, call.record, call.grad_x, call.grad_weight,
                         call.gathered, call.autocast);
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

    c10::List<int64_t> numbers;
    numbers.resize(Call::kNumbers);
    for (size_t role = 0; role < kRoles; ++role) numbers[Call::kCasts + role] = call.casts[role];
    numbers[Call::kHistory] = call.history;
    const auto flag = [](bool set, int64_t bit) { return set ? bit : 0; };
    numbers[Call::kFlags] = flag(call.training, Call::kTraining) | flag(call.record, Call::kRecord) |
                            flag(call.dummy_grad, Call::kDummyGrad) | flags_of(call.fp8, Call::kFp8) |
                            flags_of(call.fast_accum, Call::kFast);
    numbers[Call::kXDtype] = static_cast<int64_t>(x.scalar_type());
    numbers[Call::kWeightDtype] = static_cast<int64_t>(weight.scalar_type());
    numbers[Call::kBiasDtype] = bias ? static_cast<int64_t>(bias->scalar_type()) : -1;
    numbers[Call::kMemo] = call.memo;
    auto& saved = ctx->saved_data;
    saved["numbers"] = std::move(numbers);
    saved["slots"] = call.slots;
    saved["in_features"] = weight.sym_size(1);
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
    const std::vector<int64_t> numbers = data["numbers"].toIntVector();
    const int64_t flags = numbers[Call::kFlags];
    const Gemms fp8 = bits(flags, Call::kFp8);
    const bool grad_x = ctx->needs_input_grad(0), grad_weight = ctx->needs_input_grad(1);
    c10::optional<at::ScalarType> dbias;
    if (numbers[Call::kBiasDtype] >= 0 && ctx->needs_input_grad(2)) {
      dbias = static_cast<at::ScalarType>(numbers[Call::kBiasDtype]);
    }
    const auto held = [&](const char* name) {
      const auto found = data.find(name);
      return found == data.end() ? at::Tensor() : found->second.toTensor();
    };
    const at::Tensor main_grad = held("main_grad");
    const int64_t sum = data.count("sum") && grad_x ? data["sum"].toInt() : 0;
    const at::Tensor dx_sum = sum ? sum_so_far(sum) : at::Tensor();

    const variable_list saved = ctx->get_saved_variables();
    const auto optional = [](const at::Tensor& t) { return t.defined() ? c10::optional<at::Tensor>(t) : c10::nullopt; };
    static const auto backward_op = op<std::tuple<at::Tensor, at::Tensor, at::Tensor>(
        const at::Tensor&, const c10::optional<at::Tensor>&, const c10::optional<at::Tensor>&,
        const c10::optional<at::Tensor>&, const c10::optional<at::Tensor>&, const c10::optional<at::Tensor>&,
        const c10::optional<at::Tensor>&, const at::Tensor&, const c10::optional<at::Tensor>&,
        const c10::optional<at::Tensor>&, at::IntArrayRef, int64_t, Gemms, Gemms, bool, bool, bool, bool,
        c10::optional<at::ScalarType>, c10::SymInt, at::ScalarType, at::ScalarType, bool)>(
        "torch_fp8::linear_backward");
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [dx, dw, db] = backward_op.call(
        dy, optional(saved[0]), optional(saved[1]), optional(saved[2]), optional(saved[3]), optional(saved[4]),
        optional(saved[5]), held("slots"), optional(main_grad), optional(dx_sum),
        at::IntArrayRef(numbers.data() + Call::kCasts, kRoles), numbers[Call::kHistory], fp8, bits(flags, Call::kFast),
        (flags & Call::kTraining) != 0, (flags & Call::kRecord) != 0, grad_x, grad_weight, dbias,
        data["in_features"].toSymInt(), static_cast<at::ScalarType>(numbers[Call::kXDtype]),
        static_cast<at::ScalarType>(numbers[Call::kWeightDtype]), (flags & Call::kDummyGrad) != 0);
    if (const auto memo = LayerMemo::find(numbers[Call::kMemo])) {
      if ((flags & Call::kTraining) && ((grad_x && fp8[1]) || (grad_weight && fp8[2]))) memo->note_used(kGradOutput);
      if (grad_weight) memo->note_weight_grad();
    }
    if (grad_x && !dx_sum.defined()) {
      if (sum) begin_sum(sum, dx);
      result[0] = std::move(dx);
    }
    if (grad_weight && (!main_grad.defined() || (flags & Call::kDummyGrad))) result[1] = std::move(dw);
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
std::vector<at::Tensor> weight_codes(const at::Tensor& weight, LayerMemo& memo, const cuda::StreamState& now,
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
  if (call.record) siblings.note_cast(place.member);
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
  const cuda::StreamState now = stream_of(weight);
  call.slots = slots;
  call.casts = options.casts();
  call.fp8 = options.fp8_gemms(), call.fast_accum = options.fast_accum();
  call.training = training;
  call.record = training && grad_mode && options.scaling != Scaling::kConstant;
  call.grad_x = grad_mode && x.requires_grad(), call.grad_weight = grad_mode && weight.requires_grad();
  call.gathered = memo->gathered();
  call.dummy_grad = dummy_grad;
  call.memo = memo->number();
  const bool differentiable = call.grad_x || call.grad_weight || (grad_mode && wants_grad(bias));
  const int64_t forward_roles = 1 << kInput | (training ? 1 << kWeight : 0);
  if (options.scaling == Scaling::kDelayed) {
    call.history = memo->history(slots, forward_roles | (differentiable && training ? 1 << kGradOutput : 0));
  }
  // A weight that somebody else has changed is one without a history, until the next update.
  if (training && memo->weight_was_changed(weight)) call.history &= ~(int64_t{1} << kWeight);
  if (training && grad_mode) {
    memo->note_forward(now);
    memo->note_used(kInput);
    memo->note_used(kWeight);
    call.weight_codes = weight_codes(weight, *memo, now, call);
  }
  if (place.siblings != nullptr) share_input(x, options, *memo, place, now, call);
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
