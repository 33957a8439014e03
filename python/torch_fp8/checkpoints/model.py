"""The empty model that a config describes, built within bounds."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules import module as torch_module

from .errors import CheckpointError
from .folder import CONFIG
from .shard import Entry

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Whose code computes is decided here and not by a file.
_OURS = {"quantization_config", "compression_config", "model_type", "auto_map", "attn_implementation",
         "experts_implementation"}  # fmt: skip

#: The largest count of layers, heads, labels or the like in a config: classes make lists of such lengths.
MAX_COUNT = 2**16
_COUNT = re.compile(r"(^|_)(layer|label|block|depth|stage|head|expert|codebook|group|cycle|loop)s?($|_)")
_NO_COUNT = re.compile(
    r"position|embd|embed|vocab|ctx|inner|token|_ids?$|size|dim|length|window|params|step|sample|train"
)

#: How many modules a model may have, and bytes of computed buffers, beyond what the files say.
SPARE_MODULES, SPARE_BYTES = 10_000, 2**30
_MODULES_A_TENSOR = 50


def empty_model(
    path: Path, config: Mapping[str, Any], entries: Mapping[str, Entry], dtype: torch.dtype | None
) -> PreTrainedModel:
    """The model of a config, on the meta device. path: of the checkpoint, for messages."""
    from transformers import AutoModelForCausalLM

    try:
        own = read_config(path / CONFIG, config)
        if getattr(own.get_text_config(), "num_hidden_layers", 0) < 0:
            raise ValueError(f"num_hidden_layers is {own.get_text_config().num_hidden_layers}")
        dtype = dtype or getattr(own, "dtype", None) or stored_dtype(entries.values())
        with bounded(len(entries)), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(own, dtype=dtype)
    except CheckpointError:
        raise
    except Exception as error:  # whatever transformers raises for values that nobody has checked
        what = f"describes no causal language model that transformers builds: {error}"
        raise CheckpointError(path / CONFIG, what) from error
    nbytes = sum(buffer.nbytes for buffer in model.buffers())
    bound = sum(entry.nbytes for entry in entries.values()) + SPARE_BYTES
    if nbytes > bound:
        raise CheckpointError(path / CONFIG, f"describes a model with {nbytes} bytes of buffers; allowed are {bound}")
    return model


def read_config(path: Path, values: Mapping[str, Any]) -> PretrainedConfig:
    """The config as its class reads it. Raises CheckpointError, or whatever the class raises."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(path, "has no model_type")
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(path, f"has model_type {model_type[:200]!r}, which transformers does not know")
    _check_counts(values, path)
    values = {key: value for key, value in values.items() if key not in _OURS and not key.startswith("_")}
    return CONFIG_MAPPING[model_type].from_dict(PretrainedConfig._decode_special_floats(values))


def stored_dtype(entries: Iterable[Entry]) -> torch.dtype:
    """That of the largest matrix which is neither FP8 nor a scale: a config without a dtype leaves it to the files."""
    floats = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    entries = [e for e in entries if e.dtype in floats and len(e.shape) > 1 and "scale" not in e.name]
    return max(entries, key=lambda entry: entry.nbytes).dtype if entries else torch.bfloat16


def _check_counts(value: Any, path: object, key: str = "", in_list: bool = False) -> None:
    """Refuse counts that would make a class of configs build lists of any length."""
    if isinstance(value, dict):
        for name, item in value.items():
            _check_counts(item, path, name)
    elif isinstance(value, list):
        for item in value:
            _check_counts(item, path, key, True)
    elif isinstance(value, int) and abs(value) > MAX_COUNT and _counts(key, in_list):
        raise CheckpointError(path, f"has {key[:200]} of {value}; a count may be {MAX_COUNT} at most")


def _counts(key: str, in_list: bool) -> bool:
    return (in_list or bool(_COUNT.search(key))) and not _NO_COUNT.search(key)


@contextmanager
def bounded(tensors: int) -> Iterator[None]:
    """Within, a model with many more modules than there are tensors is not built to its end."""
    bound, count, thread = SPARE_MODULES + _MODULES_A_TENSOR * tensors, 0, threading.get_ident()

    def hook(*args: Any) -> None:
        nonlocal count
        count += threading.get_ident() == thread  # another thread's modules are its own
        if count > bound:
            raise ValueError(f"it has more than {bound} modules and parameters, but there are {tensors} tensors")

    handles = [
        torch_module.register_module_module_registration_hook(hook),
        torch_module.register_module_parameter_registration_hook(hook),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def dtype_of(model: PreTrainedModel) -> torch.dtype:
    """Of what is not FP8; a model whose weights are all FP8 has it from its config."""
    floats = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return next(floats, getattr(model.config, "dtype", None) or torch.bfloat16)
