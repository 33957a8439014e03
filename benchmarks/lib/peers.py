"""Other FP8 layers, measured beside ours where they are installed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from models.llama import Shape

from .common import options
from .steps import Call, step_of


def torchao(module: nn.Module) -> nn.Module:
    """A copy of a module in BF16, whose linear layers are theirs."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    model = nn.Sequential(copy.deepcopy(module))
    convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name("tensorwise"))
    return torch.compile(model)


def transformer_engine(linear: nn.Linear) -> nn.Module:
    import transformer_engine.pytorch as te

    return _delayed(
        te.Linear(linear.in_features, linear.out_features, bias=False, params_dtype=linear.weight.dtype)
    )  # fmt: skip


def transformer_engine_ffn(shape: Shape) -> nn.Module:
    """RMSNorm and SwiGLU FFN."""
    import transformer_engine.pytorch as te

    return _delayed(
        te.LayerNormMLP(
            shape.hidden, shape.ffn, bias=False, normalization="RMSNorm", activation="swiglu",
            params_dtype=torch.bfloat16,
        )
    )  # fmt: skip


def _delayed(layer: nn.Module) -> nn.Module:
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling

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


TORCHAO, TRANSFORMER_ENGINE = "torchao tensorwise, compiled", "Transformer Engine, delayed"
ADAPTERS = {TORCHAO: torchao, TRANSFORMER_ENGINE: transformer_engine}
_failed: set[str] = set()


def peer_steps(linear: nn.Linear, x: Tensor, dy: Tensor) -> dict[str, Call]:
    """Forward + backward of each peer that can be imported and runs."""
    modules = peer_modules({name: functools.partial(adapter, linear) for name, adapter in ADAPTERS.items()}, x, dy)
    return {name: step_of(module, x, dy) for name, module in modules.items()}


def peer_modules(makers: Mapping[str, Callable[[], nn.Module]], x: Tensor, dy: Tensor) -> dict[str, nn.Module]:
    """Of each peer that can be imported and runs what its maker makes, after a forward and backward."""
    found = {}
    for name, maker in makers.items():
        if options.dry or name in _failed:
            continue
        try:
            module = maker()
            step_of(module, x, dy)()
            torch.cuda.synchronize()
            found[name] = module
        except Exception as error:  # not installed, or not fit for this PyTorch: a column less
            print(f"no column for {name}: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
            _failed.add(name)
    return found
