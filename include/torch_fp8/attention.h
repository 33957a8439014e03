// Attention with QK^T and PV in FP8 (arXiv 2505.20524), and its gradient in FP8 or in 16 bits.
#pragma once

#include <memory>

#include "torch_fp8/linear.h"

namespace torch_fp8 {

struct AttentionOptions {
  LinearOptions recipe;       // forward roles are cast as inputs, gradients as output gradients; q and k by powers of 2
  double p_scale = 256;       // the constant scale of P, a power of two; 0: P is scaled as the other roles are
  bool shared_scale = false;  // one scale for q, k and v, that of q's slot

  Cast cast(AttentionRole role) const;
};

// The backward pass in 16 bits differentiates what forward computed: it reads the numbers that q, k, v and the result
// are as codes.
enum class AttentionMode : uint8_t { kFp8Forward, kFp8 };
// The largest head that FP8 takes forward, and the only one that it takes backward. dims are multiples of 16.
constexpr int64_t kAttentionDims = 256, kAttentionBackwardDims = 128;

// The slots of a new attention: (kAttentionRoles, 4) float32 with scale 1, or 2^bias for constant scaling; P's has
// p_scale, unless that is 0.
at::Tensor new_attention_slots(c10::Device device, double p_scale = 256, int64_t bias = 0, int64_t grad_bias = 0);

// What the host remembers of it. end_step is called after every scaling update.
std::shared_ptr<LayerMemo> new_attention_memo(const AttentionOptions& options);
void end_step(LayerMemo& memo);

// softmax(scale * q k^T) v, (B, H, S, D) of q's dtype, for q (B, H, S, D), k and v (B, Hk, T, D), bfloat16 or float16,
// any strides (fastest where they lie in memory as (B, S, H, D) does, as the result will). H is a multiple of Hk.
// causal: query i sees keys 0 ... i. scale: 1 / sqrt(D) unless given. D is a multiple of 16 up to kAttentionDims; with
// kFp8, where a gradient is wanted, kAttentionBackwardDims. expand: in kFp8's backward each query head has keys and
// values of its own, whose gradients are summed; faster for long sequences.
at::Tensor scaled_dot_product_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                        const at::Tensor& slots, const AttentionOptions& options,
                                        const std::shared_ptr<LayerMemo>& memo, bool training, bool causal,
                                        c10::optional<double> scale = c10::nullopt,
                                        AttentionMode mode = AttentionMode::kFp8Forward, bool expand = false);

}  // namespace torch_fp8
