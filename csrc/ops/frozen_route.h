// Which way a frozen layer's product goes: the one place that decides it, for the op, for tuning and for emulation. It
// looks at sizes and types only, so that a machine without a GPU can be asked what one with a GPU would do.
#pragma once

#include "kernels.h"
#include "torch_fp8/ops.h"

namespace torch_fp8 {

// All that the way depends on: x (m, k) and weight (n, k) give y (m, n).
struct FrozenProduct {
  int64_t m, n, k;
  WeightScale weight_scale;
  Activations activations;
  Type x, y;
  bool is_aligned;  // the weight, to 16 bytes
  bool on_cuda;
};

enum class Way : uint8_t {
  kZeros,        // there is no x, no output or nothing to add up
  kFewRows,      // x in 16 bits: a kernel of ours streams the weight
  kDequantized,  // x as it is: the weight is written in 16 or 32 bits, PyTorch multiplies
  kStreamed,     // x in FP8: a kernel of ours streams the weight
  kRescaled,     // x in FP8: cuBLASLt gives float32 without scales, a kernel of ours applies them
  kScaled        // x in FP8: cuBLASLt applies the scales
};
constexpr bool is_quantized(Way way) { return way >= Way::kStreamed; }

// Rows of x that kFewRows takes, kSkinnyRows at a time: after the first time the weight comes from the L2 cache, which
// is cheaper than to write it in 16 bits and read it again.
constexpr int64_t kFewRows = 32;

// Whether x is quantised: few rows are not, since the time there is that of reading the weight, and wide outputs, which
// read much of it, have fewer such rows. To scales of blocks x brings groups of as many columns, or stays in 16 bits.
constexpr bool is_input_quantized(int64_t m, int64_t n, int64_t k, WeightScale weight_scale, Activations activations) {
  if (m <= (n > kWideOutputs ? kSkinnyRows / 2 : kSkinnyRows)) return false;
  if (weight_scale == WeightScale::kBlock) return activations == Activations::kToken && k % kScaleBlock == 0;
  return activations != Activations::kNone;
}

// Of a quantised x and the weight: as many scales on the one as on the other, since cuBLASLt mixes no modes but those
// of blocks.
constexpr Scales scales_of(WeightScale weight_scale, Activations activations) {
  if (weight_scale == WeightScale::kBlock) return Scales::kBlocks;
  const bool one_each = weight_scale == WeightScale::kTensor && activations != Activations::kToken;
  return one_each ? Scales::kOne : Scales::kRows;
}

constexpr Way way_of(const FrozenProduct& p) {
  if (p.m == 0 || p.n == 0 || p.k == 0) return Way::kZeros;
  const bool can_stream = p.on_cuda && p.y != Type::kFloat32 && p.k % kAlignment == 0 && p.is_aligned;
  if (!is_input_quantized(p.m, p.n, p.k, p.weight_scale, p.activations)) {
    const bool fits = p.m <= kFewRows && p.k < (1 << 30) && p.x != Type::kFloat32;
    return can_stream && fits ? Way::kFewRows : Way::kDequantized;
  }
  const Scales scales = scales_of(p.weight_scale, p.activations);
  // With one scale on each side cuBLASLt needs no kernel behind it, and wide outputs keep it busy.
  const bool is_faster = scales == Scales::kRows || (scales == Scales::kOne && p.n <= kWideOutputs);
  if (can_stream && is_faster && p.m <= kSkinnyFp8Rows) return Way::kStreamed;
  // cuBLASLt has no algorithm with vectors of scales that splits k. Where the output has so few rows, or so few tiles
  // of 128 x 128 that they leave multiprocessors idle, its product without scales and our rescaling are faster.
  // float32 adds its bias in rescaling, too: the epilogue has none of that type.
  const int64_t tiles = (p.m + 127) / 128 * ((padded(p.n) + 127) / 128);
  const bool is_idle = p.m <= 32 || tiles < 96;
  return scales == Scales::kRows && (is_idle || p.y == Type::kFloat32) ? Way::kRescaled : Way::kScaled;
}

// The product that gives x's gradient: dy (m, n) . weight (n, k), seen as dy on the weight's transpose (k, n). There
// the scale of an output lies along the sum: dy's column takes it with it into its cast, and the transpose has scales
// of 1.
constexpr FrozenProduct gradient_of(const FrozenProduct& p) {
  FrozenProduct gradient = p;
  gradient.n = p.k, gradient.k = p.n;
  // Each row of dy by its own amax, however x is quantised: a static scale is made for x, and one amax of all rows
  // would flush those of tokens with small gradients. Who wants x in 16 bits gets dy in 16 bits too.
  if (p.activations != Activations::kNone) gradient.activations = Activations::kToken;
  gradient.is_aligned = true;  // the transpose is made by the call
  return gradient;
}

// Its way. For few rows, and where dy is not quantised, the weight is written in 16 bits as it lies: to transpose it
// would cost as much.
constexpr Way way_of_gradient(const FrozenProduct& p) {
  const Way way = way_of(gradient_of(p));
  return way == Way::kZeros || (is_quantized(way) && p.m > kSkinnyFp8Rows) ? way : Way::kDequantized;
}

}  // namespace torch_fp8
