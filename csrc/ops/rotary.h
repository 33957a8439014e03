// What stands between the projections and the attention: a norm of each head, and rotary positions; schemas in
// register.cpp, rules in rotary.cpp, the gradient's formula in rotary_autograd.cpp.
#pragma once

#include <tuple>

#include <ATen/core/Tensor.h>

namespace torch_fp8 {

using RotaryResult = std::tuple<at::Tensor, at::Tensor>;
using RotaryGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// -> q and k, of the inputs' shapes; the memory is that of (batch, tokens, heads, dims), whatever the inputs' is.
RotaryResult rotary(const at::Tensor& q, const at::Tensor& k, const c10::optional<at::Tensor>& cos,
                    const c10::optional<at::Tensor>& sin, int64_t rotary_dims, bool interleaved, bool heads_first,
                    int64_t norm, const c10::optional<at::Tensor>& q_gain, const c10::optional<at::Tensor>& k_gain,
                    double eps, double gain_offset);
RotaryResult rotary_meta(const at::Tensor& q, const at::Tensor& k, const c10::optional<at::Tensor>& cos,
                         const c10::optional<at::Tensor>& sin, int64_t rotary_dims, bool interleaved, bool heads_first,
                         int64_t norm, const c10::optional<at::Tensor>& q_gain, const c10::optional<at::Tensor>& k_gain,
                         double eps, double gain_offset);
RotaryResult rotary_autograd(c10::DispatchKeySet keys, const at::Tensor& q, const at::Tensor& k,
                             const c10::optional<at::Tensor>& cos, const c10::optional<at::Tensor>& sin,
                             int64_t rotary_dims, bool interleaved, bool heads_first, int64_t norm,
                             const c10::optional<at::Tensor>& q_gain, const c10::optional<at::Tensor>& k_gain,
                             double eps, double gain_offset);

// -> the gradients of q, k, q_gain, k_gain; 0 elements where dq or dk is missing, or without gain_grads. q and k only
// with a norm.
RotaryGradients rotary_backward(const c10::optional<at::Tensor>& dq, const c10::optional<at::Tensor>& dk,
                                const c10::optional<at::Tensor>& q, const c10::optional<at::Tensor>& k,
                                const c10::optional<at::Tensor>& cos, const c10::optional<at::Tensor>& sin,
                                int64_t rotary_dims, bool interleaved, bool heads_first, int64_t norm,
                                const c10::optional<at::Tensor>& q_gain, const c10::optional<at::Tensor>& k_gain,
                                double eps, double gain_offset, bool gain_grads);
RotaryGradients rotary_backward_meta(const c10::optional<at::Tensor>& dq, const c10::optional<at::Tensor>& dk,
                                     const c10::optional<at::Tensor>& q, const c10::optional<at::Tensor>& k,
                                     const c10::optional<at::Tensor>& cos, const c10::optional<at::Tensor>& sin,
                                     int64_t rotary_dims, bool interleaved, bool heads_first, int64_t norm,
                                     const c10::optional<at::Tensor>& q_gain, const c10::optional<at::Tensor>& k_gain,
                                     double eps, double gain_offset, bool gain_grads);

}  // namespace torch_fp8
