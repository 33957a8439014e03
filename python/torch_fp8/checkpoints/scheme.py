"""What a config says of quantisation: the dialects that are read, and the three that are written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..format import BLOCK
from .errors import CheckpointError

#: What is written, by the name that save_pretrained takes.
FORMATS = ("compressed-tensors", "block", "static")

#: What dialects call the two scales. All are multipliers, weight_scale_inv too. A state_dict of frozen layers has
#: input_slot.
WEIGHT_SCALES = ("weight_scale", "weight_scale_inv", "qscale_weight")
INPUT_SCALES = ("input_scale", "activation_scale", "act_scale", "qscale_act", "input_slot")

#: The method that transformers knows us by, and the mark by which our files are known: they name a method that every
#: reader knows.
METHOD = "torch_fp8"
_PRODUCER = {"name": METHOD}

_BLOCKS = [BLOCK, BLOCK]


@dataclass(frozen=True)
class Scheme:
    """weights: what ``weight_scale`` may stand for, of "tensor", "channel" and "block". activations: as in
    :class:`FrozenLinear`."""

    method: str
    weights: tuple[str, ...]
    activations: str


def read(config: dict[str, Any], separate: dict[str, Any] | None, path: Path) -> Scheme | None:
    """The scheme of a checkpoint; None where it is not quantised. separate: the object in hf_quant_config.json. Raises
    CheckpointError for what is not FP8 as torch_fp8 computes it: nothing is guessed."""
    given = config.get("quantization_config", config.get("compression_config"))
    if given is None and separate is not None:
        given = separate.get("quantization")
        given = {**given, "quant_method": "modelopt"} if isinstance(given, dict) else given
        path = path.with_name("hf_quant_config.json")
    if given is None:
        return None
    if not isinstance(given, dict):
        raise CheckpointError(path, f"quantization_config must be an object, got {type(given).__name__}")
    method = given.get("quant_method")
    if not isinstance(method, str) or method not in _READERS:
        raise CheckpointError(path, f"has quant_method {str(method)[:200]!r}; read are {', '.join(_READERS)}")
    return Scheme(method, *_READERS[method](given, path))


def _fp8(given: dict[str, Any], path: Path) -> tuple[tuple[str, ...], str]:
    """Of vLLM and AutoFP8 (one scale a tensor), and of transformers (blocks; one scale with null for a block size)."""
    blocks = given.get("weight_block_size", "missing")
    # To vLLM a missing size means one scale, to transformers blocks: the scale's own shape tells.
    weights = {"missing": ("tensor", "block"), "None": ("tensor",), str(_BLOCKS): ("block",)}.get(str(blocks))
    if weights is None:
        raise CheckpointError(path, f"has weight_block_size {str(blocks)[:200]}; read is {_BLOCKS}")
    scheme = given.get("activation_scheme", "dynamic")
    if scheme not in ("static", "dynamic"):
        raise CheckpointError(path, f"has activation_scheme {str(scheme)[:200]!r}; read are static and dynamic")
    return weights, "static" if scheme == "static" else "token"


def _compressed_tensors(given: dict[str, Any], path: Path) -> tuple[tuple[str, ...], str]:
    def refuse(what: str) -> CheckpointError:
        return CheckpointError(path, f"compressed-tensors: {what}")

    groups = given.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise refuse("config_groups must be an object of groups")
    for key in ("sparsity_config", "transform_config"):
        if given.get(key):
            raise refuse(f"{key} is not read")
    weights, activations = [], set()
    for group in groups.values():
        form = group.get("format") or given.get("format")
        if form != "float-quantized":
            raise refuse(f"has format {str(form)[:200]!r}; read is float-quantized")
        weight, input = group.get("weights"), group.get("input_activations")
        strategy = _float8(weight, refuse, "weights")
        structure = weight.get("block_structure")
        if strategy not in ("tensor", "channel", "block") or weight.get("dynamic"):
            raise refuse(f"has weights of strategy {str(strategy)[:200]!r}; read are static tensor, channel and block")
        if strategy == "block" and structure not in (_BLOCKS, f"{BLOCK}x{BLOCK}"):
            raise refuse(f"has block_structure {str(structure)[:200]}; read is {_BLOCKS}")
        weights.append(strategy)
        activations.add("none" if input is None else _activations(input, refuse))
    if len(activations) > 1:
        raise refuse("has groups whose input_activations differ")
    return tuple(dict.fromkeys(weights)), activations.pop()


def _activations(input: Any, refuse: Any) -> str:
    strategy = _float8(input, refuse, "input_activations")
    # By groups of 128 columns is what block weights come with: "token" to those.
    known = {"token": "token", "tensor": "tensor", "group": "token"} if input.get("dynamic") else {"tensor": "static"}
    if strategy not in known:
        how = "dynamic" if input.get("dynamic") else "static"
        raise refuse(f"has {how} input_activations of strategy {str(strategy)[:200]!r}; read are {', '.join(known)}")
    return known[strategy]


def _float8(given: Any, refuse: Any, what: str) -> Any:
    """The strategy of what must be symmetric FP8."""
    if not isinstance(given, dict):
        raise refuse(f"{what} must be an object, got {type(given).__name__}")
    if (given.get("num_bits"), given.get("type"), given.get("symmetric", True)) != (8, "float", True):
        raise refuse(f"{what} must be symmetric floats of 8 bits")
    strategy = given.get("strategy")
    if not isinstance(strategy, str):
        raise refuse(f"{what} must have a strategy")
    return strategy


def _fbgemm(given: dict[str, Any], path: Path) -> tuple[tuple[str, ...], str]:
    # activation_scale_ub saturates rows beyond it; here they keep their own scale.
    return ("channel",), "token"


def _modelopt(given: dict[str, Any], path: Path) -> tuple[tuple[str, ...], str]:
    known = {
        "FP8": (("tensor",), "static"),
        "FP8_PB_WO": (("block",), "none"),
        "FP8_PC_PT": (("channel",), "token"),
    }
    algorithm = given.get("quant_algo")
    if not isinstance(algorithm, str) or algorithm not in known:
        raise CheckpointError(path, f"has quant_algo {str(algorithm)[:200]!r}; read are {', '.join(known)}")
    return known[algorithm]


_READERS = {"fp8": _fp8, "compressed-tensors": _compressed_tensors, "fbgemm_fp8": _fbgemm, "modelopt": _modelopt}


def check_writable(form: str, weight: str, activations: str) -> None:
    """Raise ValueError where a format cannot hold layers of that kind."""
    if form not in FORMATS:
        raise ValueError(f"torch_fp8: format must be one of {', '.join(FORMATS)}, got {form!r}")
    holds = {"block": ("block", "token"), "static": ("tensor", "static")}.get(form, (weight, activations))
    if (weight, activations) != holds:
        raise ValueError(
            f'torch_fp8: format {form!r} holds layers of weight="{holds[0]}", activations="{holds[1]}", but the model '
            f'was frozen with weight="{weight}", activations="{activations}"; freeze it so, or take compressed-tensors'
        )


def scale_name(form: str) -> str:
    return "weight_scale_inv" if form == "block" else "weight_scale"


def is_ours(quantization: dict[str, Any]) -> bool:
    """Whether a quantization_config is of a checkpoint that was written here."""
    return quantization.get("producer") == _PRODUCER


def written(form: str, kinds: Sequence[tuple[str, str]], ignored: Iterable[str]) -> dict[str, Any]:
    """``quantization_config`` for a format. kinds: weight and activations of the FP8 layers. ignored: names of what
    stays in 16 bits."""
    ignored = sorted(ignored)
    if form == "block":
        return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": _BLOCKS,
                "modules_to_not_convert": ignored, "producer": _PRODUCER}  # fmt: skip
    if form == "static":
        return {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None,
                "ignored_layers": ignored, "producer": _PRODUCER}  # fmt: skip
    groups = {f"group_{i}": _group(weight, activations) for i, (weight, activations) in enumerate(kinds)}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
            "config_groups": groups, "ignore": ignored, "kv_cache_scheme": None, "producer": _PRODUCER}  # fmt: skip


def _group(weight: str, activations: str) -> dict[str, Any]:
    args = {"num_bits": 8, "type": "float", "symmetric": True}
    weights = {**args, "strategy": weight, "dynamic": False}
    if weight == "block":
        weights["block_structure"] = _BLOCKS
    inputs = {**args, "strategy": "tensor", "dynamic": activations != "static"}
    if activations == "token":
        inputs |= {"strategy": "group", "group_size": BLOCK} if weight == "block" else {"strategy": "token"}
    return {"targets": ["Linear"], "format": "float-quantized", "weights": weights,
            "input_activations": None if activations == "none" else inputs, "output_activations": None}  # fmt: skip
