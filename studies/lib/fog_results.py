"""What came out of the runs of ``studies/fog.py``, small enough to be kept beside the code: a line of JSON for each.

{"spec": {...}, "step": how far it is, "result": {...} or null, "losses": [of each step], "grad_norms": [...],
 "samples": [steps], "kurtosis": {"qkv": [[of each layer] of each sample], "ffn": ..., "block": ...}}

Runs are told apart by their spec. null stands for a number that is not finite.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch_fp8.files import replacing
from torch_fp8.observe.trend import FIRST, Trend

from examples.gpt.errors import UserError

from .divergence import PATIENCE, Divergence, Loss, leaves
from .runs import Run, Spec, with_split

IN_A_ROW, SIGMAS = 3, 6.0  # of an alarm, as torch_fp8.watch has them by default
FEWEST = FIRST + IN_A_ROW - 1  # samples before which nothing can raise an alarm
KINDS = {"qkv": "q, k and v", "ffn": "input of the FFN's second projection", "block": "output of the block"}
LAST = 50  # steps whose mean is a run's last training loss


@dataclass(frozen=True)
class Line:
    spec: Spec
    step: int
    result: dict[str, Any] | None
    losses: list[Loss]
    grad_norms: list[Loss]
    samples: list[int]
    kurtosis: dict[str, list[list[Loss]]]

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
    def pair(self) -> tuple[Any, ...]:
        """What this run shares with those of other arms that it is held to."""
        return tuple(json.dumps(value) for key, value in sorted(self.spec.items()) if key not in ("arm", "fp8"))

    @property
    def setting(self) -> tuple[str, int, int]:
        """Runs of one setting are of one size, and saw as much text: size, steps, tokens of a step."""
        return self.spec["size"], self.spec["steps"], self.spec["batch"] * self.spec["context"]

    @property
    def diverged(self) -> int:
        """The step at which it diverged by itself, as far as it is; or 0."""
        return Divergence(self.losses).at

    @property
    def lost(self) -> bool:
        return Divergence(self.losses).lost

    @property
    def so_far(self) -> str:
        """Its steps, for readers."""
        return str(self.step) if self.result else f"{self.step} of {self.spec['steps']}, unfinished"


def condensed(run: Run) -> Line:
    """A training's record has a loss, a sample's a kurtosis."""
    records = run.records()
    steps = [record for record in records if "loss" in record]
    samples = [record for record in records if "kurtosis" in record]
    kinds = samples[0]["kurtosis"] if samples else {}
    return Line(
        spec=run.spec,
        step=max((record["step"] for record in records), default=0),
        result=run.result(),
        losses=[_digits(record["loss"], 5) for record in steps],
        grad_norms=[_digits(record["grad_norm"], 3) for record in steps],
        samples=[record["step"] for record in samples],
        kurtosis={
            kind: [[_digits(value, 3) for value in sample["kurtosis"].get(kind, [])] for sample in samples]
            for kind in kinds
        },
    )


def _digits(value: Loss, digits: int) -> Loss:
    return None if value is None else float(f"{value:.{digits}g}")


def read_lines(path: Path) -> list[Line]:
    if not path.exists():
        return []
    try:
        lines = [Line(**json.loads(line)) for line in path.read_text().splitlines()]
        return [replace(line, spec=with_split(line.spec)) for line in lines]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} must hold a run a line, but does not: {error}; write it anew from the runs") from error


def merged(path: Path, new: Iterable[Line]) -> list[Line]:
    """The file with what is new, which replaces what it had of the same runs where it got as far; in the order of
    specs."""
    lines = {_key(line): line for line in read_lines(path)}
    for line in new:
        before = lines.get(_key(line))
        if before is None or (line.result is not None, line.step) >= (before.result is not None, before.step):
            lines[_key(line)] = line
    kept = [lines[key] for key in sorted(lines)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(asdict(line), separators=(",", ":")) + "\n" for line in kept))
    return kept


def _key(line: Line) -> str:
    return json.dumps(line.spec, sort_keys=True)


# ---- what is read off lines ------------------------------------------------------------------------------------------


class Alarm(NamedTuple):
    step: int
    layer: int


def alarm(line: Line, kind: str = "qkv") -> Alarm | None:
    """The first alarm that ``torch_fp8.watch`` would have raised of this kurtosis, had it run beside the training."""
    tokens = line.spec["batch"] * line.spec["context"]
    trends: dict[int, Trend] = {}
    for step, layers in zip(line.samples, line.kurtosis.get(kind, [])):
        for layer, value in enumerate(layers):
            trend = trends.setdefault(layer, Trend())
            trend.add(step * tokens, math.inf if value is None else value, SIGMAS)
            if trend.beyond == IN_A_ROW:
                return Alarm(step, layer)
    return None


class Outcome(NamedTuple):
    """Of a run in FP8, or of the second one in BF16, against the first one in BF16.

    seen: the steps that both have. left: the one at which its loss left the other's. alarm: of the kurtosis of q, k and
    v, at any step. further: how much higher its mean loss over the last steps that both have is, in nats; None where
    that is not finite.
    """

    line: Line
    reference: Line
    seen: int
    left: int | None
    alarm: Alarm | None
    further: float | None

    @property
    def lead(self) -> int | None:
        """How many steps before it left the alarm was raised."""
        return None if self.left is None or self.alarm is None else self.left - self.alarm.step

    @property
    def finished(self) -> bool:
        return self.line.result is not None and self.reference.result is not None

    @property
    def watched(self) -> bool:
        """Whether there were samples enough for an alarm: before it left, where it did."""
        return sum(self.left is None or step < self.left for step in self.line.samples) >= FEWEST

    @property
    def steady(self) -> bool:
        """Whether BF16 has not diverged in the steps that both have."""
        return not Divergence(self.reference.losses[: self.seen]).at

    def holds_to(self, step: int) -> bool:
        """Whether it surely has not left at that step."""
        return self.left is None and self.seen >= step + PATIENCE - 1


def outcomes(lines: Iterable[Line], study: str) -> list[Outcome]:
    """Of each run that has a BF16 twin, as far as both went; neither need be finished."""
    of_study = [line for line in lines if line.study == study and line.losses]
    references = {line.pair: line for line in of_study if line.arm == "bf16"}
    found = []
    for line in of_study:
        reference = references.get(line.pair)
        if line.arm != "bf16" and reference is not None:
            left, seen = leaves(line.losses, reference.losses), min(len(line.losses), len(reference.losses))
            found.append(Outcome(line, reference, seen, left, alarm(line), _further(line, reference)))
    return found


def _further(line: Line, reference: Line) -> float | None:
    last = list(zip(line.losses, reference.losses))[-LAST:]
    gaps = [a - b for a, b in last if a is not None and b is not None]
    return statistics.fmean(gaps) if gaps and len(gaps) == len(last) else None


def differences(lines: Iterable[Line], arm: str, key: str = "loss") -> dict[tuple[Any, ...], list[float]]:
    """{(architecture, setting): by how many per cent a validation loss is above that of BF16 with the same seed, one
    for each pair of finished runs}. A run that was lost is infinitely worse."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for one in outcomes(lines, "parity"):
        if one.line.arm == arm and one.line.result and one.reference.result:
            mine, theirs = one.line.result.get(key), one.reference.result["loss"]
            value = math.inf if mine is None or theirs is None else 100 * (mine / theirs - 1)
            found.setdefault((one.line.architecture, one.line.setting), []).append(value)
    return found


def smoothed(values: Sequence[Loss], over: int) -> list[float]:
    """The median of the last so many; NaN from where one is not finite."""
    found = []
    for i in range(len(values)):
        recent = values[max(0, i + 1 - over) : i + 1]
        found.append(math.nan if None in recent else statistics.median(v for v in recent if v is not None))
    return found
