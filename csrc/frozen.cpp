// frozen_linear: a linear layer whose weight is stored in FP8. Checks, and which of four ways a product goes.
#include <algorithm>

#include <c10/core/DeviceGuard.h>

#include "check.h"
#include "torch_fp8/ops.h"

namespace torch_fp8 {
namespace {

constexpr int64_t kWide = 8192;

// cuBLASLt has no algorithm with vectors of scales that splits k. Where the output has so few rows, or so few tiles of
// 128 x 128 that they leave multiprocessors idle, its product without scales and our rescaling are faster.
bool is_rescaled(int64_t m, int64_t n) { return m <= 32 || (m + 127) / 128 * ((n + 127) / 128) < 96; }

// Rows of x that the kernel for few rows takes where x is not quantised, kSkinnyRows at a time: after the first time
// the weight comes from the L2 cache, which is cheaper than to write it in 16 bits and read it again.
constexpr int64_t kStreamedRows = 32;

int64_t blocks(int64_t n) { return (n + kScaleBlock - 1) / kScaleBlock; }

WeightScale kind_of(const at::Tensor& scale, int64_t n, int64_t k) {
  TORCH_CHECK_TYPE(scale.scalar_type() == at::kFloat, "torch_fp8: weight_scale must be float32, got ",
                   scale.scalar_type());
  if (scale.numel() == 1) return WeightScale::kTensor;
  TORCH_CHECK(scale.is_contiguous(), "torch_fp8: weight_scale must be contiguous; use .contiguous()");
  if (scale.dim() == 2 && scale.size(0) == n && scale.size(1) == 1) return WeightScale::kChannel;
  TORCH_CHECK(scale.dim() == 2 && scale.size(0) == blocks(n) && scale.size(1) == blocks(k),
              "torch_fp8: weight_scale of a weight of shape [", n, ", ", k, "] must have one element or shape [", n,
              ", 1] or [", blocks(n), ", ", blocks(k), "], got ", scale.sizes());
  return WeightScale::kBlock;
}

void check_frozen(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                  const c10::optional<at::Tensor>& bias, const c10::optional<at::Tensor>& input_slot,
                  int64_t activations) {
  type_of(x.scalar_type(), "x");
  check_strided(x, "x");
  TORCH_CHECK_TYPE(weight.scalar_type() == at::kFloat8_e4m3fn, "torch_fp8: a frozen weight must be float8_e4m3fn, got ",
                   weight.scalar_type());
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(),
              "torch_fp8: a frozen weight must be a contiguous matrix (out_features, in_features), got ",
              weight.sizes(), " with strides ", weight.strides());
  check_input(x, weight);
  check_same_device(weight, "the weight", weight_scale, "weight_scale");
  TORCH_CHECK_VALUE(activations >= 0 && activations <= 3, "torch_fp8: activations must be 0, 1, 2 or 3, got ",
                    activations);
  if (static_cast<Activations>(activations) == Activations::kStatic) {
    TORCH_CHECK(input_slot, "torch_fp8: static activations need an input_slot; calibrate the model first");
    check_slots(*input_slot, 1);
    check_same_device(weight, "the weight", *input_slot, "input_slot");
  }
  if (bias) check_bias(*bias, weight);
}

// The weight in float32 (CPU, float32 inputs) or in x's 16 bits.
at::Tensor dequantized(const at::Tensor& weight, const at::Tensor& scale, WeightScale kind, at::ScalarType dtype) {
  at::Tensor out = at::empty(weight.sizes(), weight.options().dtype(dtype));
  (weight.is_cuda() ? cuda::dequantize : cpu::dequantize)(
      {weight.size(0), weight.size(1), static_cast<const uint8_t*>(weight.const_data_ptr()),
       scale.const_data_ptr<float>(), kind, out.data_ptr(), type_of(dtype, "x")});
  return out;
}

// As many columns more as FP8 GEMMs need, zero.
at::Tensor padded_codes(const at::Tensor& codes, int64_t rows, int64_t cols) {
  if (codes.size(0) == rows && codes.size(1) == cols) return codes;
  at::Tensor out = at::zeros({rows, cols}, codes.options().dtype(at::kByte));
  out.narrow(0, 0, codes.size(0)).narrow(1, 0, codes.size(1)).copy_(codes.view(at::kByte));
  return out.view(codes.scalar_type());
}

// x (M, K) by rows: codes, and a scale_inv for each.
std::pair<at::Tensor, at::Tensor> quantized_rows(const at::Tensor& x) {
  const int64_t m = x.size(0), k = x.size(1);
  at::Tensor q = at::empty({m, padded(k)}, x.options().dtype(at::kFloat8_e4m3fn));
  at::Tensor scale_inv = at::empty({m}, x.options().dtype(at::kFloat));
  const QuantizeRowsArgs args{{x.const_data_ptr(), type_of(x.scalar_type(), "x"), m, k, x.stride(0), x.stride(1)},
                              static_cast<uint8_t*>(q.data_ptr()),
                              scale_inv.data_ptr<float>()};
  (x.is_cuda() ? cuda::quantize_rows : cpu::quantize_rows)(args);
  return {q, scale_inv};
}

// x (M, K) by 128 columns of a row: codes (M', K) and scale_invs (K / 128, M'), where M' is M or a few rows more.
std::pair<at::Tensor, at::Tensor> quantized_groups(const at::Tensor& x) {
  const int64_t m = x.size(0), k = x.size(1), rows = (m + 3) / 4 * 4;
  at::Tensor q = at::empty({rows, k}, x.options().dtype(at::kFloat8_e4m3fn));
  at::Tensor scale_inv = at::empty({k / kScaleBlock, rows}, x.options().dtype(at::kFloat));
  const QuantizeGroupsArgs args{{x.const_data_ptr(), type_of(x.scalar_type(), "x"), m, k, x.stride(0), x.stride(1)},
                                rows,
                                static_cast<uint8_t*>(q.data_ptr()),
                                scale_inv.data_ptr<float>()};
  (x.is_cuda() ? cuda::quantize_groups : cpu::quantize_groups)(args);
  return {q, scale_inv};
}

// FP8 on both sides, with as many scales on the one as on the other: cuBLASLt mixes no modes but those of blocks.
at::Tensor quantized_product(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                             const c10::optional<at::Tensor>& bias, const c10::optional<at::Tensor>& input_slot,
                             WeightScale kind, Activations activations, at::ScalarType dtype) {
  const int64_t m = x.size(0), n = weight.size(0), k = weight.size(1), wide = padded(n);
  at::Tensor q, x_scale, w_scale = kind == WeightScale::kBlock ? weight_scale : weight_scale.reshape({-1});
  Scales scales = Scales::kOne;
  if (kind == WeightScale::kBlock) {
    std::tie(q, x_scale) = quantized_groups(x);
    scales = Scales::kBlocks;
    if (const int64_t missing = scale_stride(k) - w_scale.size(1)) {
      w_scale = at::constant_pad_nd(w_scale, {0, missing});
    }
  } else if (activations == Activations::kToken) {
    std::tie(q, x_scale) = quantized_rows(x);
  } else {
    QuantizeOptions options;
    options.record = false;
    options.own_amax = activations == Activations::kTensor;
    const at::Tensor slot = options.own_amax ? at::empty({1, 4}, weight_scale.options()) : *input_slot;
    Quantized quantized = quantize(x, slot, 0, at::kFloat8_e4m3fn, options);
    q = quantized.q, x_scale = quantized.scale_inv;
  }
  const bool by_rows = scales == Scales::kOne && (x_scale.numel() > 1 || w_scale.numel() > 1);
  // float32 adds its bias in rescaling, too: the epilogue has none of that type.
  const bool rescaled = by_rows && (is_rescaled(m, wide) || dtype == at::kFloat);
  if (by_rows && !rescaled) {
    scales = Scales::kRows;
    if (x_scale.numel() != m) x_scale = x_scale.expand({m}).contiguous();
    if (w_scale.numel() == 1) w_scale = w_scale.expand({wide}).contiguous();
    if (w_scale.numel() != wide) w_scale = at::constant_pad_nd(w_scale, {0, wide - n});
  }
  if (!is_aligned(w_scale.const_data_ptr())) w_scale = w_scale.clone();

  const at::Tensor w = padded_codes(weight, wide, q.size(1));
  const at::ScalarType sum_dtype = rescaled ? at::kFloat : dtype;
  const int64_t rows = scales == Scales::kBlocks ? q.size(0) : m;
  at::Tensor product = at::empty({rows, wide}, x.options().dtype(sum_dtype));
  GemmArgs args{};
  args.m = rows, args.n = wide, args.k = q.size(1);
  args.a = static_cast<const uint8_t*>(q.const_data_ptr()), args.b = static_cast<const uint8_t*>(w.const_data_ptr());
  args.out = product.data_ptr(), args.out_type = type_of(sum_dtype, "the output");
  args.fast_accum = scales != Scales::kBlocks;  // those add up each block in float32 anyway
  const auto gemm = x.is_cuda() ? cuda::gemm : cpu::gemm;
  if (rescaled) {
    gemm(args);
    at::Tensor out = at::empty({m, n}, x.options().dtype(dtype));
    (x.is_cuda() ? cuda::rescale : cpu::rescale)(
        {product.const_data_ptr<float>(), m, n, wide, x_scale.const_data_ptr<float>(), w_scale.const_data_ptr<float>(),
         x_scale.numel() == 1, w_scale.numel() == 1, bias ? bias->const_data_ptr() : nullptr, out.data_ptr(),
         type_of(dtype, "the output")});
    return out;
  }
  args.a_scale_inv = x_scale.const_data_ptr<float>(), args.b_scale_inv = w_scale.const_data_ptr<float>();
  args.scales = scales;
  at::Tensor epilogue;
  if (bias && dtype != at::kFloat) {
    epilogue = wide == n ? *bias : at::constant_pad_nd(*bias, {0, wide - n});
    if (!is_aligned(epilogue.const_data_ptr())) epilogue = epilogue.clone();
    args.bias = epilogue.const_data_ptr();
  }
  gemm(args);
  product = product.narrow(0, 0, m).narrow(1, 0, n);
  return bias && dtype == at::kFloat ? product.add_(*bias) : product;
}

// Whether x is quantised: few rows are not, since the time there is that of reading the weight, and wide outputs, which
// read much of it, have fewer such rows. To scales of blocks x brings groups of as many columns, or stays in 16 bits.
bool is_quantized(int64_t m, int64_t n, int64_t k, WeightScale kind, Activations activations) {
  if (m <= (n > kWide ? kSkinnyRows / 2 : kSkinnyRows)) return false;
  if (kind == WeightScale::kBlock) return activations == Activations::kToken && k % kScaleBlock == 0;
  return activations != Activations::kNone;
}

}  // namespace

at::Tensor frozen_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                         const c10::optional<at::Tensor>& bias_given, const c10::optional<at::Tensor>& input_slot,
                         int64_t activations, c10::optional<at::ScalarType> dtype_given) {
  check_frozen(x, weight, weight_scale, bias_given, input_slot, activations);
  const int64_t n = weight.size(0), k = weight.size(1), m = leading_size(x.sizes());
  const WeightScale kind = kind_of(weight_scale, n, k);
  const at::ScalarType dtype = dtype_given.value_or(x.scalar_type());
  type_of(dtype, "dtype");
  const c10::DeviceGuard guard(x.device());
  const NoAutocast no_autocast;

  std::vector<int64_t> size = x.sizes().vec();
  size.back() = n;
  c10::optional<at::Tensor> bias = bias_given;
  if (bias) bias = bias->to(dtype).contiguous();
  if (m == 0 || k == 0) {
    at::Tensor out = at::zeros(size, x.options().dtype(dtype));
    return bias ? out.add_(*bias) : out;
  }
  at::Tensor x2 = x.dim() == 2 ? x : x.reshape({m, k});
  const auto how = static_cast<Activations>(activations);
  if (is_quantized(m, n, k, kind, how)) {
    return quantized_product(x2, weight, weight_scale, bias, input_slot, kind, how, dtype).reshape(size);
  }

  const bool is_skinny = x.is_cuda() && m <= kStreamedRows && k % kAlignment == 0 && k < (1 << 30) &&
                         dtype != at::kFloat && x.scalar_type() != at::kFloat && is_aligned(weight.const_data_ptr());
  if (is_skinny) {
    x2 = x2.to(dtype).contiguous();
    if (!is_aligned(x2.const_data_ptr())) x2 = x2.clone();
    at::Tensor out = at::empty(size, x2.options());
    const auto* const x_bytes = static_cast<const uint8_t*>(x2.const_data_ptr());
    auto* const out_bytes = static_cast<uint8_t*>(out.data_ptr());
    for (int64_t row = 0; row < m; row += kSkinnyRows) {
      cuda::skinny({std::min(kSkinnyRows, m - row), n, k, x_bytes + row * k * x2.element_size(),
                    static_cast<const uint8_t*>(weight.const_data_ptr()), weight_scale.const_data_ptr<float>(), kind,
                    bias ? bias->const_data_ptr() : nullptr, out_bytes + row * n * x2.element_size(),
                    type_of(dtype, "dtype")});
    }
    return out;
  }
  const bool in_float = !x.is_cuda() || x.scalar_type() == at::kFloat || dtype == at::kFloat;
  const at::ScalarType compute = in_float ? at::kFloat : x.scalar_type();
  at::Tensor y = at::mm(x2.to(compute), dequantized(weight, weight_scale, kind, compute).t());
  if (bias) y = y.add(bias->to(compute));
  return y.to(dtype).reshape(size);
}

}  // namespace torch_fp8
