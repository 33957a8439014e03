// All of torch_fp8's C++ interface.
#pragma once

#include "torch_fp8/attention.h"
#include "torch_fp8/cuda.h"
#include "torch_fp8/format.h"
#include "torch_fp8/linear.h"
#include "torch_fp8/mlp.h"
#include "torch_fp8/nn.h"
#include "torch_fp8/norm.h"
#include "torch_fp8/ops.h"
#include "torch_fp8/scale.h"
