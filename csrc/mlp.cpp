// The autograd function of an MLP: down(f(gate(x)) * up(x)), or down(f(up(x))), and what it is added to. It is its
// layers' own calls (call.h), with what stands between them made and cast in one pass (activation_cast): neither the
// product nor the gradients of gate and up exist in 16 bits.
#include <bit>

#include <ATen/ATen.h>

#include "call.h"
#include "check.h"
#include "siblings.h"
#include "torch_fp8/mlp.h"

namespace torch_fp8 {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = c10::optional<at::Tensor>;

struct MlpCall {
  Call gate, up, down;  // without gating there is no up
  int64_t activation;
  bool gated;
};

constexpr const char *kGate = "gate.", *kUp = "up.", *kDown = "down.";

// The codes of the product, as down casts its input.
c10::SmallVector<at::Tensor, 3> product_of(const at::Tensor& gate, const OptionalTensor& up, const MlpCall& call) {
  static const auto activate = op<decltype(activation_cast)>("torch_fp8::activation_cast");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Call& down = call.down;
  auto [q, q_t, scale_inv] = activate.call(gate, up, call.activation, down.slots, kInput, down.casts, down.history,
                                           down.training, down.record, /*rowwise=*/true, down.grad_weight,
                                           /*alphas=*/{}, /*beta=*/0);
  return {std::move(q), std::move(q_t), std::move(scale_inv)};
}

struct Forward {
  ForwardResult gate, up, down;
  OptionalTensor up_y;
};

// down's call then holds the product's codes; of its input nothing else is read but size and dtype, which are gate's.
Forward forward_all(const at::Tensor& x, const at::Tensor& x_up, const OptionalTensor& residual, const at::Tensor& gate,
                    const OptionalTensor& up, const at::Tensor& down, const OptionalTensor& bias, MlpCall& call) {
  Forward made;
  made.gate = forward_of(x, gate, {}, call.gate);
  if (call.gated) {
    made.up = forward_of(x_up, *up, {}, call.up);
    made.up_y = std::get<0>(made.up);
  }
  const at::Tensor& gate_y = std::get<0>(made.gate);
  call.down.x_codes = product_of(gate_y, made.up_y, call);
  made.down = forward_of(gate_y, down, bias, call.down, residual);
  return made;
}

enum Input : int { kX, kXUp, kResidual, kGateWeight, kUpWeight, kDownWeight, kDownBias, kInputs };

struct MlpFunction : torch::autograd::Function<MlpFunction> {
  // x_up is another tensor than x only where gate and up do not share their codes.
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const OptionalTensor& x_up,
                            const OptionalTensor& residual, const at::Tensor& gate, const OptionalTensor& up,
                            const at::Tensor& down, const OptionalTensor& bias, MlpCall& call) {
    ctx->set_materialize_grads(false);
    Forward made = forward_all(x, x_up.value_or(x), residual, gate, up, down, bias, call);
    variable_list tensors;
    tensors.reserve(3 * kSaved + 2);
    save(call.gate, x, gate, made.gate, kGate, tensors, ctx->saved_data);
    if (call.gated) {
      save(call.up, x_up.value_or(x), *up, made.up, kUp, tensors, ctx->saved_data);
    } else {
      tensors.resize(2 * kSaved);
    }
    save(call.down, std::get<0>(made.gate), down, made.down, kDown, tensors, ctx->saved_data);
    tensors.push_back(std::get<0>(made.gate));
    tensors.push_back(made.up_y.value_or(at::Tensor()));
    ctx->save_for_backward(std::move(tensors));
    ctx->saved_data["activation"] = call.activation;
    ctx->saved_data["given"] = 1 << kX | x_up.has_value() << kXUp | residual.has_value() << kResidual |
                               1 << kGateWeight | up.has_value() << kUpWeight | 1 << kDownWeight |
                               bias.has_value() << kDownBias;
    return std::get<0>(made.down);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(kInputs + 1);
    const at::Tensor& dy = grads[0];
    if (!dy.defined()) return result;
    check_not_differentiated_again();
    auto& data = ctx->saved_data;
    const variable_list saved = ctx->get_saved_variables();
    const auto of = [&](int layer) { return at::ArrayRef<at::Tensor>(saved).slice(layer * kSaved, kSaved); };
    const at::Tensor &gate_y = saved[3 * kSaved], &up_y = saved[3 * kSaved + 1];
    // The engine counts the inputs that were given.
    const auto given = static_cast<uint64_t>(data["given"].toInt());
    const auto wants = [&](Input input) {
      const uint64_t bit = uint64_t{1} << input;
      return (given & bit) && ctx->needs_input_grad(static_cast<size_t>(std::popcount(given & (bit - 1))));
    };
    const bool gated = up_y.defined(), apart = given >> kXUp & 1;

    const bool beyond = wants(kX) || wants(kXUp) || wants(kGateWeight) || wants(kUpWeight);
    Gradients of_down = backward_of(data, kDown, numbers_of(data, kDown), of(2), dy, {},
                                    {beyond, wants(kDownWeight), wants(kDownBias)}, at::Tensor());
    if (wants(kResidual)) result[kResidual] = dy;
    result[kDownWeight] = std::move(of_down.weight), result[kDownBias] = std::move(of_down.bias);
    if (!beyond) return result;

    static const auto activate_backward = op<decltype(activation_backward_cast)>("torch_fp8::activation_backward_cast");
    const Numbers gate = numbers_of(data, kGate), up = gated ? numbers_of(data, kUp) : Numbers{};
    c10::SmallVector<int64_t, 2> histories{gate.history};
    if (gated) histories.push_back(up.history);
    const OptionalTensor up_slots = gated ? OptionalTensor(held(data, std::string(kUp) + "slots")) : c10::nullopt;
    const auto codes = [&] {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      return activate_backward.call(of_down.x, gate_y, gated ? OptionalTensor(up_y) : c10::nullopt,
                                    data["activation"].toInt(), held(data, std::string(kGate) + "slots"), up_slots,
                                    kGradOutput, gate.casts, histories, gate.training, gate.record, /*dbias=*/{},
                                    /*alphas=*/{}, /*beta=*/0);
    }();
    const auto& [gate_q, gate_q_t, gate_scale_inv, up_q, up_q_t, up_scale_inv, gate_dbias, up_dbias, dalphas] = codes;
    of_down.x.reset();  // its memory serves what follows

    const std::string sum_name = std::string(kGate) + "sum";
    const int64_t sum = data.count(sum_name) && wants(kX) && can_sum() ? data[sum_name].toInt() : 0;
    at::Tensor dx = sum ? sum_so_far(sum) : at::Tensor();
    const bool begun = dx.defined();
    Gradients of_gate = backward_of(data, kGate, gate, of(0), gate_y, {gate_q, gate_q_t, gate_scale_inv},
                                    {wants(kX), wants(kGateWeight), false}, dx);
    result[kGateWeight] = std::move(of_gate.weight);
    if (!begun) dx = std::move(of_gate.x);
    if (gated) {
      // A GEMM adds to float32 and bfloat16.
      const bool adds = !apart && dx.defined() && dx.scalar_type() != at::kHalf;
      Gradients of_up = backward_of(data, kUp, up, of(1), up_y, {up_q, up_q_t, up_scale_inv},
                                    {wants(apart ? kXUp : kX), wants(kUpWeight), false}, adds ? dx : at::Tensor());
      result[kUpWeight] = std::move(of_up.weight);
      if (apart) {
        result[kXUp] = std::move(of_up.x);
      } else if (of_up.x.defined()) {
        dx.add_(of_up.x);
      }
    }
    if (sum && !begun && dx.defined()) begin_sum(sum, dx);
    if (!begun) result[kX] = std::move(dx);
    return result;
  }
};

void check_mlp(const at::Tensor& x, const OptionalTensor& residual, const LinearLayer& gate, const LinearLayer* up,
               const LinearLayer& down, int64_t activation, c10::optional<at::ScalarType> autocast) {
  check_no_transform(x, gate.weight);
  TORCH_CHECK_VALUE(activation >= 0 && activation <= 2,
                    "torch_fp8: activation must be 0 (silu), 1 (gelu) or 2 (gelu, tanh), got ", activation);
  check_layer(x, gate.weight, gate.bias, gate.slots, autocast);
  const auto check_alike = [&](const LinearLayer& layer, const char* name) {
    TORCH_CHECK_VALUE(layer.options == gate.options, "torch_fp8: ", name,
                      " has another recipe than gate; run the layers one by one");
    TORCH_CHECK(layer.training == gate.training, "torch_fp8: ", name,
                " and gate are not both in training, or both in evaluation");
  };
  if (up) {
    check_layer(x, up->weight, up->bias, up->slots, autocast);
    check_alike(*up, "up");
    TORCH_CHECK(up->weight.sym_sizes() == gate.weight.sym_sizes(), "torch_fp8: gate and up must have weights of one ",
                "shape, got ", gate.weight.sym_sizes(), " and ", up->weight.sym_sizes());
  }
  check_alike(down, "down");
  const Gemms all{true, true, true};
  TORCH_CHECK_VALUE(gate.options.fp8_gemms() == all,
                    "torch_fp8: an MLP in one piece runs all its GEMMs in FP8; run the layers one by one");
  TORCH_CHECK(!gate.bias && (!up || !up->bias), "torch_fp8: gate and up of an MLP in one piece have no bias; run the ",
              "layers one by one");
  TORCH_CHECK(down.weight.dim() == 2 && down.weight.sym_size(1) == gate.weight.sym_size(0),
              "torch_fp8: down must have gate's ", gate.weight.sym_size(0),
              " outputs as inputs, got a weight of shape ", down.weight.sym_sizes());
  const at::Tensor product =
      at::empty_symint({0, down.weight.sym_size(1)}, x.options().dtype(autocast.value_or(x.scalar_type())));
  check_layer(product, down.weight, down.bias, down.slots, autocast);
  if (!residual) return;
  check_residual(*residual, x, down.weight, autocast);
}

}  // namespace

at::Tensor mlp(const at::Tensor& x_given, const OptionalTensor& residual, const LinearLayer& gate,
               const LinearLayer* up, const LinearLayer& down, int64_t activation) {
  at::Tensor x = x_given, x_up = x_given;
  const auto autocast = autocast_dtype(x);
  check_mlp(x, residual, gate, up, down, activation, autocast);
  MlpCall call{};
  call.activation = activation, call.gated = up != nullptr;
  call.gate = begin_call(gate, x.scalar_type(), x.requires_grad(), autocast);
  if (up) call.up = begin_call(*up, x.scalar_type(), x.requires_grad(), autocast);
  const bool beyond = call.gate.is_differentiable() || (up && call.up.is_differentiable());
  call.down = begin_call(down, autocast.value_or(x.scalar_type()), beyond, autocast);
  find_codes(gate, call.gate, &x);
  if (up) find_codes(*up, call.up, &x_up);
  find_codes(down, call.down, nullptr);
  const OptionalTensor up_weight = up ? OptionalTensor(up->weight) : c10::nullopt;
  const bool residual_differentiable = at::GradMode::is_enabled() && residual && residual->requires_grad();
  if (!call.down.is_differentiable() && !residual_differentiable) {
    return std::get<0>(forward_all(x, x_up, residual, gate.weight, up_weight, down.weight, down.bias, call).down);
  }
  const bool apart = up && !x_up.is_same(x);
  return MlpFunction::apply(x, apart ? OptionalTensor(x_up) : c10::nullopt, residual, gate.weight, up_weight,
                            down.weight, down.bias, call);
}

}  // namespace torch_fp8
