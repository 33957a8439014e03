#include "torch_fp8/nn.h"

#include <cmath>
#include <unordered_set>

#include <ATen/ATen.h>
#include <torch/nn/init.h>

namespace torch_fp8::nn {
namespace {

// Casts go past float32 state seen as integers, moves do not.
template <class Move>
void move_state(at::Tensor& state, Move&& move) {
  const at::Tensor bits = state.view(at::kInt);
  move();
  state.set_data(bits.to(state.device()).view(at::kFloat));
}

}  // namespace

LinearImpl::LinearImpl(const LinearOptions& options_) : options(options_) {
  TORCH_CHECK_VALUE(options.amax_history_len() > 0, "torch_fp8: amax_history_len must be positive, got ",
                    options.amax_history_len());
  LinearImpl::reset();
}

void LinearImpl::reset() {
  const at::TensorOptions parameter_options(c10::get_default_dtype_as_scalartype());  // as torch::nn::Linear's
  weight = register_parameter("weight", at::empty({options.out_features(), options.in_features()}, parameter_options));
  bias =
      register_parameter("bias", options.bias() ? at::empty({options.out_features()}, parameter_options) : at::Tensor(),
                         /*requires_grad=*/options.bias());
  slots = register_buffer("slots", at::empty({kRoles, 4}, at::kFloat));
  history = register_buffer("history", at::empty({kRoles, options.amax_history_len()}, at::kFloat));
  reset_parameters();
}

void LinearImpl::reset_parameters() {
  torch::nn::init::kaiming_uniform_(weight, std::sqrt(5));
  if (bias.defined()) {
    const double bound = options.in_features() > 0 ? 1 / std::sqrt(static_cast<double>(options.in_features())) : 0;
    torch::nn::init::uniform_(bias, -bound, bound);
  }
  const torch_fp8::LinearOptions& recipe = options.recipe();
  const int64_t c = options.constant_bias();
  slots.copy_(recipe.scaling == Scaling::kConstant ? new_slots(at::kCPU, c - recipe.margin, c - recipe.grad_margin)
                                                   : new_slots(at::kCPU));
  history.zero_();
  memo = new_memo();
}

at::Tensor LinearImpl::forward(const at::Tensor& input) {
  return linear(input, weight, bias.defined() ? c10::optional<at::Tensor>(bias) : c10::nullopt, slots, options.recipe(),
                memo, is_training());
}

void LinearImpl::load(torch::serialize::InputArchive& archive) {
  Module::load(archive);
  memo = new_memo();  // what the host knew of the old tensors is void
}

void LinearImpl::pretty_print(std::ostream& stream) const {
  stream << std::boolalpha << "torch_fp8::nn::Linear(in_features=" << options.in_features()
         << ", out_features=" << options.out_features() << ", bias=" << options.bias() << ")";
}

void LinearImpl::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  move_state(slots, [&] { move_state(history, [&] { Module::to(device, dtype, non_blocking); }); });
  memo = new_memo();
}

void LinearImpl::to(torch::Dtype dtype, bool non_blocking) {
  move_state(slots, [&] { move_state(history, [&] { Module::to(dtype, non_blocking); }); });
  memo = new_memo();
}

void LinearImpl::to(torch::Device device, bool non_blocking) {
  Module::to(device, non_blocking);
  memo = new_memo();
}

void update_scales(const torch::nn::Module& module) {
  std::vector<at::Tensor> slots, histories;
  std::vector<double> targets;
  std::unordered_set<LayerMemo*> seen;  // a layer may stand in two places
  std::vector<const LinearImpl*> layers;
  std::vector<int64_t> power_of_two;
  for (const auto& child : module.modules()) {
    const auto* layer = child->as<LinearImpl>();
    if (layer == nullptr) continue;
    if (!seen.insert(layer->memo.get()).second) continue;
    layers.push_back(layer);
    if (layer->options.recipe().scaling == Scaling::kConstant) continue;
    slots.push_back(layer->slots);
    histories.push_back(layer->history);
    for (int role = 0; role < kRoles; ++role) targets.push_back(layer->options.recipe().cast(role).target());
    power_of_two.push_back(layer->options.recipe().power_of_two);
  }
  update_scales_(slots, histories, targets, power_of_two);
  for (const LinearImpl* layer : layers) end_step(*layer->memo, layer->weight);
}

}  // namespace torch_fp8::nn
