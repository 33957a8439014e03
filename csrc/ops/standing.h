// Which weights stand still, so that a kernel may read them before the kernel in front of it has finished
// (weight_stands in kernels.h).
//
// A kernel that is launched ahead of its turn may run beside the kernel in front and, where that one lets its
// successors start early, beside those before it. What is sure to be written is what was written before a barrier, and
// the host knows two: a CUDA graph begins when all earlier work of its stream is complete; and a kernel of ours that
// does not read early lets no successor start before all work in front of it is complete. So a weight stands in a
// kernel of a graph if nothing wrote it since this graph began, or since such a kernel of this graph and stream.
//
// Writes are seen by version counters: the weight, its scales and the bias must be those of a call before that barrier,
// in storage, address and version. The counters do not see what a kernel writes into `.data`, nor what a kernel of the
// user's own writes. In eager mode people write so, hence no weight stands there. In a graph, who writes so tells it by
// torch.autograd.graph.increment_version. A plain copy into `.data` needs no such word: it is no kernel, so what
// follows it in the graph waits for its end.
#pragma once

#include <ATen/core/Tensor.h>

#include "torch_fp8/cuda.h"

namespace torch_fp8 {

// Notes a call of this thread, and says whether its kernel may read early what it is given. Where not, its kernel must
// be one that waits before it lets its successor start.
bool weight_stands(const at::Tensor& weight, const at::Tensor& weight_scale, const c10::optional<at::Tensor>& bias,
                   const cuda::StreamState& now);

}  // namespace torch_fp8
