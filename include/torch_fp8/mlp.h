// An MLP in one piece: down(f(gate(x)) * up(x)) with all its GEMMs in FP8, where neither the product nor the gradients
// of gate and up are ever written in 16 bits.
#pragma once

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

// y (..., K) = down(f(gate(x)) * up(x)) [+ residual (..., K)] for x (..., K); without up it is down(f(gate(x))). The
// three are layers of one recipe with all GEMMs in FP8; gate and up have weights (N, K), down (K, N).
// activation: 0 silu, 1 gelu, 2 gelu by tanh, 4 relu squared. The same casts, states and gradients as of the layers one
// after the other, but that what stands between them is rounded once. recompute: backward makes the product's codes
// again instead of keeping them.
at::Tensor mlp(const at::Tensor& x, const c10::optional<at::Tensor>& residual, const LinearLayer& gate,
               const LinearLayer* up, const LinearLayer& down, int64_t activation, bool recompute = false);

}  // namespace torch_fp8
