// Argument checks shared by the ops: what was expected, what came, and the mend. All run before any kernel.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "kernels.h"

namespace torch_fp8 {

inline Type type_of(at::ScalarType dtype, const char* what) {
  switch (dtype) {
    case at::kFloat: return Type::kFloat32;
    case at::kHalf: return Type::kFloat16;
    case at::kBFloat16: return Type::kBFloat16;
    default:
      TORCH_CHECK_TYPE(false, "torch_fp8: ", what, " must be bfloat16, float16 or float32, got ", dtype,
                       "; cast it with .to(torch.bfloat16)");
  }
}

inline Format format_of(at::ScalarType dtype, const char* what) {
  switch (dtype) {
    case at::kFloat8_e4m3fn: return Format::kE4M3;
    case at::kFloat8_e5m2: return Format::kE5M2;
    default:
      TORCH_CHECK_TYPE(false, "torch_fp8: ", what, " must be float8_e4m3fn or float8_e5m2, got ", dtype,
                       "; quantise it with torch.ops.torch_fp8.quantize");
  }
}

inline at::ScalarType dtype_of(Format format) {
  return format == Format::kE4M3 ? at::kFloat8_e4m3fn : at::kFloat8_e5m2;
}

inline at::ScalarType dtype_of(Type type) {
  return type == Type::kFloat32 ? at::kFloat : type == Type::kFloat16 ? at::kHalf : at::kBFloat16;
}

inline void check_same_device(const at::Tensor& expected, const char* expected_name, const at::Tensor& t,
                              const char* name) {
  TORCH_CHECK(t.device() == expected.device(), "torch_fp8: ", name, " is on ", t.device(), " but ", expected_name,
              " is on ", expected.device(), "; move both to one device");
}

inline void check_strided(const at::Tensor& t, const char* name) {
  TORCH_CHECK(t.layout() == at::kStrided, "torch_fp8: ", name, " must be a dense (strided) tensor, got layout ",
              t.layout(), "; use .to_dense()");
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// (rows, 4) float32 slots; `rows` 0 takes any number.
inline void check_slots(const at::Tensor& slots, int64_t rows) {
  TORCH_CHECK(slots.scalar_type() == at::kFloat && slots.dim() == 2 && slots.sym_size(1) == 4 &&
                  slots.is_contiguous() && (rows == 0 ? slots.sym_size(0) > 0 : slots.sym_size(0) == rows),
              "torch_fp8: slots must be a contiguous float32 tensor of shape (", rows ? std::to_string(rows) : "roles",
              ", 4), got ", slots.scalar_type(), " ", slots.sym_sizes(), " with strides ", slots.sym_strides(),
              "; a layer's fp8_slots is of that form");
  if (slots.is_meta()) return;
  TORCH_CHECK(is_aligned(slots.const_data_ptr()), "torch_fp8: slots must start at a 16-byte boundary, got address ",
              slots.const_data_ptr(), "; use slots.clone()");
}

inline Slot* slots_of(const at::Tensor& slots) { return static_cast<Slot*>(slots.data_ptr()); }

// What every linear layer asks of its input (..., in) and bias (out) beside a weight (out, in).
inline void check_input(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK(!x.is_nested() && x.layout() == at::kStrided, "torch_fp8: the input must be a dense tensor, got a ",
              x.is_nested() ? "nested" : "sparse", " one; use .values() or .to_padded_tensor(0) of a nested tensor, ",
              ".to_dense() of a sparse one");
  TORCH_CHECK(x.dim() >= 1 && x.sym_size(-1) == weight.sym_size(1),
              "torch_fp8: the input's last dimension must be "
              "in_features = ",
              weight.sym_size(1), ", got an input of shape ", x.sym_sizes());
  check_same_device(weight, "the weight", x, "the input");
}

inline void check_bias(const at::Tensor& bias, const at::Tensor& weight) {
  type_of(bias.scalar_type(), "the bias");
  check_same_device(weight, "the weight", bias, "the bias");
  TORCH_CHECK(bias.dim() == 1 && bias.sym_size(0) == weight.sym_size(0), "torch_fp8: the bias must have shape [",
              weight.sym_size(0), "], got ", bias.sym_sizes());
}

// The ops choose their own precision: under torch.autocast the PyTorch functions they call would cast behind their
// back.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

// What an op gives in place of a result that nobody asked for.
inline at::Tensor nothing(const at::Tensor& like) { return at::empty({0}, like.options().dtype(at::kFloat)); }

// padded() of a size that may be symbolic.
inline c10::SymInt padded_symbolic(const c10::SymInt& n) { return (n + (kAlignment - 1)) / kAlignment * kAlignment; }

// The product of every size but the last, also where the last is 0.
inline int64_t leading_size(at::IntArrayRef size) { return c10::multiply_integers(size.slice(0, size.size() - 1)); }
inline c10::SymInt leading_size_symbolic(const at::Tensor& x) {
  c10::SymInt size = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) size = size * x.sym_size(i);
  return size;
}

}  // namespace torch_fp8
