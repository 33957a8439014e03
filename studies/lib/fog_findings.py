"""What came out, in a sentence each, for those who read no further: by rules, from the data alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from .fog_claims import PARITY, Twins, needed_words, pairs_words, parity_of, speeds, twins
from .fog_judged import EARLY, back_words, count_left, judged, steps_words, tokens_words, unheld
from .fog_kurtosis import Watch, beside, watch_of
from .fog_results import FEWEST, LAST, Line, Outcome, alone, current, differences, outcomes
from .fog_words import (
    ARMS,
    MARGIN,
    OLD,
    PAPER_ARM,
    architecture_name,
    architecture_order,
    arm_order,
    bounds_qk,
    listed,
    millions,
    number,
    plural,
    rate_words,
    rates_words,
    setting_order,
    size_words,
    sizes_in,
    span,
    told_apart,
)  # fmt: skip
from .intervals import interval


def findings(lines: Sequence[Line], measured: str) -> list[str]:
    """measured: the page of benchmarks/fog.py."""
    found = outcomes(lines, "provoke")
    of_runs = [*_leaving(found), *_holding(found), *_parity(lines), *_kurtosis(found, lines)]
    return [*of_runs, *_speed(measured), *_alone(lines)]


def _leaving(all_found: Sequence[Outcome]) -> list[str]:
    """A sentence for each architecture, size and learning rate at which a run with FP8 attention left BF16, and for
    each higher rate that one bore without norms of q and k."""
    groups: dict[tuple[object, ...], list[Outcome]] = {}
    for one in judged(all_found):
        key = architecture_order(one.line.architecture), setting_order(one.line), -one.line.spec["lr"]
        groups.setdefault(key, []).append(one)
    return [_of_group(groups[key], all_found) for key in sorted(groups)
            if any(one.attention and (one.left or _bore(one.line)) for one in groups[key])]  # fmt: skip


def _bore(line: Line) -> bool:
    return line.rate > 1 and not bounds_qk(line.architecture)


def _of_group(of: Sequence[Outcome], all_found: Sequence[Outcome]) -> str:
    line = of[0].line
    attention, linears = [one for one in of if one.attention], [one for one in of if one.line.arm == "fp8"]
    left = sorted(one.left for one in attention if one.left)
    pairs = {one.line.pair for one in of}
    again = [one for one in all_found if one.line.arm == "bf16-again" and one.line.pair in pairs]
    arms = len({one.line.arm for one in attention})
    variants = f", in {arms} variants," if arms > 1 else ""
    size = size_words(line, (one.line for one in all_found))
    name = f"{architecture_name(line.architecture)} of {size} at {rate_words(line)}"
    said = [f"**{name}: {count_left(attention, 'run')} with FP8 attention{variants} left BF16's loss**"]
    said[0] += f", {_at(left, line)}" if left else f" in {steps_words(attention)} ({tokens_words(attention)})"
    said += [back_words(attention)] * any(one.came_back for one in attention)
    said += [f"{count} more {did}" for count, did in unheld(attention)]
    said += [f"{count_left(linears)} with FP8 linears alone did"] * bool(linears)
    said += [f"{count_left(again)} of BF16 run again did"] * bool(again)
    if left:
        early = sum(step <= EARLY * line.spec["warm_up"] for step in left)
        said.append(
            f"{early} of {len(left)} left within {EARLY} times the warm-up of {line.spec['warm_up']} steps; the "
            "paper's left after 0.7 billion tokens and more"
        )
    ends = {"with FP8 attention ": attention, "with FP8 linears alone ": linears, "BF16 run again ": again}
    return f"{'; '.join(said)}. {_above_bf16(ends)}."


def _above_bf16(ends: Mapping[str, Sequence[Outcome]]) -> str:
    """Whether or not they left: by the rule they need not where the noise of BF16's steps is loud."""
    said = []
    for words, of in ends.items():
        known = [one.further for one in of if one.further is not None]
        lost = [f"{len(of) - len(known)} lost"] * (len(known) < len(of))
        nats = [span(known, lambda x: f"{x:+.2f}" if abs(x) < 1000 else f"{x:+.1e}")] if known else []
        said += [f"{words}{', '.join(nats + lost)}"] * bool(of)
    return f"How far the mean of the last {LAST} losses lies above BF16's, in nats: {'; '.join(said)}"


def _at(left: Sequence[int], line: Line) -> str:
    half = f", half of them by {statistics.median_low(left)}" if len(left) > 2 else ""
    tokens = span([step * line.setting[2] for step in left], millions)
    return f"at {'step' if left[0] == left[-1] else 'steps'} {span(left)} ({tokens} tokens){half}"


def told_of_old(lines: Sequence[Line]) -> str:
    """How many runs are old, what that is, and which of them count."""
    begun = [line for line in lines if line.losses]
    old, left_over = (sum(line.old for line in of) for of in (begun, current(begun)))
    of = [one for study in ("provoke", "parity") for one in outcomes(lines, study) if one.line.old]
    again, aside = old - left_over, sum(one.aside for one in of)
    held = len(of) - aside
    which = [f"{again} {_was(again)} made again since, and the old stay in runs.jsonl alone"] * bool(again)
    which += [f"{held} held all the same, and count{'s' * (held == 1)}"] * bool(held)
    which += [f"{aside} did not, which proves nothing of FP8, and stand{'s' * (aside == 1)} aside"] * bool(aside)
    return "" if not which else (
        f"**Marked{OLD}:** {plural(old, 'run')} with FP8 attention {_was(old)} made before a fault of its backward was "
        "mended, which made gradients of large scores too large by an exponential ([docs/design.md](design.md)). "
        f"Of these {'; '.join(which)}."
    )  # fmt: skip


def _was(count: int) -> str:
    return "was" if count == 1 else "were"


def _holding(all_found: Sequence[Outcome]) -> list[str]:
    of = [one for one in judged(all_found) if one.attention]
    bounded = [one for one in of if _is_bounded(one)]
    said = []
    if bounded:
        names = sorted({one.line.architecture for one in bounded}, key=architecture_order)
        old = {one.line.architecture for one in bounded if one.line.old}
        rates, back = rates_words(one.line.spec["lr"] for one in bounded), back_words(bounded)
        said.append(
            f"**With norms or a tanh of q and k {count_left(bounded, 'run')} with FP8 attention left**"
            f"{', and ' * bool(back)}{back}, in {steps_words(bounded)} at {rates}: "
            f"{listed(architecture_name(name) + OLD * (name in old) for name in names)}. "
            f"{_above_bf16({'': bounded})}{_by_rate(bounded)}"
        )
    if others := unheld(bounded):
        said.append(f"of those that did not leave, {listed(f'{count} {did}' for count, did in others)}")
    if left_out := [one for one in all_found if one.attention and not one.aside and one not in of]:
        which = listed(dict.fromkeys(architecture_name(one.line.architecture) for one in left_out))
        said.append(
            f"{plural(len(left_out), 'more run')} of {which} {_was(len(left_out))} beside a BF16 that is not sound, or "
            "leaves itself when it is run again: not counted"
        )
    pairs: dict[tuple[str, str, float], list[Twins]] = {}
    for pair in twins(all_found):
        pairs.setdefault(_names(pair), []).append(pair)
    for (plain, normed, _), of_names in pairs.items():
        without, with_ = (span({number(one.reference.last) for one in side}) for side in zip(*of_names))
        said.append(
            f"{normed} is {plain} with nothing else changed; in BF16 its loss ends at {with_}, the other's at "
            f"{without} ({rate_words(of_names[0].with_.line)})"
        )
    usual = [one for one in of if one.line.rate == 1]
    if usual:
        many = plural(len({one.line.architecture for one in usual}), "architecture")
        said.append(
            f"at the usual rate {count_left(usual, 'run')} with FP8 attention left, of {many}, in {tokens_words(usual)}"
        )
    return [_sentences(said)] if said else []


def _is_bounded(one: Outcome) -> bool:
    return one.attention and bounds_qk(one.line.architecture)


def _by_rate(of: Sequence[Outcome]) -> str:
    rates = sorted({one.line.spec["lr"] for one in of}, reverse=True)
    each = [f"{count_left([one for one in of if one.line.spec['lr'] == rate])} at {rate:g}" for rate in rates]
    return f". By learning rate: {', '.join(each)}" if len(rates) > 1 else ""


def _sentences(said: Sequence[str]) -> str:
    return " ".join(f"{one[:1].upper()}{one[1:]}." for one in said)


def _names(pair: Twins) -> tuple[str, str, float]:
    without, with_ = (architecture_name(one.line.architecture) for one in pair)
    return without, with_, pair.without.line.spec["lr"]


def _parity(lines: Sequence[Line]) -> list[str]:
    floor = differences(lines, "bf16-again")
    of = list(differences(lines, PAPER_ARM).items())
    if not of:
        return []
    said = []
    sizes = sizes_in(told_apart([pairs.line for _, pairs in of], "seed"))
    for key, pairs in sorted(of, key=lambda item: architecture_order(item[1].line.architecture)):
        shown, needed = parity_of(pairs), needed_words(pairs.values)
        mean = f", {_mean(pairs.values)} in" if pairs.values else ":"
        name = architecture_name(pairs.line.architecture)
        words = f"{name} of {sizes[key]} {PARITY[shown]}{mean} {pairs_words(pairs)}"
        if key in floor and floor[key].values:
            words += f", where BF16 against itself has {_mean(floor[key].values)}"
        said.append(
            words
            + (f"; at this scatter it takes {needed}, if its mean is 0" if shown == "open" and needed != "–" else "")
        )
    return [f"**That FOG with FP8 attention ends no more than {MARGIN} % above BF16's loss:** {'. '.join(said)}."]


def _mean(values: Sequence[float]) -> str:
    if lost := sum(not math.isfinite(value) for value in values):
        return f"{lost} of {len(values)} lost"
    mean = interval(values)
    return f"{mean.mean:+.2f} %" if len(values) < 2 else f"{mean.mean:+.2f} ± {mean.high - mean.mean:.2f} %"


def _kurtosis(found: Sequence[Outcome], lines: Sequence[Line]) -> list[str]:
    said, watch = [], watch_of(found)
    if watch.left:
        said.append(
            f"of {plural(len(watch.left), 'run')} in FP8 that left for good, their kurtosis announced "
            f"{len(watch.announced)}; {len(watch.blind)} left before the {FEWEST} samples that an alarm takes; "
            f"{len(watch.as_papers)} of the others had neither left nor had their gradient norm jump within {EARLY} "
            f"times the warm-up, which is what the claim speaks of; {len(watch.false)} of {len(watch.others)} that did "
            "not leave had an alarm of it"
        )
    of_rms = [one for one in (run.by_rms for run in judged(found)) if one and one.watched]
    if of_rms:
        rms = watch_of(of_rms)
        told = f"announced {len(rms.announced)} of {len(rms.left)} that left{_before(rms.announced)}{_of_papers(rms)}"
        said.append(
            'the rms of q, k and v (`fp8.watch(model, metrics="rms/qkv")`) '
            f"{told if rms.left else 'has seen none that left'}, where it was recorded; {len(rms.false)} of "
            f"{len(rms.others)} others had an alarm of it"
        )
    if watch.left:
        first = sum(one.line.jumped is not None and one.line.jumped < (one.left or 0) for one in watch.left)
        stayed = sum(one.line.jumped is not None for one in watch.others)
        said.append(
            f"the gradient norm jumped before {first} of the {len(watch.left)} left, and in {stayed} of the "
            f"{len(watch.others)} that did not"
        )
    for one in beside(lines):
        size, steps, tokens = one.line.setting
        said.append(f"FOG-max beside Llama 3 in BF16 ({size}, {millions(steps * tokens)} tokens): {one.words}")
    return [f"**Kurtosis, rms and gradient norms:** {_sentences(said)}"] if said else []


def _of_papers(watch: Watch) -> str:
    """Of those whose start was sound, how many it announced."""
    told = sum(one.announced > 0 for one in watch.as_papers)
    return f", of those that were sound at the start {told} of {len(watch.as_papers)}"


def _before(steps: Sequence[int]) -> str:
    return f", {span(steps)} steps before" if steps else ""


def _speed(measured: str) -> list[str]:
    said = [
        f"{one.times:g} × at context {one.context} ({one.width} width; mode auto ran attention in {one.mode_words})"
        for one in speeds(measured)
    ]
    words = "**Speed of a step of FOG-flash's layers in FP8 over Llama 3's in BF16, compiled:**"
    return [f"{words} {', '.join(said)}."] if said else []


def _alone(lines: Sequence[Line]) -> list[str]:
    of = [line for study in ("provoke", "parity") for line in alone(lines, study)]
    if not of:
        return []
    which = []
    for pair, (name, length, rate, seed) in told_apart(of).items():
        arms = sorted({line.arm for line in of if line.pair == pair}, key=arm_order)
        which.append(f"{name}, {length}, learning rate {rate}, seed {seed} ({', '.join(ARMS[arm] for arm in arms)})")
    one = len(of) == 1
    return [
        f"**{plural(len(of), 'run')} with no BF16 beside {'it' if one else 'them'}**, which "
        f"{'says' if one else 'say'} nothing: {'; '.join(which)}."
    ]
