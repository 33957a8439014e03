// What the codes of a layer's input can be made of again in backward, where they were not kept: by what made them, a
// norm or an activation, from what it keeps for its own backward.
#pragma once

#include <variant>

#include <ATen/core/Tensor.h>

#include "torch_fp8/norm.h"

namespace torch_fp8 {

// f(gate), or f(gate) * up; by halves gate is both.
struct Product {
  at::Tensor gate, up, alphas;  // up, alphas: or undefined
  int64_t activation;
  double beta;
  int64_t halves;
};

// The norm of x.
struct Normed {
  at::Tensor x, gain, bias;  // gain, bias: or undefined
  NormOptions options;
};

using Source = std::variant<Product, Normed>;

}  // namespace torch_fp8
