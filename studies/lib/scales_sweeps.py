"""What is read off sweeps of inference: what each policy keeps of 16 bits, and the window of constants."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping

from .inference import policies
from .scales_results import CRITERION, Line

Ratios = Mapping[str, Mapping[str, float]]


def inference_ratios(lines: Iterable[Line]) -> dict[str, dict[str, float]]:
    """{model: {policy: next-token accuracy over that of 16 bits}}, the mean over seeds. Random weights have none, and a
    sweep that is not finished has those of the policies that are done; of constants only where all of them are."""
    found: dict[str, dict[str, list[float]]] = {}
    for line in lines:
        if line.study not in ("window", "infer") or line.is_random:
            continue
        whole = line.inference.get("bf16", {}).get("accuracy")
        lacking = {name.partition(":")[0] for name in lacking_policies(line)}
        for policy, entry in line.inference.items():
            if policy.partition(":")[0] in lacking:
                continue
            if whole and policy != "bf16":
                ratio = (entry["accuracy"] or 0.0) / whole
                found.setdefault(line.model, {}).setdefault(policy, []).append(ratio)
    return {model: {name: statistics.fmean(r) for name, r in of.items()} for model, of in found.items()}


def by_size(ratios: Ratios, sizes: Mapping[str, float]) -> Ratios:
    return {model: ratios[model] for model in sorted(ratios, key=lambda model: sizes.get(model, 0))}


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
