"""docs/scales.md, from the data alone: each claim of the paper, what was run, what came out, what may be said of it."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch_fp8.table import markdown

from .costs import costs_table
from .divergence import FACTOR, MEDIAN, PATIENCE
from .intervals import interval
from .scales_figures import millions
from .scales_results import CRITERION, Line, arms_of, constants, done, inference_ratios, pairs, trained_tokens, window

Ratios = Mapping[str, Mapping[str, float]]

MARGIN = 0.25  # per cent of the loss, fixed before the runs

STUDIES = {
    "window": "training in BF16, then inference under every policy",
    "infer": "inference of a checkpoint under every policy",
    "finetune": "fine-tuning beside BF16 and FP16",
    "parity": "training from scratch beside BF16, with paired seeds",
}

_HEAD = """# Scales: FP8-AMAX and FP8-CSCALE

A study of the policies of [arXiv 2309.17224](https://arxiv.org/abs/2309.17224) with the recipes of this project. This
page is written by `python studies/scales.py report` from what came out of every run:
[runs.jsonl]({data}/runs.jsonl).

The paper's tables are not known here number by number; its claims are. A claim is called *consistent* or *not* where
all models that were run agree, and else it *cannot be claimed*. What is measured is the share of next tokens that are
the model's first choice, on held-out text; the paper measures tasks. *Ratio* is that accuracy over the one in BF16, *c*
the paper's constant: on this hardware, whose E4M3 has an exponent bias of 7 and not 8, inputs and weights are scaled by
2^(c + 1), E5M2 gradients by 2^(c − 3). Policies with *gc-* have the paper's own formats, and are emulated, as the
histogram is. In all of it the head, embeddings, norms and attention are in 16 bits."""


class Claim(NamedTuple):
    words: str
    run: str
    found: str
    verdict: str


CONSISTENT, NOT, OPEN = "consistent", "not", "cannot be claimed"


def page(lines: Sequence[Line], pictures: Sequence[str], sizes: Mapping[str, float], data: str) -> str:
    """data: the folder of runs.jsonl and the pictures, as the page links to it."""
    parts = [
        _HEAD.format(data=data),
        "## Claims\n\n"
        + markdown(["claim of the paper", "what was run", "what came out", "verdict"], claims(lines, sizes)),
        _parity(lines, "parity", "Training with paired seeds"),
        _parity(lines, "finetune", "Fine-tuning"),
        _windows(lines, sizes),
        _policies(lines, sizes),
        _figures(pictures, data),
        _runs(lines, sizes),
        _COSTS + costs_table(),
        _not_claimed(lines),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# ---- the claims ------------------------------------------------------------------------------------------------------


def claims(lines: Sequence[Line], sizes: Mapping[str, float]) -> list[Claim]:
    ratios = inference_ratios(done(lines, "window", "infer"))
    return [_amax_inference(ratios), _amax_fine_tuning(lines), _has_window(ratios), _smaller(ratios, lines, sizes)]


def _amax_inference(ratios: Ratios) -> Claim:
    words = "FP8-AMAX, and FP8-CSCALE inside its window, keep more than 99.5 % of 16 bits in inference"
    amax = {model: of["amax"] for model, of in ratios.items() if "amax" in of}
    if not amax:
        return Claim(words, "nothing yet", "–", OPEN)
    best = {model: max(c.values()) for model, of in ratios.items() if (c := constants(of))}
    found = f"AMAX: {_range(amax.values())}; the best constant: {_range(best.values())}"
    good = [value > CRITERION for value in [*amax.values(), *best.values()]]
    return Claim(words, _models(amax), found, CONSISTENT if all(good) else NOT if not any(good) else OPEN)


def _amax_fine_tuning(lines: Sequence[Line]) -> Claim:
    words = "FP8-AMAX fine-tuning is basically equal to FP16"
    found = pairs(done(lines, "finetune"), "amax", "fp16", "accuracy")
    if not found:
        return Claim(words, "nothing yet", "–", OPEN)
    said = "; ".join(f"{model}: accuracy {_percent(values)}, {len(values)} seeds" for model, values in found.items())
    limit = 100 * (CRITERION - 1)
    lost = any(not math.isfinite(value) for values in found.values() for value in values)
    good = not lost and all(interval(values).low > limit for values in found.values())
    bad = lost or any(interval(values).high < limit for values in found.values())
    return Claim(words, f"fine-tuning of {_models(found)}", said, CONSISTENT if good else NOT if bad else OPEN)


def _has_window(ratios: Ratios) -> Claim:
    words = "FP8-CSCALE works for the constants of a window alone, which depends on the model (inference)"
    swept = {model: constants(of) for model, of in ratios.items() if constants(of)}
    if not swept:
        return Claim(words, "nothing yet", "–", OPEN)
    found = {model: window(of) for model, of in swept.items()}
    said = "; ".join(f"{model}: {_window(w, swept[model])}" for model, w in found.items())
    inside = [w is not None and w[1] - w[0] + 1 < len(swept[model]) for model, w in found.items()]
    whole = [_is_whole(swept[model]) for model in found]
    differ = len(set(found.values())) > 1 or len(found) == 1
    low, high = min(min(of) for of in swept.values()), max(max(of) for of in swept.values())
    verdict = CONSISTENT if all(inside) and all(whole) and differ else NOT if not any(inside) else OPEN
    return Claim(words, f"c from {low} to {high}, {_models(swept)}", said, verdict)


def _smaller(ratios: Ratios, lines: Sequence[Line], sizes: Mapping[str, float]) -> Claim:
    words = "The larger the model, the smaller the window (stated of fine-tuning)"
    swept = {model: w for model, of in ratios.items() if (w := window(constants(of)))}
    trained = [model for model in swept if any(line.model == model and line.study == "window" for line in lines)]
    if len(trained) < 2:
        return Claim(words, "fewer than two sizes", "–", OPEN)
    order = sorted(trained, key=lambda model: sizes[model])
    widths = [swept[model][1] - swept[model][0] + 1 for model in order]
    said = "widths in inference, from the smallest model to the largest: " + ", ".join(map(str, widths))
    falls = all(a >= b for a, b in itertools.pairwise(widths)) and widths[0] > widths[-1]
    rises = widths[-1] > widths[0]
    note = "in inference consistent" if falls else "in inference not" if rises else "in inference no trend"
    return Claim(words, f"inference of {_models(order)}; no window was fine-tuned", said, f"{OPEN} ({note})")


def _is_whole(ratios: Mapping[int, float]) -> bool:
    """All constants that work are neighbours."""
    found = window(ratios)
    return found is not None and sum(r >= CRITERION for r in ratios.values()) == found[1] - found[0] + 1


# ---- sections --------------------------------------------------------------------------------------------------------


_ABOUT_PAIRS = f"""Differences of runs that share seed, weights at the start and batches; means over pairs with their
95 % interval by Student's t. The margin of {MARGIN} % of the loss was fixed before the runs: *yes* where the whole
interval is below it, *no* where it is above or a run was lost, else *open*. All runs are validated in BF16. The largest
gap is that of the training loss between the arms' means, over stretches of a fiftieth of the run after its first tenth.
A run diverges where its loss is not finite, or stays above {FACTOR} times the median of the last {MEDIAN} steps for
{PATIENCE} steps."""


def _parity(lines: Sequence[Line], study: str, title: str) -> str:
    finished = done(lines, study)
    rows = []
    for model in dict.fromkeys(line.model for line in finished):
        mine = [line for line in finished if line.model == model]
        rows += [_pair_row(model, arm, mine) for arm in arms_of(mine) if arm != "bf16"]
    if not rows:
        return f"## {title}\n\nNot run yet: `python studies/scales.py {study}` makes the runs."
    head = ["model", "arm", "pairs", "loss against BF16 [95 %]", "accuracy against BF16 [95 %]"]
    head += ["largest gap on the way", "diverged", f"within {MARGIN} %"]
    noise = [_noise(model, finished) for model in dict.fromkeys(line.model for line in finished)]
    return "\n\n".join([f"## {title}", _ABOUT_PAIRS, markdown(head, rows), "\n".join(filter(None, noise))]).rstrip()


def _pair_row(model: str, arm: str, lines: Sequence[Line]) -> list[str]:
    losses = pairs(lines, arm, "bf16", "loss").get(model, [])
    accuracies = pairs(lines, arm, "bf16", "accuracy").get(model, [])
    diverged = sum(bool(line.result["diverged"]) for line in lines if line.spec["arm"] == arm)
    gap = _largest_gap(lines, arm)
    return [
        model,
        arm,
        str(len(losses)),
        _percent(losses),
        _percent(accuracies),
        "–" if gap is None else f"{gap:+.2f} %",
        str(diverged),
        _within(losses),
    ]


def _noise(model: str, lines: Sequence[Line]) -> str:
    """What BF16 does by itself."""
    mine = [line for line in lines if line.model == model]
    losses = [line.result["loss"] for line in mine if line.spec["arm"] == "bf16" and line.result["loss"] is not None]
    if len(losses) < 2:
        return ""
    scatter = 100 * statistics.stdev(losses) / statistics.fmean(losses)
    again = [abs(apart) for apart in pairs(mine, "bf16-again", "bf16", "loss").get(model, [])]
    floor = f"; the same seed again moves it by {statistics.fmean(again):.2f} % on average" if again else ""
    return (
        f"* {model}, BF16: {statistics.fmean(losses):.4f} nats a token, mean of {len(losses)} seeds that scatter by "
        f"{scatter:.2f} % (standard deviation){floor}"
    )


def _largest_gap(lines: Sequence[Line], arm: str) -> float | None:
    """In per cent, of the means over seeds that both arms have."""
    of = {(line.spec["arm"], line.spec["seed"]): line.losses for line in lines}
    seeds = [seed for name, seed in of if name == arm and ("bf16", seed) in of]
    together = [
        [(a[1], b[1]) for a, b in zip(of[arm, seed], of["bf16", seed]) if a[0] == b[0]][len(of[arm, seed]) // 10 :]
        for seed in seeds
    ]
    gaps = [100 * (sum(a for a, _ in at) / sum(b for _, b in at) - 1) for at in zip(*together)]
    return max(gaps, key=abs) if gaps else None


def _within(differences: Sequence[float]) -> str:
    if not differences or not all(map(math.isfinite, differences)):
        return "no" if differences else "–"
    of = interval(differences)
    return "yes" if of.high < MARGIN else "no" if of.low > MARGIN else "open"


def _windows(lines: Sequence[Line], sizes: Mapping[str, float]) -> str:
    ratios = {m: of for m, of in inference_ratios(done(lines, "window", "infer")).items() if constants(of)}
    title = "## The window of FP8-CSCALE in inference"
    if not ratios:
        return f"{title}\n\nNot run yet: `python studies/scales.py window` makes the runs."
    rows = []
    for model in sorted(ratios, key=lambda model: sizes.get(model, 0)):
        ours = constants(ratios[model])
        found = window(ours)
        best = max(ours, key=lambda c: ours[c])
        rows.append([model, millions(sizes.get(model, 0)), _window(found, ours),
                     f"{found[0] + 1} … {found[1] + 1}" if found else "–", str(found[1] - found[0] + 1 if found else 0),
                     f"{best} ({ours[best]:.4f})"])  # fmt: skip
    head = ["model", "parameters", "window, c", "as biases of this hardware", "width", "best c (ratio)"]
    return f"{title}\n\nConstants in a row with a ratio of at least {CRITERION}.\n\n" + markdown(head, rows)


def _policies(lines: Sequence[Line], sizes: Mapping[str, float]) -> str:
    ratios = {m: of for m, of in inference_ratios(done(lines, "window", "infer")).items() if "amax" in of}
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
    "parity": "Training from scratch: pairs, their means and intervals.",
    "finetune": "Fine-tuning: pairs, their means and intervals.",
}


def _figures(pictures: Sequence[str], data: str) -> str:
    if not pictures:
        return ""
    return "\n\n".join(
        ["## Pictures", *(f"{_SHOWS[name]}\n\n![{name}]({data}/{name}.png)" for name in _SHOWS if name in pictures)]
    )


def _runs(lines: Sequence[Line], sizes: Mapping[str, float]) -> str:
    rows, missing = [], []
    for study, what in STUDIES.items():
        of_study = [line for line in lines if line.study == study]
        for model in dict.fromkeys(line.model for line in sorted(of_study, key=lambda line: sizes.get(line.model, 0))):
            mine = [line for line in of_study if line.model == model]
            finished = [line for line in mine if line.result is not None]
            spec = mine[0].spec
            tokens = trained_tokens(mine[0])
            gpus = sorted({line.result["gpu"] for line in finished if line.result})
            rows.append([what, model, millions(sizes.get(model, 0)), millions(tokens) if tokens else "–",
                         f"{tokens / sizes[model]:.2g}" if tokens and model in sizes else "–",
                         f"{len(finished)} of {len(mine)}", ", ".join(gpus) or "–", spec["data"]])  # fmt: skip
            missing += [f"{line.run} ({line.step} of {spec['steps']} steps)" for line in mine if line.result is None]
    if not rows:
        return "## Runs\n\nNone yet."
    head = ["study", "model", "parameters", "tokens of a training", "per parameter", "runs done", "on", "text"]
    left = "\n\nStill missing: " + ", ".join(missing) + "." if missing else ""
    return f"## Runs\n\n{markdown(head, rows)}\n\n*Text* is a digest of the tokens.{left}"


_COSTS = """## Models by name

Counted on the meta device, not measured: the shapes are the published ones, every linear layer but the head is in FP8,
inputs are those of such layers, and FLOPs are those of a forward over a whole context, causal; backward has twice as
many.

"""


def _not_claimed(lines: Sequence[Line]) -> str:
    longest = max(map(trained_tokens, lines), default=0)
    most = f" The longest\n  training here is of {millions(longest)} tokens." if longest else ""
    return f"""## What this does not say

* Nothing of models that were not run, and nothing of 1B parameters and more: activations of large models have outliers
  that small ones lack.
* Nothing of long trainings: published divergences in FP8 come after 0.7 to 200 billion tokens.{most}
* Nothing of the paper's tasks, GLUE or MMLU: next-token accuracy on one text is not those.
* Nothing of size alone: where models of several sizes were trained on as many tokens, the larger ones are trained less.
* Nothing of how a ratio or a window scatters over trainings, but where several seeds were run."""


# ---- words -----------------------------------------------------------------------------------------------------------


def _models(names: Mapping[str, object] | Sequence[str]) -> str:
    return ", ".join(names)


def _range(values: object) -> str:
    found = list(values)
    if not found:
        return "–"
    low, high = min(found), max(found)
    return f"{low:.4f}" if low == high else f"{low:.4f} to {high:.4f}"


def _percent(differences: Sequence[float]) -> str:
    """Of those that are finite."""
    kept = [value for value in differences if math.isfinite(value)]
    if not kept:
        return "–"
    of = interval(kept)
    return f"{of.mean:+.2f} % [{of.low:+.2f}, {of.high:+.2f}]" if of.count > 1 else f"{of.mean:+.2f} %"


def _window(found: tuple[int, int] | None, swept: Mapping[int, float]) -> str:
    """An end that is the sweep's is marked: the window may go on beyond."""
    if found is None:
        return "none"
    low, high = ("" if found[i] != end else " (the sweep's end)" for i, end in enumerate((min(swept), max(swept))))
    return f"{found[0]}{low} … {found[1]}{high}"
