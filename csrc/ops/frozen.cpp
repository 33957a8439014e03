// frozen_linear: a linear layer whose weight is stored in FP8. Checks, and which of five ways a product goes.
#include <algorithm>

#include <c10/core/DeviceGuard.h>

#include "check.h"
#include "torch_fp8/ops.h"

namespace torch_fp8 {
namespace {

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
  kernels_of(weight).dequantize({weight.size(0), weight.size(1), static_cast<const uint8_t*>(weight.const_data_ptr()),
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

// FP8 on both sides, with as many scales on the one as on the other: cuBLASLt mixes no modes but those of blocks.
// Everything between x and y lies in one allocation: for small products the time is the host's.
at::Tensor quantized_product(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                             const c10::optional<at::Tensor>& bias, const c10::optional<at::Tensor>& input_slot,
                             WeightScale kind, Activations activations, at::IntArrayRef size, at::ScalarType dtype) {
  const int64_t m = x.size(0), n = weight.size(0), k = weight.size(1), wide = padded(n), cols = padded(k);
  const bool on_cuda = x.is_cuda(), own_amax = activations == Activations::kTensor;
  const bool one_each = kind == WeightScale::kTensor && activations != Activations::kToken;
  const Scales scales = kind == WeightScale::kBlock ? Scales::kBlocks : one_each ? Scales::kOne : Scales::kRows;
  const int64_t rows = scales == Scales::kBlocks ? (m + 3) / 4 * 4 : m;
  // With one scale on each side cuBLASLt needs no kernel behind it, and wide outputs keep it busy.
  const bool streams = scales == Scales::kRows || (scales == Scales::kOne && n <= kWideOutputs);
  const bool streamed = on_cuda && m <= kSkinnyFp8Rows && streams && k == cols && dtype != at::kFloat &&
                        is_aligned(weight.const_data_ptr());
  // float32 adds its bias in rescaling, too: the epilogue has none of that type.
  const bool rescaled = !streamed && scales == Scales::kRows && (is_rescaled(m, wide) || dtype == at::kFloat);

  int64_t bytes = 0;
  const auto reserve = [&bytes](int64_t size) {
    const int64_t place = bytes;
    bytes += (size + 255) / 256 * 256;  // as aligned as algorithms can wish
    return place;
  };
  const int64_t q_place = reserve(padded(rows) * cols);
  const int64_t scale_place =
      reserve(4 * (kind == WeightScale::kBlock ? rows * k / kScaleBlock : std::max<int64_t>(m, 4)));
  const int64_t parts_place = reserve(own_amax ? 4 * kAmaxParts : 0);
  const int64_t sums_place = reserve(rescaled ? 4 * m * wide : 0);
  const at::Tensor scratch = at::empty({bytes}, x.options().dtype(at::kByte));
  uint8_t* const base = static_cast<uint8_t*>(scratch.data_ptr());
  uint8_t* const q = base + q_place;
  float* const own_scale = reinterpret_cast<float*>(base + scale_place);
  const float* x_scale = own_scale;

  const Matrix matrix{x.const_data_ptr(), type_of(x.scalar_type(), "x"), m, k, x.stride(0), x.stride(1)};
  if (scales == Scales::kBlocks) {
    kernels(on_cuda).quantize_groups({matrix, rows, q, own_scale});
  } else if (activations == Activations::kToken) {
    kernels(on_cuda).quantize_rows({matrix, q, own_scale});
  } else {
    Slot* const own = reinterpret_cast<Slot*>(own_scale);
    if (own_amax) {
      float* const parts = reinterpret_cast<float*>(base + parts_place);
      kernels(on_cuda).amax(matrix, parts);
      kernels(on_cuda).scale_from_amax(parts, own, E4M3::kMax, /*power_of_two=*/false);
    }
    const Slot* const slot = own_amax ? own : slots_of(*input_slot);
    kernels(on_cuda).quantize({matrix, Format::kE4M3, slot, q, nullptr, nullptr, nullptr, nullptr});
    x_scale = &slot->scale_inv;
  }
  const bool one_x_scale = scales != Scales::kBlocks && activations != Activations::kToken;

  at::Tensor out = at::empty(size, x.options().dtype(dtype));
  if (streamed) {
    kernels(on_cuda).skinny_fp8({m, n, k, q, static_cast<const uint8_t*>(weight.const_data_ptr()), x_scale,
                                 weight_scale.const_data_ptr<float>(), one_x_scale, kind == WeightScale::kTensor,
                                 bias ? bias->const_data_ptr() : nullptr, out.data_ptr(),
                                 type_of(dtype, "the output")});
    return out;
  }
  const at::Tensor w = padded_codes(weight, wide, cols);
  GemmArgs args{};
  args.m = rows, args.n = wide, args.k = cols;
  args.a = q, args.b = static_cast<const uint8_t*>(w.const_data_ptr());
  args.fast_accum = scales != Scales::kBlocks;  // those add up each block in float32 anyway
  const auto gemm = kernels(on_cuda).gemm;
  if (rescaled) {
    float* const sums = reinterpret_cast<float*>(base + sums_place);
    args.out = sums, args.out_type = Type::kFloat32;
    gemm(args);
    kernels(on_cuda).rescale({sums, m, n, wide, x_scale, weight_scale.const_data_ptr<float>(), one_x_scale,
                              kind == WeightScale::kTensor, bias ? bias->const_data_ptr() : nullptr, out.data_ptr(),
                              type_of(dtype, "the output")});
    return out;
  }

  at::Tensor w_scale = weight_scale, x_scales;
  if (scales == Scales::kRows) {
    if (one_x_scale) {
      x_scales = (own_amax ? scratch.narrow(0, scale_place, 4).view(at::kFloat) : input_slot->view(-1).narrow(0, 0, 1))
                     .expand({m})
                     .contiguous();
      x_scale = x_scales.const_data_ptr<float>();
    }
    if (kind == WeightScale::kTensor) w_scale = w_scale.reshape({1}).expand({wide}).contiguous();
    if (w_scale.numel() != wide) w_scale = at::constant_pad_nd(w_scale.view(-1), {0, wide - n});
  } else if (scales == Scales::kBlocks && w_scale.size(1) != scale_stride(k)) {
    w_scale = at::constant_pad_nd(w_scale, {0, scale_stride(k) - w_scale.size(1)});
  }
  if (!is_aligned(w_scale.const_data_ptr())) w_scale = w_scale.clone();
  args.a_scale_inv = x_scale, args.b_scale_inv = w_scale.const_data_ptr<float>();
  args.scales = scales;
  at::Tensor epilogue;
  if (bias && dtype != at::kFloat) {
    epilogue = wide == n ? *bias : at::constant_pad_nd(*bias, {0, wide - n});
    if (!is_aligned(epilogue.const_data_ptr())) epilogue = epilogue.clone();
    args.bias = epilogue.const_data_ptr();
  }
  const bool is_padded = rows != m || wide != n;
  const at::Tensor product = is_padded ? at::empty({rows, wide}, out.options()) : out;
  args.out = product.data_ptr(), args.out_type = type_of(dtype, "the output");
  gemm(args);
  if (is_padded) out.view({m, n}).copy_(product.narrow(0, 0, m).narrow(1, 0, n));
  if (bias && dtype == at::kFloat) out.add_(*bias);
  return out;
}

// Whether x is quantised: few rows are not, since the time there is that of reading the weight, and wide outputs, which
// read much of it, have fewer such rows. To scales of blocks x brings groups of as many columns, or stays in 16 bits.
bool is_quantized(int64_t m, int64_t n, int64_t k, WeightScale kind, Activations activations) {
  if (m <= (n > kWideOutputs ? kSkinnyRows / 2 : kSkinnyRows)) return false;
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
  if (m == 0 || n == 0 || k == 0) {
    at::Tensor out = at::zeros(size, x.options().dtype(dtype));
    return bias ? out.add_(*bias) : out;
  }
  at::Tensor x2 = x.dim() == 2 ? x : x.reshape({m, k});
  const auto how = static_cast<Activations>(activations);
  if (is_quantized(m, n, k, kind, how)) {
    return quantized_product(x2, weight, weight_scale, bias, input_slot, kind, how, size, dtype);
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
      kernels_of(x).skinny({std::min(kSkinnyRows, m - row), n, k, x_bytes + row * k * x2.element_size(),
                            static_cast<const uint8_t*>(weight.const_data_ptr()), weight_scale.const_data_ptr<float>(),
                            kind, bias ? bias->const_data_ptr() : nullptr, out_bytes + row * n * x2.element_size(),
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
