"""What a run is: the model's size, what suits it, and which settings must stay the same when a run is resumed."""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch_fp8 as fp8

from models import fog_config
from models.gpt import Shape

from .errors import UserError


@dataclass(frozen=True)
class Size:
    """A model, and the defaults of its training."""

    shape: Shape | fog_config.Shape
    context: int
    batch_tokens: int  # per optimizer step
    micro_batch: int  # sequences, as many as memory allows
    steps: int
    lr: float
    num_threads: int | None = None  # None: what PyTorch takes


# tiny is for a CPU. Its operations are so small that a second thread gains a half on an idle machine and costs tenfold
# on a busy one. From 124M on: GPT-2's models with GPT-3's learning rates, in batches small enough that a few minutes
# show something.
SIZES = {
    "tiny": Size(Shape(4, 4, 128), context=128, batch_tokens=1 << 10, micro_batch=8, steps=300, lr=2e-3, num_threads=1),
    "small": Size(Shape(6, 6, 384), context=256, batch_tokens=1 << 14, micro_batch=64, steps=1000, lr=1e-3),
    "124M": Size(Shape(12, 12, 768), context=1024, batch_tokens=1 << 16, micro_batch=32, steps=1000, lr=6e-4),
    "355M": Size(Shape(24, 16, 1024), context=1024, batch_tokens=1 << 16, micro_batch=16, steps=1000, lr=3e-4),
    "774M": Size(Shape(36, 20, 1280), context=1024, batch_tokens=1 << 16, micro_batch=16, steps=1000, lr=2.5e-4),
    "1558M": Size(Shape(48, 25, 1600), context=1024, batch_tokens=1 << 16, micro_batch=8, steps=1000, lr=2e-4),
}
# Of the models in models/fog.py: where the paper has a size, its context, learning rate and softmax scale, in batches
# as small as those above.
FOG_SIZES = {
    "tiny": Size(fog_config.SIZES["tiny"], 128, 1 << 10, micro_batch=8, steps=100, lr=2e-3, num_threads=1),
    "25M": Size(fog_config.SIZES["25M"], 1024, 1 << 16, micro_batch=64, steps=1000, lr=1e-3),
    "100M": Size(fog_config.SIZES["100M"], 1024, 1 << 16, micro_batch=32, steps=1000, lr=1e-3),
    "200M": Size(fog_config.SIZES["200M"], 1024, 1 << 16, micro_batch=32, steps=1000, lr=1e-3),
    "390M": Size(fog_config.SIZES["390M"], 4096, 1 << 16, micro_batch=4, steps=1000, lr=1e-3),
    "1.5B": Size(fog_config.SIZES["1.5B"], 4096, 1 << 16, micro_batch=4, steps=1000, lr=2.5e-4),
    "8B": Size(fog_config.SIZES["8B"], 4096, 1 << 16, micro_batch=1, steps=1000, lr=1.5e-4),
}
MODELS = {"gpt": SIZES} | dict.fromkeys(fog_config.ARCHITECTURES, FOG_SIZES)  # the sizes of each

_COUNTS = (
    *("context", "batch_tokens", "micro_batch", "steps", "warm_up"),
    *("eval_every", "eval_batches", "save_every", "num_threads"),
)


@dataclass(frozen=True)
class Settings:
    size: str
    context: int
    batch_tokens: int
    micro_batch: int
    steps: int
    lr: float
    warm_up: int  # steps
    seed: int
    recipe: fp8.Recipe  # of the FP8 arm
    eval_every: int
    eval_batches: int
    save_every: int
    time_limit: float | None  # seconds of an arm
    device: torch.device
    num_threads: int
    out: Path
    model: str = "gpt"
    cooldown: int | None = None  # steps of falling learning rate; None: a cosine from the warm-up on
    attention: str = "16bit"  # how the products of the FP8 arm's attention run
    shared_scale: bool = False  # of q, k and v there

    def __post_init__(self) -> None:
        # Zeros would fail much later, and less clearly.
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise UserError(f"{_flag(name)} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "time_limit"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{_flag(name)} must be positive and finite, got {value}")
        if self.warm_up > self.steps:
            raise UserError(f"--warm-up must be at most --steps = {self.steps}, got {self.warm_up}")
        if self.cooldown is not None and not 0 <= self.cooldown <= self.steps - self.warm_up:
            raise UserError(
                f"--cooldown must be from 0 to --steps - --warm-up = {self.steps - self.warm_up}, got {self.cooldown}"
            )
        if self.attention != "16bit" and self.model == "gpt":
            raise UserError(
                f"--attention {self.attention} needs a model whose attention can run in FP8, one of "
                f"{', '.join(fog_config.ARCHITECTURES)}; --model gpt has heads of 64 or less in 16 bits"
            )
        if self.shared_scale and self.attention == "16bit":
            raise UserError("--shared-scale is of the attention's q, k and v in FP8; give --attention fp8 too")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed must be from 0 to 2**63 - 1, got {self.seed}")
        micro_tokens = self.micro_batch * self.context
        if self.batch_tokens % micro_tokens:
            nearest = max(1, round(self.batch_tokens / micro_tokens)) * micro_tokens
            raise UserError(
                f"--batch-tokens must be a multiple of --micro-batch x --context = {self.micro_batch} x "
                f"{self.context} = {micro_tokens}, got {self.batch_tokens}; the nearest is {nearest}"
            )

    def identity(self, arm: str, fingerprint: str) -> dict[str, str | int | float]:
        """What decides which weights come out of an arm, and how they and their speed are judged: a resumed run must
        have the same."""
        decisive = ("size", "context", "batch_tokens", "micro_batch", "steps", "lr", "warm_up", "seed", "eval_batches")
        identity = {name: value for name, value in asdict(self).items() if name in decisive}
        identity |= {"device": device_name(self.device), "data": fingerprint}
        # What a run of an earlier version had no name for stands here only where it is not as it was then.
        added = {"model": "gpt", "cooldown": None}
        if arm == "fp8":
            identity["recipe"] = str(self.recipe)
            added |= {"attention": "16bit", "shared_scale": False}
        values = {name: getattr(self, name) for name in added}
        return identity | {name: value for name, value in values.items() if value != added[name]}


def sizes_of(model: str) -> dict[str, Size]:
    """The sizes of a model by its name; a wrong one is answered with the near ones."""
    if model not in MODELS:
        near = difflib.get_close_matches(model.lower(), MODELS, n=3)
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"--model must be one of {', '.join(MODELS)}, got {model!r}; {meant}".rstrip("; "))
    return MODELS[model]


def make_recipe(
    kind: str, *, amax_history_len: int | None, margin: int | None, bias: int | None
) -> fp8.DelayedScaling | fp8.CurrentScaling | fp8.ConstantScaling:
    """A recipe by name. None leaves a field at its default; a field that the recipe has not is an error."""
    recipes = {
        "delayed": (fp8.DelayedScaling, {"amax_history_len": amax_history_len, "margin": margin}),
        "current": (fp8.CurrentScaling, {"grad_margin": margin}),
        "constant": (fp8.ConstantScaling, {"bias": bias, "grad_margin": margin}),
    }
    for flag, value, takers in (("--amax-history-len", amax_history_len, "delayed"), ("--bias", bias, "constant")):
        if value is not None and kind != takers:
            raise UserError(f"{flag} belongs to --recipe {takers}, got it with --recipe {kind}")
    recipe, fields = recipes[kind]
    try:
        return recipe(**{name: value for name, value in fields.items() if value is not None})
    except ValueError as error:
        raise UserError(str(error)) from error


def fitting_micro_batch(size: Size, batch_tokens: int, context: int) -> int:
    """The largest micro-batch up to the size's own that divides the batch."""
    sequences = batch_tokens // max(1, context)
    return next((n for n in range(min(size.micro_batch, sequences), 0, -1) if sequences % n == 0), 1)


def find_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU that this PyTorch can use, and finds none; use --device cpu")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
