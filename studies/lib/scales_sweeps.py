"""What is read off sweeps of inference: what each policy keeps of 16 bits, and the window of constants."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from .inference import policies
from .scales_results import CRITERION, Line

Ratios = Mapping[str, Mapping[str, float]]


def inference_ratios(lines: Iterable[Line]) -> dict[str, dict[str, float]]:
    """{model: {policy: next-token accuracy over that of 16 bits}}, the mean over seeds. Random weights have none, and a
    sweep that is not finished has those of the policies that are done; of constants only where all of them are."""
    found: dict[str, dict[str, list[float]]] = {}
    for line in lines:
        whole = _of_bf16(line)
        lacking = {name.partition(":")[0] for name in lacking_policies(line)}
        for policy, entry in line.inference.items():
            if policy.partition(":")[0] in lacking:
                continue
            if whole and policy != "bf16":
                ratio = (entry["accuracy"] or 0.0) / whole
                found.setdefault(line.model, {}).setdefault(policy, []).append(ratio)
    return {model: {name: statistics.fmean(r) for name, r in of.items()} for model, of in found.items()}


def _of_bf16(line: Line) -> float | None:
    """Its accuracy in a sweep of trained weights."""
    is_sweep = line.study in ("window", "infer") and not line.is_random
    return line.inference.get("bf16", {}).get("accuracy") if is_sweep else None


class Baseline(NamedTuple):
    """What ratios are of: BF16's accuracy on so many tokens."""

    accuracy: float
    tokens: int

    @property
    def half_width(self) -> float:
        """Of its 95 % interval, as a binomial share of the tokens."""
        return 1.96 * math.sqrt(self.accuracy * (1 - self.accuracy) / self.tokens) if self.tokens else math.inf

    @property
    def tells(self) -> bool:
        """Whether it is known to less of itself than a ratio of CRITERION lacks. The ratio is known better, since both
        of its accuracies are of the same tokens."""
        return self.half_width < (1 - CRITERION) * self.accuracy


def baselines(lines: Iterable[Line]) -> dict[str, Baseline]:
    """Of each model that has ratios; the mean over seeds, whose tokens are the same."""
    found: dict[str, list[Baseline]] = {}
    for line in lines:
        if accuracy := _of_bf16(line):
            found.setdefault(line.model, []).append(Baseline(accuracy, line.spec.get("sweep_tokens", 0)))
    return {
        model: Baseline(statistics.fmean(one.accuracy for one in of), min(one.tokens for one in of))
        for model, of in found.items()
    }


def telling_ratios(lines: Sequence[Line], sizes: Mapping[str, float]) -> Ratios:
    """Of models whose sweeps have tokens enough to tell, from the smallest to the largest."""
    ratios, of = inference_ratios(lines), baselines(lines)
    return {model: ratios[model] for model in by_size(ratios, sizes) if of[model].tells}


def by_size(models: Iterable[str], sizes: Mapping[str, float]) -> list[str]:
    return sorted(models, key=lambda model: sizes.get(model, 0))


def lacking_policies(line: Line) -> list[str]:
    """Those that an unfinished sweep has still to do."""
    asked = policies(line.spec["sweep"]) if line.result is None and line.spec.get("sweep") else ()
    return [name for name in asked if name not in line.policies]


def constants(ratios: Mapping[str, float], family: str = "cscale") -> dict[int, float]:
    """{c: ratio} of the policies ``cscale:c``, in order."""
    found = {int(name.partition(":")[2]): ratio for name, ratio in ratios.items() if name.startswith(f"{family}:")}
    return dict(sorted(found.items()))


def window(ratios: Mapping[int, float]) -> tuple[int, int] | None:
    """The longest run of neighbouring constants whose ratio is at least CRITERION; None where there is none."""
    best: list[int] = []
    run: list[int] = []
    for c in sorted(ratios):
        if ratios[c] < CRITERION:
            run = []
        else:
            run = [*run, c] if run and run[-1] == c - 1 else [c]
            best = max(best, run, key=len)
    return (best[0], best[-1]) if best else None


def best_constant(ratios: Mapping[int, float]) -> int:
    """Of the window; where there is none, of all."""
    low, high = window(ratios) or (min(ratios), max(ratios))
    return max((c for c in ratios if low <= c <= high), key=lambda c: ratios[c])
