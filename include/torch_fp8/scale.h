// From an amax to a scale. One text for host and device, so that both compute the same bits.
#pragma once

#include "torch_fp8/format.h"

namespace torch_fp8 {

// The state of one quantised tensor role. 16 bytes, because cuBLASLt 12.9 to 13.1 wants the scalar scale pointer
// 16-byte aligned: scale_inv comes first and is read by the GEMM where it lies.
struct alignas(16) Slot {
  float scale_inv;  // what the GEMM multiplies by; 1 / scale
  float scale;      // what the cast multiplies by
  float amax;       // maximum of |x| over everything quantised since the last update
  float cursor;     // entries of the history written in this turn of the ring, 1 ... length; 0: no history yet
};
static_assert(sizeof(Slot) == 16, "tensors of state are (roles, 4) float32");

enum Role : int { kInput = 0, kWeight = 1, kGradOutput = 2, kRoles = 3 };  // of a linear layer
// Of an attention; P: softmax's numerators, GradP: dS = P * (dP - rowsum(dO * O)).
enum AttentionRole : int { kQ, kK, kV, kP, kO, kGradO, kGradP, kGradQ, kGradK, kGradV, kAttentionRoles };

// Scales stay where both they and their reciprocals are normal numbers.
constexpr float kMaxScale = 8.5070591730234616e37f;   // 2^126
constexpr float kMinScale = 1.1754943508222875e-38f;  // 2^-126
constexpr int kMaxBias = 31;                          // of power-of-two scales, as in arXiv 2309.17224

// An amax that says something: 0 (nothing seen), Inf and NaN do not.
TORCH_FP8_HOST_DEVICE inline bool is_usable(float amax) {
  return bits_of(amax) - 1u < 0x7F800000u - 1u;  // positive and finite
}

TORCH_FP8_HOST_DEVICE inline int clipped_bias(int bias) {
  return bias > kMaxBias ? kMaxBias : bias < -kMaxBias ? -kMaxBias : bias;
}

// The scale that maps amax to target = fp8_max / 2^margin. amax must be usable.
// kExact: target / amax. With the target's margin: 2^b, b = clip(clip(floor(log2(fp8_max / amax)), -31, 31) - margin),
// as arXiv 2309.17224 has it, in integers: with amax = m * 2^e and fp8_max = 1.75 * 2^f, as both formats have it, the
// floor is f - e, less one where m > 1.75.
constexpr int kExact = -1;
TORCH_FP8_HOST_DEVICE inline float scale_for(float amax, float target, int margin) {
  if (margin == kExact) {
    const float scale = target / amax;
    return scale > kMaxScale ? kMaxScale : scale < kMinScale ? kMinScale : scale;
  }
  const int mantissa_above = (bits_of(amax) & 0x7FFFFF) > 0x600000;
  const int apart = static_cast<int>(bits_of(target) >> 23) - static_cast<int>(bits_of(amax) >> 23);
  const int bias = clipped_bias(clipped_bias(apart + margin - mantissa_above) - margin);
  return float_of(static_cast<uint32_t>(127 + bias) << 23);
}

// Whether this can be the state of a role: the scale and its reciprocal belong together, amax is a magnitude (NaN: one
// was seen), cursor a place in a ring.
inline bool is_sound(const Slot& slot) {
  return slot.scale >= kMinScale && slot.scale <= kMaxScale && slot.scale_inv == 1.0f / slot.scale &&
         !(slot.amax < 0) && slot.cursor >= 0 && slot.cursor < 0x1p24f && slot.cursor == std::floor(slot.cursor);
}

// The slot of a tensor that is scaled by its own amax; scale 1 where that says nothing.
TORCH_FP8_HOST_DEVICE inline Slot own_slot(float amax, float target, int margin) {
  const float scale = is_usable(amax) ? scale_for(amax, target, margin) : 1.0f;
  return {1.0f / scale, scale, amax, 0.0f};
}

// sum * (a * b) of two scales. Where their product is beyond float32 both are above 1, and multiplying by one after the
// other overflows only where the result does: a sum of 0 stays 0.
TORCH_FP8_HOST_DEVICE inline float rescaled(float sum, float a, float b) {
  const float both = a * b;
  return bits_of(both) == 0x7F800000 ? sum * a * b : sum * both;
}

// A delayed scale is unfit for a tensor of this amax if it maps the amax more than a binade beyond the format's range,
// or more than 5 binades below the target. The binade above is room for a tensor that grows from step to step: there it
// saturates, as under any delayed scaling.
TORCH_FP8_HOST_DEVICE inline bool is_unfit(float scale, float amax, Format format, float target) {
  const float mapped = amax * scale;
  return is_usable(amax) && (mapped > max_of(format) * 2 || mapped < target / 32);
}

}  // namespace torch_fp8
