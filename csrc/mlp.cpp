// An MLP: down(f(gate(x)) * up(x)), or down(f(gate(x))), and what it is added to. Its layers are called as by
// themselves (call.h); between them is a node of autograd that makes and casts in one pass: the product for down, and
// the gradients of gate and up. None of these exists in 16 bits: stand-ins travel along the graph (stand_in.h).
#include <algorithm>
#include <array>

#include <ATen/ATen.h>

#include "call.h"
#include "check.h"
#include "ops/producers.h"
#include "siblings.h"
#include "stand_in.h"
#include "torch_fp8/mlp.h"

namespace torch_fp8 {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = c10::optional<at::Tensor>;

struct Activate {
  const Call &gate, &down;
  const Call* up;  // null without gating, and by halves
  int64_t activation;
  double beta;
  int64_t halves;
  bool again;  // in backward
};

// Compiled autograd hands tensors on by their values alone; those of codes become the same codes again.
at::Tensor values_of(const Codes& codes, const at::Tensor& like) {
  const at::Tensor q = codes.q.narrow(0, 0, leading_size(like.sizes())).narrow(1, 0, like.size(-1));
  return q.to(at::kFloat).mul_(codes.scale_inv).to(like.scalar_type()).view(like.sizes());
}

// What one layer makes for the product: all of it, or a half.
at::Tensor factor_of(const at::Tensor& made, int64_t halves) {
  return halves == 0 ? made : made.narrow_symint(-1, 0, made.sym_size(-1) / 2);
}

struct ActivationFunction : torch::autograd::Function<ActivationFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& gate, const OptionalTensor& up,
                            const OptionalTensor& alphas, const Activate& activate) {
    ctx->set_materialize_grads(false);
    const Call& down = activate.down;
    const at::Tensor no_tensor, &up_y = up ? *up : no_tensor, &factors = alphas ? *alphas : no_tensor;
    Codes codes =
        cast_product({gate, up_y, factors, activate.activation, activate.beta, activate.halves}, down.slots, down.casts,
                     down.history, down.training, down.record, /*rowwise=*/true, down.grad_weight && !activate.again);
    ctx->save_for_backward({gate, up_y, factors});
    auto& data = ctx->saved_data;
    data["beta"] = activate.beta, data["halves"] = activate.halves;
    const Call& of_gate = activate.gate;
    data["activation"] = activate.activation;
    data["gate_slots"] = of_gate.slots;
    data["casts"] = c10::List<int64_t>(c10::IntArrayRef(of_gate.casts));
    data["histories"] = activate.up ? c10::List<int64_t>({of_gate.history, activate.up->history})
                                    : c10::List<int64_t>({of_gate.history});
    data["training"] = of_gate.training, data["record"] = of_gate.record;
    data["sums"] = of_gate.grad_bias || (activate.up && activate.up->grad_bias);
    if (activate.up) data["up_slots"] = activate.up->slots;
    data["again"] = activate.again;
    return stand_in(factor_of(gate, activate.halves), {std::move(codes), {}});
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(4);  // gate, up, alphas, activate
    if (!grads[0].defined()) return result;
    check_not_differentiated_again();
    auto& data = ctx->saved_data;
    const variable_list saved = ctx->get_saved_variables();
    const auto optional = [](const at::Tensor& t) { return t.defined() ? OptionalTensor(t) : c10::nullopt; };
    const OptionalTensor up = optional(saved[1]), alphas = optional(saved[2]);
    const OptionalTensor up_slots = up ? OptionalTensor(data["up_slots"].toTensor()) : c10::nullopt;
    c10::optional<at::ScalarType> dbias;
    if (data["sums"].toBool()) dbias = at::kFloat;
    // The transposes of these codes, which lie beside gate, up and the gradient here, are made of them by each layer.
    const bool again = data["again"].toBool();
    static const auto backward_op = op<decltype(activation_backward_cast)>("torch_fp8::activation_backward_cast");
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [gate_q, gate_q_t, gate_scale_inv, up_q, up_q_t, up_scale_inv, gate_dbias, up_dbias, dalphas] =
        backward_op.call(grads[0], saved[0], up, data["activation"].toInt(), data["gate_slots"].toTensor(), up_slots,
                         kGradOutput, data["casts"].toIntVector(), data["histories"].toIntVector(),
                         data["training"].toBool(), data["record"].toBool(), dbias, alphas, data["beta"].toDouble(),
                         /*columnwise=*/!again, data["halves"].toInt());
    const auto hand_over = [](const at::Tensor& like, HandedOver handed) {
      return can_sum() ? stand_in(like, std::move(handed)) : values_of(handed.codes, like);
    };
    result[0] = hand_over(saved[0], {{gate_q, gate_q_t, gate_scale_inv}, gate_dbias});
    if (up) result[1] = hand_over(saved[1], {{up_q, up_q_t, up_scale_inv}, up_dbias});
    if (alphas) result[2] = std::move(dalphas);
    return result;
  }
};

void check_mlp(const at::Tensor& x, const OptionalTensor& residual, const LinearLayer& gate, const LinearLayer* up,
               const LinearLayer& down, int64_t activation, const OptionalTensor& alphas, double beta, int64_t halves,
               c10::optional<at::ScalarType> autocast) {
  check_no_transform(x, gate.weight);
  check_activation(activation, alphas, beta, x, "the input");
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
  TORCH_CHECK_VALUE(halves == 0 || !up, "torch_fp8: by halves gate is up, too; leave up out");
  TORCH_CHECK(down.weight.dim() == 2 && down.weight.sym_size(1) * (halves == 0 ? 1 : 2) == gate.weight.sym_size(0),
              "torch_fp8: down must have ", halves == 0 ? "" : "half of ", "gate's ", gate.weight.sym_size(0),
              " outputs as inputs, got a weight of shape ", down.weight.sym_sizes());
  const at::Tensor product =
      at::empty_symint({0, down.weight.sym_size(1)}, x.options().dtype(autocast.value_or(x.scalar_type())));
  check_layer(product, down.weight, down.bias, down.slots, autocast);
  if (!residual) return;
  check_residual(*residual, x, down.weight, autocast);
}

}  // namespace

int64_t activation_of_name(const std::string& name) {
  constexpr std::array<const char*, 5> kNames{"silu", "gelu", "gelu_tanh", "xielu", "relu_squared"};
  const auto* const found = std::find(kNames.begin(), kNames.end(), name);
  TORCH_CHECK_VALUE(found != kNames.end(), "torch_fp8: activation must be one of ", c10::Join(", ", kNames), ", got '",
                    name, "'");
  return found - kNames.begin();
}

at::Tensor mlp(const at::Tensor& x_given, const OptionalTensor& residual, const LinearLayer& gate,
               const LinearLayer* up, const LinearLayer& down, int64_t activation, bool recompute,
               const OptionalTensor& alphas, double beta, int64_t halves) {
  const auto autocast = autocast_dtype(x_given);
  check_mlp(x_given, residual, gate, up, down, activation, alphas, beta, halves, autocast);
  const at::ScalarType x_dtype = x_given.scalar_type();
  Call of_gate = begin_call(gate, x_dtype, x_given.requires_grad(), autocast), of_up;
  if (up) of_up = begin_call(*up, x_dtype, x_given.requires_grad(), autocast);
  const bool beyond = of_gate.is_differentiable() || (up && of_up.is_differentiable()) ||
                      (alphas && at::GradMode::is_enabled() && alphas->requires_grad());
  Call of_down = begin_call(down, autocast.value_or(x_dtype), beyond, autocast);

  const auto run_one = [&](const LinearLayer& layer, Call& call) {
    at::Tensor x = x_given;
    find_codes(layer, call, &x);
    return run(x, layer.weight, layer.bias, call);
  };
  const at::Tensor gate_y = run_one(gate, of_gate);
  const OptionalTensor up_y = up ? OptionalTensor(run_one(*up, of_up)) : c10::nullopt;
  find_codes(down, of_down, nullptr);
  const Activate activate{of_gate, of_down, up ? &of_up : nullptr, activation, beta, halves, recompute};
  const at::Tensor product = ActivationFunction::apply(gate_y, up_y, alphas, activate);
  const Codes& codes = handed_over(product)->codes;
  of_down.x_codes = {codes.q, codes.q_t, codes.scale_inv};
  if (recompute) {
    of_down.source =
        Product{gate_y, up_y.value_or(at::Tensor()), alphas.value_or(at::Tensor()), activation, beta, halves};
  }
  return run(product, down.weight, down.bias, of_down, residual);
}

}  // namespace torch_fp8
