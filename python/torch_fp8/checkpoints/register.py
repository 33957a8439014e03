"""How transformers learns of FP8 layers: :class:`QuantizationConfig` for ``from_pretrained``.

torch_fp8 does not import transformers, and either may be imported first. So transformers' tables are entered when it
loads them, or at once where it has.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..swap.attention import enter_table
from ..swap.freeze import after_freeze
from ..swap.select import Filter
from .errors import need_transformers


def QuantizationConfig(
    activations: str = "token", weight: str = "channel", filter: Filter | Sequence[str] | None = None
) -> Any:
    """What ``from_pretrained(..., quantization_config=)`` of transformers takes to make FrozenLinear layers of a 16-bit
    checkpoint as its weights arrive, so that no 16-bit model is ever held.

    activations, weight, filter: as in :func:`freeze`; not "static", which needs :func:`calibrate`.

    A model that was made so, frozen, or loaded from a folder of ours has the config that says so, and
    ``model.save_pretrained`` writes compressed-tensors with it. With torch_fp8 imported,
    ``AutoModel....from_pretrained(folder)`` reads a folder of ours into FrozenLinear layers; without it, transformers
    reads it as any other compressed-tensors checkpoint. Needs transformers.
    """
    need_transformers()
    from .quantizer import QuantizationConfig

    return QuantizationConfig(activations, weight, filter)


class _Finder(importlib.abc.MetaPathFinder):
    """Enters transformers' tables once they are loaded."""

    searching: set[str] = set()  # noqa: RUF012  (there is one finder)

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in _TABLES or name in self.searching:
            return None
        self.searching.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching.remove(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            _TABLES[name]()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _enter() -> None:
    try:
        from . import quantizer  # noqa: F401  (enters itself, at its end; it may be in the middle of its own imports)
    except ImportError as error:  # of a transformers that is not supported: it must not fail because of us
        warnings.warn(f"torch_fp8: this transformers cannot read or write FP8 models by itself: {error}", stacklevel=2)


# What is done once a module of transformers is loaded.
_TABLES = {"transformers.quantizers.auto": _enter, "transformers.modeling_utils": enter_table}


def _declare(model: nn.Module) -> None:
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return
    theirs = [module for module in model.modules() if isinstance(module, modeling.PreTrainedModel)]
    try:
        if theirs:
            need_transformers()
    except ImportError as error:
        for module in theirs:  # it would write codes as if they were weights
            module.save_pretrained = functools.partial(_cannot_write, str(error))
        return
    if theirs:
        from .quantizer import declare

        declare(model)


def _cannot_write(why: str, *args: Any, **kwargs: Any) -> None:
    raise ImportError(why)


def register() -> None:
    """Once, when torch_fp8 is imported."""
    after_freeze.append(_declare)
    for name, enter in _TABLES.items():
        if name in sys.modules:
            enter()
    if not all(name in sys.modules for name in _TABLES):
        sys.meta_path.insert(0, _Finder())
