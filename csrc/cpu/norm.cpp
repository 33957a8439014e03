// The reference: sums in float64, each element in float32, and then the cast.
#include <cmath>
#include <vector>

#include <ATen/Parallel.h>

#include "types.h"

namespace torch_fp8::cpu {
namespace {

std::vector<float> floats(const Vector& v, int64_t cols, float offset, float otherwise) {
  std::vector<float> values(static_cast<size_t>(cols), otherwise);
  if (!v.data) return values;
  with_type(v.type, [&](auto t) {
    const auto* const source = static_cast<const decltype(t)*>(v.data);
    for (int64_t col = 0; col < cols; ++col) values[static_cast<size_t>(col)] = source[col] + offset;
  });
  return values;
}

template <class T>
void norm_as(const NormArgs& args) {
  const Matrix& x = args.cast.x;
  const int64_t rows = x.rows, cols = x.cols;
  const std::vector<float> gain = floats(args.gain, cols, args.gain_offset, 1.0f);
  const std::vector<float> bias = floats(args.bias, cols, 0.0f, 0.0f);
  std::vector<float> values(static_cast<size_t>(rows * cols));
  at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* const of_row = values.data() + row * cols;
      double sum = 0, squares = 0;
      for (int64_t col = 0; col < cols; ++col) {
        of_row[col] = element<T>(x, row, col);
        if (args.residual.data) of_row[col] = T(of_row[col] + element<T>(args.residual, row, col));
        if (args.sum) static_cast<T*>(args.sum)[row * cols + col] = of_row[col];
        sum += of_row[col];
      }
      const double mean = args.layer_norm ? sum / static_cast<double>(cols) : 0;
      for (int64_t col = 0; col < cols; ++col) squares += (of_row[col] - mean) * (of_row[col] - mean);
      const auto rstd = static_cast<float>(1 / std::sqrt(squares / static_cast<double>(cols) + args.eps));
      if (args.layer_norm) args.stats[row] = static_cast<float>(mean);
      args.stats[(args.layer_norm ? rows : 0) + row] = rstd;
      for (int64_t col = 0; col < cols; ++col) {
        const auto at = static_cast<size_t>(col);
        of_row[col] = (of_row[col] - static_cast<float>(mean)) * rstd * gain[at] + bias[at];
        if (args.y) static_cast<T*>(args.y)[row * cols + col] = of_row[col];
      }
    }
  });
  if (!args.cast.slot) return;
  QuantizeArgs cast = args.cast;
  cast.x = {values.data(), Type::kFloat32, rows, cols, cols, 1};
  cpu_kernels().quantize(cast);
}

template <class T>
void norm_backward_as(const NormBackwardArgs& args) {
  const int64_t rows = args.x.rows, cols = args.x.cols;
  const std::vector<float> gain = floats(args.gain, cols, args.gain_offset, 1.0f);
  at::parallel_for(0, args.parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      float* const dgain = args.dgain ? args.dgain + part * cols : nullptr;
      float* const dbias = args.dbias ? args.dbias + part * cols : nullptr;
      if (dgain) std::fill(dgain, dgain + cols, 0.0f);
      if (dbias) std::fill(dbias, dbias + cols, 0.0f);
      for (int64_t row = part; row < rows; row += args.parts) {
        const float mean = args.layer_norm ? args.stats[row] : 0;
        const float rstd = args.stats[(args.layer_norm ? rows : 0) + row];
        const auto normalised = [&](int64_t col) { return (element<T>(args.x, row, col) - mean) * rstd; };
        const auto gradient = [&](int64_t col) {
          return element<T>(args.dy, row, col) * gain[static_cast<size_t>(col)];
        };
        double sum = 0, products = 0;
        for (int64_t col = 0; col < cols; ++col) {
          sum += gradient(col);
          products += double{gradient(col)} * normalised(col);
        }
        const auto of_sum = args.layer_norm ? static_cast<float>(sum / static_cast<double>(cols)) : 0.0f;
        const auto of_products = static_cast<float>(products / static_cast<double>(cols));
        for (int64_t col = 0; col < cols; ++col) {
          const float dy = element<T>(args.dy, row, col), n = normalised(col);
          float dx = rstd * (gradient(col) - of_sum - n * of_products);
          if (args.dsum.data) dx += element<T>(args.dsum, row, col);
          static_cast<T*>(args.dx)[row * cols + col] = dx;
          if (dgain) dgain[col] += dy * n;
          if (dbias) dbias[col] += dy;
        }
      }
    }
  });
}

void norm(const NormArgs& args) {
  with_type(args.cast.x.type, [&](auto t) { norm_as<decltype(t)>(args); });
}

void norm_backward(const NormBackwardArgs& args) {
  with_type(args.x.type, [&](auto t) { norm_backward_as<decltype(t)>(args); });
}

void norm_rows(const NormRowsArgs& args) { norm_and_quantize(cpu_kernels(), args); }

[[maybe_unused]] const bool filled = [] {
  cpu_kernels().norm = norm;
  cpu_kernels().norm_rows = norm_rows;
  cpu_kernels().norm_backward = norm_backward;
  return true;
}();

}  // namespace
}  // namespace torch_fp8::cpu
