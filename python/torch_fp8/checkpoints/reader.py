"""What transformers' loading asks of a quantiser while it fills frozen layers from an FP8 checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.base import HfQuantizer

from ..format import E4M3
from . import experts
from .names import reading, shaping, with_scales

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Reader(HfQuantizer):
    requires_calibration = False
    is_trainable = True  # by adapters

    def is_serializable(self) -> bool:
        return True

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        # Of modules that a class keeps in float32 the codes are codes all the same.
        stored = param.get_dtype() if hasattr(param, "get_dtype") else param.dtype
        return None if stored in ("F8_E4M3", E4M3) else super().get_new_dtype(converter, param, dtype)

    def update_weight_conversions(self, conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        return reading() + with_scales(conversions, shaped=True) + experts.converters(model, conversions) + shaping()
