// The primitives on at::Tensor. The same functions are the dispatcher ops torch.ops.torch_fp8.* (csrc/register.cpp),
// where docstrings for every argument stand beside the schemas.
#pragma once

#include <tuple>
#include <utility>

#include <ATen/core/Tensor.h>

#include "torch_fp8/cast.h"

namespace torch_fp8 {

struct QuantizeOptions {
  bool own_amax = false;      // scale by x's own amax (two passes) instead of the slot's scale
  bool power_of_two = false;  // with own_amax or recast: round the scale down to a power of two
  int64_t margin = 0;         // with own_amax or recast: binades left free above the amax
  bool record = true;         // raise the slot's amax to max |x|
  bool rowwise = true;        // give q
  bool columnwise = false;    // give q_t
  // Without own_amax: cast x again, as own_amax would, where its amax shows that the slot's scale is unfit (scale.h).
  // With record that amax is the slot's, which others may have raised in the same step.
  bool recast = false;
  c10::optional<at::ScalarType> dbias;  // give the column sums of x, in this dtype
};

struct Quantized : Codes {
  at::Tensor dbias;  // (K); 0 elements where not asked for
};

// x (..., K), seen as (M, K), is cast to dtype (Float8_e4m3fn or Float8_e5m2) with slots[role].
Quantized quantize(const at::Tensor& x, const at::Tensor& slots, int64_t role, at::ScalarType dtype,
                   const QuantizeOptions& options);

// The same, with undefined tensors for what was not asked for.
Quantized quantize_only(const at::Tensor& x, const at::Tensor& slots, int64_t role, at::ScalarType dtype,
                        const QuantizeOptions& options);

// Two tensors that a layer casts at a time: in one launch where both are small. Without dbias.
struct ToQuantize {
  const at::Tensor &x, &slots;
  int64_t role;
  at::ScalarType dtype;
  QuantizeOptions options;
};
std::pair<Quantized, Quantized> quantize_both(const ToQuantize& first, const ToQuantize& second);

// (pad16(K), pad16(M)), of contiguous FP8 codes (M, K).
at::Tensor transpose_codes(const at::Tensor& codes);

// What the cast of x with slots[role] (or by its own amax, as options says) loses: counts (4) int64 of saturated,
// flushed, infinite and NaN elements, and values (2) float32: the scale and the amax.
std::tuple<at::Tensor, at::Tensor> count_losses(const at::Tensor& x, const at::Tensor& slots, int64_t role,
                                                at::ScalarType dtype, const QuantizeOptions& options);

// out (size) = a . b^T * a_scale_inv * b_scale_inv [+ bias] [+ addend]; a (>= M, k), b (>= pad16(N), k) with M the
// product of size but its last entry and N the last; addend of out's shape and dtype.
at::Tensor gemm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& a_scale_inv, const at::Tensor& b_scale_inv,
                const c10::optional<at::Tensor>& bias, at::IntArrayRef size, at::ScalarType dtype, bool fast_accum,
                const c10::optional<at::Tensor>& addend = c10::nullopt);

// RMSNorm, or with layer_norm LayerNorm, of x (..., K) or of x + residual, in float32: norm * (gain + gain_offset) +
// bias -> y, the sum, q, q_t, scale_inv, stats. Codes are those of slots[role], cast as casts[role] (Cast::packed)
// says; history has one bit for each role that has one, training and record are those of the layer that reads the
// codes. Without slots there are no codes. stats are for norm_backward. What is not asked for comes with 0 elements.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_cast(
    const at::Tensor& x, const c10::optional<at::Tensor>& residual, const c10::optional<at::Tensor>& gain,
    const c10::optional<at::Tensor>& bias, double eps, bool layer_norm, double gain_offset,
    const c10::optional<at::Tensor>& slots, int64_t role, at::IntArrayRef casts, int64_t history, bool training,
    bool record, bool rowwise, bool columnwise, bool wants_y);

// -> dx + dsum, dgain, dbias of dy and of x, what was normalised: the sum, where there was a residual.
std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_backward(const at::Tensor& dy, const at::Tensor& x,
                                                             const c10::optional<at::Tensor>& dsum,
                                                             const c10::optional<at::Tensor>& gain,
                                                             const at::Tensor& stats, bool layer_norm,
                                                             double gain_offset, bool wants_dgain, bool wants_dbias);

// The same norm for frozen layers that read it -> y, the sum, and the codes of y as it was rounded, for frozen_linear
// and frozen_mlp: q (M, pad16(K)) and scale (M), by row or, with an input_slot (1, 4), by that, when scale has 0
// elements. Without codes both have 0 elements. Not differentiable. y counts its writes in inference mode too.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> frozen_norm(
    const at::Tensor& x, const c10::optional<at::Tensor>& residual, const c10::optional<at::Tensor>& gain,
    const c10::optional<at::Tensor>& bias, double eps, bool layer_norm, double gain_offset,
    const c10::optional<at::Tensor>& input_slot, bool codes = true);

// How the input of a frozen layer is quantised.
enum class Activations : uint8_t { kNone, kStatic, kTensor, kToken };

// y (..., N) = x (..., K) . (weight * weight_scale)^T + bias. weight (N, K) float8_e4m3fn;
// weight_scale float32: one, (N, 1), or (ceil(N / 128), ceil(K / 128)); input_slot (1, 4) float32 {scale_inv, scale, -,
// -} for kStatic. Which x are quantised: is_input_quantized (csrc/ops/frozen_route.h) says it. x_codes (M, pad16(K)),
// where they are given, are those that would be made of x: by row with x_scale (M), or by the slot without. They are
// read where x would be quantised; the gradient knows nothing of them.
at::Tensor frozen_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                         const c10::optional<at::Tensor>& bias, const c10::optional<at::Tensor>& input_slot,
                         int64_t activations, c10::optional<at::ScalarType> dtype,
                         const c10::optional<at::Tensor>& x_codes = c10::nullopt,
                         const c10::optional<at::Tensor>& x_scale = c10::nullopt);

// y (..., N) = down(f(gate(x)) * up(x)) or, of two layers, down(f(up(x))), each layer as frozen_linear computes it; f:
// activation_cast's activation, but 3. weights, weight_scales, biases and input_slots are those of gate, up and down,
// or of up and down; a first of two layers with twice down's inputs is gate and, behind it, up, or with up_first up and
// then gate. Where down quantises by row or by its slot, the product is cast as it is made, never rounded to 16 bits.
// x_codes and x_scale are for the layers that read x. Not differentiable.
at::Tensor frozen_mlp(const at::Tensor& x, at::TensorList weights, at::TensorList weight_scales,
                      const c10::List<c10::optional<at::Tensor>>& biases,
                      const c10::List<c10::optional<at::Tensor>>& input_slots, int64_t activation, int64_t activations,
                      c10::optional<at::ScalarType> dtype, const c10::optional<at::Tensor>& x_codes = c10::nullopt,
                      const c10::optional<at::Tensor>& x_scale = c10::nullopt, bool up_first = false);

// y (rows, N) of x (rows, K): rows offsets[e] to offsets[e + 1] by weight[e] and the rest of expert e, as frozen_linear
// has it; rows behind offsets[E] are zero. offsets (E + 1) int64 on the CPU; weight (E, N, K) float8_e4m3fn; bias (E,
// N); input_slot (E, 4). The N outputs are in equal parts (a gate above what it gates: 2), each with scales of its own:
// weight_scale float32 (E, parts), (E, N, 1), or (E, parts * ceil(N / parts / 128), ceil(K / 128)).
at::Tensor frozen_experts(const at::Tensor& x, const at::Tensor& offsets, const at::Tensor& weight,
                          const at::Tensor& weight_scale, const c10::optional<at::Tensor>& bias,
                          const c10::optional<at::Tensor>& input_slot, int64_t activations, int64_t parts,
                          c10::optional<at::ScalarType> dtype);

// The gradient of its input, of x_dtype.
at::Tensor frozen_experts_backward(const at::Tensor& dy, const at::Tensor& offsets, const at::Tensor& weight,
                                   const at::Tensor& weight_scale, int64_t activations, int64_t parts,
                                   at::ScalarType x_dtype);

// The gradient of its input: dx (..., K) of x_dtype = dy (..., N) . (weight * weight_scale). dy is quantised by row
// where way_of_gradient (csrc/ops/frozen_route.h) says it.
at::Tensor frozen_linear_backward(const at::Tensor& dy, const at::Tensor& weight, const at::Tensor& weight_scale,
                                  int64_t activations, at::ScalarType x_dtype);

// out (..., N) += a . b^T * a_scale_inv * b_scale_inv; out float32 or bfloat16, contiguous.
void gemm_accumulate_(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, const at::Tensor& a_scale_inv,
                      const at::Tensor& b_scale_inv, bool fast_accum);

// One scaling update of many layers: slots (R, 4), histories (R, length), a target for each of a layer's R roles, and a
// power_of_two for each role or each layer: 0 of exact scales, else 1 + the margin that the target has. Layers may
// differ in R: a linear layer has 3.
void update_scales_(at::TensorList slots, at::TensorList histories, at::ArrayRef<double> targets,
                    at::IntArrayRef power_of_two);

}  // namespace torch_fp8
