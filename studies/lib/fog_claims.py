"""Each claim of the paper: what was run, what came out, what may be said of it. By rules, from the data alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch_fp8.table import read_markdown

from .fog_judged import back_words, count_left, judged, of_the_start, steps_words, tokens_words, unheld
from .fog_kurtosis import beside, is_good, watch_of
from .fog_results import FEWEST, LOST, Line, Outcome, Pairs, alone, differences, outcomes
from .fog_words import (
    MARGIN,
    OLD,
    PAPER_ARM,
    architecture_name,
    bounds_qk,
    listed,
    millions,
    plural,
    rates_words,
    setting_order,
    size_words,
    sizes_in,
    span,
    told_apart,
)  # fmt: skip
from .intervals import interval, pairs_needed

PARITY = {"yes": "shown", "no": "not so", "open": "not shown"}
CONSISTENT, NOT, OPEN = "consistent", "not", "cannot be claimed here"
OTHER = "diverges, but in another way than the paper's"
FOGS = ("fog-max", "fog-opt", "fog-flash")
SPEEDS = Path(__file__).parents[2] / "benchmarks" / "results" / "fog.md"  # what benchmarks/fog.py wrote
OVER = "times as fast as Llama BF16 compiled, GPU / loop"  # its column


class Claim(NamedTuple):
    words: str
    run: str
    found: str
    verdict: str


def claims(lines: Sequence[Line]) -> list[Claim]:
    found, lonely = outcomes(lines, "provoke"), alone(lines, "provoke")
    return [
        _diverges(found, lonely, "llama3", "0.7 to 6.6"),
        _diverges(found, lonely, "olmo2", "3.3 to 15.9"),
        *(_holds(found, lonely, name) for name in FOGS),
        _op(found, lonely),
        _norms(found),
        *(_equal(lines, name) for name in FOGS),
        _foretold(found),
        _kurtosis_claim(lines),
        _speed(SPEEDS.read_text() if SPEEDS.exists() else ""),
        Claim("Larger models diverge after more tokens; FOG-max at 1.5B is stable over 450 billion tokens; tasks are "
              "scored equally", "nothing: too many tokens, no data of the tasks", "–", OPEN),
    ]  # fmt: skip


# ---- what leaves -----------------------------------------------------------------------------------------------------


def _of(found: Sequence[Outcome], name: str) -> list[Outcome]:
    of = [one for one in found if one.line.arm == PAPER_ARM and one.line.architecture == name]
    return sorted(of, key=lambda one: setting_order(one.line))


def _proven(found: Sequence[Outcome], all_found: Sequence[Outcome]) -> list[Outcome]:
    """Those that left for good where BF16, run again as far, did not."""
    again = {one.line.pair: one for one in all_found if one.line.arm == "bf16-again"}
    gone = [one for one in found if one.gone]
    return [one for one in gone if one.line.pair in again and again[one.line.pair].holds_to(one.left or 0)]


def _diverged(found: Sequence[Outcome], all_found: Sequence[Outcome], verdict: str) -> str | None:
    """The verdict where some of these are proven to have left, as what the paper saw or in another way; None where
    none is."""
    reasons = [(_differing(one, all_found), one.line.rate) for one in _proven(found, all_found)]
    if not reasons:
        return None
    why, rate = min(reasons, key=lambda of: (len(of[0]), of[1]))  # the nearest to the paper's
    return "; ".join(
        [f"{OTHER}: {why[0]}" if why else verdict, *why[1:], *([f"at {rate:g} × the usual rate"] * (rate != 1))]
    )


def _differing(one: Outcome, all_found: Sequence[Outcome]) -> list[str]:
    """What makes it another divergence than the paper's."""
    assert one.left is not None
    alone = next((other for other in all_found if (other.line.arm, other.line.pair) == ("fp8", one.line.pair)), None)
    why = of_the_start(one)
    if alone is not None and alone.left:
        why.append("FP8 linears alone leave too")
    elif alone is None or not alone.holds_to(one.left):
        why.append("FP8 linears alone were not run as far")
    return why


def _ran(name: str, of: Sequence[Outcome], all_found: Sequence[Outcome], lonely: Sequence[Line]) -> str:
    """How many runs, at which rates, over how many tokens; and how many more say nothing."""
    all_of = _of(all_found, name)
    aside = sum(one.aside for one in all_of)
    unsound = len(all_of) - len(of) - aside
    nothing = [f"{unsound} beside a BF16 that is not sound itself"] * bool(unsound)
    nothing += [f"{aside} aside{OLD}"] * bool(aside) + _lonely_words(lonely, name)
    if not of:
        return f"only {listed(nothing)}" if nothing else "nothing yet"
    sizes = listed(dict.fromkeys(one.line.setting[0] for one in of))
    many = f"{plural(len(of), 'run')} of {sizes}{OLD * any(one.line.old for one in of)}"
    said = [f"{many}, {rates_words(one.line.spec['lr'] for one in of)}, {tokens_words(of)}"]
    short = sum(not one.finished for one in of)
    said += [f"{short} not finished, or BF16 beside it is not"] * bool(short)
    return "; ".join(said + nothing)


def _lonely_words(lonely: Sequence[Line], name: str) -> list[str]:
    count = sum((line.architecture, line.arm) == (name, PAPER_ARM) for line in lonely)
    return [f"{count} with no BF16 beside {'it' if count == 1 else 'them'}"] * bool(count)


def _left(of: Sequence[Outcome]) -> str:
    if not of:
        return "–"
    at: dict[tuple[str, int, float], list[int]] = {}
    for one in of:
        if one.left:
            size = size_words(one.line, (other.line for other in of))
            at.setdefault((size, one.line.setting[2], one.line.spec["lr"]), []).append(one.left)
    where = [
        f"step{'s' * (len(steps) > 1)} {listed(map(str, sorted(steps)))} "
        f"({span([step * tokens for step in steps], millions)} tokens; {size}, learning rate {rate:g})"
        for (size, tokens, rate), steps in at.items()
    ]
    said = f"{count_left(of)} left BF16, at {listed(where)}" if at else f"none left BF16 in {steps_words(of)}"
    said += f"; {back}" if (back := back_words(of)) else ""
    return said + "".join(f"; {count} more {words}" for count, words in unheld(of))


def _diverges(all_found: Sequence[Outcome], lonely: Sequence[Line], name: str, tokens: str) -> Claim:
    words = f"{architecture_name(name)} diverges with FP8 attention (after {tokens} billion tokens)"
    of = _of(judged(all_found), name)
    verdict = _diverged(of, all_found, CONSISTENT) or f"{OPEN}{_undecided(of)}"
    return Claim(words, _ran(name, of, all_found, lonely), _left(of), verdict)


def _undecided(of: Sequence[Outcome]) -> str:
    """Why runs that are not proven to have left do not decide."""
    if not of:
        return ""
    if any(one.gone for one in of):
        return ": BF16, run again as far, is not known to hold"
    if any(not one.left and one.line.fault == LOST for one in of):
        return ": BF16 was not run as far as what was lost"
    return ": it may yet come, after so many tokens more"


def _holds(all_found: Sequence[Outcome], lonely: Sequence[Line], name: str) -> Claim:
    words = f"{architecture_name(name)} does not diverge with FP8 attention"
    of = _of(judged(all_found), name)
    held = bool(of) and all(one.holds or one.came_back for one in of)
    verdict = _diverged(of, all_found, NOT) or (
        f"{CONSISTENT}, as far as these tokens" if held else f"{OPEN}{_undecided(of)}"
    )
    return Claim(words, _ran(name, of, all_found, lonely), _left(of), verdict)


def _op(all_found: Sequence[Outcome], lonely: Sequence[Line]) -> Claim:
    of = _of(judged(all_found), "op")
    words = "OP diverges with FP8 attention, before OP with frozen QK-norms (390M, within 50 billion tokens)"
    verdict = f"{OPEN}: which is first takes billions of tokens"
    return Claim(words, _ran("op", of, all_found, lonely), _left(of), verdict)


# ---- norms of q and k ------------------------------------------------------------------------------------------------


class Twins(NamedTuple):
    """Runs in FP8 attention that are the same but for their norms of q and k."""

    without: Outcome
    with_: Outcome


def twins(found: Sequence[Outcome]) -> list[Twins]:
    """Of each architecture that leaves q and k unbounded and the same one with norms of them, all else in their specs
    alike, where both are judged."""
    of = [one for one in judged(found) if one.attention]
    bound = {_but_norms(one.line): one for one in of if bounds_qk(one.line.architecture)}
    return [
        Twins(one, bound[_but_norms(one.line)])
        for one in of
        if not bounds_qk(one.line.architecture) and _but_norms(one.line) in bound
    ]


def _but_norms(line: Line) -> tuple[str, ...]:
    return line.architecture.partition(":")[0], line.arm, *line.but_for("architecture")


def _norms(found: Sequence[Outcome]) -> Claim:
    words = (
        "Norms of q and k, a part of FOG, let attention bear FP8 (the paper has no run of them alone; OLMo 2, which "
        "has them, diverges later than Llama 3)"
    )
    pairs = twins(found)
    if not pairs:
        return Claim(words, "nothing yet", "–", OPEN)
    names = listed(dict.fromkeys(architecture_name(pair.without.line.architecture) for pair in pairs))
    rates = rates_words(pair.without.line.spec["lr"] for pair in pairs)
    old = OLD * any(one.line.old for pair in pairs for one in pair)
    many = f"{plural(len(pairs), 'pair')} of runs of {names}{old}"
    alone = "in these norms and, where marked, in attention's old backward" if old else "in these norms alone"
    ran = f"{many}, with FP8 attention, that differ {alone}, {rates}"
    proven = [pair for pair in pairs if _proven([pair.without], found)]
    cured = [pair for pair in proven if pair.with_.holds and pair.with_.holds_to(pair.without.left or 0)]
    said = [f"without norms {count_left([pair.without for pair in pairs])} left BF16"]
    said += [f"with them {count_left([pair.with_ for pair in pairs])}"]
    said += [f"in {steps_words([pair.with_ for pair in pairs])}"]
    if not proven:
        return Claim(words, ran, ", ".join(said), OPEN)
    failed = [pair for pair in proven if not pair.with_.holds]
    verdict = CONSISTENT if len(cured) == len(proven) else NOT if len(failed) == len(proven) else OPEN
    if verdict == CONSISTENT and all(_differing(pair.without, found) for pair in cured):
        verdict += ", but of another divergence than the paper's"
    return Claim(words, ran, ", ".join(said), verdict)


# ---- parity ----------------------------------------------------------------------------------------------------------


def _equal(lines: Sequence[Line], name: str) -> Claim:
    words = f"{architecture_name(name)} with FP8 attention is as good as in BF16, through the cooldown"
    keys = [(key, one) for key, one in differences(lines, PAPER_ARM).items() if one.line.architecture == name]
    of = [pairs for _, pairs in keys]
    lonely = _lonely_words(alone(lines, "parity"), name)
    if not of:
        return Claim(words, f"only {lonely[0]}" if lonely else "nothing yet", "–", OPEN)
    sizes = sizes_in(told_apart([pairs.line for pairs in of], "seed"))
    ran = "; ".join([*(f"{pairs_words(pairs)} of {sizes[key]}" for key, pairs in keys), *lonely])
    floor = differences(lines, "bf16-again")
    said = "; ".join(
        interval_words(pairs.values)
        + " of the loss" * bool(pairs.values)
        + (f"; BF16 against itself {interval_words(floor[key].values)}" if key in floor else "")
        for key, pairs in keys
    )
    shown = {parity_of(pairs) for pairs in of}
    why = _not_shown(of)
    if any(pairs.old and _above(pairs.values) for pairs in of):
        why = f"not shown, and what is marked{OLD} proves nothing against FP8"
    verdict = {"yes": CONSISTENT, "no": NOT}.get(shown.pop(), f"{OPEN}: {why}") if len(shown) == 1 else OPEN
    return Claim(words, ran, said, verdict)


def _not_shown(of: Sequence[Pairs]) -> str:
    if not any(pairs.values for pairs in of):
        return "not shown, no pair has a BF16 that is sound itself"
    needed = [words for pairs in of if (words := needed_words(pairs.values)) != "–"]
    takes = f"; at this scatter that takes {listed(needed)} pairs, if the mean is 0" if needed else ""
    return f"not shown, the interval ends above the margin of {MARGIN} %{takes}"


def pairs_words(pairs: Pairs) -> str:
    said = f"{plural(len(pairs.values), 'pair')}{OLD * bool(pairs.old)}"
    return f"{said}, and {pairs.unsound} whose BF16 is not sound itself" if pairs.unsound else said


def parity_of(pairs: Pairs) -> str:
    """Old runs may show it, and never that it is not so."""
    if _above(pairs.values):
        return "open" if pairs.old else "no"
    return "yes" if pairs.values and interval(pairs.values).high < MARGIN else "open"


def _above(values: Sequence[float]) -> bool:
    return bool(values) and (not all(map(math.isfinite, values)) or interval(values).low > MARGIN)


def needed_words(values: Sequence[float]) -> str:
    """The pairs that it takes at this scatter, if their mean is 0."""
    needed = pairs_needed(values, MARGIN) if all(map(math.isfinite, values)) else None
    return "–" if needed is None else str(needed)


def interval_words(values: Sequence[float]) -> str:
    if not values:
        return "–"
    if not all(map(math.isfinite, values)):
        return f"{sum(not math.isfinite(v) for v in values)} of {len(values)} lost"
    mean = interval(values)
    if not math.isfinite(mean.low):
        return f"{mean.mean:+.3f} %"
    return f"{mean.mean:+.3f} % [{mean.low:+.3f}, {mean.high:+.3f}]"


# ---- kurtosis --------------------------------------------------------------------------------------------------------


def _foretold(found: Sequence[Outcome]) -> Claim:
    words = "The kurtosis of q, k and v leaves its healthy growth long before the loss diverges (billions of tokens)"
    many = len(judged(found))
    if not many:
        return Claim(words, "nothing yet", "–", OPEN)
    ran, watch = f"{plural(many, 'run')} in FP8", watch_of(found)
    seen = len(watch.left) - len(watch.blind)
    said = [f"the watch announced {len(watch.announced)} of {plural(seen, 'run')} that left BF16" if seen
            else "no run left BF16 late enough"]  # fmt: skip
    said[0] += f", {span(watch.announced)} steps before" if watch.announced else ""
    said += [f"{len(watch.blind)} left before {FEWEST} samples, which no alarm can announce"] * bool(watch.blind)
    said += [f"{len(watch.false)} of {plural(len(watch.others), 'other')} had an alarm"]
    if not watch.as_papers:
        verdict = f"{OPEN}: what left began to at the start of training" if watch.left else OPEN
        return Claim(words, ran, "; ".join(said), verdict)
    early = sum(one.announced > 0 for one in watch.as_papers)
    some = (
        f"{OPEN}: it told of {early} of the {len(watch.as_papers)} whose loss and gradient norm were sound at the start"
    )
    verdict = CONSISTENT if early == len(watch.as_papers) else NOT if not early else some
    return Claim(words, ran, "; ".join(said), verdict)


def _kurtosis_claim(lines: Sequence[Line]) -> Claim:
    words = "FOG-max has as low a loss as Llama 3 in BF16, and a lower kurtosis (1.5B, more than 100 billion tokens)"
    both = beside(lines)
    if not both:
        return Claim(words, "nothing yet", "–", OPEN)
    settings = [one.line.setting for one in both]
    ran = "; ".join(f"a run of each, of {size}, {millions(steps * tokens)} tokens" for size, steps, tokens in settings)
    bad = sum(line.study == "kurtosis" and line.result is not None and not is_good(line) for line in lines)
    ran += f"; {bad} more lost, or not sound" * bool(bad)
    good = [
        is_good for one in both for is_good in (one.gap < 1, *(mine < theirs for mine, theirs in one.ends.values()))
    ]
    verdict = CONSISTENT if all(good) else NOT if not any(good) else f"{OPEN}: it holds in part"
    return Claim(words, ran, "; ".join(one.words for one in both), verdict)


# ---- speed -----------------------------------------------------------------------------------------------------------


class Speed(NamedTuple):
    """Of FOG-flash with FP8 attention in mode auto, over Llama 3 in BF16 compiled, in a loop."""

    width: str
    context: str
    mode: str
    times: float

    @property
    def mode_words(self) -> str:
        return {"16bit": "16 bits", "fp8": "FP8"}.get(self.mode, self.mode)


def speeds(measured: str) -> list[Speed]:
    """measured: the page of benchmarks/fog.py."""
    rows = [row for table in read_markdown(measured) for row in table]
    return [
        Speed(row["width"], row["context"], row["attention ran in"], float(row[OVER].split("/")[1]))
        for row in rows
        if row.get("arm") == "FOG-flash, FP8, attention" and OVER in row
    ]


def _speed(measured: str) -> Claim:
    words = "FOG-flash with FP8 attention has 1.40 to 1.43 times the tokens/s of Llama 3 in BF16 (8B, context 4096)"
    found = [one for one in speeds(measured) if one.width == "8B"]
    asked = next((one for one in found if one.context == "4096"), None)
    if asked is None:
        return Claim(words, "nothing yet", "–", OPEN)
    said = "; ".join(
        f"at context {one.context} {one.times:g} times, BF16 compiled; attention ran in {one.mode_words}, which mode "
        "auto found to be fastest" for one in found
    )  # fmt: skip
    in_fp8 = asked.mode == "fp8"
    verdict = f"{CONSISTENT}, for the layers alone" if asked.times >= 1.40 and in_fp8 else OPEN
    verdict += "" if in_fp8 else ": its attention was not in FP8, since 16 bits are faster there"
    return Claim(words, "a step of the layers, without head and optimizer (`benchmarks/fog.py`)", said, verdict)
