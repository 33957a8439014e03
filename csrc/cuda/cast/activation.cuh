// What an activation makes of gate and up, element by element: for the kernels that cast it by tiles and by rows.
#pragma once

#include "activation.h"
#include "cuda/common/block.cuh"

namespace torch_fp8::cuda {

// By instructions that take a number below 2^-126 for 0: what hangs on such a number is far below every code's unit.
struct Math {
  static __device__ float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  static __device__ float exp(float x) { return exp2(x * 1.44269504f); }
  static __device__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  // The tail P(-|x|) is the density times a ratio of polynomials, fitted to 4e-7 from 0 to 14, where the density ends.
  // Every coefficient is positive, so no digit is lost where x is negative.
  static __device__ Normal normal(float x) {
    const float density = exp2(fmaf(x * x, -0.72134752f, -1.32574806f)), z = fminf(fabsf(x), 14.0f);
    const float above = fmaf(fmaf(fmaf(0.0427319342f, z, 0.299620365f), z, 0.907325698f), z, 1.25331366f);
    const float below = fmaf(fmaf(fmaf(fmaf(0.0427369358f, z, 0.299417719f), z, 0.953437872f), z, 1.5218069f), z, 1.0f);
    const float tail = density * above * reciprocal(below);
    return {x < 0 ? tail : 1.0f - tail, density};
  }
};

// One of the factors, whose rows can be loaded in packs to the end.
template <class T>
struct Factor {
  const Matrix& x;

  __device__ Pack<T> load(int64_t row, int64_t col) const {
    if (row >= x.rows || col >= x.cols) return {};
    return *reinterpret_cast<const Pack<T>*>(static_cast<const T*>(x.data) + row * x.row_stride + col);
  }
  __device__ float at(int64_t row, int64_t col) const {
    return to_float(static_cast<const T*>(x.data)[row * x.row_stride + col]);
  }
};

// f(gate), or f(gate) * up.
template <class T, Activation kActivation, bool kGated>
struct Product {
  Factor<T> gate, up;
  Shape shape;

  __device__ float of(float gate, float up) const { return activate<kActivation, Math>(gate, shape) * up; }
  __device__ float at(int64_t row, int64_t col) const { return of(gate.at(row, col), kGated ? up.at(row, col) : 1.0f); }
};

template <class Function>
void with_bool(bool value, Function&& function) {
  value ? function(std::true_type{}) : function(std::false_type{});
}

}  // namespace torch_fp8::cuda
