"""The entries of torch_fp8 in transformers' tables of quantisers and their configs."""

from __future__ import annotations

from typing import Any

from transformers.quantizers import auto

from .scheme import METHOD, is_ours


def enter(config: Any, quantizer: Any) -> None:
    auto.register_quantizer(METHOD)(quantizer)
    auto.register_quantization_config(METHOD)(config)

    def unless_ours(theirs: Any) -> Any:
        class Either(theirs):
            @classmethod
            def from_dict(cls, values: dict[str, Any], **kwargs: Any) -> Any:
                return (config if is_ours(values) else theirs).from_dict(values, **kwargs)

        return Either

    # Folders of ours name a method that any reader knows: who has not imported torch_fp8 reads them right, too.
    configs = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    for method in ("compressed-tensors", "fp8"):
        configs[method] = unless_ours(configs[method])
