"""One training of a study: any model, from its seed to its end or to an interruption, the same for all arms of a seed.

Parameters are float32 under autocast, so masters are float32: steps of a BF16 weight would be lost to its rounding, in
all arms alike, and hide what FP8 adds. AdamW without decay of vectors. The random numbers of initialisation and batches
follow from the seed alone, so that the arms of one seed are pairs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
import torch_fp8 as fp8
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fp8.layers.scaled import scaled_modules

from examples.gpt import checkpoint
from examples.gpt.errors import UserError
from examples.gpt.journal import Journal
from examples.gpt.tokens import Corpus, even_starts, random_starts, windows

from .bounds import check_largest
from .divergence import Divergence
from .runs import Run, Spec, check_resumable, losses_in

Result = dict[str, Any]

_FETCH = 20  # steps whose losses are fetched together on a GPU, which waits for it
_SAVE = 60  # seconds between checkpoints
_OPTIONS = {  # of the studies, which users know
    **{"steps": "--steps", "batch": "--batch", "micro_batch": "--micro-batch", "context": "--context"},
    "validated": "--val-tokens",
}
_LONG_AGO = 1 << 30  # steps after which a constant loss scale would grow


@dataclass(frozen=True)
class Plan:
    """A training, apart from its model.

    cooldown: the last steps, in which the learning rate falls to zero: as 1 - sqrt, or with ``"cosine"``, where these
        are all after the warm-up, as a cosine.
    dtype: of autocast. ``"float16"`` has a loss scale that looks for its own value.
    loss_scale: a constant that gradients are multiplied by, for formats whose scales are constant too.
    decay: of matrices; vectors have none.
    validated: tokens of validation, at the end.
    """

    seed: int
    steps: int
    batch: int  # sequences of an optimizer step
    micro_batch: int  # sequences of a pass
    context: int  # tokens of a sequence
    lr: float
    warm_up: int  # steps
    cooldown: int
    validated: int
    schedule: str = "cosine"
    decay: float = 0.1
    clip: float = 1.0
    dtype: str = "bfloat16"
    loss_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "micro_batch", "context", "validated"):
            if getattr(self, name) < 1:
                raise UserError(f"{_OPTIONS[name]} must be at least 1, got {getattr(self, name)}")
        check_largest("--steps, or those that --train-tokens makes,", self.steps)
        if not 0 <= self.lr < math.inf:
            raise UserError(f"--lr must be a finite number that is not negative, got {self.lr}")
        if self.batch % self.micro_batch:
            raise UserError(f"--batch must be a multiple of --micro-batch = {self.micro_batch}, got {self.batch}")
        if self.schedule not in ("cosine", "wsd"):
            raise UserError(f"schedule must be 'cosine' or 'wsd', got {self.schedule!r}")
        if self.dtype not in ("bfloat16", "float16"):
            raise UserError(f"dtype must be 'bfloat16' or 'float16', got {self.dtype!r}")
        if self.warm_up < 0 or self.cooldown < 0 or self.warm_up + self.cooldown > self.steps:
            raise UserError(
                f"warm_up and cooldown must fit into the {self.steps} steps, got {self.warm_up} and {self.cooldown}"
            )

    @classmethod
    def of(cls, spec: Spec) -> Plan:
        return cls(**{field.name: spec[field.name] for field in fields(cls) if field.name in spec})

    @property
    def tokens(self) -> int:
        return self.steps * self.batch * self.context

    def learning_rate(self, step: int) -> float:
        """Of the step ``step``, from 0: linear warm-up, stable, then down; the step after the last would have 0."""
        if step < self.warm_up:
            return self.lr * (step + 1) / (self.warm_up + 1)
        length = self.steps - self.warm_up if self.schedule == "cosine" else self.cooldown
        done = (step - (self.steps - length)) / max(1, length)
        if done <= 0:
            return self.lr
        return self.lr * (0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1 - math.sqrt(done))


class Observer(Protocol):
    """Looks at some steps of a training, from within."""

    def wants(self, step: int) -> bool:
        """Whether to look at this step, from 1."""

    def watch(self) -> AbstractContextManager[None]:
        """Around the step's passes."""

    def seen(self) -> dict[str, Any]:
        """What was seen, as JSON; waits for the device."""


class Training:
    """A model, its optimizer and its log, new or as the run's checkpoint left them."""

    def __init__(
        self, run: Run, model: nn.Module, corpus: Corpus, device: torch.device, observer: Observer | None = None
    ) -> None:
        self.run, self.model, self.corpus, self.device, self.observer = run, model, corpus, device, observer
        self.plan = plan = Plan.of(run.spec)
        check_text(corpus, plan)
        model.train()  # a checkpoint's model comes in eval(), where delayed scaling records nothing
        self.step, self.seconds = 0, 0.0
        self._cuda = device.type == "cuda"
        self._optimizer = _adamw(model, plan, fused=self._cuda)
        self._scaler = _scaler(plan, device)
        self._generator = torch.Generator().manual_seed(plan.seed)
        self._pending: list[tuple[int, float, Tensor]] = []
        self._fetch_every = _FETCH if self._cuda else 1
        if state := checkpoint.load(run.checkpoint, {"run": run.name, **run.spec}):
            with checkpoint.restoring(run.checkpoint):
                self._restore(state)
            check_resumable(run, self.step)
        self.journal = Journal(run.log, self.step)
        losses = (record["loss"] for record in losses_in(self.journal.records))
        self._divergence = Divergence(losses, skips=self._scaler.is_enabled())
        self._mark = self._saved = time.perf_counter()

    def go_on(self, stop: Callable[[], bool], finish: Callable[[], Result | None] = dict) -> bool:
        """To the end, or until ``stop`` says so after some step; whether the run is done. ``finish`` gives what else
        belongs to the result of a training that was not lost, after its last step, or None where it was stopped; it
        logs what is to be there when it is called again."""
        plan = self.plan
        while self.step < plan.steps and not self._divergence.lost and not stop():
            self._one_step()
            if self.step % self._fetch_every == 0:
                self._fetch()
            if time.perf_counter() - self._saved > _SAVE:
                self._save()
        if self._saved_step != self.step:
            self._save()
        finished: Result | None = {}
        if not self._divergence.lost:
            finished = finish() if self.step == plan.steps and not stop() else None
            if finished is None or stop():
                self.journal.close()
                return False
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        result = {**self.validation(), "parameters": parameters, **finished}
        result |= {"seconds": round(self.seconds, 1), "diverged": self._divergence.at, "gpu": gpu_name(self.device)}
        self.journal.write(step=self.step, result=result)
        self.journal.close()
        self.run.checkpoint.unlink(missing_ok=True)
        return True

    def validation(self) -> Result:
        """In BF16, and where something is in FP8 also as it was trained."""
        with fp8.disabled(self.model):
            result: Result = self._validated()
        if scaled_modules(self.model):
            result |= {f"{name}_fp8": value for name, value in self._validated().items()}
        return result

    def _validated(self) -> dict[str, float]:
        if self._divergence.lost:  # its weights are those of as many steps later as it took to be known
            return {"loss": math.nan, "accuracy": math.nan}
        return validate(self.model, self.corpus, self.plan, self.device)

    def _one_step(self) -> None:
        plan, step = self.plan, self.step + 1
        lr = plan.learning_rate(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        starts = random_starts(self.corpus.train, plan.batch, plan.context, self._generator)
        inputs, targets = windows(self.corpus.train, starts, plan.context, self.device)
        total = torch.zeros((), device=self.device)
        looks = self.observer is not None and self.observer.wants(step)
        with self.observer.watch() if looks else nullcontext():
            for x, y in zip(inputs.split(plan.micro_batch), targets.split(plan.micro_batch)):
                with torch.autocast(self.device.type, getattr(torch, plan.dtype)):
                    loss = F.cross_entropy(logits_of(self.model, x).flatten(0, 1), y.flatten())
                loss = loss * (len(x) / plan.batch)
                self._scaler.scale(loss).backward()
                total += loss.detach()
        self._scaler.unscale_(self._optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), plan.clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        self.step = step
        self._pending.append((step, lr, torch.stack([total, norm])))
        if looks:
            self._fetch()
            if self.step == step:
                self.journal.write(step=step, **self.observer.seen())

    def _fetch(self) -> None:
        """Log what is computed. A training ends with the step that it was lost in, however late that is known."""
        if not self._pending:
            return
        numbers = torch.stack([pair for _, _, pair in self._pending]).tolist()
        now = time.perf_counter()
        self.seconds, self._mark = self.seconds + now - self._mark, now
        for (step, lr, _), (loss, norm) in zip(self._pending, numbers):
            self.journal.write(step=step, loss=loss, lr=lr, grad_norm=norm)
            self._divergence.add(loss)
            if self._divergence.lost:
                self.step = step
                break
        self._pending.clear()

    def _save(self) -> None:
        self._fetch()
        if self._divergence.lost:  # there is nothing to go on from
            return
        self.journal.sync()
        progress = {"step": self.step, "seconds": self.seconds}
        progress["scaler"] = self._scaler.state_dict()
        rng = {"data": self._generator.get_state(), "cpu": torch.get_rng_state()}
        if self._cuda:  # which dropout draws from
            rng["device"] = torch.cuda.get_rng_state(self.device)
        checkpoint.save(
            self.run.checkpoint,
            {
                "identity": {"run": self.run.name, **self.run.spec},
                "progress": progress,
                "model": self.model.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "fp8": fp8.state_dict(self.model),
                "rng": rng,
            },
        )
        self._saved_step = self.step
        self._mark = self._saved = time.perf_counter()

    _saved_step = -1

    def _restore(self, state: checkpoint.State) -> None:
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        fp8.load_state_dict(self.model, state["fp8"])
        self._generator.set_state(state["rng"]["data"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self._cuda and "device" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["device"], self.device)
        progress = state["progress"]
        self.step, self.seconds = progress["step"], progress["seconds"]
        self._scaler.load_state_dict(progress["scaler"])
        self._saved_step = self.step


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """(batch, time, vocabulary), of models that return them and of transformers'."""
    out = model(tokens)
    return out if isinstance(out, Tensor) else out.logits


def check_text(corpus: Corpus, plan: Plan, option: str = _OPTIONS["validated"]) -> None:
    """UserError where the text is too short for the plan. option: what said how many tokens are validated on."""
    if corpus.train.numel() <= plan.context:
        raise UserError(
            f"the training text must be longer than a sequence of {plan.context} tokens, has {corpus.train.numel()}; "
            "give more text or a smaller --context"
        )
    needed = max(plan.validated, plan.context + 1)
    if corpus.val.numel() < needed:
        smaller = option if plan.validated == needed else "--context"
        raise UserError(
            f"validation needs {needed:,} tokens that were held out, the text has {corpus.val.numel():,}; make the "
            f"tokens again with a larger --val-share, or give a smaller {smaller}"
        )


def in_whole_contexts(tokens: int, context: int) -> int:
    """How many of so many tokens ``validate`` is over: at least one context's. What is not positive is left to be
    refused."""
    return max(1, tokens // context) * context if min(tokens, context) > 0 else tokens


@torch.no_grad()
def validate(model: nn.Module, corpus: Corpus, plan: Plan, device: torch.device) -> dict[str, float]:
    """The mean loss in nats a token, and the share of tokens that the model's first choice is, over ``validated``
    tokens spread evenly over the held-out text, under BF16 autocast."""
    count = in_whole_contexts(plan.validated, plan.context) // plan.context
    starts = even_starts(corpus.val, count, plan.context)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    for part in starts.split(plan.micro_batch):
        x, y = windows(corpus.val, part, plan.context, device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = logits_of(model, x).flatten(0, 1)
        loss = F.cross_entropy(logits.float(), y.flatten(), reduction="sum")
        sums += torch.stack([loss, (logits.argmax(-1) == y.flatten()).sum()]).double()
    model.train(was_training)
    loss, right = (sums / (len(starts) * plan.context)).tolist()
    return {"loss": loss, "accuracy": right}


def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _adamw(model: nn.Module, plan: Plan, *, fused: bool) -> torch.optim.AdamW:
    kinds: Sequence[list[nn.Parameter]] = [], []
    for parameter in model.parameters():
        kinds[parameter.dim() < 2].append(parameter)
    groups = [{"params": kind, "weight_decay": decay} for kind, decay in zip(kinds, (plan.decay, 0.0)) if kind]
    return torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, 0.95), fused=fused)


def _scaler(plan: Plan, device: torch.device) -> torch.amp.GradScaler:
    if plan.dtype == "float16":
        return torch.amp.GradScaler(device.type, init_scale=2.0**16)
    constant = {"init_scale": plan.loss_scale, "growth_interval": _LONG_AGO, "backoff_factor": 0.999999}
    return torch.amp.GradScaler(device.type, enabled=plan.loss_scale != 1, **constant)
