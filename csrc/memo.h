// What the host remembers of one layer between calls. None of it is state: everything here can be thrown away at any
// time and is found again from the layer's tensors, so it is neither saved nor copied with the layer.
#pragma once

#include <array>
#include <atomic>
#include <mutex>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "kernels.h"
#include "torch_fp8/cast.h"

namespace torch_fp8 {

// A role as the host knows it: by what name errors call it and, where its scale never changes, that scale.
struct MemoRole {
  std::string name;
  float constant = 0;
};

class LayerMemo {
 public:
  explicit LayerMemo(std::vector<MemoRole> roles);  // as many as the slots have rows
  ~LayerMemo();
  LayerMemo(const LayerMemo&) = delete;

  // A number that finds the memo again while it lives: what a graph of autograd can carry.
  int64_t number() const { return number_; }
  static std::shared_ptr<LayerMemo> find(int64_t number);

  // Which roles have an amax history, one bit each; constant ones never do. Read from the device when not known (once,
  // and again after an update that may have begun one), which a stream capture does not allow: an error then. A row
  // that is read and is no state (is_sound in scale.h) is replaced by one without history, one of a constant role that
  // has another scale by its own.
  int64_t history(const at::Tensor& slots, int64_t roles_asked);
  // From who has read it already: spares this layer its own reading of the device.
  void set_history(int64_t history);
  // Everything is found again from the tensors, but captured(): a graph that was recorded may still be replayed.
  void forget();

  // The weight's codes, if they are kept and still those of this tensor, in both layouts if transposed; else none. They
  // are dropped where the weight may be another one: its identity, the stream or the graph has changed, or a gradient
  // of it was made and is gone.
  c10::optional<Codes> kept_weight(const at::Tensor& weight, const cuda::StreamState& now, bool transposed,
                                   bool has_main_grad);
  // Whether the codes of a weight that is cast now are worth keeping: the last step had several micro-batches, and this
  // one has had fewer. So a loop that never ends a step keeps nothing.
  bool shall_keep(const at::Tensor& weight);
  void keep_weight(const at::Tensor& weight, const cuda::StreamState& now, const Codes& codes);
  // The kept codes are void: the weight changed in a way that cannot be seen.
  void forget_weight();
  // A gradient of the weight was made: from now on somebody may use it up.
  void note_weight_grad() { grad_made_.store(true, std::memory_order_relaxed); }

  // The weight is there for the time of a forward or backward only (FSDP2 gathers it, and frees it after): its FP8
  // copies must not outlive that, so none is kept, and backward casts the weight that it finds.
  void set_gathered(bool gathered) { gathered_ = gathered; }
  // No codes are kept from a forward to its backward, which makes them again.
  void set_recompute(bool recompute) { recompute_ = recompute; }
  bool recompute() const { return recompute_; }
  bool casts_again() const { return gathered_ || recompute_; }

  // A forward in training: of which thread, and in which recorded graph.
  void note_forward(const cuda::StreamState& now);
  void note_used(int role) { note_used_roles(int64_t{1} << role); }
  void note_used_roles(int64_t roles) { used_.fetch_or(static_cast<uint16_t>(roles), std::memory_order_relaxed); }
  // The roles that took part in training since the last update, or may have, one bit each. Replays of a graph tell the
  // host nothing, so a layer that one was recorded of may always have.
  int64_t used_roles() const { return captured_ ? 0xFFFF : used_.load(std::memory_order_relaxed); }
  bool captured() const { return captured_; }
  int64_t updates() const { return updates_; }  // how many end_step() has counted
  uint64_t thread() const { return thread_; }   // of the last forward in training; 0: there was none
  // To be called after every scaling update, with the weight as it is now, if that is known.
  void end_step(const at::Tensor* weight);
  // The weight was changed by its optimizer, without a scaling update.
  void see_weight(const at::Tensor& weight);
  // Whether somebody else than the optimizer has changed the weight since the last update, as far as the host can see:
  // its scale says nothing of it then. What the host cannot see, recast finds on the device (scale.h).
  bool weight_was_changed(const at::Tensor& weight);

 private:
  // Which tensor, in which storage, at which address, in which version. The weak pointer keeps the storage's identity
  // from being given to something new.
  struct Identity {
    const void* tensor = nullptr;
    c10::weak_intrusive_ptr<c10::StorageImpl> storage{c10::intrusive_ptr<c10::StorageImpl>()};
    const void* data = nullptr;
    uint32_t version = 0;
    static Identity of(const at::Tensor& weight);
    bool operator==(const Identity& other) const;
  };
  struct Weight {
    Identity identity;
    Codes codes;
    cuda::StreamState made_on;  // other streams do not wait for it, and outside of its graph it does not exist
  };
  const int64_t number_;
  const std::vector<MemoRole> roles_;
  const int64_t constant_;  // roles, one bit each
  std::mutex mutex_;        // of weight_, updated_, history_ and known_: forwards hold no lock of Python's
  Weight weight_;
  Identity updated_;  // the weight when its scale was last updated
  bool known_ = false;
  int64_t history_ = 0;
  std::atomic<uint16_t> used_{0};                    // one bit a role; the backward thread writes it too
  std::atomic<int> forwards_{0}, last_forwards_{0};  // in training, in this step and in the last that ended
  std::atomic<bool> grad_made_{false}, captured_{false}, gathered_{false}, recompute_{false};
  std::atomic<int64_t> updates_{0};
  std::atomic<uint64_t> thread_{0};
};

std::shared_ptr<LayerMemo> new_memo(std::vector<MemoRole> roles);

// The stream that is current on the tensor's device, and the graph that it records.
cuda::StreamState stream_of(const at::Tensor& t);

// Meta and fake tensors hold no values; what is traced with them is the steady path.
inline bool has_values(const at::Tensor& t) { return !t.is_meta() && !t.key_set().has(c10::DispatchKey::Python); }

}  // namespace torch_fp8
