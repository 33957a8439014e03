"""What trainers of other libraries need to save and restore the scaling state with their checkpoints.

Each is one callback to pass; accelerate takes ``torch_fp8.ScalingState(model)`` as it is. The libraries are imported
when a callback is made, not before.
"""

from __future__ import annotations

import base64
import io
import warnings
import zlib
from typing import Any

import torch

from .layers.scaled import scaled_modules
from .scaling import load_state_dict, state_dict


def trainer_callback() -> Any:
    """A callback for Hugging Face's ``Trainer(callbacks=[...])``: checkpoints carry the scaling state, and
    ``trainer.train(resume_from_checkpoint=...)``, in any of its forms, restores it: training resumes bit for bit.

    The state is a part of the checkpoint's ``trainer_state.json`` (at most 16 KB a layer with a history of 1024,
    55 KB an attention), which needs no path and cannot be left behind. A checkpoint without one gives a warning, and
    scales start anew; one that does not fit the model is a KeyError or ValueError.
    """
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    class ScalingCallback(TrainerCallback, ExportableState):
        def __init__(self) -> None:
            self.model = None

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.model = model
            saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}).get("scaling")
            if saved is not None:
                load_state_dict(model, _decode(saved))
            elif state.global_step > 0:
                warnings.warn("torch_fp8: the checkpoint has no scaling state; scales start anew", stacklevel=2)

        def state(self) -> dict[str, Any]:
            scaling = None
            if self.model is not None and scaled_modules(self.model):
                scaling = _encode(state_dict(self.model))
            return {"args": {}, "attributes": {"scaling": scaling}}

    return ScalingCallback()


def lightning_callback() -> Any:
    """A callback for Lightning's ``Trainer(callbacks=[...])``: checkpoints carry the scaling state of the module under
    ``"torch_fp8"``, and ``fit(..., ckpt_path=...)`` restores it."""
    from lightning.pytorch import Callback

    class ScalingCallback(Callback):
        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            checkpoint["torch_fp8"] = state_dict(pl_module)

        def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            if "torch_fp8" in checkpoint:
                load_state_dict(pl_module, checkpoint["torch_fp8"])
            else:
                warnings.warn("torch_fp8: the checkpoint has no scaling state; scales start anew", stacklevel=2)

    return ScalingCallback()


def _encode(state: dict[str, torch.Tensor]) -> str:
    """Tensors as text for JSON."""
    file = io.BytesIO()
    torch.save({key: tensor.cpu() for key, tensor in state.items()}, file)
    return base64.b64encode(zlib.compress(file.getvalue())).decode()


def _decode(text: str) -> dict[str, torch.Tensor]:
    return torch.load(io.BytesIO(zlib.decompress(base64.b64decode(text))), weights_only=True)
