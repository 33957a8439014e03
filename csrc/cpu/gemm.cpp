// The reference: codes to float32, a float32 matrix product, one rounding at the end. Products of FP8 codes are exact
// in float32, so the only error besides the output's rounding is that of a float32 sum.
#include <array>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "torch_fp8/kernels.h"

namespace torch_fp8::cpu {
namespace {

template <class F>
std::array<float, 256> decode_table() {
  std::array<float, 256> table;
  for (int code = 0; code < 256; ++code) table[code] = decode<F>(static_cast<uint8_t>(code));
  return table;
}

at::Tensor decoded(const uint8_t* codes, Format format, int64_t rows, int64_t cols) {
  static const auto e4m3 = decode_table<E4M3>();
  static const auto e5m2 = decode_table<E5M2>();
  const auto& table = format == Format::kE4M3 ? e4m3 : e5m2;
  at::Tensor values = at::empty({rows, cols}, at::kFloat);
  float* out = values.data_ptr<float>();
  at::parallel_for(0, rows * cols, 65536, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = table[codes[i]];
  });
  return values;
}

at::ScalarType dtype_of(Type type) {
  return type == Type::kFloat32 ? at::kFloat : type == Type::kFloat16 ? at::kHalf : at::kBFloat16;
}

}  // namespace

void gemm(const GemmArgs& args) {
  const at::Tensor a = decoded(args.a, args.a_format, args.m, args.k);
  const at::Tensor b = decoded(args.b, args.b_format, args.n, args.k);
  at::Tensor product = at::mm(a, b.t()).mul_(*args.a_scale_inv * *args.b_scale_inv);

  const auto dtype = at::TensorOptions().dtype(dtype_of(args.out_type));
  at::Tensor out = at::from_blob(args.out, {args.m, args.n}, dtype);
  if (args.bias) product.add_(at::from_blob(const_cast<void*>(args.bias), {args.n}, dtype));
  if (args.accumulate) product.add_(out);
  out.copy_(product);
}

}  // namespace torch_fp8::cpu
