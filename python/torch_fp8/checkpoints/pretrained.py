"""A checkpoint into a model: FP8 weights go straight into FrozenLinear layers."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

import torch

from ..layers.experts import frozen_experts
from ..layers.frozen import frozen_layers
from ..swap.select import check_device
from .errors import need_transformers
from .folder import Folder
from .load import EXTRA, SOURCE, Plan
from .model import empty_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_pretrained(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    activations: str | None = None,
) -> PreTrainedModel:
    """The causal language model of transformers in a folder, in eval mode and without gradients.

    Layers whose weights are FP8 become :class:`FrozenLinear`, the others stay in 16 bits; so a plain BF16 checkpoint
    loads too. No 16-bit copy of an FP8 weight is ever made, and tensors are read one by one. Read are vLLM's and
    AutoFP8's ``fp8``, compressed-tensors ``float-quantized``, transformers' fine-grained ``fp8`` with blocks or one
    scale, FBGEMM and ModelOpt.

    dtype: of everything but the FP8 weights; the config's unless given.
    activations: instead of the checkpoint's.

    Tensors without a place in the model, KV-cache scales among them, are kept aside for :func:`save_pretrained`; where
    weights are among them, a warning says so.

    Raises CheckpointError (a ValueError), which names file and tensor, before any weight is read where headers tell;
    RuntimeError for a GPU that FP8 layers cannot run on.
    """
    need_transformers()
    from .quantizer import declare

    folder = Folder(path)
    model = empty_model(folder.path, folder.config, folder.entries, dtype)
    if folder.has("generation_config.json"):
        model.generation_config = folder.generation_config()
    device = torch.device(device)
    plan = Plan(model, folder.entries, folder.scheme(), folder.path, activations)
    if frozen_layers(model) or frozen_experts(model):
        check_device(device)
    plan.fill(device)
    declare(model)
    unused = [name for name in plan.extra if name.endswith(".weight")]
    if unused:
        warnings.warn(
            f"torch_fp8: {len(unused)} weights of {folder.path} have no place in {type(model).__name__} and are not "
            f"used: {', '.join(unused[:3])}...",
            stacklevel=2,
        )
    setattr(model, EXTRA, plan.extra)
    setattr(model, SOURCE, folder.path)
    return model.requires_grad_(False).eval()
