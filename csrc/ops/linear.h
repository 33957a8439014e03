// The two ops of a linear layer as functions; schemas in register.cpp, rules in linear.cpp.
#pragma once

#include "torch_fp8/linear.h"

namespace torch_fp8 {

using Gemms = std::array<bool, 3>;  // fprop, dgrad, wgrad

// How a tensor is cast whose delayed scale, if it has one, holds now; neither layout is asked for.
QuantizeOptions how(const Cast& cast, bool has_scale, bool record);
// How a role of a layer is cast now (linear.cpp has the rule). casts: packed; history: one bit a role that has one.
QuantizeOptions how(at::IntArrayRef casts, int role, int64_t history, bool training, bool record);

// A tensor cast as the layer casts that role now. casts: packed; history: one bit a role that has one.
std::tuple<at::Tensor, at::Tensor, at::Tensor> cast(const at::Tensor& t, const at::Tensor& slots, int64_t role,
                                                    at::IntArrayRef casts, int64_t history, bool training, bool record,
                                                    bool rowwise, bool columnwise);
std::tuple<at::Tensor, at::Tensor, at::Tensor> cast_meta(const at::Tensor& t, const at::Tensor& slots, int64_t role,
                                                         at::IntArrayRef casts, int64_t history, bool training,
                                                         bool record, bool rowwise, bool columnwise);
// What a layer asks of its tensors, before anything is read or changed.
void check_layer(const at::Tensor& x, const at::Tensor& weight, const c10::optional<at::Tensor>& bias,
                 const at::Tensor& slots, c10::optional<at::ScalarType> autocast);
void check_residual(const at::Tensor& residual, const at::Tensor& x, const at::Tensor& weight,
                    c10::optional<at::ScalarType> autocast);

// The ops without the checks of arguments that linear() has made already, and with undefined tensors for what nobody
// asked for: what plain tensors come to in eager mode, where the host's time decides.
using ForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using BackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
ForwardResult forward_only(const at::Tensor& x, const at::Tensor& weight, const c10::optional<at::Tensor>& bias,
                           const at::Tensor& slots, at::TensorList x_codes, at::TensorList weight_codes,
                           at::IntArrayRef casts, int64_t history, Gemms fp8, Gemms fast_accum, bool training,
                           bool record, bool grad_x, bool grad_weight, bool gathered,
                           c10::optional<at::ScalarType> autocast, const c10::optional<at::Tensor>& residual);
BackwardResult backward_only(const at::Tensor& dy, at::TensorList dy_codes, const c10::optional<at::Tensor>& x_t,
                             const c10::optional<at::Tensor>& x_scale_inv, const c10::optional<at::Tensor>& weight_t,
                             const c10::optional<at::Tensor>& weight_scale_inv, const c10::optional<at::Tensor>& x,
                             const c10::optional<at::Tensor>& weight, const at::Tensor& slots,
                             const c10::optional<at::Tensor>& main_grad, const c10::optional<at::Tensor>& dx_sum,
                             at::IntArrayRef casts, int64_t history, Gemms fp8, Gemms fast_accum, bool training,
                             bool record, bool grad_x, bool grad_weight, c10::optional<at::ScalarType> dbias,
                             int64_t in_features, at::ScalarType x_dtype, at::ScalarType weight_dtype, bool dummy_grad);

// -> y, and the codes made here that backward needs: x_t, x_scale_inv, weight_t, weight_scale_inv; 0 elements where
// they were given or nobody needs them.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_forward(
    const at::Tensor& x, const at::Tensor& weight, const c10::optional<at::Tensor>& bias, const at::Tensor& slots,
    at::TensorList x_codes, at::TensorList weight_codes, at::IntArrayRef casts, int64_t history, Gemms fp8,
    Gemms fast_accum, bool training, bool record, bool grad_x, bool grad_weight, bool gathered,
    c10::optional<at::ScalarType> autocast, const c10::optional<at::Tensor>& residual);

// -> dx, dweight, dbias; 0 elements where nobody asked for it, or it was added to main_grad or dx_sum.
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward(
    const at::Tensor& dy, at::TensorList dy_codes, const c10::optional<at::Tensor>& x_t,
    const c10::optional<at::Tensor>& x_scale_inv, const c10::optional<at::Tensor>& weight_t,
    const c10::optional<at::Tensor>& weight_scale_inv, const c10::optional<at::Tensor>& x,
    const c10::optional<at::Tensor>& weight, const at::Tensor& slots, const c10::optional<at::Tensor>& main_grad,
    const c10::optional<at::Tensor>& dx_sum, at::IntArrayRef casts, int64_t history, Gemms fp8, Gemms fast_accum,
    bool training, bool record, bool grad_x, bool grad_weight, c10::optional<at::ScalarType> dbias, int64_t in_features,
    at::ScalarType x_dtype, at::ScalarType weight_dtype, bool dummy_grad);

// The same for tracing: shapes and dtypes, with symbolic sizes. Nothing is checked here: the ops do when a graph runs,
// in the words and types of eager mode.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_forward_meta(
    const at::Tensor& x, const at::Tensor& weight, const c10::optional<at::Tensor>& bias, const at::Tensor& slots,
    at::TensorList x_codes, at::TensorList weight_codes, at::IntArrayRef casts, int64_t history, Gemms fp8,
    Gemms fast_accum, bool training, bool record, bool grad_x, bool grad_weight, bool gathered,
    c10::optional<at::ScalarType> autocast, const c10::optional<at::Tensor>& residual);
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward_meta(
    const at::Tensor& dy, at::TensorList dy_codes, const c10::optional<at::Tensor>& x_t,
    const c10::optional<at::Tensor>& x_scale_inv, const c10::optional<at::Tensor>& weight_t,
    const c10::optional<at::Tensor>& weight_scale_inv, const c10::optional<at::Tensor>& x,
    const c10::optional<at::Tensor>& weight, const at::Tensor& slots, const c10::optional<at::Tensor>& main_grad,
    const c10::optional<at::Tensor>& dx_sum, at::IntArrayRef casts, int64_t history, Gemms fp8, Gemms fast_accum,
    bool training, bool record, bool grad_x, bool grad_weight, c10::optional<at::ScalarType> dbias,
    c10::SymInt in_features, at::ScalarType x_dtype, at::ScalarType weight_dtype, bool dummy_grad);

// f(gate) or f(gate) * up cast for the role of the layer that reads it, and the two gradients cast for the layers that
// made gate and up (activation.cpp), or for the one that made both. histories: of those two.
std::tuple<at::Tensor, at::Tensor, at::Tensor> activation_cast(
    const at::Tensor& gate, const c10::optional<at::Tensor>& up, int64_t activation, const at::Tensor& slots,
    int64_t role, at::IntArrayRef casts, int64_t history, bool training, bool record, bool rowwise, bool columnwise,
    const c10::optional<at::Tensor>& alphas, double beta, int64_t halves);
std::tuple<at::Tensor, at::Tensor, at::Tensor> activation_cast_meta(
    const at::Tensor& gate, const c10::optional<at::Tensor>& up, int64_t activation, const at::Tensor& slots,
    int64_t role, at::IntArrayRef casts, int64_t history, bool training, bool record, bool rowwise, bool columnwise,
    const c10::optional<at::Tensor>& alphas, double beta, int64_t halves);
using GradientCasts = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                 at::Tensor, at::Tensor>;
GradientCasts activation_backward_cast(const at::Tensor& dy, const at::Tensor& gate,
                                       const c10::optional<at::Tensor>& up, int64_t activation,
                                       const at::Tensor& gate_slots, const c10::optional<at::Tensor>& up_slots,
                                       int64_t role, at::IntArrayRef casts, at::IntArrayRef histories, bool training,
                                       bool record, c10::optional<at::ScalarType> dbias,
                                       const c10::optional<at::Tensor>& alphas, double beta, bool columnwise,
                                       int64_t halves);
GradientCasts activation_backward_cast_meta(const at::Tensor& dy, const at::Tensor& gate,
                                            const c10::optional<at::Tensor>& up, int64_t activation,
                                            const at::Tensor& gate_slots, const c10::optional<at::Tensor>& up_slots,
                                            int64_t role, at::IntArrayRef casts, at::IntArrayRef histories,
                                            bool training, bool record, c10::optional<at::ScalarType> dbias,
                                            const c10::optional<at::Tensor>& alphas, double beta, bool columnwise,
                                            int64_t halves);

}  // namespace torch_fp8
