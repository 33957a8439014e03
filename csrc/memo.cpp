#include "memo.h"

#include <bit>
#include <unordered_map>

#include <ATen/ATen.h>
#include <ATen/record_function.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/graph_task.h>

#include "check.h"
#include "torch_fp8/linear.h"

namespace torch_fp8 {
namespace {

// The memos that are alive, by number.
struct Registry {
  std::mutex mutex;
  int64_t next = 1;
  std::unordered_map<int64_t, std::weak_ptr<LayerMemo>> memos;
};

Registry& registry() {
  static auto* const made = new Registry;  // never destroyed: layers may outlive the library's statics
  return *made;
}

int64_t next_number() {
  const std::lock_guard lock(registry().mutex);
  return registry().next++;
}

// A plain tensor whose writes are counted.
bool has_identity(const at::Tensor& weight) {
  return has_values(weight) && weight.has_storage() && !weight.is_inference();
}

// Whose value the weight is: where that is a transposed matrix (Conv1D holds its weight so), the matrix. Such a view is
// made anew for each forward, but what it shows is not.
at::Tensor owner_of(const at::Tensor& weight) {
  if (weight.is_leaf() && weight.requires_grad()) return weight;  // a Parameter, as nearly always
  if (weight.dim() != 2 || !weight.is_view()) return weight;
  const at::Tensor base(weight._base());
  const bool transposed = base.dim() == 2 && base.size(0) == weight.size(1) && base.size(1) == weight.size(0) &&
                          base.stride(0) == weight.stride(1) && base.stride(1) == weight.stride(0);
  return transposed ? base : weight;
}

// The row of a role that has seen nothing.
at::Tensor fresh_row(float scale) { return at::tensor({1.0f / scale, scale, 0.0f, 0.0f}, at::kFloat); }

int64_t constant_roles(const std::vector<MemoRole>& roles) {
  int64_t constant = 0;
  for (size_t role = 0; role < roles.size(); ++role) constant |= int64_t{roles[role].constant != 0} << role;
  return constant;
}

}  // namespace

std::shared_ptr<LayerMemo> new_memo() { return new_memo({{"input"}, {"weight"}, {"output gradient"}}); }

std::shared_ptr<LayerMemo> new_memo(std::vector<MemoRole> roles) {
  auto memo = std::make_shared<LayerMemo>(std::move(roles));
  const std::lock_guard lock(registry().mutex);
  registry().memos.emplace(memo->number(), memo);
  return memo;
}

void end_step(LayerMemo& memo, const at::Tensor& weight) { memo.end_step(&weight); }
int64_t used_roles(const LayerMemo& memo) { return memo.used_roles(); }

LayerMemo::LayerMemo(std::vector<MemoRole> roles)
    : number_(next_number()), roles_(std::move(roles)), constant_(constant_roles(roles_)) {
  TORCH_CHECK(roles_.size() <= 16, "torch_fp8: a layer has at most 16 roles, got ", roles_.size());
}

LayerMemo::~LayerMemo() {
  const std::lock_guard lock(registry().mutex);
  registry().memos.erase(number_);
}

std::shared_ptr<LayerMemo> LayerMemo::find(int64_t number) {
  const std::lock_guard lock(registry().mutex);
  const auto found = registry().memos.find(number);
  return found == registry().memos.end() ? nullptr : found->second.lock();
}

cuda::StreamState stream_of(const at::Tensor& t) {
  if (!t.is_cuda()) return {};
  const c10::DeviceGuard guard(t.device());
  return cuda::current_stream();
}

int64_t LayerMemo::history(const at::Tensor& slots, int64_t roles_asked) {
  const std::lock_guard lock(mutex_);
  const auto is_capturing = [&] { return slots.is_cuda() && stream_of(slots).capture != 0; };
  if (!known_) {
    if (!has_values(slots)) return ~int64_t{0};
    check_slots(slots, static_cast<int64_t>(roles_.size()));
    TORCH_CHECK(!is_capturing(),
                "torch_fp8: a CUDA graph is being captured before this layer's first scaling update, so its first "
                "step, scaled by each tensor's own amax, would be replayed for ever; run at least two training steps "
                "(forward, backward, optimizer.step()) before the capture");
    const at::Tensor rows = slots.cpu();
    history_ = 0;
    for (int64_t role = 0; role < rows.size(0); ++role) {
      const Slot& slot = slots_of(rows)[role];
      const float constant = roles_[static_cast<size_t>(role)].constant;
      // Somebody else wrote what is no state: it is no history.
      if (!is_sound(slot) || (constant != 0 && slot.scale != constant)) {
        slots.select(0, role).copy_(fresh_row(constant != 0 ? constant : 1.0f));
      } else if (constant == 0) {
        history_ |= int64_t{slot.cursor > 0} << role;
      }
    }
    known_ = true;
  }
  const int64_t missing = roles_asked & ~history_ & ~constant_;
  if (missing != 0 && is_capturing()) {
    const auto role = static_cast<size_t>(std::countr_zero(static_cast<uint64_t>(missing)));
    TORCH_CHECK(false, "torch_fp8: a CUDA graph is being captured while this layer's ", roles_.at(role).name,
                " has no amax history; run training steps until it has seen a value other than zero, then capture");
  }
  return history_;
}

void LayerMemo::set_history(int64_t history) {
  const std::lock_guard lock(mutex_);
  history_ = history, known_ = true;
}

void LayerMemo::forget() {
  const std::lock_guard lock(mutex_);
  used_ = 0, forwards_ = 0, last_forwards_ = 0, updates_ = 0;
  weight_ = {}, updated_ = {};
  known_ = false;
}

void LayerMemo::end_step(const at::Tensor* weight) {
  const std::lock_guard lock(mutex_);
  const int64_t used = used_.exchange(0, std::memory_order_relaxed);
  last_forwards_ = forwards_.exchange(0);
  weight_ = {};
  updated_ = weight != nullptr && has_identity(*weight) ? Identity::of(*weight) : Identity{};
  ++updates_;
  if (used & ~history_ & ~constant_) known_ = false;  // a role may have a history now
}

void LayerMemo::see_weight(const at::Tensor& weight) {
  const std::lock_guard lock(mutex_);
  if (updated_.tensor != nullptr && has_identity(weight)) updated_ = Identity::of(weight);
}

bool LayerMemo::weight_was_changed(const at::Tensor& weight) {
  const std::lock_guard lock(mutex_);
  // What is made anew for each forward (a gathered weight, a view, a parametrization) has no past.
  if (updated_.tensor == nullptr || gathered_ || !has_identity(weight)) return false;
  const at::Tensor owner = owner_of(weight);
  return owner.is_leaf() && !(updated_ == Identity::of(owner));
}

void LayerMemo::note_forward(const cuda::StreamState& now) {
  ++forwards_;
  // A forward that is recomputed runs in a thread of the backward pass.
  if (torch::autograd::get_current_graph_task_id() < 0) thread_ = at::RecordFunction::currentThreadId();
  if (now.capture != 0) captured_ = true;
}

LayerMemo::Identity LayerMemo::Identity::of(const at::Tensor& weight) {
  return {weight.unsafeGetTensorImpl(), weight.storage().getWeakStorageImpl(), weight.const_data_ptr(),
          static_cast<uint32_t>(weight._version())};
}

bool LayerMemo::Identity::operator==(const Identity& other) const {
  return tensor == other.tensor && storage._unsafe_get_target() == other.storage._unsafe_get_target() &&
         data == other.data && version == other.version;
}

bool LayerMemo::shall_keep(const at::Tensor& weight) {
  return forwards_ < last_forwards_ && !casts_again() && has_identity(weight);
}

c10::optional<Codes> LayerMemo::kept_weight(const at::Tensor& weight, const cuda::StreamState& now, bool transposed,
                                            bool has_main_grad) {
  const std::lock_guard lock(mutex_);
  if (weight_.identity.tensor == nullptr || !has_identity(weight)) return c10::nullopt;
  const at::Tensor owner = owner_of(weight);
  // A gradient that was made and is gone has been used: the weight may be another one, past any counter.
  const bool used_up = grad_made_ && !has_main_grad && !(owner.is_leaf() && owner.grad().defined());
  if (casts_again() || used_up || forwards_ > last_forwards_ || weight_.made_on != now ||
      !(weight_.identity == Identity::of(owner))) {
    weight_ = {};
    return c10::nullopt;
  }
  if (transposed && weight_.codes.q_t.numel() == 0) return c10::nullopt;
  return weight_.codes;
}

void LayerMemo::keep_weight(const at::Tensor& weight, const cuda::StreamState& now, const Codes& codes) {
  const std::lock_guard lock(mutex_);
  grad_made_ = false;
  weight_ = {Identity::of(owner_of(weight)), codes, now};
}

void LayerMemo::forget_weight() {
  const std::lock_guard lock(mutex_);
  weight_ = {};
}

}  // namespace torch_fp8
