"""The arms of a study, what each changes of a training, and the models that they train."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
import torch_fp8 as fp8
from torch import nn
from torch_fp8.swap.select import chosen_layers, linear_layers, why_not

from examples.gpt.errors import UserError
from examples.gpt.tokens import Corpus
from models.names import named

from .checkpoints import Checkpoint, dither_
from .emulation import Emulated, Emulation, by_amax, by_constant, by_histogram, emulate
from .runs import Spec

# The paper's constant c is one for all tensors, and gradients have a margin of 3 besides. On this hardware's E4M3,
# whose exponent bias is lower by one, that is c + 1 for inputs and weights; E5M2 is the same: c - 3.
_GRAD_MARGIN = 3
_LOSS_SCALE = 2.0**16  # with constants: BF16's gradients are far below what a constant that suits weights can hold


def constant(c: int) -> Spec:
    """FP8-CSCALE with the paper's constant c."""
    recipe = {"kind": "ConstantScaling", "bias": c + 1, "grad_margin": _GRAD_MARGIN + 1}
    return {"recipe": recipe, "loss_scale": _LOSS_SCALE}


def _emulation(rule: str, family: str, c: int = 0) -> Spec:
    return {"emulation": {"rule": rule, "family": family, "constant": c, "margin": _GRAD_MARGIN}}


ARMS: dict[str, Spec] = {
    "bf16": {},
    "bf16-again": {},  # the same seed twice: what the GPU's order of sums alone does
    "fp16": {"dtype": "float16"},
    "delayed": {"recipe": {"kind": "DelayedScaling"}},
    "current": {"recipe": {"kind": "CurrentScaling"}},
    "amax": {"recipe": {"kind": "CurrentScaling", "power_of_two": True, "grad_margin": _GRAD_MARGIN}},
    "power-of-two": {"recipe": {"kind": "CurrentScaling", "power_of_two": True}},  # these two part amax from current
    f"grad-margin{_GRAD_MARGIN}": {"recipe": {"kind": "CurrentScaling", "grad_margin": _GRAD_MARGIN}},
    "delayed-power-of-two": {"recipe": {"kind": "DelayedScaling", "power_of_two": True}},
    "e4m3": {"recipe": {"kind": "DelayedScaling", "fp8_format": "E4M3"}},
    "wgrad16": {"recipe": {"kind": "DelayedScaling", "fp8_gemms": ["fprop", "dgrad"]}},
    "dgrad16": {"recipe": {"kind": "DelayedScaling", "fp8_gemms": ["fprop", "wgrad"]}},
    "fprop16": {"recipe": {"kind": "DelayedScaling", "fp8_gemms": ["dgrad", "wgrad"]}},
    "recent": {"recipe": {"kind": "DelayedScaling", "amax_compute_algo": "most_recent"}},
    "history16": {"recipe": {"kind": "DelayedScaling", "amax_history_len": 16}},
    "margin1": {"recipe": {"kind": "DelayedScaling", "margin": 1}},
    "exact-sums": {"recipe": {"kind": "DelayedScaling", "fast_accum": []}},
    "histogram": _emulation("histogram", "ocp"),
    "gc-amax": _emulation("amax", "graphcore"),
    "gc-histogram": _emulation("histogram", "graphcore"),
}


LEVERS: dict[str, tuple[str, str]] = {  # arms that differ from another in one thing: from which, and in what
    "current": ("delayed", "each tensor's scale from its own amax"),
    "delayed-power-of-two": ("delayed", "powers of two as scales"),
    "e4m3": ("delayed", "gradients in E4M3"),
    "fprop16": ("delayed", "forward's product in 16 bits"),
    "dgrad16": ("delayed", "the input gradient's product in 16 bits"),
    "wgrad16": ("delayed", "the weight gradient's product in 16 bits"),
    "recent": ("delayed", "the newest amax alone"),
    "history16": ("delayed", "a history of 16 amaxes"),
    "margin1": ("delayed", "a binade left free above each amax"),
    "exact-sums": ("delayed", "forward's sums in float32"),
    "power-of-two": ("current", "powers of two as scales"),
    f"grad-margin{_GRAD_MARGIN}": ("current", f"{_GRAD_MARGIN} binades left free above gradients"),
    "amax": ("power-of-two", f"{_GRAD_MARGIN} binades left free above gradients"),
}


DEFAULT_ARMS = {
    "parity": ("bf16", "bf16-again", "delayed", "current", "amax", "cscale:2", "e4m3", "wgrad16"),
    "finetune": ("bf16", "bf16-again", "fp16", "delayed", "current", "amax", "cscale:-3", "e4m3"),
}


CONSTANT = re.compile(r":(0|-?[1-9][0-9]{0,2})\Z")  # behind a name, in its one spelling: 02 would be another arm


def find_arm(name: str) -> Spec | None:
    """What an arm changes of a training: ``cscale:C`` has the constant C, ``gc-cscale:C`` on the paper's formats."""
    if name in ARMS:
        return ARMS[name]
    kind, _, value = name.partition(":")
    if kind in ("cscale", "gc-cscale") and CONSTANT.fullmatch(f":{value}") and -16 <= int(value) <= 16:
        graphcore = _emulation("constant", "graphcore", int(value)) | {"loss_scale": _LOSS_SCALE}
        return constant(int(value)) if kind == "cscale" else graphcore
    return None


def arm(name: str) -> Spec:
    """The same of a name that was typed."""
    if (found := find_arm(name)) is None:
        raise UserError(
            f"--arms takes {', '.join(ARMS)}, cscale:C and gc-cscale:C with C from -16 to 16, as in cscale:-3, "
            f"got {name!r}"
        )
    return found


def words(spec: Spec) -> str:
    """What an arm is, for readers: its recipe, where it has one."""
    exponent = round(math.log2(spec.get("loss_scale", 1)))
    scaled = f" with the loss scaled by 2^{exponent}" if exponent else ""
    if "recipe" in spec:
        return f"`{make_recipe(spec['recipe'])!r}`{scaled}"
    if "emulation" in spec:
        formats = "the paper's formats" if spec["emulation"]["family"] == "graphcore" else "this hardware's formats"
        return f"{spec['emulation']['rule']} in emulation, {formats}{scaled}"
    return "FP16" if spec.get("dtype") == "float16" else "BF16"


def make_emulation(how: Spec) -> Emulation:
    rules = {"amax": by_amax, "histogram": by_histogram, "constant": by_constant(how["constant"])}
    return Emulation(rules[how["rule"]], how["family"], how["margin"])


def make_recipe(recipe: Spec) -> fp8.Recipe:
    """ValueError where no recipe has this kind."""
    kinds = {kind.__name__: kind for kind in (fp8.DelayedScaling, fp8.CurrentScaling, fp8.ConstantScaling)}
    if recipe["kind"] not in kinds:
        raise ValueError(f"a recipe's kind must be one of {', '.join(kinds)}, got {recipe['kind']}")
    return kinds[recipe["kind"]](**{name: value for name, value in recipe.items() if name != "kind"})


def make_model(
    spec: Spec,
    corpus: Corpus,
    device: torch.device,
    checkpoint: Checkpoint | None = None,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The checkpoint's weights or random ones of the run's seed, with every linear layer but the head in FP8, or in
    emulation, where the arm has it so."""
    model: Any
    if checkpoint:
        model = checkpoint.model(dtype, device)
        rows = model.get_input_embeddings().num_embeddings
        if corpus.vocab > rows:
            raise checkpoint.other_tokens(corpus.vocab, rows)
        if "dither" in spec:
            dither_(model, spec["dither"], spec["seed"])
    else:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                model = named(spec["model"]).build(corpus.vocab, spec["context"])
        finally:
            torch.set_default_dtype(before)
    layers = inner_layers(model)
    if not layers:
        raise UserError(
            f"{spec['model']} has no linear layer that FP8 takes; torch_fp8.convert says why; take another model"
        )
    if "emulation" in spec:
        emulate(layers, make_emulation(spec["emulation"]))
    return fp8.convert(model, make_recipe(spec["recipe"]), tokens=None) if "recipe" in spec else model


def inner_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers that ``fp8.convert`` takes, of any size: all but the head. Arms in emulation have the same in
    FP8, and records are of the same."""
    layers = linear_layers(model)
    cannot = {name: "" if isinstance(layer, Emulated) else why_not(layer) for name, layer in layers.items()}
    left_out = chosen_layers(model, layers, None, cannot)
    return {name: layer for name, layer in layers.items() if not left_out[name]}
