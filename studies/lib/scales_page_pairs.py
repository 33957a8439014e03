"""The tables of docs/scales.md whose rows are pairs of runs, and what is to be known of these."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from torch_fp8.table import markdown

from .arms import DEFAULT_ARMS, LEVERS, words
from .divergence import FACTOR, MEDIAN, PATIENCE
from .scales_findings import FEWEST, loss_before, pooled
from .scales_results import Line, arms_of, done, gaps, is_sound, on_two_gpus, pairs, plain_name, trained_tokens
from .scales_words import BY_CHANCE, MARGIN, no_worse, percent, unsound_words

PLANNED = {"gpt-124M": 5, "llama-127M": 5}  # models of training from scratch, and how many pairs of each

ABOUT_PAIRS = f"""Differences of runs that share seed, weights at the start and batches; means over pairs with their 95
% interval by Student's t. *In BF16*: the weights that came out, validated in BF16; *in its own FP8*: validated with
the recipe of their training, but weights by their own amax in any case, and held against BF16 in BF16. The margin of
{MARGIN} % of the loss in BF16 was fixed before any run that is kept with this project: *yes* where the whole interval
is below it, however far, *no* where it is above or a run was lost, else *open*. Arms are held to the same runs in
BF16, so that their verdicts are not independent of one another. A recipe is held in the same way to the one that it is
with one change: the loss in BF16 is *lower* or *higher* where the whole interval is, and else there is *no difference
seen*; one that the pairs on one kind of GPU do not show by themselves is *not told from a change of GPU*. The largest
gap is that of the training loss between the arms' means, over stretches of a fiftieth of the run after its first
tenth. A run diverges where its loss is not finite, or stays above {FACTOR} times the median of the last {MEDIAN} steps
for {PATIENCE} steps."""

ABOUT_TUNED = """Each weight of the checkpoint is moved before the first step by a random share of itself, at most 2^-9,
of the seed and the same in all arms. Weights of a checkpoint often lie exactly between two numbers of BF16 or FP8: the
first step would tip all of these its way, however small it is, and what the loss gains by that in some formats would
look like a difference of recipes."""

_MEASURES = ("loss", "loss_fp8", "accuracy", "accuracy_fp8")


def pairs_section(lines: Sequence[Line], study: str, title: str, about: str) -> str:
    finished = done(lines, study)
    models = list(dict.fromkeys(line.model for line in finished))
    rows = []
    for model in models:
        mine = [line for line in finished if line.model == model]
        rows += [_pair_row(model, arm, mine) for arm in arms_of(mine) if arm != "bf16"]
    if not rows:
        return f"## {title}\n\nNot run yet: `python studies/scales.py {study}` makes the runs."
    head = ["model", "arm", "pairs", "loss in BF16 [95 %]", "loss in its own FP8", "accuracy in BF16"]
    head += ["accuracy in its own FP8", "largest gap on the way", "diverged", f"at most {MARGIN} % above"]
    notes = [
        _arms(finished),
        *(_gpus(model, finished) for model in models),
        *(_noise(model, finished) for model in models),
        *(_gain(model, lines) for model in models),
    ]
    notes += [_TOGETHER if pooled(lines) else "", _added(finished), _not_planned(finished)] if study == "parity" else []
    notes.append(_arms_left(study, models, finished))
    tables = [markdown(head, rows), *_levers_table(models, finished)]
    return "\n\n".join([f"## {title}", about, *tables, "\n".join(filter(None, notes))]).rstrip()


_TOGETHER = f"""* Models together: all pairs of an arm as one sample, of the models that have {FEWEST} or more of them
  and were trained on as many tokens of one text, each at the learning rate of its runs; none where one of them was
  trained on so many in two ways. A model counts by its pairs, and pairs are independent, since each is of a model and
  seed of its own. Their mean and its 95 % interval by Student's t are of these models and of no others, and replace no
  verdict of the table. Models *differ* where the 95 % interval of the difference of the means of any two leaves out 0,
  by Student's t with the scatter within all of them"""


def _pair_row(model: str, arm: str, lines: Sequence[Line]) -> list[str]:
    apart = {key: pairs(lines, arm, "bf16", key).get(model, []) for key in _MEASURES}
    diverged = sum(bool(line.result["diverged"]) for line in lines if line.spec["arm"] == arm)
    gap = max((apart for _, apart in gaps(lines, arm)), key=abs, default=None)
    return [
        model,
        arm,
        str(len(apart["loss"])),
        *map(percent, apart.values()),
        "–" if gap is None else f"{gap:+.2f} %",
        str(diverged),
        no_worse(apart["loss"]),
    ]


def _levers_table(models: Sequence[str], lines: Sequence[Line]) -> list[str]:
    rows = []
    for model in models:
        mine = [line for line in lines if line.model == model]
        for arm, (base, change) in LEVERS.items():
            apart = [pairs(mine, arm, base, key).get(model, []) for key in _MEASURES]
            if len(apart[0]) > 1:
                rows.append([model, f"{base}, {change}", str(len(apart[0])), *map(percent, apart)])
    head = ["model", "a recipe, and one change to it", "pairs", "loss in BF16 [95 %]", "loss in their own FP8"]
    head += ["accuracy in BF16", "accuracy in their own FP8"]
    return [f"By how much each change moves what comes out. {BY_CHANCE}", markdown(head, rows)] if rows else []


def _gain(model: str, lines: Sequence[Line]) -> str:
    """Of fine-tuning, and what share of it each arm in FP8 leaves out."""
    before = loss_before(model, lines)
    finished = [line for line in done(lines, "finetune") if line.model == model and line.result["loss"] is not None]
    finished = [line for line in finished if line.spec["arm"] != "bf16" or is_sound(line.result)]
    losses = {(line.spec["arm"], line.pair): line.result["loss"] for line in finished}
    bf16 = [loss for (arm, _), loss in losses.items() if arm == "bf16"]
    if before is None or not bf16 or before[0] <= statistics.fmean(bf16):
        return ""
    left = []
    for arm in arms_of(finished):
        twins = [(loss, losses["bf16", pair]) for (name, pair), loss in losses.items()
                 if name == arm != "bf16" and ("bf16", pair) in losses]  # fmt: skip
        if twins:
            mine, theirs = (statistics.fmean(of) for of in zip(*twins))
            left.append(f"{arm} {100 * (mine - theirs) / (before[0] - theirs):+.1f} %")
    if not left:
        return ""
    return (
        f"* {model} has {before[0]:.4f} nats a token before it is fine-tuned, as the sweep of inference measured it, "
        f"on {before[1]:,} tokens of the text, where fine-tuning has {finished[0].spec['validated']:,}. Of the gain of "
        f"{before[0] - statistics.fmean(bf16):.4f} in BF16 the other arms lose: {', '.join(left)}"
    )


def _not_planned(finished: Sequence[Line]) -> str:
    """What the study asks for by default, and is not there; shorter trainings do not stand in for it."""
    long = [line for line in finished if trained_tokens(line) >= 0.99e8]
    found = {arm: pairs(long, arm, "bf16", "loss") for arm in DEFAULT_ARMS["parity"] if arm != "bf16"}
    left = []
    for model, count in PLANNED.items():
        arms = [
            arm
            for arm, models in found.items()
            if all(plain_name(name) != model or len(of) < count for name, of in models.items())
        ]
        if arms:
            left.append(f"{'every arm' if len(arms) == len(found) else ', '.join(arms)} of {model}")
    return (
        "* Not run with five pairs and 100M tokens each, which `python studies/scales.py parity` asks for by default: "
        f"{'; '.join(left)}"
        if left
        else ""
    )


def _added(finished: Sequence[Line]) -> str:
    """Pairs beyond those that the study has by default."""
    more = [
        f"{arm} of {model}"
        for arm in arms_of(finished)
        for model, of in pairs(finished, arm, "bf16", "loss").items()
        if arm != "bf16" and len(of) > PLANNED.get(plain_name(model), math.inf)
    ]
    return (
        f"* More pairs than the five of the study's default: {', '.join(more)}. Those that are kept with this project\n"
        "  were added after the first had been seen, which makes an interval less sure than it says"
        if more
        else ""
    )


def _arms_left(study: str, models: Sequence[str], finished: Sequence[Line]) -> str:
    """Of those that the study has by default."""
    left = []
    for model in models:
        counts = {arm: len(pairs(finished, arm, "bf16", "loss").get(model, [])) for arm in DEFAULT_ARMS[study]}
        if arms := [arm for arm, count in counts.items() if arm != "bf16" and count < 2]:
            left.append(f"{', '.join(arms)} of {model}")
    return f"* Arms of the study's default that have no two pairs: {'; '.join(left)}" if left else ""


def _gpus(model: str, finished: Sequence[Line]) -> str:
    """In which of all pairs that are compared on this page the two ran on two kinds of GPU."""
    compared = {"bf16": [arm for arm in arms_of(finished) if arm != "bf16"], "fp16": ["amax"]}
    for arm, (base, _) in LEVERS.items():
        compared.setdefault(base, []).append(arm)
    said = []
    for base, arms in compared.items():
        if two := {arm: count for arm in sorted(arms) if (count := on_two_gpus(finished, arm, base).get(model))}:
            said.append(f"against {base} {', '.join(f'{arm} in {count}' for arm, count in two.items())}")
    alone = "" if on_two_gpus(finished, "bf16-again", "bf16").get(model) else "; what that does alone was not measured"
    return f"* {model}, pairs whose two runs were on two kinds of GPU: {'; '.join(said)}{alone}" if said else ""


def _arms(finished: Sequence[Line]) -> str:
    """What is in FP8, by name."""
    told = {line.spec["arm"]: words(line.spec) for line in finished if {"recipe", "emulation"} & line.spec.keys()}
    return f"* Arms in FP8: {', '.join(f'{arm} is {told[arm]}' for arm in sorted(told))}" if told else ""


def _noise(model: str, lines: Sequence[Line]) -> str:
    """What BF16 does by itself."""
    mine = [line for line in lines if line.model == model]
    losses = [line.result["loss"] for line in mine if line.spec["arm"] == "bf16" and is_sound(line.result)]
    if len(losses) < 2:
        return ""
    scatter = 100 * statistics.stdev(losses) / statistics.fmean(losses)
    again = [abs(of) for of in pairs(mine, "bf16-again", "bf16", "loss").get(model, []) if math.isfinite(of)]
    floor = f"; the same seed again moves it by {statistics.fmean(again):.2f} % on average" if again else ""
    return (
        f"* {model}, BF16: {statistics.fmean(losses):.4f} nats a token, mean of {len(losses)} seeds that scatter by "
        f"{scatter:.2f} % (standard deviation){floor}{unsound_words(mine)}"
    )
