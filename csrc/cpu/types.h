// How the references read and write elements, whose dtype is known when they run.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "kernels.h"

namespace torch_fp8::cpu {

// function(a value of that type)
template <class Function>
auto with_type(Type type, Function&& function) {
  switch (type) {
    case Type::kFloat16: return function(c10::Half{});
    case Type::kBFloat16: return function(c10::BFloat16{});
    default: return function(float{});
  }
}

template <class T>
float element(const Matrix& x, int64_t row, int64_t col) {
  return static_cast<float>(static_cast<const T*>(x.data)[row * x.row_stride + col * x.col_stride]);
}

inline float element(const void* data, Type type, int64_t at) {
  return with_type(type, [&](auto t) { return static_cast<float>(static_cast<const decltype(t)*>(data)[at]); });
}
inline float element(const Matrix& x, int64_t row, int64_t col) {
  return element(x.data, x.type, row * x.row_stride + col * x.col_stride);
}
inline void set_element(void* data, Type type, int64_t at, float value) {
  with_type(type, [&](auto t) { static_cast<decltype(t)*>(data)[at] = static_cast<decltype(t)>(value); });
}

}  // namespace torch_fp8::cpu
