// y = x W^T + b with its three GEMMs (fprop, dgrad, wgrad) in FP8: the differentiable function under both
// torch_fp8.Linear (Python) and torch_fp8::nn::Linear (C++).
//
// All rules stand in two ops, linear_forward and linear_backward (csrc/ops/linear.cpp). The function over them saves
// what the one gives for the other, and keeps what can be used again: the weight's codes for the micro-batches of a
// step, the input's codes for the layers that read one tensor.
#pragma once

#include <array>
#include <memory>
#include <vector>

#include "torch_fp8/cast.h"
#include "torch_fp8/ops.h"
#include "torch_fp8/scale.h"

namespace torch_fp8 {

// A recipe as the C++ side needs it; python/torch_fp8/recipe.py documents the fields.
struct LinearOptions {
  Scaling scaling = Scaling::kDelayed;
  bool e4m3_gradients = false;  // else E5M2 (HYBRID)
  bool power_of_two = false;
  int64_t margin = 0;       // of inputs and weights
  int64_t grad_margin = 0;  // of output gradients
  bool fast_fprop = true, fast_dgrad = false, fast_wgrad = false;
  bool fp8_fprop = true, fp8_dgrad = true, fp8_wgrad = true;  // which GEMMs run in FP8; the others in 16 bits

  bool operator==(const LinearOptions&) const = default;
  Cast cast(int role) const;
  std::array<bool, 3> fp8_gemms() const { return {fp8_fprop, fp8_dgrad, fp8_wgrad}; }
  std::array<bool, 3> fast_accum() const { return {fast_fprop, fast_dgrad, fast_wgrad}; }
};

class LayerMemo;  // csrc/memo.h: what the host remembers of one layer between calls
class Siblings;   // csrc/siblings.h: layers that read one tensor

std::shared_ptr<LayerMemo> new_memo();

// One of layers that read one tensor; without siblings where a layer reads it alone.
struct Place {
  std::shared_ptr<Siblings> siblings;
  int member = 0;
};

// x (..., in) float32, float16 or bfloat16; weight (out, in) and bias (out) of x's dtype, or any of the three under
// autocast, whose dtype y then has. slots (3, 4): the scaling state of input, weight and output gradient.
// training false: weight and output gradient are scaled by their own amax, and no amax is recorded; with grad mode off
// none is recorded either.
// main_grad (out, in) float32 or bfloat16: the weight's gradient is added to it by the GEMM, and autograd sees none;
// or, with dummy_grad, one without meaning, for hooks that wait for a gradient.
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const c10::optional<at::Tensor>& bias,
                  const at::Tensor& slots, const LinearOptions& options, const std::shared_ptr<LayerMemo>& memo,
                  bool training, const c10::optional<at::Tensor>& main_grad = c10::nullopt, bool dummy_grad = false,
                  const Place& place = {});

// To be called after every scaling update: the layer's step has ended, and this is its weight now.
void end_step(LayerMemo& memo, const at::Tensor& weight);

// The roles that took part in training since the last update, or may have, one bit each.
int64_t used_roles(const LayerMemo& memo);

// The slots of a new layer: (3, 4) float32 with scale 1, or 2^bias for constant scaling; weight_bias: bias, if not
// given.
at::Tensor new_slots(c10::Device device, int64_t bias = 0, int64_t grad_bias = 0,
                     c10::optional<int64_t> weight_bias = c10::nullopt);

}  // namespace torch_fp8
