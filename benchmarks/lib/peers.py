"""Other FP8 linear layers, measured beside ours where they are installed. An adapter makes one from an nn.Linear."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn

from .common import options
from .steps import Call, step_of


def torchao(linear: nn.Linear) -> nn.Module:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    model = nn.Sequential(copy.deepcopy(linear))
    convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name("tensorwise"))
    return torch.compile(model)


def transformer_engine(linear: nn.Linear) -> nn.Module:
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling

    layer = te.Linear(linear.in_features, linear.out_features, bias=False, params_dtype=linear.weight.dtype)
    if hasattr(te, "autocast"):
        autocast = functools.partial(te.autocast, enabled=True, recipe=DelayedScaling())
    else:
        autocast = functools.partial(te.fp8_autocast, enabled=True, fp8_recipe=DelayedScaling())
    return _Within(layer, autocast)


class _Within(nn.Module):
    def __init__(self, layer: nn.Module, context) -> None:
        super().__init__()
        self.layer, self.context = layer, context

    def forward(self, x: Tensor) -> Tensor:
        with self.context():
            return self.layer(x)


ADAPTERS = {"torchao tensorwise, compiled": torchao, "Transformer Engine, delayed": transformer_engine}
_failed: set[str] = set()


def peer_steps(linear: nn.Linear, x: Tensor, dy: Tensor) -> dict[str, Call]:
    """Forward + backward of each peer that can be imported and runs."""
    found = {}
    for name, adapter in ADAPTERS.items():
        if options.dry or name in _failed:
            continue
        try:
            step = step_of(adapter(linear), x, dy)
            step()
            torch.cuda.synchronize()
            found[name] = step
        except Exception as error:  # not installed, or not fit for this PyTorch: a column less
            print(f"no column for {name}: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
            _failed.add(name)
    return found
