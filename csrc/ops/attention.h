// The two ops of an attention as functions; schemas in register.cpp, rules in attention.cpp.
#pragma once

#include "torch_fp8/attention.h"
#include "torch_fp8/ops.h"

namespace torch_fp8 {

// y (B, H, S, D); q_codes, k_codes, v_codes, o_codes, (B, S, H, D) each; scales (roles, 4), lse (B, H, S).
using AttentionForward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
AttentionForward attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                   const at::Tensor& slots, at::IntArrayRef casts, int64_t history, bool training,
                                   bool record, bool causal, double scale, bool shared_scale);
AttentionForward attention_forward_meta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                        const at::Tensor& slots, at::IntArrayRef casts, int64_t history, bool training,
                                        bool record, bool causal, double scale, bool shared_scale);

// dq, dk, dv, of the sizes of q, k, v.
using AttentionGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
AttentionGradients attention_backward(const at::Tensor& dy, const at::Tensor& q_codes, const at::Tensor& k_codes,
                                      const at::Tensor& v_codes, const at::Tensor& o_codes, const at::Tensor& scales,
                                      const at::Tensor& lse, const at::Tensor& slots, at::IntArrayRef casts,
                                      int64_t history, bool training, bool record, bool causal, double scale, bool fp8,
                                      bool expand);
AttentionGradients attention_backward_meta(const at::Tensor& dy, const at::Tensor& q_codes, const at::Tensor& k_codes,
                                           const at::Tensor& v_codes, const at::Tensor& o_codes,
                                           const at::Tensor& scales, const at::Tensor& lse, const at::Tensor& slots,
                                           at::IntArrayRef casts, int64_t history, bool training, bool record,
                                           bool causal, double scale, bool fp8, bool expand);

// The differentiable op over the two, registered with the dispatcher (csrc/attention_autograd.cpp); by itself it is
// attention_forward's y. grad_slots: the tensor over slots' memory that backward records in.
at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& slots,
                     const at::Tensor& grad_slots, at::IntArrayRef casts, int64_t history, bool training, bool record,
                     bool causal, double scale, bool shared_scale, bool fp8_backward, bool expand);
at::Tensor attention_meta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& slots,
                          const at::Tensor& grad_slots, at::IntArrayRef casts, int64_t history, bool training,
                          bool record, bool causal, double scale, bool shared_scale, bool fp8_backward, bool expand);
at::Tensor attention_autograd(c10::DispatchKeySet keys, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                              const at::Tensor& slots, const at::Tensor& grad_slots, at::IntArrayRef casts,
                              int64_t history, bool training, bool record, bool causal, double scale, bool shared_scale,
                              bool fp8_backward, bool expand);

}  // namespace torch_fp8
