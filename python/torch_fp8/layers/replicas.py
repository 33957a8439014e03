"""Frozen layers under DistributedDataParallel.

DDP sends all buffers of a model to all ranks before each forward. The codes of a frozen model are buffers that never
change, as large as the model, and of a type that Gloo does not know. So they are sent once, as bytes, when DDP takes
the model, as its parameters are; after that DDP passes them over.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from .frozen import FrozenState


def _frozen(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FrozenState)]


def _watch(module: nn.Module, name: str, child: nn.Module | None) -> None:
    if name != "module" or child is None or not isinstance(module, DistributedDataParallel):
        return
    prefixes = tuple(f"{name}." if name else "" for name in _frozen(child))
    if not prefixes:
        return
    group = module.process_group
    for buffer_name, buffer in child.named_buffers():
        if buffer_name.startswith(prefixes) and buffer_name not in module.parameters_to_ignore:
            if buffer.numel():
                dist.broadcast(buffer.detach().view(torch.uint8), dist.get_global_rank(group, 0), group=group)
            module.parameters_to_ignore.add(buffer_name)


register_module_module_registration_hook(_watch)
