// frozen_linear, frozen_linear_backward: a linear layer whose weight is stored in FP8, and the gradient of its input.
// frozen_mlp: three such layers, whose product is cast as it is made. Checks, and each way that frozen_route.h knows.
#include <algorithm>

#include <c10/core/DeviceGuard.h>

#include "check.h"
#include "ops/cast_plan.h"
#include "ops/frozen.h"
#include "ops/frozen_route.h"
#include "ops/record.h"
#include "ops/standing.h"
#include "torch_fp8/ops.h"

namespace torch_fp8 {
namespace {

WeightScale kind_of(const at::Tensor& scale, const c10::SymInt& n, const c10::SymInt& k) {
  TORCH_CHECK_TYPE(scale.scalar_type() == at::kFloat, "torch_fp8: weight_scale must be float32, got ",
                   scale.scalar_type());
  if (scale.sym_numel() == 1) return WeightScale::kTensor;
  TORCH_CHECK(scale.is_contiguous(), "torch_fp8: weight_scale must be contiguous; use .contiguous()");
  const auto size = scale.sym_sizes();
  const auto blocks = [](const c10::SymInt& length) { return (length + (kScaleBlock - 1)) / kScaleBlock; };
  if (size.size() == 2 && size[0] == n && size[1] == 1) return WeightScale::kChannel;
  TORCH_CHECK(size.size() == 2 && size[0] == blocks(n) && size[1] == blocks(k),
              "torch_fp8: weight_scale of a weight of shape [", n, ", ", k, "] must have one element or shape [", n,
              ", 1] or [", blocks(n), ", ", blocks(k), "], got ", size);
  return WeightScale::kBlock;
}

// All that shapes, dtypes and devices tell; sizes may be symbols.
void check_weight(const at::Tensor& weight, const at::Tensor& weight_scale, int64_t activations) {
  TORCH_CHECK_TYPE(weight.scalar_type() == at::kFloat8_e4m3fn, "torch_fp8: a frozen weight must be float8_e4m3fn, got ",
                   weight.scalar_type());
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(),
              "torch_fp8: a frozen weight must be a contiguous matrix (out_features, in_features), got ",
              weight.sym_sizes(), " with strides ", weight.sym_strides());
  check_same_device(weight, "the weight", weight_scale, "weight_scale");
  TORCH_CHECK_VALUE(activations >= 0 && activations <= 3, "torch_fp8: activations must be 0, 1, 2 or 3, got ",
                    activations);
}

// Returns the kind of the weight's scales.
WeightScale check_frozen(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                         const c10::optional<at::Tensor>& bias, const c10::optional<at::Tensor>& input_slot,
                         int64_t activations, c10::optional<at::ScalarType> dtype) {
  type_of(x.scalar_type(), "x");
  check_strided(x, "x");
  check_weight(weight, weight_scale, activations);
  check_input(x, weight);
  if (static_cast<Activations>(activations) == Activations::kStatic) {
    TORCH_CHECK(input_slot, "torch_fp8: static activations need an input_slot; calibrate the model first");
    check_slots(*input_slot, 1);
    check_same_device(weight, "the weight", *input_slot, "input_slot");
  }
  if (bias) check_bias(*bias, weight);
  if (dtype) type_of(*dtype, "dtype");
  return kind_of(weight_scale, weight.sym_size(0), weight.sym_size(1));
}

// Codes that somebody has made of x, for layers whose weights have scales of these kinds.
void check_given(const at::Tensor& x, const c10::optional<at::Tensor>& codes, const c10::optional<at::Tensor>& scale,
                 Activations activations, at::ArrayRef<WeightScale> kinds) {
  if (!codes) return;
  const bool by_row = activations == Activations::kToken;
  const bool takes = by_row || activations == Activations::kStatic;
  TORCH_CHECK_VALUE(takes && std::none_of(kinds.begin(), kinds.end(), [](auto k) { return k == WeightScale::kBlock; }),
                    "torch_fp8: x_codes are for activations 1 or 3 and weights without a grid of scales; give x alone");
  TORCH_CHECK_TYPE(codes->scalar_type() == at::kFloat8_e4m3fn, "torch_fp8: x_codes must be float8_e4m3fn, got ",
                   codes->scalar_type());
  const c10::SymInt rows = leading_size_symbolic(x), cols = padded_symbolic(x.sym_size(-1));
  TORCH_CHECK(codes->dim() == 2 && codes->sym_size(0) == rows && codes->sym_size(1) == cols && codes->is_contiguous(),
              "torch_fp8: x_codes must be contiguous and of shape [", rows, ", ", cols, "], got ", codes->sym_sizes(),
              " with strides ", codes->sym_strides(), "; frozen_norm makes such ones");
  check_same_device(x, "the input", *codes, "x_codes");
  TORCH_CHECK(by_row == scale.has_value(), "torch_fp8: x_codes by row come with x_scale, those by input_slot without; ",
              "got activations ", static_cast<int>(activations), by_row ? " and no x_scale" : " and x_scale");
  if (!scale) return;
  TORCH_CHECK(
      scale->scalar_type() == at::kFloat && scale->dim() == 1 && scale->sym_size(0) == rows && scale->is_contiguous(),
      "torch_fp8: x_scale must be contiguous float32 of shape [", rows, "], got ", scale->scalar_type(), " ",
      scale->sym_sizes());
  check_same_device(x, "the input", *scale, "x_scale");
}

WeightScale check_frozen_backward(const at::Tensor& dy, const at::Tensor& weight, const at::Tensor& weight_scale,
                                  int64_t activations, at::ScalarType x_dtype) {
  type_of(dy.scalar_type(), "the output's gradient");
  type_of(x_dtype, "x_dtype");
  check_strided(dy, "the output's gradient");
  check_weight(weight, weight_scale, activations);
  TORCH_CHECK(dy.dim() >= 1 && dy.sym_size(-1) == weight.sym_size(0),
              "torch_fp8: the last dimension of the output's gradient must be out_features = ", weight.sym_size(0),
              ", got a gradient of shape ", dy.sym_sizes());
  check_same_device(weight, "the weight", dy, "the output's gradient");
  return kind_of(weight_scale, weight.sym_size(0), weight.sym_size(1));
}

struct QuantizedInput;

// A call that was checked, seen as y (m, n) = x (m, k) . weight^T. Of a gradient x is dy and weight the transpose,
// padded.
struct Product {
  FrozenProduct route;
  const Kernels& kernels;
  at::Tensor x;
  const at::Tensor &weight, &weight_scale;
  c10::optional<at::Tensor> bias;  // of y's dtype, contiguous
  c10::optional<at::Tensor> input_slot;
  std::vector<int64_t> size;  // of y as the caller sees it
  at::ScalarType dtype;       // of y
  at::Tensor y = {};          // where it goes, contiguous; or undefined: into a tensor of its own
  // Of a gradient, whose sums are promoted to float32 as in all training: what x's columns are multiplied by, or null.
  bool is_gradient = false;
  const float* col_scale = nullptr;
  // The codes of x, where somebody has made them; or null.
  const QuantizedInput* codes_of_x = nullptr;
  // Of an MLP. made: x is gate, and what is quantised is f(gate) or, with up (m, k), f(gate) * up.
  c10::optional<Activation> made = {};
  c10::optional<at::Tensor> up = {};

  bool has_one_weight_scale() const { return route.weight_scale == WeightScale::kTensor; }
  const uint8_t* codes() const { return static_cast<const uint8_t*>(weight.const_data_ptr()); }
  const float* scales() const { return static_cast<const float*>(weight_scale.const_data_ptr()); }
  const void* bias_data() const { return bias ? bias->const_data_ptr() : nullptr; }
  at::Tensor output() const { return y.defined() ? y : at::empty(size, x.options().dtype(dtype)); }
  bool stands() const { return x.is_cuda() && weight_stands(weight, weight_scale, bias, cuda::current_stream()); }
};

// ---- x is not quantised ---------------------------------------------------------------------------------------------

at::Tensor few_rows(const Product& p) {
  at::Tensor x = p.x.to(p.dtype).contiguous();
  if (!is_aligned(x.const_data_ptr())) x = x.clone();
  at::Tensor out = p.output();
  const auto* const x_bytes = static_cast<const uint8_t*>(x.const_data_ptr());
  auto* const out_bytes = static_cast<uint8_t*>(out.data_ptr());
  SkinnyArgs args{};
  args.n = p.route.n, args.k = p.route.k;
  args.w = p.codes(), args.w_scale = p.scales(), args.scale_kind = p.route.weight_scale;
  args.bias = p.bias_data(), args.type = p.route.y;
  args.weight_stands = p.stands();
  for (int64_t row = 0; row < p.route.m; row += kSkinnyRows) {
    args.m = std::min(kSkinnyRows, p.route.m - row);
    args.x = x_bytes + row * p.route.k * x.element_size();
    args.out = out_bytes + row * p.route.n * x.element_size();
    p.kernels.skinny(args);
  }
  return out;
}

// The weight in float32 (CPU, float32 inputs) or in x's 16 bits.
at::Tensor dequantized_weight(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                              WeightScale kind, bool in_float) {
  const at::ScalarType compute = in_float || x.is_cpu() ? at::kFloat : x.scalar_type();
  at::Tensor out = at::empty(weight.sizes(), weight.options().dtype(compute));
  kernels_of(x).dequantize({weight.size(0), weight.size(1), static_cast<const uint8_t*>(weight.const_data_ptr()),
                            static_cast<const float*>(weight_scale.const_data_ptr()), kind, out.data_ptr(),
                            type_of(compute, "x")});
  return out;
}

at::Tensor dequantized(const Product& p) {
  const bool in_float = p.route.x == Type::kFloat32 || p.route.y == Type::kFloat32;
  const at::Tensor weight = dequantized_weight(p.x, p.weight, p.weight_scale, p.route.weight_scale, in_float);
  const at::ScalarType compute = weight.scalar_type();
  at::Tensor y = at::mm(p.x.to(compute), weight.t());
  if (p.bias) y = y.add(p.bias->to(compute));
  return p.y.defined() ? p.y.copy_(y) : y.to(p.dtype).reshape(p.size);
}

// ---- x is quantised -------------------------------------------------------------------------------------------------

struct QuantizedInput {
  at::Tensor scratch;  // everything between x and y in one allocation: for small products the time is the host's
  uint8_t* q;          // (rows, padded(k))
  int64_t rows;        // m, or more of them
  const float* scale;  // one, or as many as scales_of says
  bool has_one_scale;
  float* sums;                // (m, padded(n)), if asked for
  at::Tensor own_sums = {};   // where they lie, if not in scratch
  at::Tensor own_scale = {};  // likewise
};

at::Tensor aligned(const at::Tensor& tensor) { return is_aligned(tensor.const_data_ptr()) ? tensor : tensor.clone(); }

// Of codes that were checked.
c10::optional<QuantizedInput> given_input(const c10::optional<at::Tensor>& codes,
                                          const c10::optional<at::Tensor>& scale,
                                          const c10::optional<at::Tensor>& input_slot) {
  if (!codes) return {};
  QuantizedInput given{};
  given.scratch = aligned(*codes), given.own_scale = scale ? aligned(*scale) : *input_slot;
  given.q = static_cast<uint8_t*>(given.scratch.data_ptr());
  given.rows = codes->size(0);
  given.scale = static_cast<const float*>(given.own_scale.const_data_ptr());  // of a slot scale_inv comes first
  given.has_one_scale = !scale;
  return given;
}

QuantizedInput quantized_input(const Product& p, bool with_sums) {
  const int64_t m = p.route.m, n = p.route.n, k = p.route.k;
  if (p.codes_of_x) {
    QuantizedInput out = *p.codes_of_x;
    if (with_sums) {
      out.own_sums = at::empty({m, padded(n)}, p.x.options().dtype(at::kFloat));
      out.sums = static_cast<float*>(out.own_sums.data_ptr());
    }
    return out;
  }
  const bool by_blocks = p.route.weight_scale == WeightScale::kBlock;
  const bool by_rows = !by_blocks && p.route.activations == Activations::kToken;
  const bool own_amax = p.route.activations == Activations::kTensor;
  const int64_t rows = by_blocks ? (m + 3) / 4 * 4 : m;
  const int64_t scales = by_blocks ? rows * k / kScaleBlock : std::max<int64_t>(m, sizeof(Slot) / sizeof(float));

  int64_t bytes = 0;
  const auto reserve = [&bytes](int64_t size) {
    const int64_t place = bytes;
    bytes += (size + 255) / 256 * 256;  // as aligned as algorithms can wish
    return place;
  };
  const int64_t scale_place = reserve(4 * scales), q_place = reserve(padded(rows) * padded(k));
  const int64_t parts_place = reserve(own_amax ? 4 * kAmaxParts : 0);
  const int64_t sums_place = reserve(with_sums ? 4 * m * padded(n) : 0);
  const at::Tensor scratch = at::empty({bytes}, p.x.options().dtype(at::kByte));
  uint8_t* const base = static_cast<uint8_t*>(scratch.data_ptr());
  float* const scale = reinterpret_cast<float*>(base + scale_place);
  QuantizedInput out{scratch, base + q_place,         rows,
                     scale,   !by_blocks && !by_rows, reinterpret_cast<float*>(base + sums_place)};

  const Matrix matrix = matrix_of(p.x), up = p.up ? matrix_of(*p.up) : Matrix{};
  if (by_blocks) {
    p.kernels.quantize_groups({matrix, rows, out.q, scale});
    return out;
  }
  if (by_rows && p.made) {
    p.kernels.activate_rows({*p.made, matrix, up, out.q, scale});
    return out;
  }
  if (by_rows) {
    p.kernels.quantize_rows({matrix, out.q, scale, p.col_scale});
    return out;
  }
  const Slot* slot = reinterpret_cast<const Slot*>(scale);
  if (own_amax) {
    float* const parts = reinterpret_cast<float*>(base + parts_place);
    p.kernels.amax(matrix, parts);
    p.kernels.scale_from_amax(parts, reinterpret_cast<Slot*>(scale), E4M3::kMax, kExact);
  } else {
    slot = slots_of(*p.input_slot);
  }
  const QuantizeArgs cast{matrix, Format::kE4M3, slot, out.q, nullptr, nullptr, nullptr, nullptr};
  p.made ? p.kernels.activate({*p.made, {}, cast, up}) : p.kernels.quantize(cast);
  out.scale = reinterpret_cast<const float*>(slot);  // scale_inv comes first
  return out;
}

at::Tensor streamed(const Product& p) {
  const QuantizedInput x = quantized_input(p, /*with_sums=*/false);
  at::Tensor out = p.output();
  SkinnyFp8Args args{};
  args.m = p.route.m, args.n = p.route.n, args.k = p.route.k;
  args.x = x.q, args.w = p.codes();
  args.x_scale = x.scale, args.one_x_scale = x.has_one_scale;
  args.w_scale = p.scales(), args.one_w_scale = p.has_one_weight_scale();
  args.bias = p.bias_data(), args.out = out.data_ptr(), args.type = p.route.y;
  args.weight_stands = p.stands();
  p.kernels.skinny_fp8(args);
  return out;
}

// The weight with as many rows and columns more as FP8 GEMMs need, zero.
at::Tensor padded_codes(const at::Tensor& codes, int64_t rows, int64_t cols) {
  if (codes.size(0) == rows && codes.size(1) == cols) return codes;
  at::Tensor out = at::zeros({rows, cols}, codes.options().dtype(at::kByte));
  out.narrow(0, 0, codes.size(0)).narrow(1, 0, codes.size(1)).copy_(codes.view(at::kByte));
  return out.view(codes.scalar_type());
}

GemmArgs gemm_args(const Product& p, const QuantizedInput& x, const at::Tensor& codes) {
  GemmArgs args{};
  args.m = x.rows, args.n = padded(p.route.n), args.k = padded(p.route.k);
  args.a = x.q, args.b = static_cast<const uint8_t*>(codes.const_data_ptr());
  return args;
}

at::Tensor rescaled(const Product& p) {
  const QuantizedInput x = quantized_input(p, /*with_sums=*/true);
  const at::Tensor codes = padded_codes(p.weight, padded(p.route.n), padded(p.route.k));
  at::Tensor out = p.output();
  GemmArgs args = gemm_args(p, x, codes);
  args.out = x.sums, args.out_type = Type::kFloat32, args.fast_accum = !p.is_gradient;
  GemmRecord::run(p.kernels, args);
  p.kernels.rescale({x.sums, p.route.m, p.route.n, args.n, x.scale, p.scales(), x.has_one_scale,
                     p.has_one_weight_scale(), p.bias_data(), out.data_ptr(), p.route.y});
  return out;
}

at::Tensor padded_with(const at::Tensor& vector, int64_t size) {
  return aligned(vector.size(-1) == size ? vector : at::constant_pad_nd(vector, {0, size - vector.size(-1)}));
}

// The weight's scales as the GEMM reads them.
at::Tensor gemm_scales(const Product& p, Scales scales, int64_t n) {
  if (scales == Scales::kOne) return aligned(p.weight_scale);
  if (scales == Scales::kBlocks) return padded_with(p.weight_scale, scale_stride(p.route.k));
  if (p.has_one_weight_scale()) return p.weight_scale.reshape({1}).expand({n}).contiguous();
  return padded_with(p.weight_scale.view(-1), n);
}

at::Tensor scaled(const Product& p) {
  const Scales scales = scales_of(p.route.weight_scale, p.route.activations);
  const QuantizedInput x = quantized_input(p, /*with_sums=*/false);
  const at::Tensor codes = padded_codes(p.weight, padded(p.route.n), padded(p.route.k));
  at::Tensor out = p.output();
  GemmArgs args = gemm_args(p, x, codes);
  const bool in_epilogue = p.bias && p.route.y != Type::kFloat32;  // which has no float32
  const bool is_padded = args.m != p.route.m || args.n != p.route.n;

  at::Tensor x_scale;
  if (scales == Scales::kRows && x.has_one_scale) {
    const bool is_static = p.route.activations == Activations::kStatic;
    const at::Tensor slot = is_static ? p.input_slot->view(-1) : x.scratch.narrow(0, 0, sizeof(Slot)).view(at::kFloat);
    x_scale = slot.narrow(0, 0, 1).expand({args.m}).contiguous();
  }
  const at::Tensor w_scale = gemm_scales(p, scales, args.n);
  const at::Tensor bias = in_epilogue ? padded_with(*p.bias, args.n) : at::Tensor();
  const at::Tensor target = is_padded ? at::empty({args.m, args.n}, out.options()) : out;
  args.a_scale_inv = x_scale.defined() ? static_cast<const float*>(x_scale.const_data_ptr()) : x.scale;
  args.b_scale_inv = static_cast<const float*>(w_scale.const_data_ptr());
  args.scales = scales;
  args.fast_accum = scales != Scales::kBlocks && !p.is_gradient;  // blocks are added up in float32 anyway
  args.bias = in_epilogue ? address_of(bias) : nullptr;
  args.out = target.data_ptr(), args.out_type = p.route.y;
  GemmRecord::run(p.kernels, args);
  if (is_padded) out.view({p.route.m, p.route.n}).copy_(target.narrow(0, 0, p.route.m).narrow(1, 0, p.route.n));
  if (p.bias && !in_epilogue) out.add_(*p.bias);
  return out;
}

Product product_of(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale, WeightScale kind,
                   const c10::optional<at::Tensor>& bias, const c10::optional<at::Tensor>& input_slot,
                   Activations activations, at::ScalarType dtype) {
  const int64_t m = leading_size(x.sizes()), n = weight.size(0), k = weight.size(1);
  Product p{.route = {m, n, k, kind, activations, type_of(x.scalar_type(), "x"), type_of(dtype, "dtype"),
                      is_aligned(weight.const_data_ptr()), !x.is_cpu()},
            .kernels = kernels_of(x),
            .x = x,
            .weight = weight,
            .weight_scale = weight_scale,
            .bias = bias,
            .input_slot = input_slot,
            .size = x.sizes().vec(),
            .dtype = dtype};
  p.size.back() = n;
  if (x.dim() != 2) p.x = x.reshape({m, k});
  if (bias) p.bias = bias->to(dtype).contiguous();
  return p;
}

at::Tensor computed(const Product& p) {
  switch (way_of(p.route)) {
    case Way::kZeros: {
      at::Tensor out = p.output().zero_();
      return p.bias ? out.add_(*p.bias) : out;
    }
    case Way::kFewRows: return few_rows(p);
    case Way::kDequantized: return dequantized(p);
    case Way::kStreamed: return streamed(p);
    case Way::kRescaled: return rescaled(p);
    case Way::kScaled: return scaled(p);
  }
  TORCH_INTERNAL_ASSERT(false);
}

// ---- three layers ---------------------------------------------------------------------------------------------------

using Tensors = at::TensorList;
using OptionalTensors = c10::List<c10::optional<at::Tensor>>;

// Of an MLP: gate, up and down; gate and up in one, and down; or up and down.
struct Layers {
  const Tensors &weights, &scales;
  const OptionalTensors &biases, &slots;
  Activations activations;
  at::ScalarType dtype;
  std::vector<WeightScale> kinds;

  Product product(size_t layer, const at::Tensor& x) const {
    return product_of(x, weights[layer], scales[layer], kinds[layer], biases.get(layer), slots.get(layer), activations,
                      dtype);
  }
};

void check_function(int64_t activation) {
  TORCH_CHECK_VALUE((activation >= 0 && activation <= 2) || activation == 4,
                    "torch_fp8: activation must be 0 (silu), 1 (gelu), 2 (gelu, tanh) or 4 (relu squared), got ",
                    activation);
}

// Whether the first of two layers makes gate and up.
bool makes_both(Tensors weights) { return weights.size() == 2 && weights[0].sym_size(0) == 2 * weights[1].sym_size(1); }

// Returns the kinds of the weights' scales.
std::vector<WeightScale> check_frozen_mlp(const at::Tensor& x, Tensors weights, Tensors scales,
                                          const OptionalTensors& biases, const OptionalTensors& slots,
                                          int64_t activation, int64_t activations,
                                          c10::optional<at::ScalarType> dtype) {
  const size_t count = weights.size();
  TORCH_CHECK_VALUE(
      (count == 2 || count == 3) && scales.size() == count && biases.size() == count && slots.size() == count,
      "torch_fp8: an MLP has two or three weights, of gate, up and down or of up and down, and as many "
      "weight_scales, biases and input_slots, got ",
      count, ", ", scales.size(), ", ", biases.size(), " and ", slots.size());
  check_function(activation);
  const at::Tensor &first = weights[0], &down = weights[count - 1];
  std::vector<WeightScale> kinds;
  for (size_t i = 0; i + 1 < count; ++i) {
    kinds.push_back(check_frozen(x, weights[i], scales[i], biases.get(i), slots.get(i), activations, dtype));
    TORCH_CHECK(weights[i].sym_sizes() == first.sym_sizes(),
                "torch_fp8: gate and up must have weights of one shape, got ", first.sym_sizes(), " and ",
                weights[i].sym_sizes());
  }
  check_weight(down, scales[count - 1], activations);
  const at::Tensor product = at::empty_symint({0, makes_both(weights) ? down.sym_size(1) : first.sym_size(0)},
                                              x.options().dtype(dtype.value_or(x.scalar_type())));
  kinds.push_back(
      check_frozen(product, down, scales[count - 1], biases.get(count - 1), slots.get(count - 1), activations, dtype));
  return kinds;
}

// Of the layers that read x.
at::ArrayRef<WeightScale> first_kinds(const std::vector<WeightScale>& kinds) {
  return at::ArrayRef<WeightScale>(kinds).slice(0, kinds.size() - 1);
}

at::Tensor activated(const at::Tensor& x, Activation f) {
  if (f == Activation::kSilu) return at::silu(x);
  if (f == Activation::kReluSquared) return at::relu(x).square();
  return at::gelu(x, f == Activation::kGelu ? "none" : "tanh");
}

// Whether the kernels that make what down reads cast it as down would: by row or by a static scale.
bool is_cast_as_made(const FrozenProduct& down) {
  constexpr int64_t kPack = 8;
  const bool by_row_or_static = down.activations == Activations::kToken || down.activations == Activations::kStatic;
  return is_quantized(way_of(down)) && by_row_or_static && down.weight_scale != WeightScale::kBlock &&
         down.k % kPack == 0;
}

// Whether two layers quantise the x that both read to the same codes.
bool have_same_codes(const FrozenProduct& a, const FrozenProduct& b) {
  return is_quantized(way_of(a)) && is_quantized(way_of(b)) && a.activations != Activations::kStatic &&
         (a.weight_scale == WeightScale::kBlock) == (b.weight_scale == WeightScale::kBlock);
}

at::Tensor mlp_of(const at::Tensor& x, const Layers& layers, Activation f, const QuantizedInput* given, bool up_first) {
  Product first = layers.product(0, x);
  const bool gated = layers.kinds.size() == 3;
  first.codes_of_x = given;
  at::Tensor gate;
  c10::optional<at::Tensor> up;
  if (!gated) {
    gate = computed(first);
    if (makes_both(layers.weights)) {
      const int64_t inner = gate.size(-1) / 2;
      up = gate.narrow(-1, up_first ? 0 : inner, inner), gate = gate.narrow(-1, up_first ? inner : 0, inner);
    }
  } else {
    Product second = layers.product(1, x);
    c10::optional<QuantizedInput> codes;
    if (given) {
      second.codes_of_x = given;
    } else if (have_same_codes(first.route, second.route)) {
      codes = quantized_input(first, /*with_sums=*/false);
      first.codes_of_x = second.codes_of_x = &*codes;
    }
    gate = computed(first), up = computed(second);
  }
  Product down = layers.product(layers.kinds.size() - 1, gate);
  if (is_cast_as_made(down.route)) {
    down.made = f;
    if (up) down.up = up->reshape(down.x.sizes());
    return computed(down);
  }
  const at::Tensor product = up ? activated(gate, f).mul_(*up) : activated(gate, f);
  return computed(layers.product(layers.kinds.size() - 1, product));
}

}  // namespace

at::Tensor frozen_product(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                          WeightScale kind, const c10::optional<at::Tensor>& bias,
                          const c10::optional<at::Tensor>& input_slot, Activations activations, at::ScalarType dtype,
                          const at::Tensor& y) {
  Product p = product_of(x, weight, weight_scale, kind, bias, input_slot, activations, dtype);
  p.y = y;
  return computed(p);
}

at::Tensor frozen_mlp(const at::Tensor& x, at::TensorList weights, at::TensorList weight_scales,
                      const c10::List<c10::optional<at::Tensor>>& biases,
                      const c10::List<c10::optional<at::Tensor>>& input_slots, int64_t activation, int64_t activations,
                      c10::optional<at::ScalarType> dtype, const c10::optional<at::Tensor>& x_codes,
                      const c10::optional<at::Tensor>& x_scale, bool up_first) {
  const Layers layers{weights,
                      weight_scales,
                      biases,
                      input_slots,
                      static_cast<Activations>(activations),
                      dtype.value_or(x.scalar_type()),
                      check_frozen_mlp(x, weights, weight_scales, biases, input_slots, activation, activations, dtype)};
  check_given(x, x_codes, x_scale, layers.activations, first_kinds(layers.kinds));
  const c10::DeviceGuard guard(x.device());
  const NoAutocast no_autocast;
  const auto given = given_input(x_codes, x_scale, input_slots.get(0));
  return mlp_of(x, layers, static_cast<Activation>(activation), given ? &*given : nullptr, up_first);
}

at::Tensor frozen_mlp_meta(const at::Tensor& x, at::TensorList weights, at::TensorList weight_scales,
                           const c10::List<c10::optional<at::Tensor>>& biases,
                           const c10::List<c10::optional<at::Tensor>>& input_slots, int64_t activation,
                           int64_t activations, c10::optional<at::ScalarType> dtype,
                           const c10::optional<at::Tensor>& x_codes, const c10::optional<at::Tensor>& x_scale,
                           bool up_first) {
  if (GemmRecord::is_open()) {
    return frozen_mlp(x, weights, weight_scales, biases, input_slots, activation, activations, dtype, x_codes, x_scale,
                      up_first);
  }
  const std::vector<WeightScale> kinds =
      check_frozen_mlp(x, weights, weight_scales, biases, input_slots, activation, activations, dtype);
  check_given(x, x_codes, x_scale, static_cast<Activations>(activations), first_kinds(kinds));
  auto size = x.sym_sizes().vec();
  size.back() = weights.back().sym_size(0);
  return at::empty_symint(size, x.options().dtype(dtype.value_or(x.scalar_type())));
}

at::Tensor frozen_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                         const c10::optional<at::Tensor>& bias, const c10::optional<at::Tensor>& input_slot,
                         int64_t activations, c10::optional<at::ScalarType> dtype,
                         const c10::optional<at::Tensor>& x_codes, const c10::optional<at::Tensor>& x_scale) {
  const WeightScale kind = check_frozen(x, weight, weight_scale, bias, input_slot, activations, dtype);
  check_given(x, x_codes, x_scale, static_cast<Activations>(activations), kind);
  const c10::DeviceGuard guard(x.device());
  const NoAutocast no_autocast;
  const auto given = given_input(x_codes, x_scale, input_slot);
  Product p = product_of(x, weight, weight_scale, kind, bias, input_slot, static_cast<Activations>(activations),
                         dtype.value_or(x.scalar_type()));
  if (given) p.codes_of_x = &*given;
  return computed(p);
}

at::Tensor frozen_linear_backward(const at::Tensor& dy, const at::Tensor& weight, const at::Tensor& weight_scale,
                                  int64_t activations, at::ScalarType x_dtype) {
  const WeightScale kind = check_frozen_backward(dy, weight, weight_scale, activations, x_dtype);
  const c10::DeviceGuard guard(dy.device());
  const NoAutocast no_autocast;
  const int64_t m = leading_size(dy.sizes()), n = weight.size(0), k = weight.size(1);
  std::vector<int64_t> size = dy.sizes().vec();
  size.back() = k;
  const Type type = type_of(dy.scalar_type(), "dy");
  const FrozenProduct forward{m, n, k, kind, static_cast<Activations>(activations), type, type, true, !dy.is_cpu()};
  const Way way = way_of_gradient(forward);
  if (way == Way::kZeros) return at::zeros(size, dy.options().dtype(x_dtype));

  const at::Tensor matrix = dy.dim() == 2 ? dy : dy.reshape({m, n});
  if (way == Way::kDequantized) {
    const at::Tensor wide = dequantized_weight(dy, weight, weight_scale, kind, type == Type::kFloat32);
    return at::mm(matrix.to(wide.scalar_type()), wide).to(x_dtype).reshape(size);
  }

  at::Tensor scale = weight_scale;
  if (kind == WeightScale::kChannel) scale = at::ones({k, 1}, weight_scale.options());
  if (kind == WeightScale::kBlock) scale = weight_scale.t().contiguous();
  Product p{.route = gradient_of(forward),
            .kernels = kernels_of(dy),
            .x = matrix,
            .weight = transpose_codes(weight),
            .weight_scale = scale,
            .bias = {},
            .input_slot = {},
            .size = size,
            .dtype = dy.scalar_type(),
            .is_gradient = true};
  if (kind == WeightScale::kChannel) p.col_scale = static_cast<const float*>(weight_scale.const_data_ptr());
  return (way == Way::kRescaled ? rescaled(p) : scaled(p)).to(x_dtype);
}

at::Tensor frozen_linear_backward_meta(const at::Tensor& dy, const at::Tensor& weight, const at::Tensor& weight_scale,
                                       int64_t activations, at::ScalarType x_dtype) {
  if (GemmRecord::is_open()) return frozen_linear_backward(dy, weight, weight_scale, activations, x_dtype);
  check_frozen_backward(dy, weight, weight_scale, activations, x_dtype);
  auto size = dy.sym_sizes().vec();
  size.back() = weight.sym_size(1);
  return at::empty_symint(size, dy.options().dtype(x_dtype));
}

at::Tensor frozen_linear_meta(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                              const c10::optional<at::Tensor>& bias, const c10::optional<at::Tensor>& input_slot,
                              int64_t activations, c10::optional<at::ScalarType> dtype,
                              const c10::optional<at::Tensor>& x_codes, const c10::optional<at::Tensor>& x_scale) {
  if (GemmRecord::is_open()) {
    return frozen_linear(x, weight, weight_scale, bias, input_slot, activations, dtype, x_codes, x_scale);
  }
  const WeightScale kind = check_frozen(x, weight, weight_scale, bias, input_slot, activations, dtype);
  check_given(x, x_codes, x_scale, static_cast<Activations>(activations), kind);
  auto size = x.sym_sizes().vec();
  size.back() = weight.sym_size(0);
  return at::empty_symint(size, x.options().dtype(dtype.value_or(x.scalar_type())));
}

}  // namespace torch_fp8
