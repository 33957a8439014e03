// An MLP in one piece: down(f(gate(x)) * up(x)) with all its GEMMs in FP8, where neither the product nor the gradients
// of gate and up are ever written in 16 bits.
#pragma once

#include <string>

#include "torch_fp8/linear.h"

namespace torch_fp8 {

// A layer, as linear() takes it.
struct LinearLayer {
  const at::Tensor& weight;
  const c10::optional<at::Tensor>& bias;
  const at::Tensor& slots;
  const LinearOptions& options;
  LayerMemo& memo;
  bool training;
  const c10::optional<at::Tensor>& main_grad;
  bool dummy_grad;
  const Place& place;
};

// 0 silu, 1 gelu, 2 gelu_tanh, 3 xielu, 4 relu_squared.
int64_t activation_of_name(const std::string& name);

// y (..., K) = down(f(gate(x)) * up(x)) [+ residual (..., K)] for x (..., K); without up it is down(f(gate(x))). The
// three are layers of one recipe with all GEMMs in FP8; gate and up have weights (N, K), down (K, N).
// activation: activation_of_name. The same casts, states and gradients as of the layers one after the other, but that
// what stands between them is rounded once. recompute: backward makes the product's codes again instead of keeping
// them. alphas (2) float32, differentiable, and beta: xielu's alone, as activation_cast (csrc/register.cpp) has them.
// halves: as there; by halves gate is one layer with the outputs of both, and weight (2 N, K).
at::Tensor mlp(const at::Tensor& x, const c10::optional<at::Tensor>& residual, const LinearLayer& gate,
               const LinearLayer* up, const LinearLayer& down, int64_t activation, bool recompute = false,
               const c10::optional<at::Tensor>& alphas = c10::nullopt, double beta = 0.5, int64_t halves = 0);

}  // namespace torch_fp8
