#include "torch_fp8/nn.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <unordered_set>

#include <ATen/ATen.h>
#include <torch/nn/init.h>

#include "nn_layers.h"

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
  if (recipe.scaling == Scaling::kConstant) {
    const int64_t c = options.constant_bias();
    slots.copy_(new_slots(at::kCPU, c - recipe.margin, options.constant_grad_bias().value_or(c) - recipe.grad_margin,
                          options.constant_weight_bias().value_or(c) - recipe.margin));
  } else {
    slots.copy_(new_slots(at::kCPU));
  }
  history.zero_();
  place = {};
  renew_memo();
}

void LinearImpl::renew_memo() {
  memo = new_memo();
  memo->set_recompute(options.recompute());
}

at::Tensor LinearImpl::forward(const at::Tensor& input) {
  return linear(input, weight, optional(bias), slots, options.recipe(), memo, is_training(), /*main_grad=*/{},
                /*dummy_grad=*/false, place);
}

void LinearImpl::load(torch::serialize::InputArchive& archive) {
  Module::load(archive);
  renew_memo();  // what the host knew of the old tensors is void
  if (place.siblings) part(*place.siblings);
}

void LinearImpl::pretty_print(std::ostream& stream) const {
  stream << std::boolalpha << "torch_fp8::nn::Linear(in_features=" << options.in_features()
         << ", out_features=" << options.out_features() << ", bias=" << options.bias() << ")";
}

void LinearImpl::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  move_state(slots, [&] { move_state(history, [&] { Module::to(device, dtype, non_blocking); }); });
  renew_memo();
}

void LinearImpl::to(torch::Dtype dtype, bool non_blocking) {
  move_state(slots, [&] { move_state(history, [&] { Module::to(dtype, non_blocking); }); });
  renew_memo();
}

void LinearImpl::to(torch::Device device, bool non_blocking) {
  Module::to(device, non_blocking);
  renew_memo();
}

void share_input(const std::vector<Linear>& layers) {
  TORCH_CHECK_VALUE(layers.size() >= 2, "torch_fp8: share_input needs two or more layers, got ", layers.size());
  const LinearImpl& first = *layers.front();
  for (const Linear& layer : layers) {
    TORCH_CHECK_VALUE(layer->options.in_features() == first.options.in_features() &&
                          layer->options.recipe() == first.options.recipe() &&
                          layer->weight.device() == first.weight.device(),
                      "torch_fp8: layers that share their input must have one in_features, recipe and device");
    TORCH_CHECK_VALUE(
        std::count_if(layers.begin(), layers.end(), [&](const Linear& l) { return l.get() == layer.get(); }) == 1,
        "torch_fp8: share_input needs different layers, got one twice");
  }
  const auto siblings = std::make_shared<Siblings>(static_cast<int>(layers.size()));
  std::vector<LinearImpl*> members;
  for (Linear layer : layers) {
    if (layer->place.siblings) part(*layer->place.siblings);
    layer->place = {siblings, static_cast<int>(members.size())};
    members.push_back(layer.get());
  }
  compare(members);
}

void part(Siblings& siblings) { siblings.set_follows(std::vector<int>(static_cast<size_t>(siblings.size()), -1)); }

void compare(const std::vector<LinearImpl*>& members) {
  Siblings& siblings = *members.front()->place.siblings;
  std::vector<int> follows(static_cast<size_t>(siblings.size()), -1);
  const auto has_history = [](const LinearImpl& layer) {
    return layer.options.recipe().scaling == Scaling::kDelayed && (layer.memo->history(layer.slots, 0) >> kInput & 1);
  };
  const auto row = [](const at::Tensor& state) { return state.select(0, kInput); };
  for (size_t i = 0; i < members.size(); ++i) {
    const LinearImpl& layer = *members[i];
    if (!has_history(layer)) continue;
    for (size_t s = 0; s < i; ++s) {  // the first of equals is followed by the others
      const LinearImpl& other = *members[s];
      const auto of_other = static_cast<size_t>(other.place.member);
      if (follows[of_other] < 0 && has_history(other) && other.slots.device() == layer.slots.device() &&
          at::equal(row(other.slots), row(layer.slots)) && at::equal(row(other.history), row(layer.history))) {
        follows[static_cast<size_t>(layer.place.member)] = other.place.member;
        break;
      }
    }
  }
  siblings.set_follows(follows);
}

namespace {

// Who took the codes of another has seen its amax, too.
void share_amaxes(const std::vector<LinearImpl*>& members) {
  Siblings& siblings = *members.front()->place.siblings;
  std::map<int, at::Tensor> amaxes;
  for (const LinearImpl* layer : members) amaxes[layer->place.member] = layer->slots.select(0, kInput).select(0, 2);
  const Siblings::Step step = siblings.end_step();
  for (const auto& [taker, maker] : step.took) {
    if (amaxes.count(taker) && amaxes.count(maker)) amaxes[taker].copy_(at::maximum(amaxes[taker], amaxes[maker]));
  }
  for (const auto& [taker, maker] : step.may_have_taken) {  // replays of a graph tell the host nothing
    if (!amaxes.count(taker) || !amaxes.count(maker)) continue;
    amaxes[taker].copy_(at::where(amaxes[taker] == 0, amaxes[maker], amaxes[taker]));
  }
  for (const int member : step.unread) {
    if (!amaxes.count(member)) continue;
    amaxes[member].zero_();  // the scale stays for this once
    siblings.reads_norms = false;
  }
}

// Whether the host does not know yet which roles have a history, or one may have begun.
bool may_have_begun(const LinearImpl& layer) {
  return layer.memo->updates() == 0 || (used_roles(*layer.memo) & ~layer.memo->history(layer.slots, 0) & 7) != 0;
}

}  // namespace

void update_scales(const torch::nn::Module& module) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> slots, histories;
  std::vector<double> targets;
  std::unordered_set<LayerMemo*> seen;  // a layer may stand in two places
  std::vector<LinearImpl*> layers;
  std::map<Siblings*, std::vector<LinearImpl*>> groups;
  std::vector<int64_t> power_of_two;
  for (const auto& child : module.modules()) {
    auto* layer = child->as<LinearImpl>();
    if (layer == nullptr) continue;
    if (!seen.insert(layer->memo.get()).second) continue;
    layers.push_back(layer);
    if (layer->place.siblings) groups[layer->place.siblings.get()].push_back(layer);
    if (layer->options.recipe().scaling == Scaling::kConstant) continue;
    slots.push_back(layer->slots);
    histories.push_back(layer->history);
    for (int role = 0; role < kRoles; ++role) {
      const Cast cast = layer->options.recipe().cast(role);
      targets.push_back(cast.target());
      power_of_two.push_back(cast.rounding());
    }
  }
  std::vector<std::vector<LinearImpl*>> to_compare;
  for (const auto& [siblings, members] : groups) {
    share_amaxes(members);
    // Layers that are not updated together have other scales from now on.
    if (static_cast<int>(members.size()) < siblings->size()) part(*siblings);
    if (std::any_of(members.begin(), members.end(), [](const auto* layer) { return may_have_begun(*layer); })) {
      to_compare.push_back(members);
    }
  }
  update_scales_(slots, histories, targets, power_of_two);
  for (const LinearImpl* layer : layers) end_step(*layer->memo, layer->weight);
  for (const auto& members : to_compare) compare(members);
}

}  // namespace torch_fp8::nn
