"""docs/scales.md, from the data alone: each claim of the paper, what was run, what came out, what may be said of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from urllib.parse import quote

from torch_fp8.table import markdown

from .costs import costs_table
from .scales_claims import claims
from .scales_findings import findings
from .scales_page_pairs import ABOUT_PAIRS, ABOUT_TUNED, pairs_section
from .scales_results import CRITERION, Line, arms_of, done, in_short, pairs, plain_name, trained_tokens, wanted
from .scales_sweeps import baselines, best_constant, by_size, constants, inference_ratios, lacking_policies, window
from .scales_words import TOO_FEW, window_of
from .texts import Text, is_closed

STUDIES = {
    "window": "training in BF16, then inference under every policy",
    "infer": "inference under every policy",
    "finetune": "fine-tuning beside BF16 and FP16",
    "parity": "training from scratch beside BF16, with paired seeds",
}

_HEAD = """# Scales: FP8-AMAX and FP8-CSCALE

A study of the policies of [arXiv 2309.17224](https://arxiv.org/abs/2309.17224) with the recipes of this project. This
page is written by `python studies/scales.py report` from what came out of every run:
[runs.jsonl]({data}/runs.jsonl).
`python studies/scales.py --help` says how to make such runs of your own, on a CPU in minutes."""

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
    """data: the path to the folder of runs.jsonl and the pictures, from the page. texts: by digest."""
    data = quote(data)
    again = "To be read as the table of fine-tuning."
    parts = [
        _HEAD.format(data=data),
        _found(lines, sizes),
        f"## Claims\n\n{_WORDS}\n\n"
        + markdown(["claim of the paper", "what was run", "what came out", "verdict"], claims(lines, sizes)),
        pairs_section(lines, "finetune", "Fine-tuning", f"{ABOUT_PAIRS}\n\n{ABOUT_TUNED}"),
        pairs_section(lines, "parity", "Training with paired seeds", again if done(lines, "finetune") else ABOUT_PAIRS),
        _windows(lines, sizes),
        _policies(lines, sizes),
        _figures(pictures, data),
        _runs(lines, sizes, texts),
        _COSTS + costs_table(),
        _not_claimed(lines, sizes),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# ---- sections --------------------------------------------------------------------------------------------------------


def _found(lines: Sequence[Line], sizes: Mapping[str, float]) -> str:
    said = findings(lines, sizes)
    points = [f"* {finding}".replace("\n", "\n  * ") for finding in said]  # what is held to what, a point of its own
    return "## What came out\n\n" + "\n".join(points) if said else ""


def _windows(lines: Sequence[Line], sizes: Mapping[str, float]) -> str:
    ratios = {m: of for m, of in inference_ratios(lines).items() if constants(of)}
    title = "## The window of FP8-CSCALE in inference"
    want = {role: wanted(lines, role) for role in ("x", "w")}
    random = {line.model for line in lines if line.is_random and any(line.model in of for of in want.values())}
    if not ratios and not random:
        return f"{title}\n\nNot run yet: `python studies/scales.py window` makes the runs."
    rows = []
    baseline = baselines(lines)
    for model in by_size([*ratios, *sorted(random)], sizes):
        found = ["–"] * 4
        if model not in random:
            found = _window_row(constants(ratios[model])) if baseline[model].tells else [TOO_FEW, *found[1:]]
        wants = [f"{of[model][0]} … {of[model][1]}" if model in of else "–" for of in want.values()]
        rows.append([model, in_short(sizes.get(model, 0)), *found, *wants])
    head = ["model", "parameters", "window, c", "as biases of this hardware", "width", "best c (ratio)"]
    head += ["biases that inputs want", "that weights want"]
    about = _ABOUT_WINDOWS + _OF_RANDOM * bool(random)
    return f"{title}\n\n{about}\n\n" + markdown(head, rows)


def _window_row(ratios: Mapping[int, float]) -> list[str]:
    found = window(ratios)
    best = best_constant(ratios)
    biases = f"{found[0] + 1} … {found[1] + 1}" if found else "–"
    width = found[1] - found[0] + 1 if found else 0
    return [window_of(found, ratios), biases, str(width), f"{best} ({ratios[best]:.4f})"]


_ABOUT_WINDOWS = f"""Constants in a row with a ratio of at least {CRITERION}. A tensor *wants* the bias that FP8-AMAX
has for it: with more its largest values saturate, with less its smallest ones lose bits. Shown are the least and the
greatest of all layers in inference or, where that was not recorded, in the first step of fine-tuning."""
_OF_RANDOM = """ Random
weights predict nothing, so that they have no accuracy to keep and no window; the biases they want are shown."""


def _policies(lines: Sequence[Line], sizes: Mapping[str, float]) -> str:
    ratios = {m: of for m, of in inference_ratios(lines).items() if "amax" in of}
    if not ratios:
        return ""
    names = ["current", "amax", "gc-amax", "histogram", "gc-histogram"]
    rows = []
    baseline = baselines(lines)
    for model in by_size(ratios, sizes):
        of = baseline[model]
        told = [f"{ratios[model][name]:.4f}" if name in ratios[model] else "–" for name in names]
        few = "" if of.tells else f", {TOO_FEW}"
        rows.append([model, *told, f"{of.accuracy:.4f} ± {of.half_width:.4f}", f"{of.tokens:,}{few}"])
    title = "## Policies that look at the tensor, in inference"
    return f"{title}\n\n{_ABOUT_POLICIES}\n\n" + markdown(["model", *names, "BF16's accuracy", "tokens"], rows)


_ABOUT_POLICIES = f"""Ratios, and the accuracy in BF16 that they are of, with half of its 95 % interval as a share of
so many tokens, as if each were independent of the others. Where that half is {100 * (1 - CRITERION):.1f} % of the
accuracy or more there are *{TOO_FEW}*, and no finding or verdict is of such a model. The rule is on the safe side: a
ratio is known better, since its two accuracies are of the same tokens. A model that always predicts the commonest token
has a ratio of 1 under every policy, so that ratios say little where the accuracy beside them is no higher than that."""


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
            rows.append([what, model, in_short(sizes.get(model, 0)), in_short(tokens) if tokens else "–",
                         f"{tokens / sizes[model]:.2g}" if tokens and model in sizes else "–", _passes(mine[0], texts),
                         _settings(mine[0]), f"{len(finished)} of {len(mine)}", ", ".join(gpus) or "–",
                         mine[0].spec["data"]])  # fmt: skip
            closed = is_closed(mine[0].spec["data"], texts)
            missing[closed] += [f"* {what}, {model}: {left}" for left in _missing(mine)]
    if not rows:
        return "## Runs\n\nNone yet."
    head = ["study", "model", "parameters", "tokens of a training", "per parameter", "passes over the text",
            "steps × batch × context, learning rate", "runs done", "on", "text"]  # fmt: skip
    known = [f"* {digest}: {text.words}; {in_short(text.train_tokens)} of its tokens are for training"
             f"{'; it cannot be made again' * is_closed(digest, texts)}"
             for digest, text in texts.items() if any(row[-1] == digest for row in rows)]  # fmt: skip
    named = any(f"text {row[-1][:8]}" in row[1] for row in rows)
    digest = f"*Text* is a digest of the tokens{', of which names of models have the first eight digits' * named}."
    parts = [f"## Runs\n\n{markdown(head, rows)}", "\n".join([digest, *([""] if known else []), *known])]
    left = [(_CLOSED if closed else _STILL) + "\n".join(of) for closed, of in missing.items() if of]
    return "\n\n".join([*parts, *left])


def _settings(line: Line) -> str:
    spec = line.spec
    sizes = f"{spec['steps']:,} × {spec['batch']} × {spec['context']:,}"
    return f"{sizes}, {spec['lr']:.2g}" if trained_tokens(line) and "lr" in spec else "–"


def _passes(line: Line, texts: Mapping[str, Text]) -> str:
    """On average: where a window of the text begins is drawn anew each time."""
    tokens, text = trained_tokens(line), texts.get(line.spec["data"])
    return f"{tokens / text.train_tokens:.2g}" if tokens and text else "–"


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


def _not_claimed(lines: Sequence[Line], sizes: Mapping[str, float]) -> str:
    largest = f"of more than {in_short(max(sizes.values()))} parameters" if sizes else "that are large"
    longest = max(map(trained_tokens, lines), default=0)
    most = f" The longest\n  training here is of {in_short(longest)} tokens." if longest else ""
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

* Nothing of models that were not run, and nothing of models {largest}: activations of large models
  have outliers that small ones lack.
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
