// What the derivatives that are registered with the dispatcher refuse, in words; PyTorch would refuse too, but in words
// that name nothing.
#pragma once

#include <ATen/FuncTorchTLS.h>
#include <c10/util/Exception.h>

namespace torch_fp8 {

// who: "a FrozenLinear gives its input"
inline void check_no_transform(const char* who) {
  const auto& functorch = at::functorch::functorchTLSAccessor();
  if (!functorch) return;
  try {
    functorch->checkSupportsCppAutogradFunction();
  } catch (const c10::Error&) {
    TORCH_CHECK(false, "torch_fp8: ", who,
                " no gradient under torch.func's transforms (grad, vjp, ...); use loss.backward() or "
                "torch.autograd.grad");
  }
}

}  // namespace torch_fp8
