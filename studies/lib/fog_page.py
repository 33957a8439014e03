"""docs/fog.md, from the data alone: what came out, each claim of the paper, the pictures, and then the details."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from urllib.parse import quote

from torch_fp8.table import markdown

from .divergence import FACTOR, FIRST, JUMP, MEDIAN, PATIENCE, SIGMAS, WINDOW
from .fog_claims import PARITY, SPEEDS, claims, interval_words, needed_words, pairs_words, parity_of
from .fog_findings import findings, told_of_old
from .fog_judged import EARLY, count_left
from .fog_kurtosis import in_bf16, last_kurtosis, loss_of
from .fog_results import FEWEST, IN_A_ROW, KINDS, LAST, Line, Outcome, differences, outcomes
from .fog_results import SIGMAS as ALARM_SIGMAS
from .fog_seen import leaving, seen, watch_words
from .fog_words import (
    ARMS,
    MARGIN,
    OLD,
    PAPER_ARM,
    architecture_name,
    architecture_order,
    arm_order,
    millions,
    number,
    span,
    three_digits,
    told_apart,
)
from .intervals import scatter_allowed

_HEAD = """# FOG: FP8 attention, and architectures that bear it

A study of [arXiv 2505.20524](https://arxiv.org/abs/2505.20524), "Towards Fully FP8 GEMM LLM Training at Scale", with
the architectures of `models/fog.py` in small sizes. This page is written by `python studies/fog.py report` from
[runs.jsonl]({data}/runs.jsonl), which holds what came out of every run, lost ones included. A run that is not finished
counts as far as it is. `python studies/fog.py --help` says how to make such runs of your own, on a CPU in minutes.

The paper finds that Llama 3 and OLMo 2 diverge where attention's products are in FP8 too, after 0.7 to 15.9 billion
tokens, that its FOG architectures do not, and that the kurtosis of activations tells long before. A claim is called
*consistent* or *not* where the runs here say so, and else it *cannot be claimed here*; a divergence of another kind is
called that. In all runs the head computes in BF16, parameters, embedding, norms and what is added up between layers are
in float32; *FP8 attention* has both products of attention and their gradients in FP8, with one scale for q, k and v,
amaxes of 1024 steps and scale 1 in the first step, as the paper's software had it, but for the weights of linear
layers, which their own amax scales in that step."""

_RULES = f"""* *Leaves BF16*: the loss is above that of BF16 with the same seed and batches by {SIGMAS:g} standard
  deviations of the latter's step noise, for {PATIENCE} steps on end, from step {FIRST + 1} on; or is not finite. Step
  noise is what a step adds to the trend of its neighbours, by the median over the {WINDOW} steps before.
* *Diverged*: the loss is not finite, or stays above {FACTOR} times the median of the last {MEDIAN} steps for
  {PATIENCE} steps.
* *Alarm*: that of `torch_fp8.watch` as it is by default, over the recorded kurtosis of q, k and v: {IN_A_ROW} samples
  in a row that are {ALARM_SIGMAS:g} σ above healthy growth, in any layer.
* *Diverges*: a run leaves BF16, which itself has not diverged and, run again, does not leave itself.
* *Parity*: the whole 95 % interval of the mean difference of validation losses, over pairs with one seed, is below the
  margin of {MARGIN} % of the loss.

These were written before the runs. The following came when runs had been seen. The last of them, when the suspects had
been tried: *by rms*, *sound*, *norms*, *came back*, *mean of layers*, *marked{OLD}*, and in *in another way* and
*blind* what they say of gradient norms and of the start.

* *In another way*: a run leaves, or its gradient norm jumps, within {EARLY} times the warm-up; or FP8 linears alone
  leave too, or were not run as far, so that it cannot be laid to attention. This counts in warm-ups, and the paper's
  own Llama 3 would not pass: at 390M it left by step 1,335 of a warm-up of 5,000, as its tables give it, though after
  0.7 billion tokens. So the rule says that the two need not be one thing, not that they are two.
* *Jumps*: a gradient norm that is not finite, or above {JUMP:g} times its median over the last {WINDOW} steps, from
  step {FIRST + 1} on.
* *Blind*: no alarm of growth is possible before {FEWEST} samples, so a run that leaves before says nothing of alarms;
  nor does one of the start of training say whether a kurtosis foretells what comes after billions of tokens.
* *By rms*: the same alarm over the root mean square of q, k and v. Chosen since it tells here of runs of which kurtosis
  does not, so that these runs do not test it. In warm-ups longer than those here it has false alarms where no norm
  stands before attention, as in OLMo 2: q, k and v then grow faster than tokens, in health too.
* *Sound*: BF16, at any step that it was run and both times, has not diverged, nor been above {FACTOR} times the loss of
  its first step from step {FIRST + 1} on, where it predicts worse than random weights. Where it is not, nothing that
  leaves it or stays with it counts, for claims or parity. A run in FP8 that rises so far does not hold, though it come
  back.
* *Came back*: the mean of a run's last {LAST} losses lies above BF16's by less than one standard deviation of step
  noise, after it had left. That is no divergence.
* *Mean of layers*: what the kurtosis of FOG-max and Llama 3 is in it is said beside the largest, and judges nothing.
* *Marked{OLD}*: a run with FP8 attention whose spec lacks `keeps_scores` was made before attention's backward had
  that. It may speak for FP8, since one that held did so with the fault, and never against it. Where the same run has
  been made since, that one counts alone.
* *Norms*: a run without norms of q and k left, and the one that has them and differs in nothing else holds as far."""


def page(lines: Sequence[Line], pictures: Sequence[str], data: str) -> str:
    """data: the path to the folder of runs.jsonl and the pictures, from the page."""
    data = quote(data)

    def shown(*starts: str) -> list[str]:
        """Of each kind the highest learning rate first."""
        said = []
        for start in starts:
            names = [name for name in sorted(pictures, reverse=True) if name.startswith(start)]
            said += [_SHOWN[start]] * bool(names) + [f"![{name}]({data}/{name}.png)" for name in names]
        return said

    found = outcomes(lines, "provoke")
    said = markdown(["claim of the paper", "what was run", "what came out", "verdict"], claims(lines))
    measured = SPEEDS.read_text() if SPEEDS.exists() else ""
    first = "\n".join(f"{i}. {sentence}" for i, sentence in enumerate(findings(lines, measured), start=1))
    parts = [
        _HEAD.format(data=data),
        f"## What came out\n\n{first}" if first else "",
        told_of_old(lines),
        f"## Claims\n\n{said}",
        "## Pictures" if pictures else "",
        *shown("losses", "arms", "parity", "layers"),
        f"## Rules\n\n{_RULES}",
        _provoked(found),
        *shown("kurtosis"),
        _parity(lines),
        _kurtosis(lines),
        _runs(lines),
        _every_run(found),
        _not_said(lines),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_SHOWN = {
    "losses": "Each architecture at one learning rate, FP8 beside BF16. Where a coloured line lies on the grey one, "
    "FP8 trains as BF16 does.",
    "arms": "Where runs with FP8 attention leave BF16's loss, arm by arm and seed by seed.",
    "parity": "How far validation losses are from BF16's at the end of training, and how far BF16's from one another.",
    "layers": "Kurtosis of two architectures in BF16, layer by layer.",
    "kurtosis": "Kurtosis of q, k and v beside BF16's, in the runs of the table.",
}


# ---- tables ----------------------------------------------------------------------------------------------------------

_WHAT = ["architecture", "size", "rate", "seed"]
_ARMS_ALONE = "bf16-again", "fp8", PAPER_ARM


def _provoked(found: Sequence[Outcome]) -> str:
    if not found:
        return "## Which losses leave BF16's\n\nNot run yet: `python studies/fog.py provoke` makes the runs."
    return "\n\n".join([_ABOUT_LEAVING.format(old=OLD), _by_arm(found), *seen(found)])


_ABOUT_LEAVING = """## Which losses leave BF16's

The step at which a loss leaves BF16's, or the last one by which it has not; nothing where it was not run. *BF16, the
same again* says what the order of sums alone does at such a rate: where it leaves too, nothing can be said of FP8. Nor
can it where the cells are in brackets: BF16 itself is not sound there, or a run marked{old} did not hold. *Something
changed* are all arms with FP8 attention that is not as the paper's; each has its rows below, where any left."""


def _by_arm(found: Sequence[Outcome]) -> str:
    """A row of runs that differ in the arm alone; one column has all arms that are the paper's with something changed,
    which few rows have."""
    arms = [arm for arm in _ARMS_ALONE if any(one.line.arm == arm for one in found)]
    changed = [one for one in found if one.line.arm not in _ARMS_ALONE]
    cells = {(one.line.pair, one.line.arm): leaving(one) for one in found}
    rows = []
    for pair, what in told_apart([one.line for one in found]).items():
        others = [one for one in changed if one.line.pair == pair]
        rows.append([*what, *(cells.get((pair, arm), "") for arm in arms), *[_all_left(others)] * bool(changed)])
    return markdown([*_WHAT, *(ARMS[arm] for arm in arms), *["… something changed"] * bool(changed)], rows)


def _all_left(of: Sequence[Outcome]) -> str:
    """Of those that count, or in brackets of all where none does."""
    if not of:
        return ""
    counted = [one for one in of if one.counts]
    left = [one.left for one in counted or of if one.left]
    said = f"{count_left(counted or of)} left{f', at {span(left)}' if left else ''}"
    return f"{said if counted else f'({said})'}{OLD * any(one.line.old for one in of)}"


def _every_run(found: Sequence[Outcome]) -> str:
    if not found:
        return ""
    head = [*_WHAT, "arm", "steps", "leaves BF16 at", "diverged at", "the watch",
            f"loss above BF16's, last {LAST} steps", "kurtosis of q, k and v, at its end", "BF16 itself"]  # fmt: skip
    names = told_apart([one.line for one in found])
    order = {pair: place for place, pair in enumerate(names)}
    rows = [[*names[one.line.pair], ARMS[one.line.arm], one.line.so_far, leaving(one), one.line.diverged or "–",
             watch_words(one), number(one.further, signed=True), f"{last_kurtosis(one.line, 'qkv'):.3g}",
             _bf16(one.reference)]
            for one in sorted(found, key=lambda one: (order[one.line.pair], arm_order(one.line.arm)))]  # fmt: skip
    return f"## Every run that is held to BF16\n\n{markdown(head, rows)}"


def _bf16(line: Line) -> str:
    first = line.alarm
    said = [f"not sound from step {line.unsound} on" if line.unsound else f"sound to step {line.so_far}"]
    return ", ".join(said + ([f"alarm at {first.step}"] if first else []))


def _parity(lines: Sequence[Line]) -> str:
    floor = differences(lines, "bf16-again")
    rows, counts = [], set()
    found = [(arm, key, pairs) for arm in ARMS if arm != "bf16-again" for key, pairs in differences(lines, arm).items()]
    for arm, key, pairs in sorted(
        found, key=lambda of: (arm_order(of[0]), architecture_order(of[2].line.architecture))
    ):
        same = floor[key].values if key in floor else []
        size, steps, tokens = pairs.line.setting
        counts.add(len(pairs.values))
        rows.append([architecture_name(pairs.line.architecture), size, f"{pairs.line.spec['lr']:g}",
                     millions(steps * tokens), ARMS[arm], pairs_words(pairs), interval_words(pairs.values),
                     interval_words(same), PARITY[parity_of(pairs)],
                     *(f"{_deviation(of)}: {needed_words(of)}" for of in (pairs.values, same))])  # fmt: skip
    if not rows:
        return "## FP8 attention beside BF16\n\nNot run yet: `python studies/fog.py parity` makes the runs."
    head = ["architecture", "size", "rate", "tokens", "arm", "pairs",
            "difference of the validation loss, 95 % interval", "BF16 against itself: the floor",
            f"below the margin of {MARGIN} %", "standard deviation: pairs needed", "the floor's"]  # fmt: skip
    allowed = [f"{scatter_allowed(n, MARGIN):.2f} % with {n} pairs" for n in sorted(counts) if n > 1]
    about = "\n".join([_ABOUT_PARITY, _ALLOWED.format(allowed=", ".join(allowed)) if allowed else ""]).rstrip()
    return f"{about}\n\n{markdown(head, rows)}"


def _deviation(values: Sequence[float]) -> str:
    return f"{statistics.stdev(values):.2f} %" if len(values) > 1 and all(map(math.isfinite, values)) else "–"


_ABOUT_PARITY = """## FP8 attention beside BF16

Through the cooldown, validated in BF16, pairs of one seed. An interval that holds 0 says neither that FP8 is worse nor
that it is better. *Pairs needed*: the fewest n with t s / √n below the margin, where s is the standard deviation of the
differences and t the 0.975 quantile of Student's t with n − 1 degrees of freedom: with a mean of 0, their interval
would end below the margin."""
_ALLOWED = """Or trainings must be so long, or so much calmer, that the differences have a standard deviation of no more
than {allowed}."""


def _kurtosis(lines: Sequence[Line]) -> str:
    found = in_bf16(lines)
    if not found:
        return "## Kurtosis in BF16\n\nNot run yet: `python studies/fog.py kurtosis` makes the runs."
    head = ["architecture", "size", "tokens", "loss", *(f"kurtosis of {words}" for words in KINDS.values())]
    rows = [
        [architecture_name(name), line.setting[0], millions(line.setting[1] * line.setting[2]), f"{loss_of(line):.4f}",
         *(", ".join(three_digits(last_kurtosis(line, kind, over)) for over in (max, statistics.fmean))
           for kind in KINDS)]
        for of in found for name, line in of.items()
    ]  # fmt: skip
    return f"{_ABOUT_KURTOSIS}\n\n{markdown(head, rows)}"


_ABOUT_KURTOSIS = """## Kurtosis in BF16

At the end, of one seed: in the layer where it is largest, by which the claim is judged, and in the mean of layers,
which the paper draws."""


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
        parameters = " to ".join(dict.fromkeys(millions(count) for count in (*counts[:1], *counts[-1:]))) or "–"
        size, steps, tokens = setting
        begun = sum(line.step > 0 for line in of)
        length = f"{steps} × {millions(tokens)}"
        rows.append([study, size, parameters, length, len(of), len(results), begun, seconds, gpus])
    return f"{_ABOUT_RUNS}\n\n{markdown(head, rows)}"


_ABOUT_RUNS = """## Runs

A size is named as in `models/fog_config.py`. Several runs shared a GPU: their seconds are no measure of speed."""


def _not_said(lines: Sequence[Line]) -> str:
    most = max((line.step * line.setting[2] for line in lines), default=0)
    batch = max((line.setting[2] for line in lines), default=0)
    largest = max((line.result["parameters"] for line in lines if line.result), default=0)
    longest = f" The longest run here saw {millions(most)}." if most else ""
    return f"""## What this does not say

* Nothing of long trainings: the paper's divergences come after 0.7 to 15.9 billion tokens.{longest}
  A run that holds here shows that nothing diverges early, and no more.
* Nothing of models of more than {millions(largest)} parameters, and nothing of batches of more than {batch:,} tokens.
* Nothing of the tasks that the paper scores.
* P, the probabilities within attention, has the constant scale 256 in all runs; in the paper's its scale was delayed,
  as the others."""
