// The LibTorch modules: torch::nn::Linear in FP8, and the norms and the MLP around it, with the options, state and
// numbers of Python's torch_fp8.Linear, RMSNorm, LayerNorm and MLP.
//
//   torch_fp8::nn::Linear layer(torch_fp8::nn::LinearOptions(1024, 4096));
//   layer->to(torch::kCUDA, torch::kBFloat16);
//   ...
//   optimizer.step();
//   torch_fp8::nn::update_scales(*model);  // once per optimizer step: LibTorch's optimizers have no hooks
//
//   auto [y, sum] = norm->with_sum(x, residual, mlp->readers());  // a pre-norm block's second half
//   x = mlp->forward(y, sum);
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include <torch/nn/cloneable.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any_value.h>
#include <torch/nn/pimpl.h>

#include "torch_fp8/linear.h"
#include "torch_fp8/mlp.h"

namespace torch_fp8::nn {

struct LinearOptions {
  LinearOptions(int64_t in_features, int64_t out_features) : in_features_(in_features), out_features_(out_features) {}

  TORCH_ARG(int64_t, in_features);
  TORCH_ARG(int64_t, out_features);
  TORCH_ARG(bool, bias) = true;
  TORCH_ARG(torch_fp8::LinearOptions, recipe) = {};
  TORCH_ARG(int64_t, amax_history_len) = 1024;  // 1 is the "most_recent" algorithm
  // Of Scaling::kConstant: the scales are 2^constant_bias, or for weights and gradients of their own. The recipe's
  // margins are taken off.
  TORCH_ARG(int64_t, constant_bias) = 0;
  TORCH_ARG(c10::optional<int64_t>, constant_weight_bias) = c10::nullopt;
  TORCH_ARG(c10::optional<int64_t>, constant_grad_bias) = c10::nullopt;
  TORCH_ARG(bool, recompute) = false;  // backward makes codes again instead of keeping them
};

class LinearImpl : public torch::nn::Cloneable<LinearImpl> {
 public:
  LinearImpl(int64_t in_features, int64_t out_features) : LinearImpl(LinearOptions(in_features, out_features)) {}
  explicit LinearImpl(const LinearOptions& options);

  void reset() override;    // new parameters and new scaling state
  void reset_parameters();  // torch::nn::Linear's initialisation
  at::Tensor forward(const at::Tensor& input);
  void load(torch::serialize::InputArchive& archive) override;
  void pretty_print(std::ostream& stream) const override;

  // The scaling state moves with the layer but stays float32.
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Device device, bool non_blocking = false) override;

  LinearOptions options;
  at::Tensor weight;   // (out_features, in_features)
  at::Tensor bias;     // (out_features), or undefined
  at::Tensor slots;    // buffer (3, 4) float32: {scale_inv, scale, amax, cursor} of input, weight, grad_output
  at::Tensor history;  // buffer (3, amax_history_len) float32
  std::shared_ptr<LayerMemo> memo;
  Place place;  // among the layers that read one tensor; a copy of the layer has none

 private:
  void renew_memo();
};

TORCH_MODULE(Linear);

// Two or more layers of one in_features, recipe and device that read one tensor: it is cast once for all of them. A
// layer that meets another tensor casts for itself. An MLP has done so with its own.
void share_input(const std::vector<Linear>& layers);

struct NormOptions {
  NormOptions(int64_t dim) : dim_(dim) {}  // as torch::nn::LayerNormOptions: a number will do

  TORCH_ARG(int64_t, dim);
  TORCH_ARG(double, eps) = 1e-5;
  TORCH_ARG(bool, elementwise_affine) = true;
  TORCH_ARG(bool, bias) = true;  // LayerNorm's
};

template <class Derived, bool kLayerNorm>
class NormImpl : public torch::nn::Cloneable<Derived> {
 public:
  explicit NormImpl(const NormOptions& options);

  void reset() override;  // the gain is 1, the bias 0
  at::Tensor forward(const at::Tensor& input);
  // The norm of input + residual, and that sum, with which a block goes on. readers: the layers that read the norm, all
  // of them or none: they take its codes, which are made in the same pass.
  std::tuple<at::Tensor, at::Tensor> with_sum(const at::Tensor& input,
                                              const c10::optional<at::Tensor>& residual = c10::nullopt,
                                              const std::vector<Linear>& readers = {});
  void pretty_print(std::ostream& stream) const override;

  NormOptions options;
  at::Tensor weight, bias;  // (dim), or undefined
};

struct RMSNormImpl : NormImpl<RMSNormImpl, false> {
  using NormImpl::NormImpl;
};
struct LayerNormImpl : NormImpl<LayerNormImpl, true> {
  using NormImpl::NormImpl;
};
TORCH_MODULE(RMSNorm);
TORCH_MODULE(LayerNorm);

struct MLPOptions {
  MLPOptions(int64_t hidden_size, int64_t intermediate_size)
      : hidden_size_(hidden_size), intermediate_size_(intermediate_size) {}

  TORCH_ARG(int64_t, hidden_size);
  TORCH_ARG(int64_t, intermediate_size);
  TORCH_ARG(std::string, activation) = "silu";  // or gelu, gelu_tanh, relu_squared, xielu
  TORCH_ARG(bool, gated) = true;
  // Of the three layers.
  TORCH_ARG(bool, bias) = false;
  TORCH_ARG(torch_fp8::LinearOptions, recipe) = {};
  TORCH_ARG(int64_t, amax_history_len) = 1024;
  TORCH_ARG(int64_t, constant_bias) = 0;
  TORCH_ARG(c10::optional<int64_t>, constant_weight_bias) = c10::nullopt;
  TORCH_ARG(c10::optional<int64_t>, constant_grad_bias) = c10::nullopt;
  // Backward makes the codes of weights, product and a norm in front again instead of keeping them.
  TORCH_ARG(bool, recompute) = false;
};

// down(f(gate(x)) * up(x)), or down(f(up(x))), in one piece (mlp.h).
class MLPImpl : public torch::nn::Cloneable<MLPImpl> {
 public:
  MLPImpl(int64_t hidden_size, int64_t intermediate_size) : MLPImpl(MLPOptions(hidden_size, intermediate_size)) {}
  explicit MLPImpl(const MLPOptions& options);

  void reset() override;
  std::shared_ptr<torch::nn::Module> clone(const c10::optional<torch::Device>& device = c10::nullopt) const override;
  void load(torch::serialize::InputArchive& archive) override;
  at::Tensor forward(const at::Tensor& input, const c10::optional<at::Tensor>& residual = c10::nullopt);
  void pretty_print(std::ostream& stream) const override;

  std::vector<Linear> readers() const;  // the layers that read the input

  MLPOptions options;
  Linear gate_proj{nullptr}, up_proj{nullptr}, down_proj{nullptr};  // gate_proj: null without gating
  at::Tensor alpha_p, alpha_n;                                      // (1), of xielu

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(c10::optional<at::Tensor>())})
};
TORCH_MODULE(MLP);

// The scaling update of every torch_fp8::nn::Linear in the module, all on one device. Layers that recorded nothing
// since the last update keep their scales. The module must be held by a shared_ptr, as LibTorch's modules are.
void update_scales(const torch::nn::Module& module);

}  // namespace torch_fp8::nn
