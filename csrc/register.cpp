// The table of contents: every op's schema, and where it runs.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "kernels.h"
#include "ops/attention.h"
#include "ops/linear.h"
#include "ops/producers.h"
#include "ops/rotary.h"
#include "torch_fp8/ops.h"

namespace torch_fp8 {

// csrc/ops/meta.cpp: shapes and dtypes of the results, for tracing.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantize_meta(
    const at::Tensor& x, const at::Tensor& slots, int64_t role, at::ScalarType dtype, bool own_amax, bool power_of_two,
    int64_t margin, bool record, bool rowwise, bool columnwise, c10::optional<at::ScalarType> dbias, bool recast);
at::Tensor gemm_meta(const at::Tensor& a, const at::Tensor& b, const at::Tensor& a_scale_inv,
                     const at::Tensor& b_scale_inv, const c10::optional<at::Tensor>& bias, c10::SymIntArrayRef size,
                     at::ScalarType dtype, bool fast_accum, const c10::optional<at::Tensor>& addend);
void gemm_accumulate_meta(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
                          const at::Tensor& a_scale_inv, const at::Tensor& b_scale_inv, bool fast_accum);
// csrc/ops/frozen.cpp: the same, and all that can be checked of them.
at::Tensor frozen_linear_meta(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                              const c10::optional<at::Tensor>& bias, const c10::optional<at::Tensor>& input_slot,
                              int64_t activations, c10::optional<at::ScalarType> dtype,
                              const c10::optional<at::Tensor>& x_codes, const c10::optional<at::Tensor>& x_scale);
at::Tensor frozen_mlp_meta(const at::Tensor& x, at::TensorList weights, at::TensorList weight_scales,
                           const c10::List<c10::optional<at::Tensor>>& biases,
                           const c10::List<c10::optional<at::Tensor>>& input_slots, int64_t activation,
                           int64_t activations, c10::optional<at::ScalarType> dtype,
                           const c10::optional<at::Tensor>& x_codes, const c10::optional<at::Tensor>& x_scale,
                           bool up_first);
at::Tensor frozen_linear_backward_meta(const at::Tensor& dy, const at::Tensor& weight, const at::Tensor& weight_scale,
                                       int64_t activations, at::ScalarType x_dtype);
// csrc/frozen_autograd.cpp
at::Tensor frozen_linear_autograd(c10::DispatchKeySet keys, const at::Tensor& x, const at::Tensor& weight,
                                  const at::Tensor& weight_scale, const c10::optional<at::Tensor>& bias,
                                  const c10::optional<at::Tensor>& input_slot, int64_t activations,
                                  c10::optional<at::ScalarType> dtype, const c10::optional<at::Tensor>& x_codes,
                                  const c10::optional<at::Tensor>& x_scale);
at::Tensor frozen_mlp_autograd(c10::DispatchKeySet keys, const at::Tensor& x, at::TensorList weights,
                               at::TensorList weight_scales, const c10::List<c10::optional<at::Tensor>>& biases,
                               const c10::List<c10::optional<at::Tensor>>& input_slots, int64_t activation,
                               int64_t activations, c10::optional<at::ScalarType> dtype,
                               const c10::optional<at::Tensor>& x_codes, const c10::optional<at::Tensor>& x_scale,
                               bool up_first);

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantize_op(
    const at::Tensor& x, const at::Tensor& slots, int64_t role, at::ScalarType dtype, bool own_amax, bool power_of_two,
    int64_t margin, bool record, bool rowwise, bool columnwise, c10::optional<at::ScalarType> dbias, bool recast) {
  QuantizeOptions options{own_amax, power_of_two, margin, record, rowwise, columnwise, recast, dbias};
  Quantized out = quantize(x, slots, role, dtype, options);
  return {std::move(out.q), std::move(out.q_t), std::move(out.scale_inv), std::move(out.dbias)};
}

std::tuple<at::Tensor, at::Tensor> count_losses_op(const at::Tensor& x, const at::Tensor& slots, int64_t role,
                                                   at::ScalarType dtype, bool own_amax, bool power_of_two,
                                                   int64_t margin) {
  QuantizeOptions options;
  options.own_amax = own_amax, options.power_of_two = power_of_two, options.margin = margin;
  return count_losses(x, slots, role, dtype, options);
}

// One function serves both backends: it checks, allocates, and runs kernels of the tensors' device.
void implement(torch::Library& m) {
  m.impl("quantize", quantize_op);
  m.impl("count_losses", count_losses_op);
  m.impl("frozen_norm", frozen_norm);
  m.impl("frozen_linear", frozen_linear);
  m.impl("frozen_mlp", frozen_mlp);
  m.impl("frozen_experts", frozen_experts);
  m.impl("frozen_experts_backward", frozen_experts_backward);
  m.impl("frozen_linear_backward", frozen_linear_backward);
  m.impl("cast", cast);
  m.impl("linear_forward", linear_forward);
  m.impl("linear_backward", linear_backward);
  m.impl("activation_cast", activation_cast);
  m.impl("activation_backward_cast", activation_backward_cast);
  m.impl("rotary", rotary);
  m.impl("rotary_backward", rotary_backward);
  m.impl("attention", attention);
  m.impl("attention_forward", attention_forward);
  m.impl("attention_backward", attention_backward);
  m.impl("norm_cast", norm_cast);
  m.impl("norm_backward", norm_backward);
  m.impl("gemm", gemm);
  m.impl("gemm_accumulate_", gemm_accumulate_);
  m.impl("update_scales_", update_scales_);
}

}  // namespace

// The ops are not differentiable by themselves, but for frozen_linear and rotary; linear (linear.h) is the
// differentiable function over the others.
TORCH_LIBRARY(torch_fp8, m) {
  // x (..., K) float32, float16 or bfloat16, any strides, seen as (M, K).
  // -> q (pad16(M), pad16(K)), q_t its transpose, scale_inv (1) float32, dbias (K): the column sums of x.
  // What is not asked for comes with 0 elements. slots (roles, 4) float32 {scale_inv, scale, amax, cursor}: the role's
  // scale is read and, with record, its amax raised to max |x|. own_amax: scale by x's own amax, in two passes, to
  // fp8_max / 2^margin. recast: where the amax that was recorded (without record, that of x) shows the slot's scale to
  // be unfit, what was cast is cast again, by that amax; with own_amax it means nothing.
  m.def(
      "quantize(Tensor x, Tensor(a!) slots, int role, ScalarType dtype, *, bool own_amax=False, "
      "bool power_of_two=False, int margin=0, bool record=True, bool rowwise=True, bool columnwise=False, "
      "ScalarType? dbias=None, bool recast=False) -> (Tensor q, Tensor q_t, Tensor scale_inv, Tensor dbias)");

  // What that cast of x loses: counts (4) int64 of finite elements that saturate, elements that become zero,
  // are Inf, are NaN; and values (2) float32: its scale, and the amax of x.
  m.def(
      "count_losses(Tensor x, Tensor slots, int role, ScalarType dtype, *, bool own_amax=False, "
      "bool power_of_two=False, int margin=0) -> (Tensor counts, Tensor values)");

  // out (size) = a . b^T * a_scale_inv * b_scale_inv + bias + addend. a (>= M, k), b (>= pad16(N), k) FP8, contiguous
  // along k, a multiple of 16; M is the product of size but its last entry, N the last; not both E5M2. dtype, bias and
  // addend (size): float32, float16 or bfloat16.
  m.def(
      "gemm(Tensor a, Tensor b, Tensor a_scale_inv, Tensor b_scale_inv, Tensor? bias, SymInt[] size, "
      "ScalarType dtype, bool fast_accum=False, Tensor? addend=None) -> Tensor");

  // y (..., N) = x (..., K) . weight (N, K)^T + bias, and of the codes made here those that backward needs; a result
  // that nobody needs, or that was given, comes with 0 elements. x_codes, weight_codes: empty, or {q, q_t, scale_inv}
  // made before. slots (3, 4), casts and history (one bit a role that has an amax history) of input, weight and output
  // gradient; a packed cast is margin << 4 | scaling (0 delayed, 1 current, 2 constant) << 2 | power_of_two << 1 |
  // E5M2. fp8, fast_accum: of fprop, dgrad and wgrad. training: delayed scales of weight and gradient come from their
  // history; else from their own amax. grad_x, grad_weight: which gradients are wanted. gathered: give no codes of the
  // weight, backward gets the weight itself. autocast: the dtype of y, where that is not x's. residual (..., N) of y's
  // dtype is added, in the GEMM's own sum where the layout allows.
  m.def(
      "linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) slots, Tensor[] x_codes, Tensor[] "
      "weight_codes, "
      "int[] casts, int history, bool[3] fp8, bool[3] fast_accum, bool training, bool record, bool grad_x, "
      "bool grad_weight, bool gathered, ScalarType? autocast=None, Tensor? residual=None) -> (Tensor y, Tensor x_t, "
      "Tensor x_scale_inv, Tensor weight_t, Tensor weight_scale_inv)");

  // What linear_forward does with one of its tensors: the codes of x as the layer casts that role.
  m.def(
      "cast(Tensor x, Tensor(a!) slots, int role, int[] casts, int history, bool training, bool record, bool rowwise, "
      "bool columnwise) -> (Tensor q, Tensor q_t, Tensor scale_inv)");

  // dx (..., K), dweight (N, K) and dbias (N) of dy (..., N), as far as they are wanted. dy_codes: empty, or {q, q_t,
  // scale_inv} made before, q_t or a tensor of one dimension, where it is made of q; of dy then nothing is read but its
  // size and dtype. x: the input, where wgrad runs in 16 bits; weight: where dgrad does, or no codes of it were kept.
  // main_grad (N, K) float32 or bfloat16: the weight's gradient is added to it, and dweight is empty or, with
  // dummy_grad, has no meaning. dx_sum (..., K) likewise for dx.
  m.def(
      "linear_backward(Tensor dy, Tensor[] dy_codes, Tensor? x_t, Tensor? x_scale_inv, Tensor? weight_t, Tensor? "
      "weight_scale_inv, "
      "Tensor? x, Tensor? weight, Tensor(a!) slots, Tensor(b!)? main_grad, Tensor(c!)? dx_sum, int[] casts, int "
      "history, "
      "bool[3] fp8, bool[3] fast_accum, bool training, bool record, bool grad_x, bool grad_weight, ScalarType? dbias, "
      "SymInt in_features, ScalarType x_dtype, ScalarType weight_dtype, bool dummy_grad=False) -> (Tensor dx, "
      "Tensor dweight, Tensor dbias)");

  // f(gate), or f(gate) * up, all (..., K) of one dtype, computed in float32 and cast to E4M3 as a layer casts that
  // role: arguments and results are those of cast. activation: 0 silu, 1 gelu, 2 gelu by tanh, 3 xielu, 4 relu squared.
  // xielu alone has alphas (2) float32 and beta: alpha_p x^2 + beta x where x > 0, else alpha_n (e^x - 1 - x) + beta x.
  // alphas are these two factors and not the parameters that they are made of: torch.cat([softplus(p), beta +
  // softplus(n)]), as arXiv 2411.13010 and transformers' XIELUActivation have it. halves: 0, gate is that alone; 1,
  // gate (..., 2 K) is gate and, behind it, up, which is left out; 2, it is up and, behind it, gate.
  m.def(
      "activation_cast(Tensor gate, Tensor? up, int activation, Tensor(a!) slots, int role, int[] casts, int history, "
      "bool training, bool record, bool rowwise, bool columnwise, Tensor? alphas=None, float beta=0.5, int halves=0) "
      "-> (Tensor q, Tensor q_t, Tensor scale_inv)");

  // The gradients of gate, dy * up * f'(gate), and of up, dy * f(gate), cast so for the layers that made the two: their
  // slots, one list of casts, the history of each. dbias, where given, asks for the column sums of the two gradients,
  // in that dtype: the gradients of those layers' biases. dalphas (2) float32: the gradients of alphas. What was not
  // asked for, and what belongs to an up or to alphas that are not there, comes with 0 elements. By halves one layer
  // made both: what is given and returned of gate is of the two gradients side by side, (..., 2 K), in that order, with
  // one scale and one amax.
  m.def(
      "activation_backward_cast(Tensor dy, Tensor gate, Tensor? up, int activation, Tensor(a!) gate_slots, "
      "Tensor(b!)? up_slots, int role, int[] casts, int[] histories, bool training, bool record, "
      "ScalarType? dbias=None, Tensor? alphas=None, float beta=0.5, bool columnwise=True, int halves=0) -> (Tensor "
      "gate_q, Tensor gate_q_t, Tensor gate_scale_inv, Tensor up_q, Tensor up_q_t, Tensor up_scale_inv, Tensor "
      "gate_dbias, Tensor up_dbias, Tensor dalphas)");

  // q (B, S, Hq, D) and k (B, S, Hk, D) or, heads_first, (B, Hq, S, D) and (B, Hk, S, D): each head normalised, and
  // then its pairs of elements turned, (x1 c - x2 s, x2 c + x1 s), in float32 and rounded once. Differentiable in q, k
  // and the gains. cos, sin ([B or 1,] S, R / 2) have one column for each pair or, as transformers gives them, (.., R)
  // for each element; R is rotary_dims <= D, elements behind it are not turned. A pair is elements i and i + R / 2 or,
  // interleaved, 2 i and 2 i + 1. norm: 0 none; 1 x / sqrt(mean(x^2) + eps) * (gain (D) + gain_offset), or without the
  // factor; 2 tanh(gain (1) x). Results lie in memory as (B, S, H, D) does, whatever the inputs' strides.
  m.def(
      "rotary(Tensor q, Tensor k, Tensor? cos, Tensor? sin, int rotary_dims, bool interleaved=False, "
      "bool heads_first=False, int norm=0, Tensor? q_gain=None, Tensor? k_gain=None, float eps=1e-6, "
      "float gain_offset=0.0) -> (Tensor q_out, Tensor k_out)");

  // Its gradients: the transposed map, whatever cos and sin are, and then the norm's. dq or dk may be missing, q and k
  // where there is no norm; what belongs to a missing one, or was not asked for, comes with 0 elements.
  m.def(
      "rotary_backward(Tensor? dq, Tensor? dk, Tensor? q, Tensor? k, Tensor? cos, Tensor? sin, int rotary_dims, "
      "bool interleaved, bool heads_first, int norm, Tensor? q_gain, Tensor? k_gain, float eps, float gain_offset, "
      "bool gain_grads) -> (Tensor dq_in, Tensor dk_in, Tensor dq_gain, Tensor dk_gain)");

  // y (B, H, S, D) = softmax(scale * q k^T) v with QK^T and PV in FP8, differentiable in q, k and v: q (B, H, S, D), k,
  // v (B, Hk, T, D) bfloat16 or float16, H a multiple of Hk; y lies in memory as (B, S, H, D). slots (10, 4), casts and
  // history (one bit a role that has an amax history) of q, k, v, P, o, and the gradients of o, P, q, k, v; casts,
  // training and record as in linear_forward. grad_slots: the tensor over slots' memory that backward records in.
  // causal: query i sees keys 0 ... i. shared_scale: k and v are cast as q is, with its slot. fp8_backward: the
  // gradient's five products in FP8 too, D 128 alone; else in 16 bits, of the numbers that the codes are. expand: in
  // FP8 each query head has keys and values of its own, whose gradients are summed.
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor(a!) slots, Tensor grad_slots, int[] casts, int history, "
      "bool training, bool record, bool causal, float scale, bool shared_scale, bool fp8_backward, bool expand) -> "
      "Tensor");

  // Its forward, with what the gradient needs: codes (B, S, H, D), each call's scales (10, 4), and lse (B, H, S)
  // float32, the natural logarithm of each row's sum of exp(scale * q k^T).
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor(a!) slots, int[] casts, int history, bool training, "
      "bool record, bool causal, float scale, bool shared_scale) -> (Tensor y, Tensor q_codes, Tensor k_codes, "
      "Tensor v_codes, Tensor o_codes, Tensor scales, Tensor lse)");

  // Its gradients, of dy's dtype; fp8 and expand as fp8_backward and expand above.
  m.def(
      "attention_backward(Tensor dy, Tensor q_codes, Tensor k_codes, Tensor v_codes, Tensor o_codes, Tensor scales, "
      "Tensor lse, Tensor(a!) slots, int[] casts, int history, bool training, bool record, bool causal, float scale, "
      "bool fp8, bool expand) -> (Tensor dq, Tensor dk, Tensor dv)");

  // RMSNorm, or with layer_norm LayerNorm, of x (..., K) or of x + residual, computed in float32:
  // y = norm * (gain + gain_offset) + bias. gain and bias (K) of x's dtype or float32; without a gain its place is
  // taken by 1, whatever the offset. The sum is rounded to x's dtype, and it is the rounded one that is normalised.
  // -> y and the sum in x's dtype; y as codes, with the arguments and results of cast, or without slots none; and what
  // norm_backward needs: stats float32, rstd (M) or, with layer_norm, mean and rstd (2, M). y that is not wanted, and a
  // sum without a residual, come with 0 elements.
  m.def(
      "norm_cast(Tensor x, Tensor? residual, Tensor? gain, Tensor? bias, float eps, bool layer_norm, "
      "float gain_offset, Tensor(a!)? slots, int role, int[] casts, int history, bool training, bool record, "
      "bool rowwise, bool columnwise, bool wants_y) -> (Tensor y, Tensor sum, Tensor q, Tensor q_t, Tensor scale_inv, "
      "Tensor stats)");

  // Of x, what was normalised, and dy (..., K): dx, to which dsum is added, the gradient that reached the sum by its
  // other ways; and dgain and dbias (K) in gain's dtype, or x's, or with 0 elements where not wanted.
  m.def(
      "norm_backward(Tensor dy, Tensor x, Tensor? dsum, Tensor? gain, Tensor stats, bool layer_norm, "
      "float gain_offset, bool wants_dgain, bool wants_dbias) -> (Tensor dx, Tensor dgain, Tensor dbias)");

  // The norm of norm_cast for frozen layers that read it: y, the sum, and the codes of y as it was rounded, which
  // frozen_linear and frozen_mlp take: q (M, pad16(K)) float8_e4m3fn and scale (M), the multipliers, each row by its
  // own amax; or by input_slot (1, 4), when scale has 0 elements. Without codes, which few rows are not read as, both
  // have 0 elements. y counts its writes in inference mode, too.
  m.def(
      "frozen_norm(Tensor x, Tensor? residual, Tensor? gain, Tensor? bias, float eps, bool layer_norm, "
      "float gain_offset, Tensor? input_slot=None, bool codes=True) -> (Tensor y, Tensor sum, Tensor q, Tensor scale)");

  // y (..., N) = x (..., K) . (weight * weight_scale)^T + bias, differentiable in x. weight (N, K) float8_e4m3fn;
  // weight_scale float32 of 1 element, (N, 1), or (ceil(N / 128), ceil(K / 128)). activations, how x is quantised: 0
  // not at all, 1 with input_slot (1, 4) {scale_inv, scale, -, -}, 2 by its own amax, 3 each row by its own amax or,
  // where weight_scale is a grid of blocks, each 128 columns of a row. Few rows are never quantised, nor with a grid of
  // blocks what is not 3 (is_input_quantized in ops/frozen_route.h). x, bias, dtype: bfloat16, float16 or float32.
  // x_codes (M, pad16(K)) float8_e4m3fn, where they are given, are those that would be made of x: with x_scale (M), the
  // multipliers, by row; without by input_slot. Where x would not be quantised they are not read, nor for a gradient.
  m.def(
      "frozen_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? input_slot, int activations, "
      "ScalarType? dtype=None, Tensor? x_codes=None, Tensor? x_scale=None) -> Tensor");

  // y (..., N) = down(f(gate(x)) * up(x)) or, of two layers, down(f(up(x))), each layer as frozen_linear computes it.
  // f: activation_cast's activation, but 3. The lists are of gate, up and down, or of up and down; a first of two
  // layers with twice down's inputs is gate and, behind it, up, or with up_first up and, behind it, gate. Where down
  // quantises more than few rows by row or by its slot, and has no grid of blocks, the product is cast as it is made,
  // never rounded to 16 bits; gate and up cast x once where both would make the same codes. x_codes and x_scale are
  // frozen_linear's, for the layers that read x.
  m.def(
      "frozen_mlp(Tensor x, Tensor[] weights, Tensor[] weight_scales, Tensor?[] biases, Tensor?[] input_slots, "
      "int activation, int activations, ScalarType? dtype=None, Tensor? x_codes=None, Tensor? x_scale=None, "
      "bool up_first=False) -> Tensor");

  // y (rows, N) of x (rows, K), whose rows are sorted by expert: rows offsets[e] to offsets[e + 1] are multiplied with
  // weight[e] as frozen_linear does, rows behind offsets[E] are zero. offsets (E + 1) int64, on the CPU whatever the
  // device of the others, since the host must know how many rows an expert has. weight (E, N, K), bias (E, N),
  // input_slot (E, 4). The N outputs are in equal parts (gate and up: 2), each with scales of its own: weight_scale (E,
  // parts), (E, N, 1), or (E, parts * ceil(N / parts / 128), ceil(K / 128)). Differentiable in x. The fakes of these
  // two and the gradient are in layers/experts.py.
  m.def(
      "frozen_experts(Tensor x, Tensor offsets, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? input_slot, "
      "int activations, int parts=1, ScalarType? dtype=None) -> Tensor");

  // dx (rows, K) of x_dtype, the gradient of frozen_experts' x: of its own arguments and dy (rows, N).
  m.def(
      "frozen_experts_backward(Tensor dy, Tensor offsets, Tensor weight, Tensor weight_scale, int activations, "
      "int parts, ScalarType x_dtype) -> Tensor");

  // dx (..., K) of x_dtype = dy (..., N) . (weight * weight_scale), the gradient of frozen_linear's input: its own
  // arguments. More than 32 rows of dy are quantised, each by its own amax, where activations is not 0 and, with a grid
  // of blocks, N is a multiple of 128 (way_of_gradient in ops/frozen_route.h).
  m.def(
      "frozen_linear_backward(Tensor dy, Tensor weight, Tensor weight_scale, int activations, ScalarType x_dtype) -> "
      "Tensor");

  // out (..., N) float32 or bfloat16 += a . b^T * a_scale_inv * b_scale_inv
  m.def(
      "gemm_accumulate_(Tensor(a!) out, Tensor a, Tensor b, Tensor a_scale_inv, Tensor b_scale_inv, "
      "bool fast_accum=False) -> ()");

  // One scaling update: for each layer slots (R, 4) and history (R, length), for each role a target fp8_max / 2^margin,
  // and for each role, or for each layer, whether (1) or not (0) scales are powers of two. A role that recorded nothing
  // keeps its scale and history. At most two launches, whatever the number of layers.
  m.def("update_scales_(Tensor(a!)[] slots, Tensor(b!)[] histories, float[] targets, int[] power_of_two) -> ()");
}

TORCH_LIBRARY_IMPL(torch_fp8, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(torch_fp8, CUDA, m) { implement(m); }
// Of no use there: the function refuses such an input in words, where the dispatcher would say that an op is missing.
TORCH_LIBRARY_IMPL(torch_fp8, NestedTensorCPU, m) { m.impl("frozen_linear", frozen_linear); }
TORCH_LIBRARY_IMPL(torch_fp8, NestedTensorCUDA, m) { m.impl("frozen_linear", frozen_linear); }
TORCH_LIBRARY_IMPL(torch_fp8, SparseCPU, m) { m.impl("frozen_linear", frozen_linear); }
TORCH_LIBRARY_IMPL(torch_fp8, SparseCUDA, m) { m.impl("frozen_linear", frozen_linear); }
TORCH_LIBRARY_IMPL(torch_fp8, Autograd, m) {
  for (const char* name :
       {"quantize", "count_losses", "gemm", "gemm_accumulate_", "cast", "linear_forward", "linear_backward",
        "frozen_linear_backward", "activation_cast", "activation_backward_cast", "norm_cast", "norm_backward",
        "frozen_norm", "rotary_backward", "attention_forward", "attention_backward", "update_scales_"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
  m.impl("frozen_linear", frozen_linear_autograd);
  m.impl("frozen_mlp", frozen_mlp_autograd);
  m.impl("rotary", rotary_autograd);
  m.impl("attention", attention_autograd);
}
TORCH_LIBRARY_IMPL(torch_fp8, Meta, m) {
  m.impl("quantize", quantize_meta);
  m.impl("count_losses", [](const at::Tensor& x, const at::Tensor&, int64_t, at::ScalarType, bool, bool, int64_t) {
    return std::tuple(at::empty({kLosses}, x.options().dtype(at::kLong)),
                      at::empty({2}, x.options().dtype(at::kFloat)));
  });
  m.impl("gemm", gemm_meta);
  m.impl("cast", cast_meta);
  m.impl("linear_forward", linear_forward_meta);
  m.impl("linear_backward", linear_backward_meta);
  m.impl("activation_cast", activation_cast_meta);
  m.impl("activation_backward_cast", activation_backward_cast_meta);
  m.impl("rotary", rotary_meta);
  m.impl("rotary_backward", rotary_backward_meta);
  m.impl("attention", attention_meta);
  m.impl("attention_forward", attention_forward_meta);
  m.impl("attention_backward", attention_backward_meta);
  m.impl("norm_cast", norm_cast_meta);
  m.impl("norm_backward", norm_backward_meta);
  m.impl("frozen_norm", frozen_norm_meta);
  m.impl("frozen_linear", frozen_linear_meta);
  m.impl("frozen_mlp", frozen_mlp_meta);
  m.impl("frozen_linear_backward", frozen_linear_backward_meta);
  m.impl("gemm_accumulate_", gemm_accumulate_meta);
  m.impl("update_scales_", [](at::TensorList, at::TensorList, at::ArrayRef<double>, at::IntArrayRef) {});
}

}  // namespace torch_fp8
