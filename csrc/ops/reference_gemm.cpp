#include "ops/reference_gemm.h"

#include <ATen/ATen.h>

#include "check.h"

namespace torch_fp8 {

void reference_gemm(const GemmArgs& args, c10::Device device) {
  const auto tensor = [&](const void* data, at::IntArrayRef size, at::ScalarType dtype) {
    return at::from_blob(const_cast<void*>(data), size, at::TensorOptions().dtype(dtype).device(device));
  };
  at::Tensor a = tensor(args.a, {args.m, args.k}, dtype_of(args.a_format)).to(at::kFloat);
  at::Tensor b = tensor(args.b, {args.n, args.k}, dtype_of(args.b_format)).to(at::kFloat);
  if (args.scales == Scales::kBlocks) {  // they change along k
    const int64_t across = args.k / kScaleBlock, down = (args.n + kScaleBlock - 1) / kScaleBlock;
    const at::Tensor a_scale = tensor(args.a_scale_inv, {across, args.m}, at::kFloat).t();
    const at::Tensor b_scale = tensor(args.b_scale_inv, {down, scale_stride(args.k)}, at::kFloat).narrow(1, 0, across);
    a.mul_(a_scale.repeat_interleave(kScaleBlock, 1));
    b.mul_(b_scale.repeat_interleave(kScaleBlock, 1).repeat_interleave(kScaleBlock, 0).narrow(0, 0, args.n));
  }
  at::Tensor out = tensor(args.out, {args.m, args.n}, dtype_of(args.out_type));

  at::Tensor product = at::mm(a, b.t());
  if (args.a_scale_inv && args.scales != Scales::kBlocks) {
    const bool rows = args.scales == Scales::kRows;
    const at::Tensor a_scale = tensor(args.a_scale_inv, {rows ? args.m : 1, 1}, at::kFloat);
    const at::Tensor b_scale = tensor(args.b_scale_inv, {1, rows ? args.n : 1}, at::kFloat);
    // As rescaled() in scale.h.
    const at::Tensor both = a_scale * b_scale, is_beyond = both.isinf();
    product.mul_(at::where(is_beyond, a_scale, both)).mul_(at::where(is_beyond, b_scale, 1.0f));
  }
  if (args.bias) product.add_(tensor(args.bias, {args.n}, out.scalar_type()));
  if (args.addend) product.add_(tensor(args.addend, {args.m, args.n}, out.scalar_type()));
  out.copy_(product);
}

}  // namespace torch_fp8
