"""What came out, in a sentence each, for those who read no further: by rules, from the data alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from .fog_claims import (
    EARLY,
    PARITY,
    UNMENDED,
    Twins,
    beside,
    count_left,
    most_tokens,
    needed_words,
    pairs_words,
    parity_of,
    sound,
    speeds,
    twins,
    watch_of,
)  # fmt: skip
from .fog_results import FEWEST, LAST, Line, Outcome, differences, outcomes
from .fog_words import (
    MARGIN,
    PAPER_ARM,
    architecture_name,
    architecture_order,
    bounds_qk,
    listed,
    millions,
    rate_words,
)  # fmt: skip
from .intervals import interval


def findings(lines: Sequence[Line], measured: str) -> list[str]:
    """measured: the page of benchmarks/fog.py."""
    found = outcomes(lines, "provoke")
    return [*_leaving(found), *_holding(found), *_parity(lines), *_kurtosis(found, lines), *_speed(measured)]


def _end(line: Line) -> str:
    last = [loss for loss in line.losses[-LAST:] if loss is not None]
    return f"{statistics.fmean(last):.2f}" if last else "lost"


def _leaving(all_found: Sequence[Outcome]) -> list[str]:
    """A sentence for each architecture, size and learning rate at which a run with FP8 attention left a sound BF16."""
    groups: dict[tuple[object, ...], list[Outcome]] = {}
    for one in sound(all_found):
        key = architecture_order(one.line.architecture), one.line.setting, -one.line.spec["lr"]
        groups.setdefault(key, []).append(one)
    return [_of_group(groups[key], all_found) for key in sorted(groups)
            if any(one.left and one.attention for one in groups[key])]  # fmt: skip


def _of_group(of: Sequence[Outcome], all_found: Sequence[Outcome]) -> str:
    line = of[0].line
    attention, linears = [one for one in of if one.attention], [one for one in of if one.line.arm == "fp8"]
    left = sorted(one.left for one in attention if one.left)
    pairs = {one.line.pair for one in of}
    again = [one for one in all_found if one.line.arm == "bf16-again" and one.line.pair in pairs]
    arms = len({one.line.arm for one in attention})
    variants = f", in {arms} variants," if arms > 1 else ""
    at = f"step {left[0]}" if len(left) == 1 else (
        f"steps {left[0]} to {left[-1]}, half of them by {statistics.median_high(left)}"
    )  # fmt: skip
    early = sum(step <= EARLY * line.spec["warm_up"] for step in left)
    others = [f"{count_left(linears)} with FP8 linears alone do"] * bool(linears)
    unmended = sum(not one.line.mended for one in attention if one.left)
    fault = f" {unmended} of {len(left)} were {UNMENDED}, and need not be FP8's doing." if unmended else ""
    others += [f"{count_left(again)} of BF16 run again do"] * bool(again)
    name = f"{architecture_name(line.architecture)} of {line.setting[0]} at {rate_words(line)}"
    return (
        f"**{name}: {count_left(attention)} runs with FP8 attention{variants} leave BF16's loss**, at {at}; "
        f"{''.join(f'{other}; ' for other in others)}{early} of {len(left)} leave within {EARLY} times the warm-up of "
        f"{line.spec['warm_up']} steps, where the paper's leave after 0.7 billion tokens and more.{fault}"
    )


def unmended(lines: Sequence[Line]) -> str:
    """What of it has to be run again, or nothing."""
    of = [one for study in ("provoke", "parity") for one in outcomes(lines, study) if one.attention]
    old = sum(not one.line.mended for one in of)
    if not old:
        return ""
    return (
        f"**To be run again: {old} of {len(of)} runs with FP8 attention were made before a fault of attention's "
        "backward was mended.** It rounded keys again, in both modes, which made gradients of large scores too large "
        "by an exponential; a Llama without norms of q and k diverged of that within its warm-up (`docs/design.md`). "
        "Where such a run leaves BF16's loss, FP8 itself need not be why; where one holds, it held with the fault. "
        "Runs with FP8 linears alone, and what is in BF16, are as they were."
    )


def _holding(all_found: Sequence[Outcome]) -> list[str]:
    of = [one for one in sound(all_found) if one.attention]
    bounded = [one for one in of if bounds_qk(one.line.architecture)]
    said = []
    if bounded:
        names = dict.fromkeys(sorted((one.line.architecture for one in bounded), key=architecture_order))
        rates = listed(f"{rate:g}" for rate in sorted({one.line.spec["lr"] for one in bounded}))
        steps = f"{min(one.seen for one in bounded)} to {max(one.seen for one in bounded)} steps"
        said.append(
            f"**With norms or a tanh of q and k {count_left(bounded)} runs with FP8 attention leave**, over {steps} at "
            f"learning rates {rates}: {listed(map(architecture_name, names))}"
        )
    for (plain, normed, _), pair in {_names(pair): pair for pair in twins(all_found)}.items():
        without, with_ = (_end(one.reference) for one in pair)
        said.append(
            f"{normed} is {plain} with nothing else changed; in BF16 its loss ends at {with_}, the other's at "
            f"{without} ({rate_words(pair.with_.line)})"
        )
    usual = [one for one in of if one.line.spec["rate"] == 1]
    if usual:
        many = len({one.line.architecture for one in usual})
        said.append(
            f"at the usual rate {count_left(usual)} runs with FP8 attention leave, of {many} architectures, over up to "
            f"{most_tokens(usual)} tokens"
        )
    return [_sentences(said)] if said else []


def _sentences(said: Sequence[str]) -> str:
    return " ".join(f"{one[:1].upper()}{one[1:]}." for one in said)


def _names(pair: Twins) -> tuple[str, str, float]:
    without, with_ = (architecture_name(one.line.architecture) for one in pair)
    return without, with_, pair.without.line.spec["lr"]


def _parity(lines: Sequence[Line]) -> list[str]:
    floor = differences(lines, "bf16-again")
    of = [(key, pairs) for key, pairs in differences(lines, PAPER_ARM).items() if pairs.values]
    if not of:
        return []
    said = []
    for key, pairs in sorted(of, key=lambda item: architecture_order(item[1].line.architecture)):
        shown, needed = parity_of(pairs.values), needed_words(pairs.values)
        name = architecture_name(pairs.line.architecture)
        words = f"{name} {PARITY[shown]}, {_mean(pairs.values)} in {pairs_words(pairs)}"
        if key in floor and floor[key].values:
            words += f", where BF16 against itself has {_mean(floor[key].values)}"
        said.append(words + (f"; it takes {needed} at this scatter" if shown == "open" and needed != "–" else ""))
    return [f"**That FOG with FP8 attention ends no more than {MARGIN} % above BF16's loss:** {'. '.join(said)}."]


def _mean(values: Sequence[float]) -> str:
    if not all(map(math.isfinite, values)):
        return "lost"
    mean = interval(values)
    return f"{mean.mean:+.2f} %" if len(values) < 2 else f"{mean.mean:+.2f} ± {mean.high - mean.mean:.2f} %"


def _kurtosis(found: Sequence[Outcome], lines: Sequence[Line]) -> list[str]:
    said, watch = [], watch_of(found)
    if watch.left:
        said.append(
            f"of {len(watch.left)} runs in FP8 that left, the watch announced {len(watch.announced)}; "
            f"{len(watch.blind)} left before the {FEWEST} samples that an alarm takes; {len(watch.as_papers)} left "
            f"later than at the start of training, which is what the claim speaks of; {len(watch.false)} of "
            f"{len(watch.others)} that did not leave had an alarm"
        )
    for one in beside(lines):
        size, steps, tokens = one.line.setting
        said.append(f"FOG-max beside Llama 3 in BF16 ({size}, {millions(steps * tokens)} tokens): {one.words}")
    return [f"**Kurtosis:** {_sentences(said)}"] if said else []


def _speed(measured: str) -> list[str]:
    said = [
        f"{one.times:g} × at context {one.context} ({one.width} width; mode auto ran attention in {one.mode_words})"
        for one in speeds(measured)
    ]
    words = "**Speed of a step of FOG-flash's layers in FP8 over Llama 3's in BF16, compiled:**"
    return [f"{words} {', '.join(said)}."] if said else []
