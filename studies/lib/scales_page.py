"""docs/scales.md, from the data alone: each claim of the paper, what was run, what came out, what may be said of it."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from torch_fp8.table import markdown

from .arms import DEFAULT_ARMS, words
from .costs import costs_table
from .divergence import FACTOR, MEDIAN, PATIENCE
from .scales_claims import (
    FEWEST,
    MARGIN,
    claims,
    findings,
    loss_before,
    millions,
    no_worse,
    percent,
    pooled,
    unsound_words,
    window_of,
)
from .scales_results import (
    CRITERION,
    Line,
    arms_of,
    constants,
    done,
    gaps,
    inference_ratios,
    is_sound,
    lacking_policies,
    pairs,
    plain_name,
    trained_tokens,
    wanted,
    window,
)
from .texts import Text, is_closed

PLANNED = {"gpt-124M": 5, "llama-127M": 5}  # models of training from scratch, and how many pairs of each

STUDIES = {
    "window": "training in BF16, then inference under every policy",
    "infer": "inference under every policy",
    "finetune": "fine-tuning beside BF16 and FP16",
    "parity": "training from scratch beside BF16, with paired seeds",
}

_HEAD = """# Scales: FP8-AMAX and FP8-CSCALE

A study of the policies of [arXiv 2309.17224](https://arxiv.org/abs/2309.17224) with the recipes of this project. This
page is written by `python studies/scales.py report` from what came out of every run:
[runs.jsonl]({data}/runs.jsonl)."""

_WORDS = """The paper's tables are not known here number by number; its claims are. A claim is called *consistent* or
*not* where all models that were run, and all measures of it, agree; else it *cannot be claimed*. What is measured is
the share of next tokens that are the model's first choice, on held-out text; the paper measures tasks. *Ratio* is that
accuracy over the one in BF16, and the paper's criterion is a ratio of 0.995. *c* is the paper's constant: on this
hardware, whose E4M3 has an exponent bias of 7 and not 8, inputs and weights are scaled by 2^(c + 1), E5M2 gradients by
2^(c − 3). Policies with *gc-* have the paper's own formats, and are emulated, as the histogram is. In all of it the
head, embeddings, norms and attention are in 16 bits."""


def page(
    lines: Sequence[Line],
    pictures: Sequence[str],
    sizes: Mapping[str, float],
    data: str,
    texts: Mapping[str, Text] = {},
) -> str:
    """data: the folder of runs.jsonl and the pictures, as the page links to it. texts: by digest."""
    again = "To be read as the table of fine-tuning."
    parts = [
        _HEAD.format(data=data),
        _found(lines, sizes),
        f"## Claims\n\n{_WORDS}\n\n"
        + markdown(["claim of the paper", "what was run", "what came out", "verdict"], claims(lines, sizes)),
        _parity(lines, "finetune", "Fine-tuning", _ABOUT_PAIRS),
        _parity(lines, "parity", "Training with paired seeds", again if done(lines, "finetune") else _ABOUT_PAIRS),
        _windows(lines, sizes),
        _policies(lines, sizes),
        _figures(pictures, data),
        _runs(lines, sizes, texts),
        _COSTS + costs_table(),
        _not_claimed(lines),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# ---- sections --------------------------------------------------------------------------------------------------------


def _found(lines: Sequence[Line], sizes: Mapping[str, float]) -> str:
    said = findings(lines, sizes)
    return "## What came out\n\n" + "\n".join(f"* {sentence}" for sentence in said) if said else ""


_ABOUT_PAIRS = f"""Differences of runs that share seed, weights at the start and batches; means over pairs with their
95 % interval by Student's t. *In BF16*: the weights that came out, validated in BF16; *in its own FP8*: validated as
they were trained, and held against BF16 in BF16. The margin of {MARGIN} % of the loss in BF16 was fixed before the
runs: *yes* where the whole interval is below it, however far, *no* where it is above or a run was lost, else *open*. A
recipe is held in the same way to the one that it is with one change: the loss is *lower* or *higher* where the whole
interval is, and else there is *no difference seen*. The largest gap is that of the training loss between the arms'
means, over stretches of a fiftieth of the run after its first tenth. A run diverges where its loss is not finite, or
stays above {FACTOR} times the median of the last {MEDIAN} steps for {PATIENCE} steps."""


def _parity(lines: Sequence[Line], study: str, title: str, about: str) -> str:
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
    return "\n\n".join([f"## {title}", about, markdown(head, rows), "\n".join(filter(None, notes))]).rstrip()


_TOGETHER = f"""* Models together: all pairs of an arm as one sample, of the models that have {FEWEST} or more of them
  and were trained on as many tokens of one text, each at the learning rate of its runs; none where a model is there in
  two ways. A model counts by its pairs, and pairs are independent, since each is of a model and seed of its own. Their
  mean and its 95 % interval by Student's t are of these models and of no others, and replace no verdict of the table.
  Models *differ* where the 95 % interval of the difference of the means of any two leaves out 0, by Student's t with
  the scatter within all of them"""


def _pair_row(model: str, arm: str, lines: Sequence[Line]) -> list[str]:
    apart = {
        key: pairs(lines, arm, "bf16", key).get(model, []) for key in ("loss", "loss_fp8", "accuracy", "accuracy_fp8")
    }
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
    """What the study asks for by default, and is not there."""
    long = [line for line in finished if trained_tokens(line) >= 0.99e8]
    left = [
        model
        for model, count in PLANNED.items()
        if all(
            plain_name(name) != model or len(of) < count for name, of in pairs(long, "delayed", "bf16", "loss").items()
        )
    ]
    return (
        f"* Not run: {', '.join(left)} with five pairs and 100M tokens each, which `python studies/scales.py parity` "
        "asks for by default"
        if left
        else ""
    )


def _added(finished: Sequence[Line]) -> str:
    """Pairs beyond those that were planned."""
    more = [
        f"{arm} of {model}"
        for arm in arms_of(finished)
        for model, of in pairs(finished, arm, "bf16", "loss").items()
        if arm != "bf16" and len(of) > PLANNED.get(plain_name(model), math.inf)
    ]
    return f"* More pairs than were planned, added after the first had been seen: {', '.join(more)}" if more else ""


def _arms_left(study: str, models: Sequence[str], finished: Sequence[Line]) -> str:
    """Of those that the study has by default."""
    left = []
    for model in models:
        counts = {arm: len(pairs(finished, arm, "bf16", "loss").get(model, [])) for arm in DEFAULT_ARMS[study]}
        if arms := [arm for arm, count in counts.items() if arm != "bf16" and count < 2]:
            left.append(f"{', '.join(arms)} of {model}")
    return f"* Arms of the study's default that have no two pairs: {'; '.join(left)}" if left else ""


def _gpus(model: str, finished: Sequence[Line]) -> str:
    """In which pairs the arm and BF16 ran on two kinds of GPU."""
    on = {(line.spec["arm"], line.pair): line.result["gpu"] for line in finished if line.model == model}
    apart = Counter(arm for (arm, pair), gpu in on.items() if on.get(("bf16", pair), gpu) != gpu)
    said = ", ".join(f"{arm} in {count}" for arm, count in sorted(apart.items()))
    alone = "" if "bf16-again" in apart else "; what that does alone was not measured"
    return f"* {model}, pairs whose two runs were on two kinds of GPU: {said}{alone}" if said else ""


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


def _windows(lines: Sequence[Line], sizes: Mapping[str, float]) -> str:
    ratios = {m: of for m, of in inference_ratios(lines).items() if constants(of)}
    title = "## The window of FP8-CSCALE in inference"
    if not ratios:
        return f"{title}\n\nNot run yet: `python studies/scales.py window` makes the runs."
    rows = []
    want = {role: wanted(lines, role) for role in ("x", "w")}
    for model in sorted(ratios, key=lambda model: sizes.get(model, 0)):
        ours = constants(ratios[model])
        found = window(ours)
        best = max(ours, key=lambda c: ours[c])
        wants = [f"{of[model][0]} … {of[model][1]}" if model in of else "–" for of in want.values()]
        rows.append([model, millions(sizes.get(model, 0)), window_of(found, ours),
                     f"{found[0] + 1} … {found[1] + 1}" if found else "–", str(found[1] - found[0] + 1 if found else 0),
                     f"{best} ({ours[best]:.4f})", *wants])  # fmt: skip
    head = ["model", "parameters", "window, c", "as biases of this hardware", "width", "best c (ratio)"]
    head += ["biases that inputs want", "that weights want"]
    return f"{title}\n\n{_ABOUT_WINDOWS}\n\n" + markdown(head, rows)


_ABOUT_WINDOWS = f"""Constants in a row with a ratio of at least {CRITERION}. A tensor *wants* the bias that FP8-AMAX
has for it: with more its largest values saturate, with less its smallest ones lose bits. Shown are the least and the
greatest of all layers in inference or, where that was not recorded, in the first step of fine-tuning."""


def _policies(lines: Sequence[Line], sizes: Mapping[str, float]) -> str:
    ratios = {m: of for m, of in inference_ratios(lines).items() if "amax" in of}
    if not ratios:
        return ""
    names = ["current", "amax", "gc-amax", "histogram", "gc-histogram"]
    rows = [
        [model, *(f"{ratios[model][name]:.4f}" if name in ratios[model] else "–" for name in names)]
        for model in sorted(ratios, key=lambda model: sizes.get(model, 0))
    ]
    return "## Policies that look at the tensor, in inference\n\nRatios.\n\n" + markdown(["model", *names], rows)


_SHOWS = {
    "histograms": "How many tensors want which scale, in training and in inference.",
    "depth": "The same by depth and kind of layer.",
    "time": "The same over a training.",
    "window": "Which constants work in inference, and how many.",
    "amax": "What the policies that look at the tensor keep of 16 bits.",
    "gaps": "The training loss on the way, against BF16 of the same seeds.",
    "parity": "Training from scratch: pairs, their means and intervals.",
    "finetune": "Fine-tuning: pairs, their means and intervals.",
}


def _figures(pictures: Sequence[str], data: str) -> str:
    if not pictures:
        return ""
    return "\n\n".join(
        ["## Pictures", *(f"{_SHOWS[name]}\n\n![{name}]({data}/{name}.png)" for name in _SHOWS if name in pictures)]
    )


def _runs(lines: Sequence[Line], sizes: Mapping[str, float], texts: Mapping[str, Text]) -> str:
    rows: list[list[str]] = []
    missing: dict[bool, list[str]] = {False: [], True: []}  # by whether it is closed
    for study, what in STUDIES.items():
        of_study = [line for line in lines if line.study == study]
        for model in dict.fromkeys(line.model for line in sorted(of_study, key=lambda line: sizes.get(line.model, 0))):
            mine = [line for line in of_study if line.model == model]
            finished = [line for line in mine if line.result is not None]
            tokens = trained_tokens(mine[0])
            gpus = sorted({line.result["gpu"] for line in finished if line.result})
            rows.append([what, model, millions(sizes.get(model, 0)), millions(tokens) if tokens else "–",
                         f"{tokens / sizes[model]:.2g}" if tokens and model in sizes else "–",
                         f"{len(finished)} of {len(mine)}", ", ".join(gpus) or "–", mine[0].spec["data"]])  # fmt: skip
            closed = is_closed(mine[0].spec["data"], texts)
            missing[closed] += [f"* {what}, {model}: {left}" for left in _missing(mine)]
    if not rows:
        return "## Runs\n\nNone yet."
    head = ["study", "model", "parameters", "tokens of a training", "per parameter", "runs done", "on", "text"]
    known = [f"* {digest}: {text.words}{'; it cannot be made again' * is_closed(digest, texts)}"
             for digest, text in texts.items() if any(row[-1] == digest for row in rows)]  # fmt: skip
    digest = "*Text* is a digest of the tokens, of which names of models have the first eight digits."
    parts = [f"## Runs\n\n{markdown(head, rows)}", "\n".join([digest, *([""] if known else []), *known])]
    left = [(_CLOSED if closed else _STILL) + "\n".join(of) for closed, of in missing.items() if of]
    return "\n\n".join([*parts, *left])


_STILL = """Still missing; a run that was begun goes on, where its folder is there, when its command is given again with
the same `--out`:

"""
_CLOSED = """Closed, and not to be run any more, since the text cannot be made again:

"""


def _missing(lines: Sequence[Line]) -> list[str]:
    """Of one study and model: by arm, or the policies of a sweep."""
    left = [line for line in lines if line.result is None]
    swept = [line for line in left if line.study == "infer"]
    found = [f"unfinished, {', '.join(lacking_policies(line))} missing" for line in swept]
    for arm in arms_of(line for line in left if line not in swept):
        of_arm = sorted((line for line in left if line.spec["arm"] == arm), key=lambda line: line.spec["seed"])
        seeds = [f"{line.spec['seed']}{f' ({line.step} of ' + str(line.spec['steps']) + ' steps)' if line.step else ''}"
                 for line in of_arm]  # fmt: skip
        found.append(f"{arm}, {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(seeds)}")
    return found if swept else ["; ".join(found)] if found else []


_COSTS = """## Models by name

Counted on the meta device, not measured: the shapes are the published ones, every linear layer but the head is in FP8,
inputs are those of such layers, and FLOPs are those of a forward over a whole context, causal; backward has twice as
many.

"""


def _not_claimed(lines: Sequence[Line]) -> str:
    longest = max(map(trained_tokens, lines), default=0)
    most = f" The longest\n  training here is of {millions(longest)} tokens." if longest else ""
    left = _not_trained(lines)
    names = dict.fromkeys(plain_name(line.model) for line in lines)
    few = [model for model in names if re.search(r"\bQ\d", model)]
    begun = (
        f"\n* Nothing of {', '.join(few)} in 16 bits from the start:\n"
        "  the file's weights have fewer, and BF16 and every other arm begin with these."
        if few
        else ""
    )
    return f"""## What this does not say

* Nothing of models that were not run, and nothing of 1B parameters and more: activations of large models have outliers
  that small ones lack.
* Nothing of long trainings: published divergences in FP8 come after 0.7 to 200 billion tokens.{most}
* Nothing of the paper's tasks, GLUE or MMLU: next-token accuracy on one text is not those.
* Nothing of size alone: where models of several sizes were trained on as many tokens, the larger ones are trained less.
* Nothing of how a ratio or a window scatters over trainings, but where several seeds were run.{left}{begun}"""


def _not_trained(lines: Sequence[Line]) -> str:
    """Which of the paper's policies no model has two pairs of from scratch."""
    trained = done(lines, "parity")
    policies = {"FP8-AMAX": ["amax"], "FP8-CSCALE": [arm for arm in arms_of(trained) if arm.startswith("cscale:")]}
    few = [
        policy
        for policy, arms in policies.items()
        if all(len(of) < 2 for arm in arms for of in pairs(trained, arm, "bf16", "loss").values())
    ]
    return f"\n* Nothing of training from scratch with {' or '.join(few)}: no model has two pairs." if few else ""
