#include "siblings.h"

#include <algorithm>
#include <unordered_map>
#include <utility>

#include <ATen/ATen.h>
#include <ATen/SavedTensorHooks.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>

#include "check.h"

namespace torch_fp8 {

Siblings::Siblings(int members) : members_(static_cast<size_t>(members)) {
  TORCH_CHECK_VALUE(members >= 1 && members <= 32, "torch_fp8: 1 to 32 layers can read one tensor together, got ",
                    members);
}

namespace {

bool can_be_told_apart(const at::Tensor& x) { return has_values(x) && !x.is_inference(); }

}  // namespace

bool Siblings::is_offered(const at::Tensor& x) const {
  return left_ > 0 && can_be_told_apart(x) && tensor_._unsafe_get_target() == x.unsafeGetTensorImpl() &&
         data_ == x.const_data_ptr() && storage_._unsafe_get_target() == x.storage().unsafeGetStorageImpl() &&
         version_ == static_cast<uint32_t>(x._version()) && x.sizes() == at::IntArrayRef(sizes_) &&
         x.strides() == at::IntArrayRef(strides_) && requires_grad_ == x.requires_grad() &&
         is_same(grad_fn_, weak(x.grad_fn()));
}

c10::optional<Siblings::Shared> Siblings::take(const at::Tensor& x, int member, const Wanted& wanted) {
  Shared dying;
  const std::lock_guard lock(mutex_);
  Member& taker = members_[static_cast<size_t>(member)];
  ++taker.forwards;
  const bool makes = maker_ == member;
  if ((makes && !made_outside_) || !is_offered(x) || !(wanted == wanted_)) return c10::nullopt;
  if (wanted.by_history && !makes && taker.follows != maker_) return c10::nullopt;
  if (makes) {
    ++taker.made;  // in its place, and recorded in its slot
    ++taker.taken_outside;
  } else {
    ++taker.taken, taker.taken_from |= 1u << maker_;
  }
  Shared shared = shared_;
  if (--left_ == 0) dying = withdraw();
  return shared;
}

bool Siblings::has_takers(int member, const Wanted& wanted) const {
  if (!wanted.by_history) return true;
  const std::lock_guard lock(mutex_);
  return std::any_of(members_.begin(), members_.end(), [&](const Member& other) { return other.follows == member; });
}

void Siblings::offer(const at::Tensor& x, int member, const Wanted& wanted, const Shared& shared, bool made_outside) {
  if (!can_be_told_apart(x)) return;
  Shared dying;
  const std::lock_guard lock(mutex_);
  dying = withdraw();
  tensor_ = decltype(tensor_)(x.getIntrusivePtr());
  storage_ = x.storage().getWeakStorageImpl();
  data_ = x.const_data_ptr();
  version_ = static_cast<uint32_t>(x._version());
  requires_grad_ = x.requires_grad(), grad_fn_ = weak(x.grad_fn());
  sizes_ = x.sizes().vec(), strides_ = x.strides().vec();
  if (made_outside && wanted.by_history && wanted.record) ++members_[static_cast<size_t>(member)].made_outside;
  maker_ = member, made_outside_ = made_outside, wanted_ = wanted, shared_ = shared;
  const auto takes = [&](const Member& other) { return !wanted.by_history || other.follows == member; };
  left_ = static_cast<int>(std::count_if(members_.begin(), members_.end(), takes)) - !wanted.by_history + made_outside;
}

Siblings::Shared Siblings::withdraw() {
  left_ = 0, maker_ = -1;
  tensor_.reset(), storage_.reset(), grad_fn_ = weak(Node());
  return std::exchange(shared_, {});
}

void Siblings::note_cast(int member) {
  const std::lock_guard lock(mutex_);
  ++members_[static_cast<size_t>(member)].made;
}

void Siblings::set_follows(const std::vector<int>& follows) {
  Shared dying;
  const std::lock_guard lock(mutex_);
  for (size_t i = 0; i < members_.size(); ++i) members_[i].follows = follows[i];
  dying = withdraw();
}

std::vector<int> Siblings::follows() const {
  const std::lock_guard lock(mutex_);
  std::vector<int> follows;
  follows.reserve(members_.size());
  for (const Member& member : members_) follows.push_back(member.follows);
  return follows;
}

Siblings::Step Siblings::end_step() {
  Shared dying;
  const std::lock_guard lock(mutex_);
  Step step;
  const bool ran = std::any_of(members_.begin(), members_.end(), [](const Member& m) { return m.forwards > 0; });
  for (int i = 0; i < static_cast<int>(members_.size()); ++i) {
    Member& member = members_[static_cast<size_t>(i)];
    for (int s = 0; s < static_cast<int>(members_.size()); ++s) {
      if (member.taken_from >> s & 1) step.took.emplace_back(i, s);
    }
    if (member.made_outside > member.taken_outside) step.unread.push_back(i);
    if (member.follows < 0) continue;
    if (!ran) step.may_have_taken.emplace_back(i, member.follows);
    // Who cast for itself, or saw less than the one it follows, has seen other values.
    const Member& maker = members_[static_cast<size_t>(member.follows)];
    if (member.taken != member.forwards || member.taken != maker.made) member.follows = -1;
  }
  for (Member& member : members_) member = {member.follows};
  dying = withdraw();
  return step;
}

const void* saving_hooks() {
  const auto hooks = at::SavedTensorDefaultHooks::get_hooks();
  return hooks ? hooks->first.ptr(&hooks->first.pyinterpreter()) : nullptr;
}

// ---- sums of gradients ---------------------------------------------------------------------------------------------

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The sums that have begun in a backward that runs: each belongs to one forward and one backward.
struct Sums {
  struct Sum {
    int backward;  // the number of the graph task
    SharedInBackward made;
  };
  std::mutex mutex;
  int64_t next = 1;
  std::unordered_map<int64_t, Sum> begun;
};

Sums& sums() {
  static auto* const made = new Sums;
  return *made;
}

struct ForkGradient : torch::autograd::Function<ForkGradient> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, int64_t sum) {
    ctx->saved_data["sum"] = sum;
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return at::alias(x);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const std::lock_guard lock(sums().mutex);
    sums().begun.erase(ctx->saved_data["sum"].toInt());
    return {grads[0], at::Tensor()};
  }
};

}  // namespace

int64_t new_sum() {
  const std::lock_guard lock(sums().mutex);
  return sums().next++;
}

at::Tensor fork_gradient(const at::Tensor& x, int64_t sum) { return ForkGradient::apply(x, sum); }

bool can_sum() { return torch::autograd::get_current_node() != nullptr; }

SharedInBackward shared_so_far(int64_t sum) {
  const std::lock_guard lock(sums().mutex);
  const auto found = sums().begun.find(sum);
  const bool mine =
      found != sums().begun.end() && found->second.backward == torch::autograd::get_current_graph_task_id();
  return mine ? found->second.made : SharedInBackward{};
}

void share_in_backward(int64_t sum, const SharedInBackward& made) {
  const int backward = torch::autograd::get_current_graph_task_id();
  const std::lock_guard lock(sums().mutex);
  sums().begun.insert_or_assign(sum, Sums::Sum{backward, made});
}

}  // namespace torch_fp8
