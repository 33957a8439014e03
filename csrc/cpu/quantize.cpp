// The reference: one loop over the elements, each scaled, encoded and noted.
#include <algorithm>
#include <atomic>

#include <ATen/Parallel.h>

#include "types.h"

namespace torch_fp8::cpu {
namespace {

template <class Function>
void with_format(Format format, Function&& function) {
  format == Format::kE4M3 ? function(E4M3{}) : function(E5M2{});
}

// As signed integers, since an amax that was loaded may be -0.0, which is then below everything.
void raise(float* amax, uint32_t seen) {
  auto* bits = reinterpret_cast<std::atomic<int32_t>*>(amax);
  int32_t held = bits->load();
  const auto magnitude = static_cast<int32_t>(seen);
  while (held < magnitude && !bits->compare_exchange_weak(held, magnitude)) {
  }
}

int64_t grain(int64_t cols) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, cols)); }

void amax(const Matrix& x, float* parts) {
  std::fill(parts, parts + kAmaxParts, 0.0f);
  with_type(x.type, [&](auto t) {
    at::parallel_for(0, x.rows, grain(x.cols), [&](int64_t begin, int64_t end) {
      uint32_t seen = 0;
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t col = 0; col < x.cols; ++col) {
          seen = std::max(seen, magnitude(element<decltype(t)>(x, row, col)));
        }
      }
      raise(parts, seen);
    });
  });
}

void scale_from_amax(const float* parts, Slot* slot, float target, int margin) {
  uint32_t seen = 0;
  for (int i = 0; i < kAmaxParts; ++i) seen = std::max(seen, bits_of(parts[i]));
  *slot = own_slot(float_of(seen), target, margin);
}

void quantize(const QuantizeArgs& args) {
  const Matrix& x = args.x;
  const int64_t rows = padded(x.rows), cols = padded(x.cols);
  const float scale = args.slot->scale;
  if (args.scale_inv) *args.scale_inv = args.slot->scale_inv;

  with_type(x.type, [&](auto t) {
    with_format(args.format, [&](auto f) {
      using F = decltype(f);
      // Whole groups of kBiasRows rows to a thread, so that each row of column sums has one writer.
      const int64_t groups = (rows + kBiasRows - 1) / kBiasRows;
      at::parallel_for(0, groups, grain(cols * kBiasRows), [&](int64_t begin, int64_t end) {
        uint32_t seen = 0;
        for (int64_t group = begin; group < end; ++group) {
          float* sums = args.column_sums ? args.column_sums + group * cols : nullptr;
          if (sums) std::fill(sums, sums + cols, 0.0f);
          const int64_t last_row = std::min(rows, (group + 1) * kBiasRows);
          for (int64_t row = group * kBiasRows; row < last_row; ++row) {
            for (int64_t col = 0; col < cols; ++col) {
              const bool inside = row < x.rows && col < x.cols;
              const float value = inside ? element<decltype(t)>(x, row, col) : 0.0f;
              const uint8_t code = encode<F>(value, scale);
              if (args.q) args.q[row * cols + col] = code;
              if (args.q_t) args.q_t[col * rows + row] = code;
              if (sums) sums[col] += value;
              seen = std::max(seen, magnitude(value));
            }
          }
        }
        if (args.amax) raise(args.amax, seen);
      });
    });
  });
}

void recast(const RecastArgs& args) {
  QuantizeArgs cast = args.cast;
  if (!is_unfit(cast.slot->scale, *cast.amax, cast.format, args.target)) return;
  const Slot own = own_slot(*cast.amax, args.target, args.margin);
  cast.slot = &own;
  cast.amax = cast.column_sums = nullptr;
  quantize(cast);
}

void quantize_rows(const QuantizeRowsArgs& args) {
  const Matrix& x = args.x;
  const int64_t cols = padded(x.cols);
  with_type(x.type, [&](auto t) {
    at::parallel_for(0, x.rows, grain(x.cols), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const auto value = [&](int64_t col) {
          const float of_x = col < x.cols ? element<decltype(t)>(x, row, col) : 0.0f;
          return args.col_scale && col < x.cols ? of_x * args.col_scale[col] : of_x;
        };
        uint32_t seen = 0;
        for (int64_t col = 0; col < x.cols; ++col) seen = std::max(seen, magnitude(value(col)));
        const Slot slot = own_slot(float_of(seen), E4M3::kMax, kExact);
        args.scale_inv[row] = slot.scale_inv;
        for (int64_t col = 0; col < cols; ++col) args.q[row * cols + col] = encode<E4M3>(value(col), slot.scale);
      }
    });
  });
}

void quantize_groups(const QuantizeGroupsArgs& args) {
  const Matrix& x = args.x;
  with_type(x.type, [&](auto t) {
    at::parallel_for(0, args.rows, grain(x.cols), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const auto value = [&](int64_t col) { return row < x.rows ? element<decltype(t)>(x, row, col) : 0.0f; };
        for (int64_t first = 0; first < x.cols; first += kScaleBlock) {
          uint32_t seen = 0;
          for (int64_t col = first; col < first + kScaleBlock; ++col) seen = std::max(seen, magnitude(value(col)));
          const Slot slot = own_slot(float_of(seen), E4M3::kMax, kExact);
          args.scale_inv[first / kScaleBlock * args.rows + row] = slot.scale_inv;
          for (int64_t col = first; col < first + kScaleBlock; ++col) {
            args.q[row * x.cols + col] = encode<E4M3>(value(col), slot.scale);
          }
        }
      }
    });
  });
}

void rescale(const RescaleArgs& args) {
  with_type(args.type, [&](auto t) {
    using T = decltype(t);
    for (int64_t row = 0; row < args.rows; ++row) {
      for (int64_t col = 0; col < args.cols; ++col) {
        const float row_scale = args.row_scale[args.one_row_scale ? 0 : row];
        const float col_scale = args.col_scale[args.one_col_scale ? 0 : col];
        float y = rescaled(args.sums[row * args.stride + col], row_scale, col_scale);
        if (args.bias) y += static_cast<float>(static_cast<const T*>(args.bias)[col]);
        static_cast<T*>(args.out)[row * args.cols + col] = static_cast<T>(y);
      }
    }
  });
}

void count_losses(const LossArgs& args) {
  const Matrix& x = args.x;
  const float scale = args.slot->scale, most = max_of(args.format), least = half_smallest_of(args.format);
  args.values[0] = scale;
  with_type(x.type, [&](auto t) {
    at::parallel_for(0, x.rows, grain(x.cols), [&](int64_t begin, int64_t end) {
      int64_t counts[kLosses] = {};
      uint32_t seen = 0;
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t col = 0; col < x.cols; ++col) {
          const float value = element<decltype(t)>(x, row, col), scaled = std::abs(value * scale);
          counts[kSaturated] += scaled > most && is_finite(value);
          counts[kFlushed] += value != 0 && scaled <= least;
          counts[kInf] += std::isinf(value);
          counts[kNaN] += std::isnan(value);
          seen = std::max(seen, magnitude(value));
        }
      }
      for (int i = 0; i < kLosses; ++i) std::atomic_ref(args.counts[i]) += counts[i];
      raise(args.values + 1, seen);
    });
  });
}

void dequantize(const DequantizeArgs& args) {
  float values[256];
  for (int code = 0; code < 256; ++code) values[code] = decode<E4M3>(static_cast<uint8_t>(code));
  with_type(args.type, [&](auto t) {
    using T = decltype(t);
    at::parallel_for(0, args.n, grain(args.k), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t col = 0; col < args.k; ++col) {
          const float scale = args.w_scale[scale_index(args.scale_kind, args.k, row, col)];
          static_cast<T*>(args.out)[row * args.k + col] = static_cast<T>(values[args.w[row * args.k + col]] * scale);
        }
      }
    });
  });
}

void transpose(const TransposeArgs& args) {
  const int64_t rows = padded(args.rows), cols = padded(args.cols);
  at::parallel_for(0, cols, grain(rows), [&](int64_t begin, int64_t end) {
    for (int64_t col = begin; col < end; ++col) {
      for (int64_t row = 0; row < rows; ++row) {
        const bool inside = row < args.rows && col < args.cols;
        args.out[col * rows + row] = inside ? args.codes[row * args.cols + col] : 0;
      }
    }
  });
}

void add_column_sums(const ColumnSums& sums) {
  with_type(sums.type, [&](auto t) {
    using T = decltype(t);
    for (int64_t col = 0; col < sums.cols; ++col) {
      float sum = 0;
      for (int64_t row = 0; row < sums.count; ++row) sum += sums.parts[row * sums.stride + col];
      static_cast<T*>(sums.out)[col] = static_cast<T>(sum);
    }
  });
}

[[maybe_unused]] const bool filled = [] {
  Kernels& table = cpu_kernels();
  table.amax = amax;
  table.scale_from_amax = scale_from_amax;
  table.quantize = quantize;
  table.recast = recast;
  table.quantize_rows = quantize_rows;
  table.quantize_groups = quantize_groups;
  table.count_losses = count_losses;
  table.add_column_sums = add_column_sums;
  table.rescale = rescale;
  table.dequantize = dequantize;
  table.transpose = transpose;
  return true;
}();

}  // namespace
}  // namespace torch_fp8::cpu
