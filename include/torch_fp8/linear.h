// y = x W^T + b with all three GEMMs (fprop, dgrad, wgrad) in FP8: the differentiable function under both
// torch_fp8.Linear (Python) and torch_fp8::nn::Linear (C++).
//
// Forward:  cast+transpose x, cast+transpose w (cached), one GEMM. Kept for backward: the FP8 transposes of x and w.
// Backward: cast+transpose dy (and its column sums, the bias gradient), two GEMMs. Each copy of dy is freed as soon as
// its GEMM is queued. Where the weight is gathered (FSDP2) its transpose is made here instead.
#pragma once

#include <array>
#include <atomic>
#include <memory>

#include "torch_fp8/cuda.h"
#include "torch_fp8/ops.h"
#include "torch_fp8/scale.h"

namespace torch_fp8 {

enum class Scaling : uint8_t {
  kDelayed,   // by the slot's scale, once it has a history; before that by the tensor's own amax
  kCurrent,   // always by the tensor's own amax
  kConstant,  // by the slot's scale, which never changes
};

// A recipe as the C++ side needs it; python/torch_fp8/recipe.py documents the fields.
struct LinearOptions {
  Scaling scaling = Scaling::kDelayed;
  bool e4m3_gradients = false;  // else E5M2 (HYBRID)
  bool power_of_two = false;
  int64_t margin = 0;       // of inputs and weights
  int64_t grad_margin = 0;  // of output gradients
  bool fast_fprop = true, fast_dgrad = false, fast_wgrad = false;

  at::ScalarType dtype(int role) const {
    return role == kGradOutput && !e4m3_gradients ? at::kFloat8_e5m2 : at::kFloat8_e4m3fn;
  }
  int64_t margin_of(int role) const { return role == kGradOutput ? grad_margin : margin; }
  // fp8_max / 2^margin: what an amax is mapped to.
  double target(int role) const;
};

// What the host remembers of one layer between calls. None of it is state: everything here can be thrown away at any
// time and is found again from the layer's tensors, so it is neither saved nor copied with the layer.
class LayerMemo {
 public:
  // Whether the role has an amax history. Read from the device when not known (once, and again after an update that
  // may have begun one), which a stream capture does not allow: an error then.
  bool has_history(int role, const at::Tensor& slots);

  // The weight in FP8. In training (forwards with gradients, whose micro-batches share it) it is kept, and quantised
  // again only after it, its scale, the stream, the recorded graph or what is asked for has changed; in evaluation it
  // is quantised each time, since there nothing bounds how long a write that cannot be seen would stay unseen.
  Quantized quantized_weight(const at::Tensor& weight, const at::Tensor& slots, const LinearOptions& options,
                             bool transposed, bool training, bool record);
  // Everything is found again from the tensors; what has been recorded in a graph stays so.
  void forget();
  // The weight is there for the time of a forward or backward only (FSDP2 gathers it, and frees it after): its FP8
  // copies must not outlive that, so none is kept, and backward casts the weight that it finds.
  void set_gathered(bool gathered) { gathered_ = gathered; }
  bool gathered() const { return gathered_; }
  // The kept copy is void: the weight changed in a way that cannot be seen.
  void forget_weight() { weight_ = {}; }

  void note_used(int role) { used_.fetch_or(static_cast<uint8_t>(1 << role), std::memory_order_relaxed); }
  // The roles that took part in training since the last update, or may have, one bit each. Replays of a graph tell the
  // host nothing, so a layer that one was recorded of may always have.
  uint8_t used_roles() const { return captured_ ? 0b111 : used_.load(std::memory_order_relaxed); }
  bool captured() const { return captured_; }
  int64_t updates() const { return updates_; }  // how many after_update() has counted
  // To be called after every scaling update.
  void after_update();
  // Which roles have a history, from who has read it already: spares this layer its own reading of the device.
  void set_history(const std::array<bool, kRoles>& has_history) { has_history_ = has_history, known_ = true; }

 private:
  struct Weight {
    Quantized quantized;
    // Which tensor, in which storage, at which address, in which version. The weak pointers keep the identity of
    // what is gone from being given to something new.
    c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> impl{
        c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>()};
    c10::weak_intrusive_ptr<c10::StorageImpl> storage{c10::intrusive_ptr<c10::StorageImpl>()};
    const void* data = nullptr;
    int64_t version = 0;
    cuda::StreamState made_on;  // other streams do not wait for it, and outside of its graph it does not exist
    bool recorded = false;
    // The codes are those of this tensor as it is now, as far as can be seen.
    bool is_of(const at::Tensor& weight, const cuda::StreamState& now) const;
  };
  Weight weight_;
  bool known_ = false;
  std::array<bool, kRoles> has_history_ = {};
  std::atomic<uint8_t> used_{0};  // one bit a role; the backward thread writes it too
  bool captured_ = false, gathered_ = false;
  int64_t updates_ = 0;
};

// x (..., in) float32, float16 or bfloat16; weight (out, in) and bias (out) of x's dtype, or any of the three under
// autocast, whose dtype y then has. slots (3, 4): the scaling state of input, weight and output gradient.
// training false, or grad mode off: no amax is recorded.
// main_grad (out, in) float32 or bfloat16: the weight's gradient is added to it by the GEMM, and autograd sees none;
// or, with dummy_grad, one without meaning, for hooks that wait for a gradient.
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const c10::optional<at::Tensor>& bias,
                  const at::Tensor& slots, const LinearOptions& options, const std::shared_ptr<LayerMemo>& memo,
                  bool training, const c10::optional<at::Tensor>& main_grad = c10::nullopt, bool dummy_grad = false);

// The slots of a new layer: (3, 4) float32 with scale 1, or 2^bias for constant scaling.
at::Tensor new_slots(c10::Device device, int64_t bias = 0, int64_t grad_bias = 0);

}  // namespace torch_fp8
