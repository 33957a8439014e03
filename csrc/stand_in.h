// A tensor of autograd that stands for codes: it has size and dtype and no values, and whoever reads it gets an error.
// Between the layers of an MLP in one piece the product and the gradients travel so: what an edge of the graph carries
// is never written in 16 bits.
#pragma once

#include <ATen/core/Tensor.h>

#include "torch_fp8/cast.h"

namespace torch_fp8 {

struct HandedOver {
  Codes codes;
  at::Tensor column_sums;  // of a gradient: that of the bias; or undefined
};

// Of like's size, dtype and device.
at::Tensor stand_in(const at::Tensor& like, HandedOver handed);
// What a tensor stands for; null where it has values.
const HandedOver* handed_over(const at::Tensor& t);

}  // namespace torch_fp8
