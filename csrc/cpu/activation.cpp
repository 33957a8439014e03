// The reference: what the activation makes, in float32, and then the cast.
#include "activation.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include <ATen/Parallel.h>

#include "types.h"

namespace torch_fp8::cpu {
namespace {

struct Math {
  static float exp(float x) { return std::exp(x); }
  static float reciprocal(float x) { return 1.0f / x; }
  static Normal normal(float x) { return {0.5f * std::erfc(x * -0.70710678f), std::exp(-0.5f * x * x) * 0.39894228f}; }
};

// value(row, col) of all rows and columns.
template <class Value>
std::vector<float> all_of(int64_t rows, int64_t cols, const Value& value) {
  std::vector<float> values(static_cast<size_t>(rows * cols));
  at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t col = 0; col < cols; ++col) values[static_cast<size_t>(row * cols + col)] = value(row, col);
    }
  });
  return values;
}

// quantize of value(row, col).
template <class Value>
void cast(QuantizeArgs args, const Value& value) {
  const int64_t rows = args.x.rows, cols = args.x.cols;
  const std::vector<float> values = all_of(rows, cols, value);
  args.x = {values.data(), Type::kFloat32, rows, cols, cols, 1};
  cpu_kernels().quantize(args);
}

void activate(const ActivationArgs& args) {
  const Shape shape = shape_of(args.xielu);
  with_activation(args.activation, [&](auto f) {
    cast(args.cast, [&](int64_t row, int64_t col) {
      const float up = args.up.data ? element(args.up, row, col) : 1.0f;
      return torch_fp8::activate<f(), Math>(element(args.cast.x, row, col), shape) * up;
    });
  });
}

void activate_rows(const ActivationRowsArgs& args) {
  const int64_t rows = args.gate.rows, cols = args.gate.cols;
  with_activation(args.activation, [&](auto f) {
    const std::vector<float> values = all_of(rows, cols, [&](int64_t row, int64_t col) {
      const float up = args.up.data ? element(args.up, row, col) : 1.0f;
      return torch_fp8::activate<f(), Math>(element(args.gate, row, col), Shape{}) * up;
    });
    cpu_kernels().quantize_rows(
        {{values.data(), Type::kFloat32, rows, cols, cols, 1}, args.q, args.scale_inv, nullptr});
  });
}

// dy * up * df / dalpha, summed over each tile.
void sum_by_alpha(const ActivationBackwardArgs& args) {
  const Matrix &gate = args.gate.x, &up = args.up.x;
  const Shape shape = shape_of(args.xielu);
  const int64_t across = tiles_along(gate.cols), down = tiles_along(gate.rows);
  std::fill(args.alpha_sums, args.alpha_sums + 2 * down * across, 0.0f);
  at::parallel_for(0, down, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kTile; row < std::min(end * kTile, gate.rows); ++row) {
      for (int64_t col = 0; col < gate.cols; ++col) {
        const float x = element(gate, row, col), factor = up.data ? element(up, row, col) : 1.0f;
        const float by_alpha = differentiate<Activation::kXielu, Math>(x, shape).by_alpha;
        float* const sums = args.alpha_sums + 2 * (row / kTile * across + col / kTile);
        sums[x > 0 ? 0 : 1] += element(args.dy, row, col) * factor * by_alpha;
      }
    }
  });
}

void activate_backward(const ActivationBackwardArgs& args) {
  const Matrix &gate = args.gate.x, &up = args.up.x;
  const Shape shape = shape_of(args.xielu);
  if (args.alpha_sums) sum_by_alpha(args);
  with_activation(args.activation, [&](auto f) {
    const auto of_gate = [&](int64_t row, int64_t col) {
      const float factor = up.data ? element(up, row, col) : 1.0f;
      return element(args.dy, row, col) * (factor * differentiate<f(), Math>(element(gate, row, col), shape).slope);
    };
    const auto of_up = [&](int64_t row, int64_t col) {
      return element(args.dy, row, col) * torch_fp8::activate<f(), Math>(element(gate, row, col), shape);
    };
    if (args.halves != Halves::kNone) {
      QuantizeArgs both = args.gate;
      both.x.cols *= 2;
      cast(both, [&](int64_t row, int64_t col) {
        const bool is_gate = (col < gate.cols) == (args.halves == Halves::kGateFirst);
        return is_gate ? of_gate(row, col % gate.cols) : of_up(row, col % gate.cols);
      });
      return;
    }
    cast(args.gate, of_gate);
    if (up.data) cast(args.up, of_up);
  });
}

[[maybe_unused]] const bool filled = [] {
  cpu_kernels().activate = activate;
  cpu_kernels().activate_rows = activate_rows;
  cpu_kernels().activate_backward = activate_backward;
  return true;
}();

}  // namespace
}  // namespace torch_fp8::cpu
