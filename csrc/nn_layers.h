// What the C++ modules share: their layers as mlp() and norm() take them, and the layers that read one tensor.
#pragma once

#include <vector>

#include "siblings.h"
#include "torch_fp8/nn.h"

namespace torch_fp8::nn {

inline c10::optional<at::Tensor> optional(const at::Tensor& t) {
  return t.defined() ? c10::optional<at::Tensor>(t) : c10::nullopt;
}

// A LinearLayer, and what it refers to.
struct Given {
  explicit Given(const Linear& given) : module(*given), bias(optional(module.bias)) {}

  LinearLayer layer() const {
    return {module.weight, bias,
            module.slots,  module.options.recipe(),
            *module.memo,  module.is_training(),
            main_grad,     /*dummy_grad=*/false,
            module.place};
  }

  const LinearImpl& module;
  const c10::optional<at::Tensor> bias, main_grad;
};

// From now on nobody's row of the scaling state is known to be equal to another's.
void part(Siblings& siblings);
// Finds out whose row is equal to another's: they may share delayed scales. Of one group.
void compare(const std::vector<LinearImpl*>& members);

}  // namespace torch_fp8::nn
