// How the tensors of one role of a layer are cast, and what a cast gives. A recipe says it once for each role; the ops,
// the scaling update, the monitor and the tuner all read it here.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

#include "torch_fp8/format.h"

namespace torch_fp8 {

enum class Scaling : uint8_t {
  kDelayed,   // by the slot's scale, once it has a history; before that by the tensor's own amax
  kCurrent,   // always by the tensor's own amax
  kConstant,  // by the slot's scale, which never changes
};

struct Cast {
  Format format = Format::kE4M3;
  Scaling scaling = Scaling::kDelayed;
  bool power_of_two = false;  // scales are rounded down to a power of two
  int64_t margin = 0;         // binades left free above an amax, 0 ... 31

  at::ScalarType dtype() const { return format == Format::kE5M2 ? at::kFloat8_e5m2 : at::kFloat8_e4m3fn; }
  double target() const;                                              // fp8_max / 2^margin: what an amax is mapped to
  int64_t rounding() const { return power_of_two ? 1 + margin : 0; }  // the power_of_two of update_scales_
  // As an op takes it: margin << 4 | scaling << 2 | power_of_two << 1 | E5M2.
  int64_t packed() const;
  static Cast unpacked(int64_t packed);
};

// A quantised tensor (M, K).
struct Codes {
  at::Tensor q;          // (pad16(M), pad16(K)) FP8; 0 elements where not asked for
  at::Tensor q_t;        // (pad16(K), pad16(M)) FP8, the transpose; likewise
  at::Tensor scale_inv;  // (1) float32: what a code is multiplied by
};

}  // namespace torch_fp8
