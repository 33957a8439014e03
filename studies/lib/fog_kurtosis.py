"""What the kurtosis of runs told before they left, and what it comes to in BF16."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .fog_judged import judged, of_the_start
from .fog_results import KINDS, Line, Outcome
from .fog_words import listed, three_digits


class Watch(NamedTuple):
    """What the alarm did in the runs that are judged."""

    left: list[Outcome]  # for good
    blind: list[Outcome]  # of those that left: before any alarm is possible
    announced: list[int]  # by how many steps
    as_papers: list[Outcome]  # of those that left and were watched: not of the start
    others: list[Outcome]  # that did not leave, watched
    false: list[Outcome]


def watch_of(found: Sequence[Outcome]) -> Watch:
    of = judged(found)
    left = [one for one in of if one.gone]  # what came back is no divergence
    seen = [one for one in left if one.watched]
    others = [one for one in of if not one.left and one.watched]
    return Watch(
        left,
        [one for one in left if not one.watched],
        [one.announced for one in seen if one.announced],
        [one for one in seen if not of_the_start(one)],
        others,
        [one for one in others if one.alarm],
    )


def last_kurtosis(line: Line, kind: str, over: Callable[[Sequence[float]], float] = max) -> float:
    """The median of the last five samples: the largest over layers, or another number of theirs."""
    samples = line.kurtosis.get(kind, [])[-5:]
    columns = [[value for value in of if value is not None] for of in zip(*samples)]
    layers = [statistics.median(of) for of in columns if of]
    return over(layers) if layers else math.nan


def loss_of(line: Line) -> float:
    value = (line.result or {}).get("loss")
    return math.nan if value is None else value


def is_good(line: Line) -> bool:
    return math.isfinite(loss_of(line)) and not line.unsound


def in_bf16(lines: Sequence[Line]) -> list[dict[str, Line]]:
    """{architecture: its run} of the kurtosis study, of those trained alike with one seed, the first one that most
    have; sound and finished ones."""
    found: dict[tuple[str, ...], dict[int, dict[str, Line]]] = {}
    for line in sorted(lines, key=lambda line: line.spec["seed"]):
        if line.study == "kurtosis" and line.arm == "bf16" and is_good(line):
            seeds = found.setdefault(line.but_for("seed", "architecture"), {})
            seeds.setdefault(line.spec["seed"], {})[line.architecture] = line
    return [max(seeds.values(), key=len) for seeds in found.values()]


class Beside(NamedTuple):
    """FOG-max beside Llama 3 in BF16. gap: of its loss, in per cent. ends: {kind: (its kurtosis, Llama's)}, each in the
    layer where it is largest; means: in the mean of layers, which the paper draws."""

    line: Line
    gap: float
    ends: dict[str, tuple[float, float]]
    means: dict[str, tuple[float, float]]

    @property
    def words(self) -> str:
        return (
            f"loss {self.gap:+.2f} %; at the end (median of the last five samples) its kurtosis, in the largest layer, "
            f"is {_against(self.ends)}; in the mean of layers, {_against(self.means)}"
        )


def _against(pairs: dict[str, tuple[float, float]]) -> str:
    lower, higher = (
        [f"{KINDS[kind]} ({three_digits(mine)} against {three_digits(theirs)})"
         for kind, (mine, theirs) in pairs.items() if (mine < theirs) == below] for below in (True, False)
    )  # fmt: skip
    said = [f"lower for {listed(lower)}"] * bool(lower) + [f"not lower for {listed(higher)}"] * bool(higher)
    return ", ".join(said)


def beside(lines: Sequence[Line]) -> list[Beside]:
    found = []
    for of in in_bf16(lines):
        if {"llama3", "fog-max"} <= of.keys():
            llama, fog = of["llama3"], of["fog-max"]
            largest, mean = (
                {kind: (last_kurtosis(fog, kind, over), last_kurtosis(llama, kind, over)) for kind in KINDS}
                for over in (max, statistics.fmean)
            )
            found.append(Beside(fog, 100 * (loss_of(fog) / loss_of(llama) - 1), largest, mean))
    return found
