"""docs/fog.md, from the data alone: each claim of the paper, what was run, what came out, what may be said of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch_fp8.table import markdown, read_markdown

from .divergence import FACTOR, FIRST, MEDIAN, PATIENCE, SIGMAS, WINDOW
from .fog_figures import ARMS, MARGIN, architecture_name, millions
from .fog_results import FEWEST, IN_A_ROW, KINDS, LAST, Line, Outcome, alarm, differences, outcomes
from .fog_results import SIGMAS as ALARM_SIGMAS
from .fog_seen import JUMP, seen
from .intervals import interval

CONSISTENT, NOT, OPEN = "consistent", "not", "cannot be claimed here"
OTHER = "diverges, but in another way than the paper's"
EARLY = 2  # times the warm-up: a divergence before is one of the start
FOGS = ("fog-max", "fog-opt", "fog-flash")
PAPER_ARM = "fp8-attention"
SPEEDS = Path(__file__).parents[2] / "benchmarks" / "results" / "fog.md"  # what benchmarks/fog.py wrote

_HEAD = """# FOG: FP8 attention, and architectures that bear it

A study of [arXiv 2505.20524](https://arxiv.org/abs/2505.20524), "Towards Fully FP8 GEMM LLM Training at Scale", with
the architectures of `models/fog.py` in small sizes. This page is written by `python studies/fog.py report` from
[runs.jsonl]({data}/runs.jsonl), which holds what came out of every run, lost ones included. A run that is not finished
counts as far as it is.

The paper finds that Llama 3 and OLMo 2 diverge where attention's products are in FP8 too, after 0.7 to 15.9 billion
tokens, that its FOG architectures do not, and that the kurtosis of activations tells long before. A claim is called
*consistent* or *not* where the runs here say so, and else it *cannot be claimed here*; a divergence of another kind is
called that. In all runs head, embedding and norms are in BF16 and parameters in float32; *FP8 attention* has both
products of attention and their gradients in FP8, with one scale for q, k and v, amaxes of 1024 steps and scale 1 in the
first step, as the paper's software had it."""

_RULES = f"""* *Leaves BF16*: the loss is above that of BF16 with the same seed and batches by {SIGMAS:g} standard
  deviations of the latter's step noise, for {PATIENCE} steps on end, from step {FIRST + 1} on; or is not finite. Step
  noise is what a step adds to the trend of its neighbours, by the median over the {WINDOW} steps before.
* *Diverged*: the loss is not finite, or stays above {FACTOR} times the median of the last {MEDIAN} steps for
  {PATIENCE} steps.
* *Alarm*: `torch_fp8.watch` as it is by default, over the recorded kurtosis of q, k and v: {IN_A_ROW} samples in a row
  that are {ALARM_SIGMAS:g} σ above healthy growth, in any layer. No alarm is possible before {FEWEST} samples, so a run
  that leaves before says nothing of alarms.
* *Diverges*: a run leaves BF16, which itself has not diverged and, run again, does not leave itself. *In another way*:
  within {EARLY} times the warm-up, where the paper's runs came after 0.7 billion tokens and more; or where FP8 linears
  alone leave too, or were not run as far, so that it cannot be laid to attention.
* *Jumped*: a gradient norm that is not finite, or above {JUMP:g} times its median over the last {WINDOW} steps, from
  step {FIRST + 1} on.
* *Parity*: the whole 95 % interval of the mean difference of validation losses, over pairs with one seed, is below the
  margin of {MARGIN} % of the loss.

All were written before the runs but three, which came when the first had been seen: *in another way*, *jumped*, and
that a run that leaves before {FEWEST} samples says nothing of alarms."""


class Claim(NamedTuple):
    words: str
    run: str
    found: str
    verdict: str


def page(lines: Sequence[Line], pictures: Sequence[str], data: str) -> str:
    """data: the folder of runs.jsonl and the pictures, as the page links to it."""

    def shown(study: str) -> list[str]:
        return [f"![{name}]({data}/{name}.png)" for name in pictures if name.startswith(study)]

    said = markdown(["claim of the paper", "what was run", "what came out", "verdict"], claims(lines))
    parts = [
        _HEAD.format(data=data),
        f"## Claims\n\n{said}",
        f"## Rules\n\n{_RULES}",
        _provoked(lines),
        *shown("provoke"),
        _parity(lines),
        *shown("parity"),
        _kurtosis(lines),
        *shown("kurtosis"),
        _runs(lines),
        _not_said(lines),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# ---- the claims ------------------------------------------------------------------------------------------------------


def claims(lines: Sequence[Line]) -> list[Claim]:
    found = outcomes(lines, "provoke")
    return [
        _diverges(found, "llama3", "0.7 to 6.6"),
        _diverges(found, "olmo2", "3.3 to 15.9"),
        *(_holds(found, name) for name in FOGS),
        _op(found),
        *(_equal(lines, name) for name in FOGS),
        _foretold(found),
        _kurtosis_claim(lines),
        _speed(SPEEDS.read_text() if SPEEDS.exists() else ""),
        Claim("Larger models diverge after more tokens; FOG-max at 1.5B is stable over 450 billion tokens; tasks are "
              "scored equally", "nothing: too many tokens, no data of the tasks", "–", OPEN),
    ]  # fmt: skip


def _steady(found: Sequence[Outcome], *arms: str) -> list[Outcome]:
    """Of these arms, where BF16 stayed healthy and was not left by itself, as far as that was run."""
    unsteady = {one.line.pair for one in found if one.line.arm == "bf16-again" and one.left}
    of_arms = [one for one in found if one.line.arm in arms and one.steady]
    return [one for one in of_arms if one.line.pair not in unsteady]


def _of(found: Sequence[Outcome], name: str) -> list[Outcome]:
    return [one for one in _steady(found, PAPER_ARM) if one.line.architecture == name]


def _proven(found: Sequence[Outcome], all_found: Sequence[Outcome]) -> list[Outcome]:
    """Those that left where BF16, run again as far, did not."""
    again = {one.line.pair: one for one in all_found if one.line.arm == "bf16-again"}
    return [one for one in found if one.left and one.line.pair in again and again[one.line.pair].holds_to(one.left)]


def _diverged(found: Sequence[Outcome], all_found: Sequence[Outcome], verdict: str) -> str | None:
    """The verdict where some of these are proven to have left, as what the paper saw or in another way; None where
    none is."""
    reasons = [(_differing(one, all_found), one.line.spec["rate"]) for one in _proven(found, all_found)]
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
    why = ["at the start of training"] if one.left <= EARLY * one.line.spec["warm_up"] else []
    if alone is not None and alone.left:
        why.append("FP8 linears alone leave too")
    elif alone is None or not alone.holds_to(one.left):
        why.append("FP8 linears alone were not run as far")
    return why


def _ran(found: Sequence[Outcome]) -> str:
    """How many runs, at which rates, over how many tokens."""
    if not found:
        return "nothing yet, where BF16 holds"
    settings = [one.line.setting for one in found]
    sizes = ", ".join(dict.fromkeys(size for size, _, _ in settings))
    rates = ", ".join(f"{rate:g}" for rate in sorted({one.line.spec["lr"] for one in found}))
    tokens = [one.seen * one.line.setting[2] for one in found]
    many = f"{len(found)} run{'s' * (len(found) > 1)}"
    short = sum(not one.finished for one in found)
    many += f" ({short} of the pairs unfinished)" if short else ""
    return f"{many} of {sizes}, learning rates {rates}, up to {millions(max(tokens))} tokens"


def _left(found: Sequence[Outcome]) -> str:
    left = [one for one in found if one.left]
    if not left:
        return (
            f"none left BF16 by step {', '.join(str(n) for n in sorted({one.seen for one in found}))}" if found else "–"
        )
    at = ", ".join(f"{one.left} (rate {one.line.spec['lr']:g})" for one in left)
    return f"{len(left)} of {len(found)} left BF16, at step {at}"


def _diverges(found: Sequence[Outcome], name: str, tokens: str) -> Claim:
    words = f"{architecture_name(name)} diverges with FP8 attention (after {tokens} billion tokens)"
    of = _of(found, name)
    return Claim(words, _ran(of), _left(of), _diverged(of, found, CONSISTENT) or OPEN)


def _holds(found: Sequence[Outcome], name: str) -> Claim:
    words = f"{architecture_name(name)} does not diverge with FP8 attention"
    of = _of(found, name)
    held = bool(of) and not any(one.left for one in of)
    verdict = _diverged(of, found, NOT) or (f"{CONSISTENT}, as far as these tokens" if held else OPEN)
    return Claim(words, _ran(of), _left(of), verdict)


def _op(found: Sequence[Outcome]) -> Claim:
    of = _of(found, "op")
    return Claim("OP diverges with FP8 attention, before OP with frozen QK-norms (390M, within 50 billion tokens)",
                 _ran(of), _left(of), OPEN)  # fmt: skip


def _equal(lines: Sequence[Line], name: str) -> Claim:
    words = f"{architecture_name(name)} with FP8 attention is as good as in BF16, through the cooldown"
    of = {key: values for key, values in differences(lines, PAPER_ARM).items() if key[0] == name}
    if not of:
        return Claim(words, "nothing yet", "–", OPEN)
    ran = "; ".join(f"{len(values)} pairs of {setting[0]}" for (_, setting), values in of.items())
    said = "; ".join(f"{_interval(values)} of the loss" for values in of.values())
    shown = {_parity_of(values) for values in of.values()}
    return Claim(words, ran, said, {"yes": CONSISTENT, "no": NOT}.get(shown.pop(), OPEN) if len(shown) == 1 else OPEN)


def _parity_of(values: Sequence[float]) -> str:
    if not all(map(math.isfinite, values)):
        return "no"
    mean = interval(values)
    return "yes" if mean.high < MARGIN else "no" if mean.low > MARGIN else "open"


def _interval(values: Sequence[float]) -> str:
    if not all(map(math.isfinite, values)):
        return f"{sum(not math.isfinite(v) for v in values)} of {len(values)} lost"
    mean = interval(values)
    if not math.isfinite(mean.low):
        return f"{mean.mean:+.3f} %"
    return f"{mean.mean:+.3f} % [{mean.low:+.3f}, {mean.high:+.3f}]"


def _foretold(found: Sequence[Outcome]) -> Claim:
    words = "The kurtosis of q, k and v leaves its healthy growth long before the loss diverges"
    steady = _steady(found, *(arm for arm in ARMS if arm != "bf16-again"))
    watched = [one for one in steady if one.watched]
    left = [one for one in watched if one.left]
    early = [one.lead for one in left if one.lead is not None and one.lead > 0]
    false = [one for one in watched if one.alarm and not one.left]
    if not steady:
        return Claim(words, "nothing yet", "–", OPEN)
    said = f"{len(early)} of {len(left)} runs that left BF16 were announced" if left else "no run left BF16 late enough"
    said += f", by {min(early)} to {max(early)} steps" if early else ""
    said += f"; {len(false)} of {len(watched) - len(left)} others had an alarm"
    unjudged = len(steady) - len(watched)
    said += f"; {unjudged} left or ended before {FEWEST} samples, which no alarm can announce" if unjudged else ""
    verdict = OPEN if not left else CONSISTENT if len(early) == len(left) else NOT if not early else OPEN
    return Claim(words, f"{len(steady)} runs in FP8", said, verdict)


def _speed(measured: str) -> Claim:
    """measured: the page of benchmarks/fog.py."""
    words = "FOG-flash with FP8 attention has 1.40 to 1.43 times the tokens/s of Llama 3 in BF16 (8B, context 4096)"
    rows = [row for table in read_markdown(measured) for row in table]
    over = "times as fast as Llama BF16 compiled, GPU / loop"
    found = [
        row for row in rows
        if (row["width"], row["context"], row["arm"]) == ("8B", "4096", "FOG-flash, FP8, attention") and over in row
    ]  # fmt: skip
    if not found:
        return Claim(words, "nothing yet", "–", OPEN)
    times, mode = float(found[0][over].split("/")[1]), found[0]["attention ran in"]
    said = f"{times:g} times, BF16 compiled; attention ran in {mode}, which mode auto found to be fastest"
    verdict = f"{CONSISTENT}, for the layers alone" if times >= 1.40 and mode == "fp8" else OPEN
    return Claim(words, "a step of the layers, without head and optimizer (`benchmarks/fog.py`)", said, verdict)


def _last(line: Line, kind: str) -> float:
    """The largest over layers of the median of the last five samples."""
    samples = line.kurtosis.get(kind, [])[-5:]
    columns = [[value for value in of if value is not None] for of in zip(*samples)]
    return max((statistics.median(of) for of in columns if of), default=math.nan)


def _in_bf16(lines: Sequence[Line]) -> dict[tuple[str, int, int], dict[str, Line]]:
    """{setting: {architecture: the first seed's run}} of the kurtosis study."""
    found: dict[tuple[str, int, int], dict[str, Line]] = {}
    for line in sorted(lines, key=lambda line: line.spec["seed"]):
        if line.study == "kurtosis" and line.arm == "bf16" and line.result is not None:
            found.setdefault(line.setting, {}).setdefault(line.architecture, line)
    return found


def _kurtosis_claim(lines: Sequence[Line]) -> Claim:
    words = "FOG-max has as low a loss as Llama 3 in BF16, and a lower kurtosis"
    both = {setting: of for setting, of in _in_bf16(lines).items() if {"llama3", "fog-max"} <= of.keys()}
    if not both:
        return Claim(words, "nothing yet", "–", OPEN)
    ran, said, good = [], [], []
    for (size, steps, tokens), of in both.items():
        llama, fog = of["llama3"], of["fog-max"]
        ran.append(f"{size}, {millions(steps * tokens)} tokens")
        factors = {kind: _last(llama, kind) / _last(fog, kind) for kind in KINDS}
        gap = 100 * (_loss(fog) / _loss(llama) - 1)
        listed = ", ".join(f"{kind} × {factor:.3g}" for kind, factor in factors.items())
        said.append(f"loss {gap:+.2f} %; Llama's kurtosis over FOG-max's at the end: {listed}")
        good += [gap < 1, *(factor > 1 for factor in factors.values())]
    return Claim(words, "; ".join(ran), "; ".join(said), CONSISTENT if all(good) else NOT if not any(good) else OPEN)


def _loss(line: Line) -> float:
    value = (line.result or {}).get("loss")
    return math.nan if value is None else value


# ---- tables ----------------------------------------------------------------------------------------------------------


def _provoked(lines: Sequence[Line]) -> str:
    found = outcomes(lines, "provoke")
    if not found:
        return "## Which losses leave BF16's\n\nNot run yet: `python studies/fog.py provoke` makes the runs."
    head = ["architecture", "size", "rate", "seed", "arm", "steps", "leaves BF16 at", "diverged at", "alarm at",
            "steps before", f"loss above BF16's, last {LAST} steps", "kurtosis of q, k and v, at its end",
            "BF16 itself"]  # fmt: skip
    rows = [[*_what(one), ARMS[one.line.arm], one.line.so_far, _leaving(one), one.line.diverged or "–",
             f"{one.alarm.step} (layer {one.alarm.layer + 1})" if one.alarm else "–",
             "–" if one.lead is None else one.lead,
             "lost" if one.further is None else f"{one.further:+.4f}", f"{_last(one.line, 'qkv'):.3g}",
             _bf16(one.reference)]
            for one in sorted(found, key=_what)]  # fmt: skip
    known = f"All that is known of each run:\n\n{markdown(head, rows)}"
    return "\n\n".join([_ABOUT_LEAVING, _by_arm(found), *seen(found), known])


_ABOUT_LEAVING = """## Which losses leave BF16's

The step at which a loss leaves BF16's, or the last one by which it has not; nothing where it was not run. *BF16, the
same again* says what the order of sums alone does at such a rate: where it leaves too, nothing can be said of FP8."""


def _leaving(one: Outcome) -> str:
    if one.left:
        return f"**{one.left}**"
    return f"not by {one.seen}{'' if one.finished else ', unfinished'}"


def _by_arm(found: Sequence[Outcome]) -> str:
    """A row of runs that differ in the arm alone."""
    arms = [arm for arm in ARMS if any(one.line.arm == arm for one in found)]
    cells: dict[tuple[str, str, str, int], dict[str, str]] = {}
    for one in sorted(found, key=_what):
        cells.setdefault(_what(one), {})[one.line.arm] = _leaving(one)
    rows = [[*what, *(of.get(arm, "") for arm in arms)] for what, of in cells.items()]
    return markdown(["architecture", "size", "rate", "seed", *(ARMS[arm] for arm in arms)], rows)


def _what(one: Outcome) -> tuple[str, str, str, int]:
    line = one.line
    size, steps, tokens = line.setting
    name = architecture_name(line.architecture).replace("\n", " ")
    return name, f"{size}, {steps} × {millions(tokens)} tokens", f"{line.spec['lr']:g}", line.spec["seed"]


def _bf16(line: Line) -> str:
    first = alarm(line)
    said = [f"{f'diverged at {line.diverged}' if line.diverged else 'healthy'}, {line.so_far}"]
    return ", ".join(said + ([f"alarm at {first.step}"] if first else []))


def _parity(lines: Sequence[Line]) -> str:
    floor = differences(lines, "bf16-again")
    rows = []
    for arm in ARMS:
        for (name, (size, steps, tokens)), values in differences(lines, arm).items():
            if arm != "bf16-again":
                same = floor.get((name, (size, steps, tokens)), [])
                rows.append([architecture_name(name), size, millions(steps * tokens), ARMS[arm], len(values),
                             _interval(values), _interval(same) if same else "–", _parity_of(values)])  # fmt: skip
    if not rows:
        return "## FP8 attention beside BF16\n\nNot run yet: `python studies/fog.py parity` makes the runs."
    head = ["architecture", "size", "tokens", "arm", "pairs", "difference of the validation loss, 95 % interval",
            "BF16 against itself", f"below the margin of {MARGIN} %"]  # fmt: skip
    return "## FP8 attention beside BF16\n\nThrough the cooldown, validated in BF16, pairs of one seed.\n\n" + markdown(
        head, rows
    )


def _kurtosis(lines: Sequence[Line]) -> str:
    found = _in_bf16(lines)
    if not found:
        return "## Kurtosis in BF16\n\nNot run yet: `python studies/fog.py kurtosis` makes the runs."
    head = ["architecture", "size", "tokens", "loss", *(f"kurtosis of {words}" for words in KINDS.values())]
    rows = [
        [architecture_name(name), size, millions(steps * tokens), f"{_loss(line):.4f}",
         *(f"{_last(line, kind):.4g}" for kind in KINDS)]
        for (size, steps, tokens), of in found.items() for name, line in of.items()
    ]  # fmt: skip
    return "## Kurtosis in BF16\n\nAt the end, in the layer where it is largest.\n\n" + markdown(head, rows)


def _runs(lines: Sequence[Line]) -> str:
    """Of the seconds and GPUs, those of finished runs."""
    if not lines:
        return "## Runs\n\nNone yet."
    head = [
        "study",
        "size",
        "parameters",
        "steps × tokens",
        "runs",
        "finished",
        "begun",
        "seconds of a run, median",
        "GPU",
    ]
    rows = []
    for study, setting in dict.fromkeys((line.study, line.setting) for line in lines):
        of = [line for line in lines if (line.study, line.setting) == (study, setting)]
        results = [line.result for line in of if line.result is not None]
        seconds = f"{statistics.median(result['seconds'] for result in results):.0f}" if results else "–"
        gpus = ", ".join(sorted({result["gpu"] for result in results})) or "–"
        counts = sorted({result["parameters"] for result in results})
        parameters = " to ".join(millions(count) for count in dict.fromkeys((*counts[:1], *counts[-1:]))) or "–"
        size, steps, tokens = setting
        rows.append(
            [
                study,
                size,
                parameters,
                f"{steps} × {millions(tokens)}",
                len(of),
                len(results),
                sum(line.step > 0 for line in of),
                seconds,
                gpus,
            ]
        )
    return f"{_ABOUT_RUNS}\n\n{markdown(head, rows)}"


_ABOUT_RUNS = """## Runs

A size is named as in `models/fog_config.py`. Several runs shared a GPU: their seconds are no measure of speed."""


def _not_said(lines: Sequence[Line]) -> str:
    most = max((line.step * line.setting[2] for line in lines), default=0)
    longest = f" The longest run here has {millions(most)}." if most else ""
    return f"""## What this does not say

* Nothing of long trainings: the paper's divergences come after 0.7 to 15.9 billion tokens.{longest}
  A run that holds here shows that nothing diverges early, and no more.
* Nothing of models of 390M parameters and more, and nothing of batches of half a million tokens and more.
* Nothing of the tasks that the paper scores.
* P, the probabilities within attention, has the constant scale 256 in all runs; in the paper's its scale was delayed,
  as the others."""
