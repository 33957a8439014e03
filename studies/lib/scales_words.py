"""Numbers, intervals and verdicts of a study of scales, in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from .intervals import interval
from .scales_results import Line, is_sound

MARGIN = 0.25  # per cent of the loss, fixed before the runs
BY_CHANCE = "Where nothing differs one in twenty such intervals leaves 0 out all the same."
TOO_FEW = "too few tokens to tell"  # whether a policy keeps so much as the paper's criterion


def models_of(names: Iterable[str]) -> str:
    return ", ".join(names)


def percent(differences: Sequence[float]) -> str:
    """Of those that are finite, and how many are not."""
    kept = finite(differences)
    lost = f"{len(differences) - len(kept)} lost" if len(kept) < len(differences) else ""
    if not kept:
        return f"lost in all {len(differences)}" if len(differences) > 1 else lost or "–"
    of = interval(kept)
    said = f"{of.mean:+.2f} % [{_end(of.low)}, {_end(of.high)}]" if of.count > 1 else f"{of.mean:+.2f} %"
    return f"{said}, {lost}" if lost else said


def _end(value: float) -> str:
    """Of an interval: with more digits where two would hide on which side it is of 0 or MARGIN."""
    said, longer = f"{value:+.2f}", f"{value:+.4f}"
    hides = said in ("+0.00", "-0.00", f"{MARGIN:+.2f}") and float(longer)
    return longer if hides else said


def gpu_words(two: int, count: int) -> str:
    """Said beside each comparison of so many pairs, of which ``two`` are on two kinds of GPU."""
    return f" ({two} of {count} pair{'s' * (count > 1)} on two kinds of GPU)" if two else ""


def no_worse(differences: Sequence[float]) -> str:
    """Whether losses are at most MARGIN above BF16's, in a word."""
    if not differences or not all(map(math.isfinite, differences)):
        return "no" if differences else "–"
    if len(differences) == 1:
        return "one pair shows nothing"
    of = interval(differences)
    return "yes" if of.high < MARGIN else "no" if of.low > MARGIN else "open"


def hangs_on(differences: Sequence[float]) -> int:
    """How many of the pairs of a *yes* it would be none without, one by one."""
    without = ([*differences[:i], *differences[i + 1 :]] for i in range(len(differences)))
    return sum(no_worse(of) != "yes" for of in without) if no_worse(differences) == "yes" else 0


def window_of(found: tuple[int, int] | None, swept: Mapping[int, float]) -> str:
    """An end that is the sweep's is marked: the window may go on beyond."""
    if found is None:
        return "none"
    low, high = ("" if found[i] != end else " (the sweep's end)" for i, end in enumerate((min(swept), max(swept))))
    return f"{found[0]}{low} … {found[1]}{high}"


def unsound_words(lines: Iterable[Line], arm: str = "bf16") -> str:
    """Of the runs of a study and model: those of ``arm`` that others are not held to."""
    bad = unsound(lines, arm)
    name = arm.upper() if arm in ("bf16", "fp16") else arm
    return f"; {name} itself was lost or diverged in {bad}, of which no pair counts" if bad else ""


def unsound(lines: Iterable[Line], arm: str) -> int:
    return sum(line.spec["arm"] == arm and line.result is not None and not is_sound(line.result) for line in lines)


def finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]
