// The reference: each head in float32, a norm, and then its pairs turned.
#include <cmath>
#include <vector>

#include <ATen/Parallel.h>

#include "types.h"

namespace torch_fp8::cpu {
namespace {

using Row = std::vector<float>;

struct Place {
  int64_t batch, token, head;
};

Row read(const Heads& x, Type type, const Place& at, int64_t dims) {
  Row row(static_cast<size_t>(dims));
  const int64_t first = at.batch * x.batch_stride + at.token * x.token_stride + at.head * x.head_stride;
  for (size_t i = 0; i < row.size(); ++i) row[i] = element(x.data, type, first + static_cast<int64_t>(i));
  return row;
}

// sign -1 turns back by the same angles: the transposed map.
void turn(Row& row, const RotaryArgs& args, const Place& at, float sign) {
  for (int64_t pair = 0; pair < args.rotary_dims / 2; ++pair) {
    const int64_t column =
        at.batch * args.table_batch_stride + at.token * args.table_token_stride + pair * args.table_pair_stride;
    const float c = element(args.cos, args.table_type, column), s = sign * element(args.sin, args.table_type, column);
    float& first = row[static_cast<size_t>(args.interleaved ? 2 * pair : pair)];
    float& second = row[static_cast<size_t>(args.interleaved ? 2 * pair + 1 : pair + args.rotary_dims / 2)];
    const float x1 = first, x2 = second;
    first = x1 * c - x2 * s;
    second = x2 * c + x1 * s;
  }
}

float rstd_of(const Row& x, float eps) {
  float sum = 0;
  for (const float value : x) sum += value * value;
  return 1.0f / std::sqrt(sum / static_cast<float>(x.size()) + eps);
}

Row factors(const RotaryArgs& args, const RotarySide& side) {
  Row factors(static_cast<size_t>(args.dims), 1.0f);
  if (!side.gain) return factors;
  for (size_t i = 0; i < factors.size(); ++i) {
    factors[i] = args.norm == RotaryNorm::kTanh
                     ? element(side.gain, side.gain_type, 0)
                     : element(side.gain, side.gain_type, static_cast<int64_t>(i)) + args.gain_offset;
  }
  return factors;
}

void normalise(Row& x, RotaryNorm norm, const Row& gain, float eps) {
  const float rstd = norm == RotaryNorm::kRms ? rstd_of(x, eps) : 0;
  for (size_t i = 0; i < x.size(); ++i) {
    if (norm == RotaryNorm::kRms) x[i] = x[i] * rstd * gain[i];
    if (norm == RotaryNorm::kTanh) x[i] = std::tanh(gain[i] * x[i]);
  }
}

// dz, the gradient behind the norm, becomes that in front of it; what each element gives to the gain is added to sums.
void normalise_backward(Row& dz, const Row& x, RotaryNorm norm, const Row& gain, float eps, std::vector<double>& sums) {
  const auto size = static_cast<float>(dz.size());
  const float rstd = norm == RotaryNorm::kRms ? rstd_of(x, eps) : 0;
  float dot = 0;
  for (size_t i = 0; i < dz.size(); ++i) dot += dz[i] * gain[i] * (x[i] * rstd);
  for (size_t i = 0; i < dz.size(); ++i) {
    if (norm == RotaryNorm::kRms) {
      sums[i] += dz[i] * (x[i] * rstd);
      dz[i] = rstd * (dz[i] * gain[i] - x[i] * rstd * (dot / size));
    } else {
      const float t = std::tanh(gain[i] * x[i]), slope = dz[i] * (1.0f - t * t);
      sums[i] += slope * x[i];
      dz[i] = slope * gain[i];
    }
  }
}

template <class Function>
void for_heads(const RotaryArgs& args, const RotarySide& side, int64_t begin, int64_t end, const Function& function) {
  for (int64_t i = begin; i < end; ++i) {
    function(i, Place{i / side.heads / args.tokens, i / side.heads % args.tokens, i % side.heads});
  }
}

void write(const RotaryArgs& args, const RotarySide& side, int64_t head, const Row& row) {
  for (size_t i = 0; i < row.size(); ++i) {
    set_element(side.out, args.type, head * args.dims + static_cast<int64_t>(i), row[i]);
  }
}

void rotary(const RotaryArgs& args) {
  for (const RotarySide* side : {&args.q, &args.k}) {
    const Row gain = factors(args, *side);
    at::parallel_for(0, args.batch * args.tokens * side->heads, 16, [&](int64_t begin, int64_t end) {
      for_heads(args, *side, begin, end, [&](int64_t head, const Place& at) {
        Row row = read(side->x, args.type, at, args.dims);
        normalise(row, args.norm, gain, args.eps);
        turn(row, args, at, 1.0f);
        write(args, *side, head, row);
      });
    });
  }
}

void rotary_backward(const RotaryArgs& args) {
  constexpr int64_t kShares = 16;  // whatever the number of threads, so that sums are the same
  for (const RotarySide* side : {&args.q, &args.k}) {
    if (side->heads == 0 && !side->dgain) continue;
    const Row gain = factors(args, *side);
    const int64_t heads = args.batch * args.tokens * side->heads, share = (heads + kShares - 1) / kShares;
    std::vector<std::vector<double>> sums(kShares, std::vector<double>(static_cast<size_t>(args.dims)));
    at::parallel_for(0, kShares, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for_heads(args, *side, std::min(i * share, heads), std::min((i + 1) * share, heads),
                  [&](int64_t head, const Place& at) {
                    Row row = read(side->dy, args.type, at, args.dims);
                    turn(row, args, at, -1.0f);
                    if (args.norm != RotaryNorm::kNone) {
                      normalise_backward(row, read(side->x, args.type, at, args.dims), args.norm, gain, args.eps,
                                         sums[static_cast<size_t>(i)]);
                    }
                    write(args, *side, head, row);
                  });
      }
    });
    if (!side->dgain) continue;
    for (size_t i = 1; i < sums.size(); ++i) {
      for (size_t j = 0; j < sums[0].size(); ++j) sums[0][j] += sums[i][j];
    }
    const bool one = args.norm == RotaryNorm::kTanh;
    for (size_t j = 1; one && j < sums[0].size(); ++j) sums[0][0] += sums[0][j];
    for (int64_t j = 0; j < (one ? 1 : args.dims); ++j) {
      set_element(side->dgain, side->gain_type, j, static_cast<float>(sums[0][static_cast<size_t>(j)]));
    }
  }
}

[[maybe_unused]] const bool filled = [] {
  cpu_kernels().rotary = rotary;
  cpu_kernels().rotary_backward = rotary_backward;
  return true;
}();

}  // namespace
}  // namespace torch_fp8::cpu
