"""What may be said of each claim of the paper, by rule and from the data alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .intervals import interval
from .scales_results import CRITERION, Line, done, family, on_two_gpus, pairs, plain_name, trained_tokens
from .scales_sweeps import Ratios, best_constant, constants, telling_ratios, window
from .scales_words import MARGIN, gpu_words, models_of, percent, unsound, unsound_words, window_of

WIDEST = (-16, 16)  # the constants that the paper speaks of

CONSISTENT, NOT, OPEN = "consistent", "not", "cannot be claimed"
NOTHING = "nothing yet that can tell"


class Claim(NamedTuple):
    words: str
    run: str
    found: str
    verdict: str


def claims(lines: Sequence[Line], sizes: Mapping[str, float]) -> list[Claim]:
    ratios = telling_ratios(lines, sizes)
    return [_amax_inference(ratios), _amax_fine_tuning(lines), _has_window(ratios), _smaller(ratios, lines, sizes)]


def _amax_inference(ratios: Ratios) -> Claim:
    words = "FP8-AMAX, and FP8-CSCALE inside its window, keep more than 99.5 % of 16 bits in inference"
    amax = {model: of["amax"] for model, of in ratios.items() if "amax" in of}
    if not amax:
        return Claim(words, NOTHING, "–", OPEN)
    best = {model: c[best_constant(c)] for model, of in ratios.items() if (c := constants(of))}
    good = {m for m in amax if amax[m] > CRITERION and best.get(m, amax[m]) > CRITERION}
    groups = [group for group in ([m for m in amax if m in good], [m for m in amax if m not in good]) if group]
    said = []
    for group in groups:
        swept = [m for m in group if m in best]
        whose = f" of {models_of(swept)}" if 0 < len(swept) < len(group) else ""
        constant = f"the best constant{whose} {_range(best[m] for m in swept)}"
        said.append(f"{models_of(group)}: AMAX {_range(amax[m] for m in group)}, {constant}")
    values = [value > CRITERION for value in [*amax.values(), *best.values()]]
    verdict = CONSISTENT if all(values) else NOT if not any(values) else OPEN
    return Claim(words, models_of(amax), "; ".join(said), verdict)


def _amax_fine_tuning(lines: Sequence[Line]) -> Claim:
    """By the paper's criterion, of accuracy; and by the margin of the loss that is this study's own."""
    words = "FP8-AMAX fine-tuning is basically equal to FP16"
    keys = ("accuracy", "accuracy_fp8", "loss")
    finished = done(lines, "finetune")
    found = {key: pairs(finished, "amax", "fp16", key) for key in keys}
    said = {model: of for model in dict.fromkeys(line.model for line in finished)
            if (of := _against_fp16(model, finished, {key: found[key].get(model, []) for key in keys}))}  # fmt: skip
    if not said:
        return Claim(words, NOTHING, "–", OPEN)
    accuracies = [*(found["accuracy"].get(model, []) for model in said), *found["accuracy_fp8"].values()]
    by_accuracy = _verdict([[-v if math.isfinite(v) else v for v in of] for of in accuracies], 100 * (1 - CRITERION))
    by_loss = _verdict([found["loss"].get(model, []) for model in said], MARGIN)
    apart = f"{OPEN} (by the paper's 0.5 % of accuracy: {by_accuracy}; by {MARGIN} % of the loss: {by_loss})"
    verdict = by_accuracy if by_accuracy == by_loss else apart
    return Claim(words, f"fine-tuning of {models_of(said)}", "; ".join(said.values()), verdict)


def _against_fp16(model: str, lines: Sequence[Line], apart: Mapping[str, Sequence[float]]) -> str:
    """What came out of FP8-AMAX beside FP16; where no pair counts, which of the two was lost, if one was."""
    mine = [line for line in lines if line.model == model]
    if apart["accuracy"]:
        in_fp8 = f", in its own FP8 {percent(apart['accuracy_fp8'])}" if apart["accuracy_fp8"] else ""
        gpus = gpu_words(on_two_gpus(mine, "amax", "fp16").get(model, 0), len(apart["loss"]))
        return (
            f"{model}, against FP16: accuracy {percent(apart['accuracy'])}{in_fp8}; loss {percent(apart['loss'])}; "
            f"seeds: {len(apart['accuracy'])}{gpus}{unsound_words(mine, 'fp16')}"
        )
    lost = [f"{arm.upper()} was lost or diverged in {bad}" for arm in ("fp16", "amax") if (bad := unsound(mine, arm))]
    return f"{model}: {', '.join(lost)}, and no pair counts" if lost else ""


def _verdict(worse: Sequence[Sequence[float]], limit: float) -> str:
    """Of each model's differences, positive where it is worse, infinite where a run was lost: whether all are below.
    A model without any leaves it open."""
    if any(not math.isfinite(value) for values in worse for value in values):
        return NOT
    intervals = [interval(values) for values in worse if values]
    if any(of.low > limit for of in intervals):
        return NOT
    return CONSISTENT if worse and all(worse) and all(of.high < limit for of in intervals) else OPEN


def _has_window(ratios: Ratios) -> Claim:
    words = "FP8-CSCALE works for the constants of a window alone, which depends on the model (inference)"
    swept = {model: constants(of) for model, of in ratios.items() if constants(of)}
    if not swept:
        return Claim(words, NOTHING, "–", OPEN)
    found = {model: window(of) for model, of in swept.items()}
    said = "; ".join(f"{model}: {window_of(w, swept[model])}" for model, w in found.items())
    inside = [w is not None and w[1] - w[0] + 1 < len(swept[model]) for model, w in found.items()]
    whole = [_is_whole(swept[model]) for model in found]
    differ = len(set(found.values())) > 1 or len(found) == 1
    low, high = min(min(of) for of in swept.values()), max(max(of) for of in swept.values())
    verdict = CONSISTENT if all(inside) and all(whole) and differ else NOT if not any(inside) else OPEN
    if any(_is_cut(of) for of in swept.values()):
        verdict = f"{OPEN}: a window may go on where its sweep ends"
    return Claim(words, f"c from {low} to {high}, {models_of(swept)}", said, verdict)


def _smaller(ratios: Ratios, lines: Sequence[Line], sizes: Mapping[str, float]) -> Claim:
    """Within families: of models that were trained here, alike. A checkpoint's training differs from that of others."""
    words = "The larger the model, the smaller the window (stated of fine-tuning)"
    swept = {model: window(ours) for model, of in ratios.items() if (ours := constants(of))}
    trained = {line.model: line for line in lines if line.model in swept and line.study == "window"}
    kinds: dict[tuple[Any, ...], dict[str, int]] = {}  # of a family, those trained on as many tokens of one text
    for model in sorted(trained, key=lambda model: sizes[model]):
        spec = trained[model].spec
        kind = family(model), trained_tokens(trained[model]), spec.get("data"), spec.get("split")
        kinds.setdefault(kind, {})[model] = _width(swept[model])
    families = {
        kind: widths
        for kind, widths in kinds.items()
        if len(widths) > 1 and len(widths) == len(set(map(plain_name, widths)))
    }
    if not families:
        return Claim(words, "fewer than two sizes of a family, each trained once and alike", "–", OPEN)
    said = "widths in inference, from the smallest model to the largest: " + "; ".join(
        (f"{name} " if len(families) > 1 else "") + ", ".join(map(str, of.values()))
        for (name, *_), of in families.items()
    )
    rows = [list(of.values()) for of in families.values()]
    falls = all(row[0] > row[-1] and all(a >= b for a, b in itertools.pairwise(row)) for row in rows)
    rises = all(row[-1] > row[0] for row in rows)
    note = (
        "in inference no larger one's is wider" if falls else "in inference not" if rises else "in inference no trend"
    )
    if any(_is_cut(constants(ratios[model])) for of in families.values() for model in of):
        note = "a window may go on where its sweep ends"
    models = models_of(model for of in families.values() for model in of)
    return Claim(words, f"inference of {models}; no window was fine-tuned", said, f"{OPEN} ({note})")


def _width(found: tuple[int, int] | None) -> int:
    return found[1] - found[0] + 1 if found else 0


def _is_cut(ratios: Mapping[int, float]) -> bool:
    """Whether its window is as wide as a sweep of fewer than the paper's constants lets it be."""
    found = window(ratios)
    return found is not None and any(found[i] == end != WIDEST[i] for i, end in enumerate((min(ratios), max(ratios))))


def _is_whole(ratios: Mapping[int, float]) -> bool:
    """All constants that work are neighbours."""
    found = window(ratios)
    return found is not None and sum(r >= CRITERION for r in ratios.values()) == found[1] - found[0] + 1


def _range(values: Iterable[float]) -> str:
    found = list(values)
    if not found:
        return "–"
    low, high = min(found), max(found)
    return f"{low:.4f}" if low == high else f"{low:.4f} to {high:.4f}"
