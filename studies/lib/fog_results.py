"""What came out of the runs of ``studies/fog.py``, small enough to be kept beside the code: a line of JSON for each.

{"spec": {...}, "step": how far it is, "result": {...} or null, "losses": [of each step], "grad_norms": [...],
 "samples": [steps], "kurtosis": {"qkv": [[of each layer] of each sample], "ffn": ..., "block": ...},
 "rms": {"qkv": as of kurtosis, or nothing of runs that were condensed before it was}}

Runs are told apart by their spec, but for its ``rate``: the learning rate, ``lr``, says all of it. null stands for a
number that is not finite.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from torch_fp8.observe.trend import FIRST, Trend

from examples.gpt.errors import UserError
from models.fog_config import ARCHITECTURES, SIZES

from .divergence import PATIENCE, WINDOW, Divergence, Loss, above_start, jump, leaves, step_noise
from .fog_words import ARMS, CHANGES
from .lines import (
    COUNT,
    LIST,
    LOSS,
    LOSS_OR_NULL,
    OBJECT,
    POSITIVE,
    SIZE,
    SIZE_OR_NULL,
    TEXT,
    check_all,
    check_common,
    check_entries,
    check_known,
    check_steps_of,
    merge_lines,
)
from .runs import Run, Spec, check_steps

STUDIES = ("provoke", "parity", "kurtosis")
IN_A_ROW, SIGMAS = 3, 6.0  # of an alarm, as torch_fp8.watch has them by default
FEWEST = FIRST + IN_A_ROW - 1  # samples before which nothing can raise an alarm
KINDS = {"qkv": "q, k and v", "ffn": "input of the FFN's second projection", "block": "output of the block"}
LOST, ABOVE, DIVERGED = "not finite", "above its start", "diverged"  # what an unsound loss may be
LAST = 50  # steps whose mean is a run's last training loss
USUAL = 1e-3  # the peak learning rate that others are called so many times of


def learning_rate(base: float, times: float) -> float:
    """To 12 digits: 10 times 0.0003 is 0.003, and in floats a little less, which would be another run."""
    return float(f"{base * times:.12g}")


def times_usual(lr: float) -> float:
    return float(f"{lr / USUAL:.6g}")


@dataclass(frozen=True)
class Line:
    spec: Spec
    step: int
    result: dict[str, Any] | None
    losses: list[Loss]
    grad_norms: list[Loss]
    samples: list[int]
    kurtosis: dict[str, list[list[Loss]]]
    rms: dict[str, list[list[Loss]]] = field(default_factory=dict)

    def check(self) -> None:
        """ValueError where it is not what this file says of a line."""
        needed = {"architecture": TEXT, "size": TEXT, "lr": LOSS, "warm_up": COUNT, "fp8": OBJECT}
        check_common(self, STUDIES, needed)
        check_known("arm of the spec", self.arm, ARMS)
        if bool(self.spec["fp8"]) == self.arm.startswith("bf16"):
            raise ValueError(f"fp8 of the spec must be empty in BF16 and nowhere else, and its arm is {self.arm}")
        check_known("size of the spec", self.spec["size"], SIZES)
        name, _, change = self.architecture.partition(":")
        check_known("architecture of the spec", name, ARCHITECTURES)
        check_known("what follows the architecture's colon", change, CHANGES)
        if self.result is not None:
            check_entries("the result", self.result, {"seconds": SIZE, "parameters": POSITIVE})
        check_all("losses", self.losses, LOSS_OR_NULL)
        check_all("grad_norms", self.grad_norms, SIZE_OR_NULL)
        if not len(self.losses) == len(self.grad_norms) == self.step:
            raise ValueError(f"losses and grad_norms must have a number of each of its {self.step} steps")
        check_steps_of("samples", self.samples, self)
        check_entries("kurtosis", self.kurtosis, dict.fromkeys(KINDS if self.samples else (), LIST))
        check_entries("rms", self.rms, {}, {"qkv": LIST})
        for kind, of_samples in (*self.kurtosis.items(), *self.rms.items()):
            for layers in of_samples:
                check_all(f"a sample of {kind}", layers, SIZE_OR_NULL)
            if len(of_samples) != len(self.samples) or len({len(layers) for layers in of_samples}) > 1:
                raise ValueError(f"{kind} must have a number of each layer in each sample")

    @property
    def study(self) -> str:
        return self.spec["study"]

    @property
    def architecture(self) -> str:
        return self.spec["architecture"]

    @property
    def arm(self) -> str:
        return self.spec["arm"]

    @property
    def rate(self) -> float:
        """Its learning rate over the usual one, whatever its spec calls ``rate``: that is what was typed."""
        return times_usual(self.spec["lr"])

    @property
    def training(self) -> Spec:
        """What its spec says but for its arm, each thing once."""
        return {key: value for key, value in sorted(self.spec.items()) if key not in ("arm", "fp8", "rate")}

    def but_for(self, *keys: str) -> tuple[str, ...]:
        """What its spec says but for its arm and these: runs that share it differ in nothing else."""
        return tuple(f"{key} {json.dumps(value)}" for key, value in self.training.items() if key not in keys)

    @property
    def pair(self) -> tuple[str, ...]:
        """What this run shares with those of other arms that it is held to."""
        return self.but_for()

    @property
    def setting(self) -> tuple[str, int, int]:
        """Runs of one setting are of one size, and saw as much text: size, steps, tokens of a step."""
        return self.spec["size"], self.spec["steps"], self.spec["batch"] * self.spec["context"]

    @cached_property  # pages ask it of each run many times
    def diverged(self) -> int:
        """The step at which it diverged by itself, as far as it is; or 0."""
        return Divergence(self.losses).at

    @cached_property
    def alarm(self) -> Alarm | None:
        """Of the kurtosis of q, k and v."""
        return alarm(self)

    @property
    def unsound(self) -> int:
        """The step at which it first diverged by itself or rose above its start, or 0: even if it came back, what its
        loss is held to says nothing."""
        return min((step for step in (self.diverged, above_start(self.losses)) if step), default=0)

    @property
    def fault(self) -> str:
        """What it is at the step ``unsound``, in words; nothing where it is sound."""
        at = self.unsound
        if not at:
            return ""
        return LOST if self.losses[at - 1] is None else ABOVE if at == above_start(self.losses) else DIVERGED

    @property
    def old(self) -> bool:
        """Whether attention was in FP8 and its backward did not yet keep scores where they were. Gradients of large
        scores were then too large by an exponential, and a Llama without norms of q and k diverged of that."""
        return "attention" in self.spec["fp8"] and not self.spec["fp8"].get("keeps_scores")

    @property
    def jumped(self) -> int | None:
        return jump(self.grad_norms)

    @property
    def lost(self) -> bool:
        return Divergence(self.losses).lost

    @property
    def last(self) -> Loss:
        """The mean of its last losses, as far as it is; None where one is not finite."""
        known = [loss for loss in self.losses[-LAST:] if loss is not None]
        return statistics.fmean(known) if known and len(known) == len(self.losses[-LAST:]) else None

    @property
    def so_far(self) -> str:
        """Its steps, for readers."""
        return str(self.step) if self.result else f"{self.step} of {self.spec['steps']}, unfinished"


def condensed(run: Run) -> Line:
    """A training's record has a loss and a gradient norm, a sample's a kurtosis. UserError where one has the first
    alone: null would call the norm not finite, and to leave it out would move all that follow."""
    records = run.records()
    steps = [record for record in records if "loss" in record]
    if (half := next((record for record in steps if "grad_norm" not in record), None)) is not None:
        raise UserError(
            f"{run.log} must have a grad_norm beside each loss, but has none in step {half['step']}; this study writes "
            f"both: bring the log back whole, or delete {run.folder} and run it again"
        )
    check_steps(run, [record["step"] for record in steps])
    samples = [record for record in records if "kurtosis" in record]
    kinds = samples[0]["kurtosis"] if samples else {}
    return Line(
        spec=run.spec,
        step=max((record["step"] for record in records), default=0),
        result=run.result(),
        losses=[_digits(record["loss"], 5) for record in steps],
        grad_norms=[_digits(record["grad_norm"], 3) for record in steps],
        samples=[record["step"] for record in samples],
        kurtosis={kind: _layers(samples, "kurtosis", kind) for kind in kinds},
        rms={"qkv": _layers(samples, "rms", "qkv")} if "qkv" in kinds and "rms" in samples[0] else {},
    )


def _layers(samples: Sequence[dict[str, Any]], metric: str, kind: str) -> list[list[Loss]]:
    return [[_digits(value, 3) for value in sample[metric].get(kind, [])] for sample in samples]


def _digits(value: Loss, digits: int) -> Loss:
    return None if value is None else float(f"{value:.{digits}g}")


def merged(path: Path, new: Iterable[Line]) -> list[Line]:
    return merge_lines(path, Line, new, _identity, _meaning)


def _identity(line: Line) -> str:
    return json.dumps({key: value for key, value in line.spec.items() if key != "rate"}, sort_keys=True)


def _meaning(line: Line) -> Spec:
    """Of its arm, but for ``keeps_scores``, which is no switch."""
    return {key: value for key, value in sorted(line.spec["fp8"].items()) if key != "keeps_scores"}


# ---- what is read off lines ------------------------------------------------------------------------------------------


class Alarm(NamedTuple):
    step: int
    layer: int


def _watched(line: Line, metric: str) -> Iterator[tuple[int, int, int]]:
    """Of each sample and layer, as ``torch_fp8.watch`` would have seen this metric of q, k and v beside the training:
    step, layer, how many samples in a row are out of healthy growth."""
    tokens = line.spec["batch"] * line.spec["context"]
    trends: dict[int, Trend] = {}
    for step, layers in zip(line.samples, getattr(line, metric).get("qkv", [])):
        for layer, value in enumerate(layers):
            if value is not None and value <= 0:  # no trend is of what is 0 throughout
                continue
            trend = trends.setdefault(layer, Trend())
            trend.add(step * tokens, math.inf if value is None else value, SIGMAS)
            yield step, layer, trend.beyond


def alarm(line: Line, metric: str = "kurtosis") -> Alarm | None:
    """The first alarm that ``torch_fp8.watch`` would have raised."""
    return next((Alarm(step, layer) for step, layer, beyond in _watched(line, metric) if beyond == IN_A_ROW), None)


def most_in_a_row(line: Line, before: int) -> int:
    """The most samples in a row before that step whose kurtosis was out of healthy growth, in any layer."""
    return max((beyond for step, _, beyond in _watched(line, "kurtosis") if step < before), default=0)


class Outcome(NamedTuple):
    """Of a run in FP8, or of the second one in BF16, against the first one in BF16.

    seen: the steps that both have. left: the one at which its loss left the other's. alarm: of the kurtosis of q, k and
    v, at any step. further: how much higher its mean loss over the last steps that both have is, in nats; None where
    that is not finite. steady: whether BF16 itself, as far as it was run, has neither diverged nor risen above its
    start.
    """

    line: Line
    reference: Line
    seen: int
    left: int | None
    alarm: Alarm | None
    further: float | None
    steady: bool

    @property
    def attention(self) -> bool:
        """Whether attention is in FP8 too."""
        return "attention" in self.line.spec["fp8"]

    @property
    def aside(self) -> bool:
        """Whether it is an old run that did not hold, of which its backward may be the cause. One that held did so
        with that backward, and counts: an old run may speak for FP8, and never against it."""
        return self.line.old and not self.holds

    @property
    def counts(self) -> bool:
        """Whether it says anything of FP8."""
        return self.steady and not self.aside

    @property
    def lead(self) -> int | None:
        """How many steps before it left the alarm was raised."""
        return None if self.left is None or self.alarm is None else self.left - self.alarm.step

    @property
    def announced(self) -> int:
        """The same where that was in time, else 0."""
        return max(self.lead or 0, 0)

    @property
    def finished(self) -> bool:
        return self.line.result is not None and self.reference.result is not None

    @property
    def by_rms(self) -> Outcome | None:
        """With the alarm of the rms of q, k and v in place of that of their kurtosis, where it was recorded."""
        return self._replace(alarm=alarm(self.line, "rms")) if self.line.rms else None

    @property
    def samples(self) -> int:
        """Before it left, where it did."""
        return sum(self.left is None or step < self.left for step in self.line.samples)

    @property
    def watched(self) -> bool:
        """Whether there were samples enough for an alarm."""
        return self.samples >= FEWEST

    @property
    def holds(self) -> bool:
        """Whether it has neither left, as far as both went, nor diverged or been above its own start, as far as it went
        itself."""
        return self.left is None and not self.line.unsound

    @property
    def came_back(self) -> bool:
        """Whether it left, and its last losses lie, in the mean, within a standard deviation of BF16's step noise."""
        if self.left is None or self.further is None or self.line.unsound or not self.steady:
            return False
        return self.further < step_noise(self.reference.losses[max(0, self.seen - WINDOW) : self.seen])

    @property
    def gone(self) -> bool:
        """Whether it left for good, as far as both went."""
        return self.left is not None and not self.came_back

    def holds_to(self, step: int) -> bool:
        """Whether it surely has not left at that step."""
        return self.left is None and self.seen >= step + PATIENCE - 1


def current(lines: Iterable[Line]) -> list[Line]:
    """Of an old run and the same one made since, the new one, once it is as far or has come to its end: one that was
    lost ends early."""
    lines = list(lines)
    old = {(line.pair, line.arm): line for line in lines if line.old}
    again = {(line.pair, line.arm): line for line in lines if not line.old}
    ended = {key: line.result is not None or line.lost for key, line in again.items()}
    passed = [
        old[key] if ended[key] or line.step >= old[key].step else line for key, line in again.items() if key in old
    ]
    return [line for line in lines if all(line is not other for other in passed)]


def outcomes(lines: Iterable[Line], study: str) -> list[Outcome]:
    """Of each run that has a BF16 twin, as far as both went; neither need be finished."""
    of_study, references = _begun(lines, study)
    steady = {pair: not line.unsound for pair, line in references.items()}
    found = []
    for line in of_study:
        reference = references.get(line.pair)
        if line.arm != "bf16" and reference is not None:
            left, seen = leaves(line.losses, reference.losses), min(len(line.losses), len(reference.losses))
            further = _further(line, reference)
            found.append(Outcome(line, reference, seen, left, line.alarm, further, steady[line.pair]))
    return found


def alone(lines: Iterable[Line], study: str) -> list[Line]:
    """The runs that have no BF16 twin, and so no outcome."""
    of_study, references = _begun(lines, study)
    return [line for line in of_study if line.arm != "bf16" and line.pair not in references]


def _begun(lines: Iterable[Line], study: str) -> tuple[list[Line], dict[tuple[str, ...], Line]]:
    """The runs of a study that have a loss, and {pair: that in BF16}."""
    of_study = current(line for line in lines if line.study == study and line.losses)
    return of_study, {line.pair: line for line in of_study if line.arm == "bf16"}


def _further(line: Line, reference: Line) -> float | None:
    last = list(zip(line.losses, reference.losses))[-LAST:]
    gaps = [a - b for a, b in last if a is not None and b is not None]
    return statistics.fmean(gaps) if gaps and len(gaps) == len(last) else None


class Pairs(NamedTuple):
    """Of one architecture and arm, trained alike but for the seed: by how many per cent each validation loss is above
    that of BF16 with the same seed. A run that was lost is infinitely worse. unsound: pairs that say nothing, since
    BF16 itself was lost, has diverged or has risen above its start. old: how many of the values are of old runs."""

    line: Line  # one of them
    values: list[float]
    unsound: int
    old: int


def differences(lines: Iterable[Line], arm: str, key: str = "loss") -> dict[tuple[str, ...], Pairs]:
    """Of pairs of finished runs, by what they share."""
    found: dict[tuple[str, ...], Pairs] = {}
    for one in outcomes(lines, "parity"):
        if one.line.arm == arm and one.line.result and one.reference.result and not one.aside:
            mine, theirs = one.line.result.get(key), one.reference.result["loss"]
            shared = one.line.but_for("seed")
            line, values, unsound, old = found.get(shared, Pairs(one.line, [], 0, 0))
            if theirs is None or not one.steady:
                unsound += 1
            else:
                values = [*values, math.inf if mine is None else 100 * (mine / theirs - 1)]
                old += one.line.old
            found[shared] = Pairs(line, values, unsound, old)
    return found


def smoothed(values: Sequence[Loss], over: int) -> list[float]:
    """The median of the last so many; NaN from where one is not finite."""
    found = []
    for i in range(len(values)):
        recent = values[max(0, i + 1 - over) : i + 1]
        found.append(math.nan if None in recent else statistics.median(v for v in recent if v is not None))
    return found
