"""Tensors of torch.func's transforms and of forward mode, which PyTorch's own operators take and ours do not."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed(*tensors: Tensor | None) -> bool:
    if torch.compiler.is_compiling():
        return False
    given = [t for t in tensors if t is not None]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in given):
        return True
    return any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in given)
