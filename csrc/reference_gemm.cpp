#include "reference_gemm.h"

#include <ATen/ATen.h>

#include "check.h"

namespace torch_fp8 {

void reference_gemm(const GemmArgs& args, c10::Device device) {
  const auto tensor = [&](const void* data, at::IntArrayRef size, at::ScalarType dtype) {
    return at::from_blob(const_cast<void*>(data), size, at::TensorOptions().dtype(dtype).device(device));
  };
  const at::Tensor a = tensor(args.a, {args.m, args.k}, dtype_of(args.a_format)).to(at::kFloat);
  const at::Tensor b = tensor(args.b, {args.n, args.k}, dtype_of(args.b_format)).to(at::kFloat);
  const int64_t a_scales = args.vector_scales ? args.m : 1, b_scales = args.vector_scales ? args.n : 1;
  at::Tensor out = tensor(args.out, {args.m, args.n}, dtype_of(args.out_type));

  at::Tensor product = at::mm(a, b.t());
  if (args.a_scale_inv) {
    product.mul_(tensor(args.a_scale_inv, {a_scales, 1}, at::kFloat) *
                 tensor(args.b_scale_inv, {1, b_scales}, at::kFloat));
  }
  if (args.bias) product.add_(tensor(args.bias, {args.n}, out.scalar_type()));
  if (args.accumulate) product.add_(out);
  out.copy_(product);
}

}  // namespace torch_fp8
