// One call of an FP8 linear layer: what is constant in it, and which codes are there already. A layer (autograd.cpp),
// an MLP (mlp.cpp) and a norm (norm.cpp) are made of it. It has no rules: linear_forward and linear_backward have them.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include "again.h"
#include "memo.h"
#include "ops/linear.h"
#include "torch_fp8/mlp.h"

namespace torch_fp8 {

// The ops go through the dispatcher, below autograd: tracing and fake tensors see them, and eager mode does not pay for
// bookkeeping that the functions over them replace.
template <class Schema>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Schema>();
}

// What backward needs of one call besides tensors: as text, which compiled autograd can carry.
struct Numbers {
  std::array<int64_t, kRoles> casts;
  int64_t history = 0, memo = 0, in_features = 0;
  Gemms fp8, fast_accum;
  bool training = false, record = false, dummy_grad = false, has_bias = false;
  at::ScalarType x_dtype, weight_dtype, bias_dtype;
};
static_assert(std::is_trivially_copyable_v<Numbers>);

struct Call : Numbers {
  // The slots are mutated by design between forward and backward, so they are held past autograd's version check; the
  // scales that the saved codes need travel with those.
  at::Tensor slots, main_grad;
  int64_t sum = 0;  // in which the layers that share their input add up its gradient (siblings.h); 0: none
  bool gathered, grad_x, grad_weight, grad_bias;
  c10::optional<at::ScalarType> autocast;
  c10::SmallVector<at::Tensor, 3> x_codes, weight_codes;  // given, or empty
  c10::optional<Source> source;  // of which backward makes the transpose of the input's codes again; else it is kept

  bool is_differentiable() const { return grad_x || grad_weight || grad_bias; }
};

// Tensors that the dispatcher would hand straight to the op of their backend: no subclass, mode, trace or transform
// sees them, and autocast has nothing to say.
bool is_plain(const at::Tensor& a, const at::Tensor& b);
// The dtype that autocast asks for, if it does.
c10::optional<at::ScalarType> autocast_dtype(const at::Tensor& x);
// Functorch and forward mode would fail too, but in words that name nothing.
void check_no_transform(const at::Tensor& x, const at::Tensor& weight);

// A call with an input of that dtype, whose gradient is wanted or not. Whoever calls has checked the tensors
// (check_layer), but main_grad.
Call begin_call(const LinearLayer& layer, at::ScalarType x_dtype, bool grad_x, c10::optional<at::ScalarType> autocast);
// In a training step: the codes that are there already or are made for others too, of the weight and, where x is given,
// of the input; x is then what stands for it in the graph.
void find_codes(const LinearLayer& layer, Call& call, at::Tensor* x);

// The product's codes, as that layer casts its input.
Codes cast_product(const Product& product, const at::Tensor& slots, at::IntArrayRef casts, int64_t history,
                   bool training, bool record, bool rowwise, bool columnwise);
Codes cast_of(const at::Tensor& t, int role, const Call& call, bool rowwise, bool columnwise);
ForwardResult forward_of(const at::Tensor& x, const at::Tensor& weight, const c10::optional<at::Tensor>& bias,
                         const Call& call, const c10::optional<at::Tensor>& residual = c10::nullopt);

// The call's result [+ residual (..., out), of its dtype], differentiable.
at::Tensor run(const at::Tensor& x, const at::Tensor& weight, const c10::optional<at::Tensor>& bias, const Call& call,
               const c10::optional<at::Tensor>& residual = c10::nullopt);
void check_not_differentiated_again();

}  // namespace torch_fp8
