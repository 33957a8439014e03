// frozen_experts, frozen_experts_backward: one linear layer of each expert of a mixture, whose weights are a stack in
// FP8, and the gradient of its input. The rows of x come sorted by expert, and each expert's rows are a product as
// frozen_linear has it.
#include <c10/core/DeviceGuard.h>

#include "check.h"
#include "ops/frozen.h"

namespace torch_fp8 {
namespace {

int64_t blocks(int64_t size) { return (size + kScaleBlock - 1) / kScaleBlock; }

// A weight of parts (gate above up) has the scales of each part by itself.
WeightScale kind_of(const at::Tensor& scale, at::IntArrayRef weight, int64_t parts) {
  TORCH_CHECK_TYPE(scale.scalar_type() == at::kFloat, "torch_fp8: weight_scale must be float32, got ",
                   scale.scalar_type());
  TORCH_CHECK(scale.is_contiguous(), "torch_fp8: weight_scale must be contiguous; use .contiguous()");
  const int64_t experts = weight[0], n = weight[1], k = weight[2];
  const at::IntArrayRef size = scale.sizes();
  const std::vector<int64_t> tensor{experts, parts}, channel{experts, n, 1};
  const std::vector<int64_t> block{experts, parts * blocks(n / parts), blocks(k)};
  if (size == at::IntArrayRef(tensor)) return WeightScale::kTensor;
  if (size == at::IntArrayRef(channel)) return WeightScale::kChannel;
  TORCH_CHECK(size == at::IntArrayRef(block), "torch_fp8: weight_scale of ", experts, " experts of ", n, " x ", k,
              " in ", parts, " parts must have shape ", at::IntArrayRef(tensor), ", ", at::IntArrayRef(channel), " or ",
              at::IntArrayRef(block), ", got ", size);
  return WeightScale::kBlock;
}

WeightScale check_experts(const at::Tensor& x, const at::Tensor& offsets, const at::Tensor& weight,
                          const at::Tensor& weight_scale, const c10::optional<at::Tensor>& bias,
                          const c10::optional<at::Tensor>& input_slot, int64_t activations, int64_t parts,
                          c10::optional<at::ScalarType> dtype) {
  type_of(x.scalar_type(), "x");
  check_strided(x, "x");
  TORCH_CHECK_TYPE(weight.scalar_type() == at::kFloat8_e4m3fn, "torch_fp8: frozen experts must be float8_e4m3fn, got ",
                   weight.scalar_type());
  TORCH_CHECK(weight.dim() == 3 && weight.is_contiguous(),
              "torch_fp8: frozen experts must be a contiguous stack (experts, out_features, in_features), got ",
              weight.sizes(), " with strides ", weight.strides());
  const int64_t experts = weight.size(0);
  TORCH_CHECK(x.dim() == 2 && x.size(1) == weight.size(2), "torch_fp8: the experts' input must have shape [rows, ",
              weight.size(2), "], got ", x.sizes());
  check_same_device(weight, "the experts' weight", x, "the input");
  check_same_device(weight, "the experts' weight", weight_scale, "weight_scale");
  TORCH_CHECK_VALUE(parts >= 1 && weight.size(1) % parts == 0, "torch_fp8: parts must divide the experts' ",
                    weight.size(1), " outputs, got ", parts);
  TORCH_CHECK_VALUE(activations >= 0 && activations <= 3, "torch_fp8: activations must be 0, 1, 2 or 3, got ",
                    activations);
  if (static_cast<Activations>(activations) == Activations::kStatic) {
    TORCH_CHECK(input_slot, "torch_fp8: static activations need an input_slot; calibrate the model first");
    check_slots(*input_slot, experts);
    check_same_device(weight, "the experts' weight", *input_slot, "input_slot");
  }
  if (bias) {
    type_of(bias->scalar_type(), "the bias");
    check_same_device(weight, "the experts' weight", *bias, "the bias");
    TORCH_CHECK(bias->dim() == 2 && bias->size(0) == experts && bias->size(1) == weight.size(1),
                "torch_fp8: the experts' bias must have shape [", experts, ", ", weight.size(1), "], got ",
                bias->sizes());
  }
  if (dtype) type_of(*dtype, "dtype");

  TORCH_CHECK(offsets.is_cpu() && offsets.scalar_type() == at::kLong && offsets.dim() == 1 && offsets.is_contiguous() &&
                  offsets.size(0) == experts + 1,
              "torch_fp8: offsets must be a contiguous int64 tensor of ", experts + 1, " elements on the CPU, got ",
              offsets.scalar_type(), " ", offsets.sizes(), " on ", offsets.device());
  const int64_t* const begin = offsets.const_data_ptr<int64_t>();
  bool is_sorted = begin[0] == 0 && begin[experts] <= x.size(0);
  for (int64_t e = 0; e < experts; ++e) is_sorted = is_sorted && begin[e] <= begin[e + 1];
  TORCH_CHECK_INDEX(is_sorted, "torch_fp8: offsets must rise from 0 to at most ", x.size(0),
                    ", the rows of the input; an expert's number that is negative makes them begin later");
  return kind_of(weight_scale, weight.sizes(), parts);
}

// The weight's scales in the form that serves most products with one. Where blocks do not divide a part there is no
// grid of the whole: then each part is a product.
struct StackScales {
  WeightScale kind;
  at::Tensor scale;
  bool by_parts;
};

StackScales scales_of_stack(WeightScale kind, const at::Tensor& weight, const at::Tensor& weight_scale, int64_t parts) {
  const int64_t experts = weight.size(0), n = weight.size(1), part = n / parts;
  if (kind == WeightScale::kTensor && parts > 1) {
    const at::Tensor of_channels = weight_scale.unsqueeze(2).expand({experts, parts, part}).reshape({experts, n, 1});
    return {WeightScale::kChannel, of_channels, false};
  }
  return {kind, weight_scale, kind == WeightScale::kBlock && parts > 1 && part % kScaleBlock != 0};
}

}  // namespace

at::Tensor frozen_experts(const at::Tensor& x, const at::Tensor& offsets, const at::Tensor& weight,
                          const at::Tensor& weight_scale_given, const c10::optional<at::Tensor>& bias_given,
                          const c10::optional<at::Tensor>& input_slot, int64_t activations, int64_t parts,
                          c10::optional<at::ScalarType> dtype_given) {
  const WeightScale given =
      check_experts(x, offsets, weight, weight_scale_given, bias_given, input_slot, activations, parts, dtype_given);
  const c10::DeviceGuard guard(x.device());
  const NoAutocast no_autocast;
  const at::ScalarType dtype = dtype_given.value_or(x.scalar_type());
  const int64_t experts = weight.size(0), n = weight.size(1), part = n / parts;
  const auto [kind, weight_scale, by_parts] = scales_of_stack(given, weight, weight_scale_given, parts);
  c10::optional<at::Tensor> bias = bias_given;
  if (bias) bias = bias->to(dtype).contiguous();

  const at::Tensor y = at::empty({x.size(0), n}, x.options().dtype(dtype));
  const int64_t* const begin = offsets.const_data_ptr<int64_t>();
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t rows = begin[e + 1] - begin[e];
    if (rows == 0) continue;
    const at::Tensor its_x = x.narrow(0, begin[e], rows), its_y = y.narrow(0, begin[e], rows);
    const at::Tensor its_weight = weight[e], its_scale = weight_scale[e];
    c10::optional<at::Tensor> its_bias, its_slot;
    if (bias) its_bias = (*bias)[e];
    if (input_slot) its_slot = input_slot->narrow(0, e, 1);
    const auto how = static_cast<Activations>(activations);
    if (!by_parts) {
      frozen_product(its_x, its_weight, its_scale, kind, its_bias, its_slot, how, dtype, its_y);
      continue;
    }
    for (int64_t i = 0; i < parts; ++i) {
      c10::optional<at::Tensor> part_bias;
      if (its_bias) part_bias = its_bias->narrow(0, i * part, part);
      const int64_t grid = blocks(part);
      its_y.narrow(1, i * part, part)
          .copy_(frozen_product(its_x, its_weight.narrow(0, i * part, part), its_scale.narrow(0, i * grid, grid), kind,
                                part_bias, its_slot, how, dtype));
    }
  }
  y.narrow(0, begin[experts], x.size(0) - begin[experts]).zero_();
  return y;
}

at::Tensor frozen_experts_backward(const at::Tensor& dy, const at::Tensor& offsets, const at::Tensor& weight,
                                   const at::Tensor& weight_scale_given, int64_t activations, int64_t parts,
                                   at::ScalarType x_dtype) {
  const int64_t experts = weight.size(0), n = weight.size(1), part = n / parts;
  const auto [kind, weight_scale, by_parts] =
      scales_of_stack(kind_of(weight_scale_given, weight.sizes(), parts), weight, weight_scale_given, parts);
  const int64_t* const begin = offsets.const_data_ptr<int64_t>();
  const at::Tensor dx = at::zeros({dy.size(0), weight.size(2)}, dy.options().dtype(x_dtype));
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t rows = begin[e + 1] - begin[e];
    if (rows == 0) continue;
    const at::Tensor its_dy = dy.narrow(0, begin[e], rows), its_dx = dx.narrow(0, begin[e], rows);
    if (!by_parts) {
      its_dx.copy_(frozen_linear_backward(its_dy, weight[e], weight_scale[e], activations, x_dtype));
      continue;
    }
    const int64_t grid = blocks(part);
    for (int64_t i = 0; i < parts; ++i) {
      its_dx.add_(frozen_linear_backward(its_dy.narrow(1, i * part, part), weight[e].narrow(0, i * part, part),
                                         weight_scale[e].narrow(0, i * grid, grid), activations, x_dtype));
    }
  }
  return dx;
}

}  // namespace torch_fp8
