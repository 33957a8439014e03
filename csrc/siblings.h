// Layers that read one tensor (q, k, v of an attention; gate and up of an MLP) share its codes: the first casts it, the
// others take what it made, and one transpose is kept for all. Their gradients of that tensor are summed by the GEMMs.
//
// A layer takes codes if the tensor is the same object in the same version, wanted in the same way, in the same step,
// on the same stream, and if the layer would have made the same codes. With an own amax or a constant scale all would.
// With a scale from history only a layer whose row of the scaling state is equal to the maker's would: it follows the
// maker. end_step keeps the rows equal, and lets go of a layer that has seen other tensors than the maker.
#pragma once

#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>

#include "again.h"
#include "memo.h"
#include "torch_fp8/cast.h"

namespace torch_fp8 {

// The node behind a tensor, std::shared_ptr in PyTorch 2.11 and c10::intrusive_ptr in 2.15; and what keeps its address
// from being given to another.
using Node = std::decay_t<decltype(std::declval<const at::Tensor&>().grad_fn())>;
template <class T>
std::weak_ptr<T> weak(const std::shared_ptr<T>& node) {
  return node;
}
template <class T>
c10::weak_intrusive_ptr<T> weak(const c10::intrusive_ptr<T>& node) {
  return c10::weak_intrusive_ptr<T>(node);
}
template <class T>
bool is_same(const std::weak_ptr<T>& a, const std::weak_ptr<T>& b) {
  return !a.owner_before(b) && !b.owner_before(a);
}
template <class T>
bool is_same(const c10::weak_intrusive_ptr<T>& a, const c10::weak_intrusive_ptr<T>& b) {
  return a == b;
}
using WeakNode = decltype(weak(Node()));

class Siblings {
 public:
  explicit Siblings(int members);
  int size() const { return static_cast<int>(members_.size()); }

  // What decides which codes a member makes of a tensor.
  struct Wanted {
    int64_t cast;  // packed
    bool by_history, record, rowwise, columnwise;
    int64_t step;  // updates of the scaling state
    cuda::StreamState now;
    const void* saving = nullptr;  // where codes are made again: the hooks of saved tensors (saving_hooks)
    bool operator==(const Wanted&) const = default;
  };
  struct Shared {
    Codes codes;
    at::Tensor x;                       // behind the node that hands the sum of the gradients on; or the input itself
    int64_t sum = 0;                    // number of that sum; 0: each layer's gradient is its own
    c10::optional<Source> source = {};  // of which backward makes the transpose, where it is not in codes
  };

  // The codes that another member has made of x, if this member may take them.
  c10::optional<Shared> take(const at::Tensor& x, int member, const Wanted& wanted);
  // Whether somebody would take what this member makes.
  bool has_takers(int member, const Wanted& wanted) const;
  // made_outside: what makes x cast it too, in place of that member, which takes the codes as well.
  void offer(const at::Tensor& x, int member, const Wanted& wanted, const Shared& shared, bool made_outside = false);
  // The member cast a tensor that no other member sees.
  void note_cast(int member);

  // follows[i]: whose row of the scaling state is equal to that of member i; -1: nobody's.
  void set_follows(const std::vector<int>& follows);
  std::vector<int> follows() const;
  // Whether the members read what a norm casts in the place of one of them; for the C++ modules (nn_layers.h).
  bool reads_norms = true;
  // Pairs (i, s): member i has taken codes of s, and so has seen its amax; or may have, in a compiled step, which tells
  // the host nothing.
  struct Step {
    std::vector<std::pair<int, int>> took, may_have_taken;
    // Members in whose place a tensor was cast by history that they did not read: their amax says something of it, too.
    std::vector<int> unread;
  };
  // The step has ended.
  Step end_step();

 private:
  struct Member {
    int follows = -1;
    int forwards = 0, taken = 0, made = 0;    // in this step: casts asked for, taken from others, made
    uint32_t taken_from = 0;                  // one bit a member
    int made_outside = 0, taken_outside = 0;  // by history: cast in its place, and taken by itself
  };
  bool is_offered(const at::Tensor& x) const;
  // What was offered, to be let go of without the lock: its graph may have to wait for Python.
  Shared withdraw();
  mutable std::mutex mutex_;
  std::vector<Member> members_;
  // The last offer, of a tensor whose address the weak pointers keep from being given to another.
  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> tensor_{
      c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>()};
  c10::weak_intrusive_ptr<c10::StorageImpl> storage_{c10::intrusive_ptr<c10::StorageImpl>()};
  const void* data_ = nullptr;
  uint32_t version_ = 0;
  bool requires_grad_ = false;
  WeakNode grad_fn_ = weak(Node());
  std::vector<int64_t> sizes_, strides_;
  int maker_ = -1, left_ = 0;  // how many may still take it; 0: there is no offer
  bool made_outside_ = false;
  Wanted wanted_{};
  Shared shared_;
};

// The hooks through which tensors are saved now. A checkpoint counts those, so within one no source is taken that was
// made without: when it is run again, there is none.
const void* saving_hooks();

// x, behind a node of autograd whose backward ends the sum of that number.
at::Tensor fork_gradient(const at::Tensor& x, int64_t sum);
int64_t new_sum();
// Whether the engine itself runs this backward: compiled autograd expects a gradient of each layer, and its values.
bool can_sum();
// In a backward: what the layers of that sum have made in it so far, for those that come after.
struct SharedInBackward {
  at::Tensor dx;   // the sum, to be added to; or undefined
  at::Tensor x_t;  // the transpose of their input's codes, where it was made again; or undefined
};
SharedInBackward shared_so_far(int64_t sum);
void share_in_backward(int64_t sum, const SharedInBackward& made);

}  // namespace torch_fp8
