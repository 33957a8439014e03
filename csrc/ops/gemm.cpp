// gemm, gemm_accumulate_: check, allocate, run on the tensors' backend.
#include <c10/core/DeviceGuard.h>

#include "check.h"
#include "ops/record.h"
#include "torch_fp8/ops.h"

namespace torch_fp8 {
namespace {

void check_operand(const at::Tensor& t, const at::Tensor& scale_inv, const char* name, int64_t rows) {
  TORCH_CHECK(t.dim() == 2 && t.is_contiguous() && t.size(1) % kAlignment == 0 && is_aligned(t.const_data_ptr()),
              "torch_fp8: ", name, " must be a contiguous, 16-byte aligned matrix whose columns are a multiple of ",
              kAlignment, ", got ", t.sizes(), " with strides ", t.strides(),
              "; torch.ops.torch_fp8.quantize gives such matrices");
  TORCH_CHECK(t.size(0) >= rows, "torch_fp8: ", name, " must have at least the ", rows,
              " rows that the output needs, got ", t.sizes());
  TORCH_CHECK(scale_inv.scalar_type() == at::kFloat && scale_inv.numel() == 1, "torch_fp8: ", name,
              "_scale_inv must be one float32, got ", scale_inv.scalar_type(), " ", scale_inv.sizes());
  TORCH_CHECK(is_aligned(scale_inv.const_data_ptr()), "torch_fp8: ", name,
              "_scale_inv must lie at a 16-byte boundary (a rule of cuBLASLt), got address ",
              scale_inv.const_data_ptr(), "; use .clone()");
  check_same_device(t, name, scale_inv, "its scale_inv");
}

// What both ops ask of a, b and their product of shape (m, n).
GemmArgs check_gemm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& a_scale_inv,
                    const at::Tensor& b_scale_inv, int64_t m, int64_t n, at::ScalarType dtype, bool fast_accum) {
  GemmArgs args{};
  args.a_format = format_of(a.scalar_type(), "a");
  args.b_format = format_of(b.scalar_type(), "b");
  args.out_type = type_of(dtype, "the output");
  TORCH_CHECK(args.a_format != Format::kE5M2 || args.b_format != Format::kE5M2,
              "torch_fp8: a and b are both float8_e5m2, which FP8 GEMMs do not take; quantise one of them to "
              "float8_e4m3fn");
  check_operand(a, a_scale_inv, "a", m);
  check_operand(b, b_scale_inv, "b", padded(n));
  check_same_device(a, "a", b, "b");
  TORCH_CHECK(a.size(1) == b.size(1),
              "torch_fp8: a and b must have as many columns (both are contracted along them), "
              "got ",
              a.sizes(), " and ", b.sizes());
  args.m = m, args.n = padded(n), args.k = a.size(1);
  args.a = static_cast<const uint8_t*>(a.const_data_ptr());
  args.b = static_cast<const uint8_t*>(b.const_data_ptr());
  args.a_scale_inv = static_cast<const float*>(a_scale_inv.const_data_ptr());
  args.b_scale_inv = static_cast<const float*>(b_scale_inv.const_data_ptr());
  args.fast_accum = fast_accum;
  return args;
}

void run(const GemmArgs& args, const at::Tensor& a) { GemmRecord::run(kernels_of(a), args); }

}  // namespace

at::Tensor gemm(const at::Tensor& a, const at::Tensor& b, const at::Tensor& a_scale_inv, const at::Tensor& b_scale_inv,
                const c10::optional<at::Tensor>& bias, at::IntArrayRef size, at::ScalarType dtype, bool fast_accum,
                const c10::optional<at::Tensor>& addend) {
  TORCH_CHECK(!size.empty(), "torch_fp8: size must name at least the output's columns, got []");
  const int64_t m = leading_size(size), n = size.back();
  GemmArgs args = check_gemm(a, b, a_scale_inv, b_scale_inv, m, n, dtype, fast_accum);
  const c10::DeviceGuard guard(a.device());
  const NoAutocast no_autocast;
  if (bias) {
    TORCH_CHECK(bias->scalar_type() == dtype && bias->dim() == 1 && bias->size(0) == n, "torch_fp8: bias must be ",
                dtype, " of shape [", n, "], got ", bias->scalar_type(), " ", bias->sizes());
    check_same_device(a, "a", *bias, "bias");
  }
  if (addend) {
    TORCH_CHECK(addend->scalar_type() == dtype && addend->sizes() == size, "torch_fp8: addend must be ", dtype,
                " of the output's shape ", size, ", got ", addend->scalar_type(), " ", addend->sizes());
    check_same_device(a, "a", *addend, "addend");
  }

  const auto options = a.options().dtype(dtype);
  at::Tensor out = at::empty(size, options);
  if (out.numel() == 0) return out;
  const bool is_padded = args.n != n;
  at::Tensor target = is_padded ? at::empty({m, args.n}, options) : out;
  at::Tensor padded_bias;
  if (bias) {
    padded_bias = is_padded ? at::constant_pad_nd(*bias, {0, args.n - n}) : bias->contiguous();
    if (args.out_type == Type::kFloat32 || !is_aligned(padded_bias.const_data_ptr()) || args.k == 0) {
      // cuBLASLt's epilogue takes no float32 bias, and rounding it to 16 bits would lose what the caller has: start
      // from it instead. The same for a bias that lies at an odd address, and for an empty sum.
      target.copy_(padded_bias.expand_as(target));
      args.addend = address_of(target);
    } else {
      args.bias = address_of(padded_bias);
    }
  }
  args.out = target.data_ptr();
  // The GEMM's own sum is rounded once. It adds to float32 and bfloat16, and only what lies as the output does.
  const bool adds = addend && !args.addend && !is_padded && dtype != at::kHalf && args.k > 0 &&
                    addend->is_contiguous() && is_aligned(addend->const_data_ptr());
  if (adds) args.addend = address_of(*addend);
  if (args.k == 0) {  // an empty sum
    if (!args.addend) target.zero_();
  } else {
    run(args, a);
  }
  if (is_padded) out.view({m, n}).copy_(target.narrow(1, 0, n));
  if (addend && !adds) out.add_(*addend);
  return out;
}

void gemm_accumulate_(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, const at::Tensor& a_scale_inv,
                      const at::Tensor& b_scale_inv, bool fast_accum) {
  TORCH_CHECK_TYPE(out.scalar_type() == at::kFloat || out.scalar_type() == at::kBFloat16,
                   "torch_fp8: out must be float32 or bfloat16 to be accumulated into, got ", out.scalar_type());
  TORCH_CHECK(out.dim() >= 1 && out.layout() == at::kStrided && out.is_contiguous() && is_aligned(out.const_data_ptr()),
              "torch_fp8: out must be contiguous and start at a 16-byte boundary, got ", out.sizes(), " with strides ",
              out.strides(), " at ", out.const_data_ptr(), "; use out.clone()");
  check_same_device(a, "a", out, "out");
  const int64_t m = leading_size(out.sizes()), n = out.size(-1);
  GemmArgs args = check_gemm(a, b, a_scale_inv, b_scale_inv, m, n, out.scalar_type(), fast_accum);
  if (out.numel() == 0 || args.k == 0) return;
  const c10::DeviceGuard guard(a.device());
  const NoAutocast no_autocast;
  if (args.n != n) {
    out.add_(gemm(a, b, a_scale_inv, b_scale_inv, {}, out.sizes(), at::kFloat, fast_accum));
    return;
  }
  args.out = out.data_ptr();
  args.addend = address_of(out);
  run(args, a);
}

}  // namespace torch_fp8
