"""What was seen where a loss in FP8 left that of BF16: written from the data by rules, so that it holds for any."""

from __future__ import annotations

from collections.abc import Sequence

from torch_fp8.table import markdown

from .divergence import PATIENCE
from .fog_judged import count_left
from .fog_results import FEWEST, IN_A_ROW, LAST, Line, Outcome, most_in_a_row
from .fog_words import (
    ARMS,
    OLD,
    architecture_name,
    arm_order,
    bounds_qk,
    listed,
    millions,
    number,
    plural,
    rate_words,
    told_apart,
)  # fmt: skip

# What the paper's arm has, and the arms that do without it.
SUSPECTS = {
    "a cold start": ("warm", "default"),
    "one scale for q, k and v": ("separate", "default"),
    "amaxes of 1024 steps": ("history16",),
    "gradients within attention in E5M2": ("e4m3",),
    "attention's backward in FP8": ("forward", "fp8"),
    "attention in FP8": ("fp8",),
}
NORMS = "q and k without norms"
_HEAD = ["arm", "seed", "leaves BF16 at", "its gradient norm jumps at", "kurtosis of q, k, v in the last sample before",
         "BF16's", "the watch", "its loss in the end", "BF16's then"]  # fmt: skip


def seen(found: Sequence[Outcome]) -> list[str]:
    """Markdown, a part for each architecture and way of training in which some run in FP8 left BF16; of all seeds."""
    groups: dict[tuple[str, ...], list[Outcome]] = {}
    for one in found:
        groups.setdefault(one.line.but_for("seed", "every"), []).append(one)
    names = told_apart([one.line for one in found], "seed", "every")
    parts = []
    for key, (name, length, rate) in names.items():
        of = groups[key]
        if not any(one.gone for one in of if one.line.arm != "bf16-again"):
            continue
        title = f"### {name}, {length}, learning rate {rate}"
        parts += [title, _start(of, found), " ".join(_suspects(of, found)), _table(of)]
    return [part for part in parts if part]


def _start(of: Sequence[Outcome], found: Sequence[Outcome]) -> str:
    line, seeds = of[0].line, told_apart([one.line for one in of])
    references = {one.line.pair: one.reference for one in of}
    ends = [f"{number(references[pair].last)} (seed {words[-1]}{_short(references[pair])})"
            for pair, words in seeds.items()]  # fmt: skip
    said = (
        f"{rate_words(line).capitalize()}; the warm-up is {line.spec['warm_up']} steps long, a step has "
        f"{millions(line.setting[2])} tokens. The mean of BF16's last {LAST} losses is {', '.join(ends)}"
        f"{_usual(references[next(iter(seeds))], found)}."
    )
    unsound = [f"{reference.unsound} (seed {seeds[pair][-1]})" for pair, reference in references.items()
               if reference.unsound]  # fmt: skip
    if unsound:
        said += (
            f" BF16 itself is not sound: it rises above its start, or diverges, at step {', '.join(unsound)}. What "
            "leaves it says nothing of FP8."
        )
    return said


def _short(line: Line) -> str:
    return "" if line.result else f", {line.step} of {line.spec['steps']} steps so far"


def _usual(reference: Line, found: Sequence[Outcome]) -> str:
    """Where it ends at the usual rate, if this is another one."""
    alike = [one.reference for one in found if one.reference.but_for("lr", "every") == reference.but_for("lr", "every")]
    usual = next((other for other in alike if other.rate == 1 and reference.rate != 1), None)
    return "" if usual is None else f"; at the usual rate it is {number(usual.last)}{_short(usual)}"


# ---- what it needs ---------------------------------------------------------------------------------------------------


def _suspects(of: Sequence[Outcome], found: Sequence[Outcome]) -> list[str]:
    """What it needs and what not, as far as arms tell, of the runs that count."""
    of = [one for one in of if one.counts]
    in_fp8 = [one for one in of if one.line.arm != "bf16-again"]
    if not any(one.left for one in in_fp8):
        return []
    last = max(one.left for one in in_fp8 if one.left)
    said = [_again(of, last)]
    innocent, open_ = [], []
    for what, arms in SUSPECTS.items():
        without = [one for one in in_fp8 if one.line.arm in arms]
        leaving_arms = {one.line.arm for one in without if one.left}
        if leaving_arms:
            runs = [one for one in without if one.line.arm in leaving_arms]
            innocent.append(f"{what} ({count_left(runs, 'run')} without it left too)")
        elif not any(one.holds_to(last) for one in without):
            open_.append(what)
    held = [f"{ARMS[arm]} ({_none(runs)})" for arm, runs in _by_arm(in_fp8) if _hold(runs, last)]
    if not bounds_qk(of[0].line.architecture):
        normed = [one for one in _with_norms(of[0].line, found) if one.attention and one.counts]
        name = architecture_name(normed[0].line.architecture) if normed else ""
        if any(one.left for one in normed):
            innocent.append(f"{NORMS} ({name}: {count_left(normed, 'run')} with FP8 attention left too)")
        elif normed and _hold(normed, last):
            held.append(f"norms of q and k and nothing else changed ({name}, FP8 attention: {_none(normed)})")
        else:
            open_.append(NORMS)
    if innocent:
        said.append(f"Not needed for it: {', '.join(innocent)}.")
    if held:
        said.append(f"**It does not happen with {listed(held)}.**")
    if open_:
        said.append(f"No run has tried yet to do without: {', '.join(open_)}.")
    return said


def _none(runs: Sequence[Outcome]) -> str:
    return f"{count_left(runs)} left by step {min(one.seen for one in runs)}{OLD * any(one.line.old for one in runs)}"


def _hold(runs: Sequence[Outcome], step: int) -> bool:
    return all(one.holds_to(step) and one.holds for one in runs)


def _by_arm(of: Sequence[Outcome]) -> list[tuple[str, list[Outcome]]]:
    arms = sorted({one.line.arm for one in of}, key=arm_order)
    return [(arm, [one for one in of if one.line.arm == arm]) for arm in arms]


def _with_norms(line: Line, found: Sequence[Outcome]) -> list[Outcome]:
    """Runs of the same architecture with norms of q and k, trained alike, of any seed."""
    plain, keys = line.architecture.partition(":")[0], ("architecture", "seed", "every")
    return [one for one in found if one.line.architecture.partition(":")[0] == plain
            and bounds_qk(one.line.architecture) and one.line.but_for(*keys) == line.but_for(*keys)
            and one.line.arm != "bf16-again"]  # fmt: skip


def _again(of: Sequence[Outcome], last: int) -> str:
    # How often a run is sampled does not change it.
    again = {one.line.but_for("every"): one for one in of if one.line.arm == "bf16-again"}
    pairs = {one.line.but_for("every") for one in of if one.left and one.line.arm != "bf16-again"}
    if any(one.left for one in again.values()):
        return "The order of sums alone does this too: BF16, run again, leaves itself."
    if all(pair in again and again[pair].holds_to(last) for pair in pairs):
        return f"BF16, run again with each seed, does not leave itself by step {last + PATIENCE - 1}: the order of " \
               "sums alone does not do this."  # fmt: skip
    return "BF16 was not run again so far with each seed: the order of sums alone may do this."


# ---- a row a run -----------------------------------------------------------------------------------------------------


def _table(of: Sequence[Outcome]) -> str:
    seeds = told_apart([one.line for one in of])
    ordered = sorted(of, key=lambda one: (arm_order(one.line.arm), list(seeds).index(one.line.pair)))
    rows = [[ARMS[one.line.arm], seeds[one.line.pair][-1], leaving(one), one.line.jumped or "–", *_before(one),
             watch_words(one), *_in_the_end(one)] for one in ordered]  # fmt: skip
    return markdown(_HEAD, rows)


def leaving(one: Outcome) -> str:
    """In brackets where it says nothing of FP8."""
    said = f"not by {one.seen}{'' if one.finished else ', unfinished'}"
    if one.left:
        said = f"**{one.left}**{', came back' * one.came_back}"
    if not one.left and not one.holds:
        said += f", but {one.line.fault} at {one.line.unsound}"
    said = said if one.counts else f"({said.replace('**', '')})"
    return f"{said}{OLD * one.line.old}"


def watch_words(one: Outcome) -> str:
    """How many steps before it left the watch said so, or why it did not."""
    by_rms = one.by_rms
    if by_rms is None:
        return _of_kurtosis(one)
    at = f"alarm at {by_rms.alarm.step}" if by_rms.alarm else "no alarm"
    return f"{_of_kurtosis(one)}; by rms {_in_time(by_rms) or at}"


def _in_time(one: Outcome) -> str:
    if not one.alarm or not one.announced:
        return ""
    return f"alarm {one.announced} steps before, at {one.alarm.step} (layer {one.alarm.layer + 1})"


def _of_kurtosis(one: Outcome) -> str:
    if in_time := _in_time(one):
        return in_time
    later = f"; alarm at {one.alarm.step}" if one.alarm else ""
    if not one.left:
        return f"no alarm in {plural(one.samples, 'sample')}" if not one.alarm else later[2:]
    if not one.watched:
        return f"could not: {plural(one.samples, 'sample')} before it, an alarm takes {FEWEST}{later}"
    most = most_in_a_row(one.line, one.left)
    out = f"at most {most} in a row out of trend, an alarm takes {IN_A_ROW}" if most else "none out of trend"
    return f"no alarm in {plural(one.samples, 'sample')} before it: {out}{later}"


def _before(one: Outcome) -> tuple[str, str]:
    """Of its kurtosis and BF16's, in the last sample that both have before it left."""
    both = [step for step in one.line.samples if step in one.reference.samples and one.left and step < one.left]
    if not both:
        return "–", "–"
    return f"{_largest(one.line, both[-1])} (step {both[-1]})", _largest(one.reference, both[-1])


def _largest(line: Line, step: int) -> str:
    values = [v for v in line.kurtosis.get("qkv", [])[line.samples.index(step)] if v is not None]
    return f"{max(values):.3g}" if values else "not finite"


def _in_the_end(one: Outcome) -> tuple[str, str]:
    if one.line.lost:
        return f"not finite from {one.line.losses.index(None) + 1} on", "–"
    return f"{number(one.line.losses[one.seen - 1])} (step {one.seen})", number(one.reference.losses[one.seen - 1])
