// The norms and the MLP of the C++ API, over norm() and mlp().
#include <algorithm>
#include <cmath>

#include <ATen/ATen.h>

#include "nn_layers.h"
#include "torch_fp8/norm.h"

namespace torch_fp8::nn {
namespace {

constexpr double kBeta = 0.5;  // xielu's slope at 0

LinearOptions layer_options(const MLPOptions& options, int64_t in_features, int64_t out_features) {
  return LinearOptions(in_features, out_features)
      .bias(options.bias())
      .recipe(options.recipe())
      .amax_history_len(options.amax_history_len())
      .constant_bias(options.constant_bias())
      .constant_weight_bias(options.constant_weight_bias())
      .constant_grad_bias(options.constant_grad_bias())
      .recompute(options.recompute());
}

// By whose scaling state the codes are made: of the layer that the others follow. Null where they take none.
const Linear* leader(const std::vector<Linear>& readers) {
  if (readers.empty()) return nullptr;
  const auto& siblings = readers.front()->place.siblings;
  const bool together = std::all_of(readers.begin(), readers.end(), [&](const Linear& layer) {
    return siblings && layer->place.siblings == siblings && layer->is_training();
  });
  if (!together || !siblings->reads_norms) return nullptr;
  const std::vector<int> follows = siblings->follows();
  const auto found = std::find_if(readers.begin(), readers.end(), [&](const Linear& layer) {
    return follows[static_cast<size_t>(layer->place.member)] < 0;
  });
  return found == readers.end() ? nullptr : &*found;
}

// Layers that read a norm are a group, by which they take its codes.
void feed(const std::vector<Linear>& readers) {
  if (readers.size() == 1) {
    Linear reader = readers.front();
    if (!reader->place.siblings) reader->place = {std::make_shared<Siblings>(1), 0};
    return;
  }
  const auto& first = readers.front()->place.siblings;
  const bool together = std::all_of(readers.begin(), readers.end(),
                                    [&](const Linear& layer) { return first && layer->place.siblings == first; });
  if (!together) share_input(readers);
}

}  // namespace

template <class Derived, bool kLayerNorm>
NormImpl<Derived, kLayerNorm>::NormImpl(const NormOptions& options_) : options(options_) {
  NormImpl::reset();
}

template <class Derived, bool kLayerNorm>
void NormImpl<Derived, kLayerNorm>::reset() {
  const at::TensorOptions parameter_options(c10::get_default_dtype_as_scalartype());  // as torch::nn's
  const auto registered = [&](const char* name, bool wanted, double value) {
    const at::Tensor t = wanted ? at::full({options.dim()}, value, parameter_options) : at::Tensor();
    return this->register_parameter(name, t, /*requires_grad=*/wanted);
  };
  weight = registered("weight", options.elementwise_affine(), 1);
  if (kLayerNorm) bias = registered("bias", options.elementwise_affine() && options.bias(), 0);
}

template <class Derived, bool kLayerNorm>
at::Tensor NormImpl<Derived, kLayerNorm>::forward(const at::Tensor& input) {
  return std::get<0>(with_sum(input));
}

template <class Derived, bool kLayerNorm>
std::tuple<at::Tensor, at::Tensor> NormImpl<Derived, kLayerNorm>::with_sum(const at::Tensor& input,
                                                                           const c10::optional<at::Tensor>& residual,
                                                                           const std::vector<Linear>& readers) {
  torch_fp8::NormOptions how{.eps = options.eps(), .layer_norm = kLayerNorm};
  if (!readers.empty()) feed(readers);
  const Linear* const reader = leader(readers);
  if (!reader) return norm(input, residual, optional(weight), optional(bias), how, nullptr);
  how.recompute = (*reader)->options.recompute();
  const Given given(*reader);
  const LinearLayer layer = given.layer();
  return norm(input, residual, optional(weight), optional(bias), how, &layer);
}

template <class Derived, bool kLayerNorm>
void NormImpl<Derived, kLayerNorm>::pretty_print(std::ostream& stream) const {
  stream << std::boolalpha << "torch_fp8::nn::" << (kLayerNorm ? "LayerNorm" : "RMSNorm") << "(" << options.dim()
         << ", eps=" << options.eps() << ", elementwise_affine=" << options.elementwise_affine() << ")";
}

template class NormImpl<RMSNormImpl, false>;
template class NormImpl<LayerNormImpl, true>;

MLPImpl::MLPImpl(const MLPOptions& options_) : options(options_) {
  activation_of_name(options.activation());  // a name that is none is an error here, and not in a forward
  MLPImpl::reset();
}

void MLPImpl::reset() {
  const int64_t hidden = options.hidden_size(), wide = options.intermediate_size();
  if (options.gated()) gate_proj = register_module("gate_proj", Linear(layer_options(options, hidden, wide)));
  up_proj = register_module("up_proj", Linear(layer_options(options, hidden, wide)));
  down_proj = register_module("down_proj", Linear(layer_options(options, wide, hidden)));
  if (options.activation() == "xielu") {
    const auto raw = [](double factor) {                                                  // softplus gives it back
      const at::TensorOptions parameter_options(c10::get_default_dtype_as_scalartype());  // as torch::nn's
      return at::full({1}, std::log(std::expm1(factor)), parameter_options);
    };
    alpha_p = register_parameter("alpha_p", raw(0.8));
    alpha_n = register_parameter("alpha_n", raw(0.8 - kBeta));
  }
  if (options.gated()) share_input(readers());
}

std::shared_ptr<torch::nn::Module> MLPImpl::clone(const c10::optional<torch::Device>& device) const {
  auto copied = Cloneable::clone(device);
  auto& copy = *copied->as<MLPImpl>();
  // The registered layers are copies now, and know of no group.
  if (options.gated()) {
    share_input(copy.readers());
    copy.up_proj->place.siblings->set_follows(up_proj->place.siblings->follows());
  }
  return copied;
}

void MLPImpl::load(torch::serialize::InputArchive& archive) {
  Module::load(archive);
  if (options.gated()) share_input(readers());
}

std::vector<Linear> MLPImpl::readers() const {
  return options.gated() ? std::vector{gate_proj, up_proj} : std::vector{up_proj};
}

at::Tensor MLPImpl::forward(const at::Tensor& input, const c10::optional<at::Tensor>& residual) {
  const bool gated = options.gated();
  const Given first(gated ? gate_proj : up_proj), second(up_proj), last(down_proj);
  const LinearLayer up = second.layer();
  c10::optional<at::Tensor> alphas;
  if (alpha_p.defined()) {
    const auto positive = [](const at::Tensor& raw) { return at::softplus(raw.to(at::kFloat)); };
    alphas = at::cat({positive(alpha_p), kBeta + positive(alpha_n)});
  }
  return mlp(input, residual, first.layer(), gated ? &up : nullptr, last.layer(),
             activation_of_name(options.activation()), options.recompute(), alphas, kBeta);
}

void MLPImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_fp8::nn::MLP(" << options.activation() << ")";
}

}  // namespace torch_fp8::nn
