// The LibTorch module: torch::nn::Linear in FP8, with the options, state and numbers of Python's torch_fp8.Linear.
//
//   torch_fp8::nn::Linear layer(torch_fp8::nn::LinearOptions(1024, 4096));
//   layer->to(torch::kCUDA, torch::kBFloat16);
//   ...
//   optimizer.step();
//   torch_fp8::nn::update_scales(*model);  // once per optimizer step: LibTorch's optimizers have no hooks
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include "torch_fp8/linear.h"

namespace torch_fp8::nn {

struct LinearOptions {
  LinearOptions(int64_t in_features, int64_t out_features) : in_features_(in_features), out_features_(out_features) {}

  TORCH_ARG(int64_t, in_features);
  TORCH_ARG(int64_t, out_features);
  TORCH_ARG(bool, bias) = true;
  TORCH_ARG(torch_fp8::LinearOptions, recipe) = {};
  TORCH_ARG(int64_t, amax_history_len) = 1024;  // 1 is the "most_recent" algorithm
  TORCH_ARG(int64_t, constant_bias) = 0;        // of Scaling::kConstant: the scales are 2^constant_bias
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
};

TORCH_MODULE(Linear);

// The scaling update of every torch_fp8::nn::Linear in the module, all on one device. Layers that recorded nothing
// since the last update keep their scales. The module must be held by a shared_ptr, as LibTorch's modules are.
void update_scales(const torch::nn::Module& module);

}  // namespace torch_fp8::nn
