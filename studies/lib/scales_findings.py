"""What came out of a study of scales, in sentences, by rule and from the data alone."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .arms import LEVERS
from .intervals import interval, means_differ, pairs_needed
from .scales_results import (
    CRITERION,
    Line,
    arms_of,
    done,
    in_short,
    is_sound,
    on_two_gpus,
    pairs,
    plain_name,
    trained_tokens,
)
from .scales_sweeps import Ratios, best_constant, constants, telling_ratios, window
from .scales_words import (
    BY_CHANCE,
    MARGIN,
    finite,
    gpu_words,
    hangs_on,
    models_of,
    no_worse,
    percent,
    unsound_words,
)

FEWEST = 3  # pairs that a model must have to be put together with others


def findings(lines: Sequence[Line], sizes: Mapping[str, float]) -> list[str]:
    """A sentence or more each, the ones that there are data for; what is held to what begins a line of its own."""
    ratios = telling_ratios(lines, sizes)
    found = [_amax_keeps(ratios), _constants_keep(ratios), _no_ratio(lines)]
    found += [*_fine_tuned(lines), *_trained(lines), *_together(lines)]
    return [sentence for sentence in found if sentence]


def _amax_keeps(ratios: Ratios) -> str:
    amax = {model: of["amax"] for model, of in ratios.items() if "amax" in of}
    parts = [
        f"{_per_cent(values)} in {models_of(group)}"
        for holds in (True, False)
        if (group := [model for model, ratio in amax.items() if (ratio > CRITERION) == holds])
        for values in [[amax[model] for model in group]]
    ]
    return f"FP8-AMAX keeps of BF16's accuracy in inference {', but '.join(parts)}." if parts else ""


def _constants_keep(ratios: Ratios) -> str:
    swept = {model: ours for model, of in ratios.items() if (ours := constants(of))}
    have = {model: found for model, ours in swept.items() if (found := window(ours))}
    said = []
    if have:
        low, high = max(w[0] for w in have.values()), min(w[1] for w in have.values())
        which = f"each c from {low} to {high}" if low <= high else "no c that is the same for all,"
        said.append(f"{which} keeps {100 * CRITERION} % and more of it in {models_of(have)}")
    for model, ours in swept.items():
        if model not in have:
            best = best_constant(ours)
            none = "none does" if have else f"none keeps {100 * CRITERION} % of it"
            said.append(f"{none} in {model}, whose best, c = {best}, keeps {_per_cent([ours[best]])}")
    return f"One constant scale for all tensors, FP8-CSCALE: {'; '.join(said)}." if said else ""


def _no_ratio(lines: Sequence[Line]) -> str:
    trained = [line for line in lines if "bf16" in line.inference and not line.is_random]
    models = dict.fromkeys(line.model for line in trained if not line.inference["bf16"]["accuracy"])
    return f"Of {models_of(models)} no ratio can be said: BF16 itself predicts no token right." if models else ""


def _against_bf16(lines: Sequence[Line], study: str) -> Iterator[tuple[str, list[Line], dict[str, list[float]]]]:
    """Of each model that a study has finished runs of: its name, these, and of each arm the losses against BF16's."""
    finished = done(lines, study)
    for model in dict.fromkeys(line.model for line in finished):
        mine = [line for line in finished if line.model == model]
        others = [arm for arm in arms_of(mine) if arm != "bf16"]
        yield model, mine, {arm: v for arm in others if (v := pairs(mine, arm, "bf16", "loss").get(model))}


def _fine_tuned(lines: Sequence[Line]) -> list[str]:
    """Of each model: what fine-tuning gained, and how near which arm comes."""
    found = []
    for model, mine, apart in _against_bf16(lines, "finetune"):
        fp8 = sorted((arm for arm in apart if _in_fp8(arm, mine)), key=lambda arm: statistics.fmean(apart[arm]))
        arms = [*fp8, *(["fp16"] if "fp16" in apart else [])]
        if not arms and not unsound_words(mine):
            continue
        words = _each({arm: apart[arm] for arm in arms}, mine)
        verdict = _decided({arm: apart[arm] for arm in fp8})
        if not fp8:
            verdict = "no arm in FP8 has a pair"
        elif all(no_worse(apart[arm]) == "no" for arm in fp8):
            verdict = f"no arm in FP8 ends at most {MARGIN} % above it"
        elif _shows_nothing([apart[arm] for arm in fp8]):
            verdict = "one pair each shows nothing"
        losses = f"\nThe loss against BF16's: {words}." if words else ""
        told = f"{losses}{_in_their_own(fp8, mine)}{_levers(model, mine, apart)}"
        found.append(f"{_gained(model, lines)}{verdict}{unsound_words(mine)}.{told}")
    return found


def _in_their_own(arms: Iterable[str], lines: Sequence[Line]) -> str:
    """The losses of those in FP8 as they were trained, of one model."""
    own = {arm: v for arm in arms for v in pairs(lines, arm, "bf16", "loss_fp8").values() if not _shows_nothing([v])}
    return f"\nIn the FP8 of their training: {_each(own, lines, judged=False)}." if own else ""


def _levers(model: str, lines: Sequence[Line], against_bf16: Mapping[str, Sequence[float]]) -> str:
    """Which one change of a recipe moves the loss, by how much, and which do not: of runs with and without it that have
    all else in common. Of how many pairs is said where that is not the same of all arms. A difference is the change's
    where pairs on one kind of GPU show it by themselves."""
    said: list[str] = []
    seen: set[str] = set()  # how changes move it
    for base in dict.fromkeys(base for base, _ in LEVERS.values()):
        arms = [arm for arm, (of, _) in LEVERS.items() if of == base]
        apart = {
            arm: v for arm in arms if (v := pairs(lines, arm, base, "loss").get(model)) and not _shows_nothing([v])
        }
        words = {arm: _moved(apart[arm], pairs(lines, arm, base, "loss", one_gpu=True).get(model, [])) for arm in apart}
        said_of = {
            arm: f"{arm} ({LEVERS[arm][1]}) {percent(apart[arm])}{_in_pairs({**against_bf16, **apart}, arm)}"
            + gpu_words(on_two_gpus(lines, arm, base).get(model, 0), len(apart[arm]))
            for arm in apart
        }
        parts = [
            f"{word} {', '.join(said_of[arm] for arm in moved)}"
            for word in _MOVES
            if (moved := [arm for arm in apart if words[arm] == word])
        ]
        seen |= set(words.values())
        bad = unsound_words(lines, base)
        if parts:
            said.append(f"\nThe loss in BF16 against {base}'s, with one change to it: {'; '.join(parts)}{bad}.")
        elif bad and any(arm in LEVERS and LEVERS[arm][0] == base for arm in arms_of(lines)):
            said.append(f"\nOf changes to {base} nothing can be said{bad}.")
    return "".join(said) + f" {BY_CHANCE}" * bool(seen & {_LOWER, _HIGHER})


def _in_pairs(apart: Mapping[str, Sequence[float]], arm: str) -> str:
    """Of how many pairs, where that is not the same of all arms."""
    count = len(apart[arm])
    return f" in {count} pair{'s' * (count > 1)}" if len(set(map(len, apart.values()))) > 1 else ""


_LOWER, _NONE_SEEN, _HIGHER, _LOST = "lower with", "no difference seen with", "higher with", "lost with"
_UNTOLD = "not told from a change of GPU:"
_MOVES = (_LOWER, _NONE_SEEN, _HIGHER, _LOST, _UNTOLD)


def _moved(differences: Sequence[float], on_one_gpu: Sequence[float]) -> str:
    """Where the whole interval is, and that of the pairs on one kind of GPU alone."""
    word = _where(differences)
    return word if word in (_NONE_SEEN, _LOST) or word == _where(on_one_gpu) else _UNTOLD


def _where(differences: Sequence[float]) -> str:
    if not all(map(math.isfinite, differences)):
        return _LOST
    of = interval(differences) if differences else None
    return _NONE_SEEN if of is None or of.low <= 0 <= of.high else _LOWER if of.high < 0 else _HIGHER


def _gained(model: str, lines: Sequence[Line]) -> str:
    sound = [line for line in done(lines, "finetune") if _is(line, model, "bf16") and is_sound(line.result)]
    before = loss_before(model, lines)
    if before is None or not sound:
        return f"Fine-tuning {model}: "
    after, tokens = statistics.fmean(line.result["loss"] for line in sound), sound[0].spec["validated"]
    return (
        f"Fine-tuning in BF16 takes the loss of {model} from {before[0]:.4f} nats a token, on {before[1]:,} of the "
        f"text, to {after:.4f}, on {tokens:,}; "
    )


def _trained(lines: Sequence[Line]) -> list[str]:
    """Of each model that was trained from scratch: which arms came near, or that too few pairs say nothing."""
    found = []
    for model, mine, apart in _against_bf16(lines, "parity"):
        noise = _again_words(apart.get("bf16-again", [])) + unsound_words(mine)
        if not apart:
            found += [f"Training {model} from scratch: no arm has a pair{noise}."] if noise else []
            continue
        if _shows_nothing(apart.values()):
            found.append(f"Training {model} from scratch: of one pair each, which shows nothing{noise}.")
            continue
        fp8 = {arm: values for arm, values in apart.items() if arm != "bf16-again"}
        verdict, words = _decided(fp8), _each(fp8, mine)
        found.append(
            f"Training {model} from scratch, {_counts(fp8)}: {verdict}{noise}.\nThe loss against BF16's: {words}."
            f"{_in_their_own(fp8, mine)}{_levers(model, mine, fp8)}"
            if words
            else f"Training {model} from scratch in BF16 alone{noise}."
        )
    return found


def _shows_nothing(apart: Iterable[Sequence[float]]) -> bool:
    """One pair each, of which none was lost: that says something."""
    return all(len(of) == 1 and math.isfinite(of[0]) for of in apart)


def pooled(lines: Sequence[Line]) -> dict[tuple[int, tuple[str, ...]], dict[str, list[list[float]]]]:
    """{(tokens of each training, models): {arm: of each of these models the losses against BF16's}}, of trainings from
    scratch that are equally long and of one text, where at least two models have FEWEST pairs. Not where a model was
    trained on so many tokens in two ways: its runs share their seeds, and are not independent."""
    apart: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for model, mine, of in _against_bf16(lines, "parity"):
        alike = trained_tokens(mine[0]), *(mine[0].spec.get(key) for key in ("data", "split", "validated"))
        for arm, values in of.items():
            if arm != "bf16-again" and len(values) >= FEWEST:
                apart.setdefault((*alike, arm), {})[model] = values
    found: dict[tuple[int, tuple[str, ...]], dict[str, list[list[float]]]] = {}
    for (tokens, *_, arm), models in apart.items():
        if len(set(map(plain_name, models))) == len(models) > 1:
            found.setdefault((tokens, tuple(models)), {})[arm] = list(models.values())
    return found


def _together(lines: Sequence[Line]) -> list[str]:
    """Of all models that were trained from scratch on as many tokens."""
    found = []
    for (tokens, models), arms in pooled(lines).items():
        apart = {arm: [value for values in groups for value in values] for arm, groups in arms.items()}
        differ = [arm for arm, groups in arms.items() if _differ(groups)]
        words = _each(apart, [line for line in lines if line.study == "parity" and line.model in models], judged=False)
        found.append(
            f"{' and '.join([', '.join(models[:-1]), models[-1]])} together, from scratch on {in_short(tokens)} tokens "
            f"each, {_counts(apart)} in all, pooled after the runs were seen, so that the verdicts stay those of each "
            f"model: {words}. "
            + (f"With {', '.join(differ)} the models differ" if differ else "The models are not seen to differ")
            + " from one another by more than their pairs scatter."
        )
    return found


def _differ(groups: Sequence[Sequence[float]]) -> bool:
    """Whether models are seen to differ: where all runs of one were lost and not of another, too."""
    kept = list(filter(None, map(finite, groups)))
    return 0 < len(kept) < len(groups) or means_differ(kept)


def _counts(apart: Mapping[str, Sequence[float]]) -> str:
    """How many pairs the arms have."""
    counts = sorted(set(map(len, apart.values())))
    return f"{' to '.join(map(str, counts[:: len(counts) - 1 or 1]))} pair{'s' * (counts != [1])}"


def _again_words(again: Sequence[float]) -> str:
    """What the same seed does to BF16 when it is run again."""
    kept = list(map(abs, finite(again)))
    lost = len(again) - len(kept)
    moves = f"; the same seed again moves BF16 by {statistics.fmean(kept):.2f} %" if kept else ""
    return moves + (f"; BF16 run again was lost in {lost}" if lost else "")


def _decided(apart: Mapping[str, Sequence[float]]) -> str:
    """Which arms end below the margin and which above, as far as that is known."""
    near, far = ([arm for arm, values in apart.items() if no_worse(values) == word] for word in ("yes", "no"))
    lost = ", or lost" * any(math.isinf(value) for arm in far for value in apart[arm])
    said = [f"at most {MARGIN} % above BF16: {', '.join(near)}"] * bool(near)
    said += [f"more than {MARGIN} % above BF16{lost}: {', '.join(far)}"] * bool(far)
    return "; ".join(said) or "nothing is decided yet"


def _each(apart: Mapping[str, Sequence[float]], lines: Sequence[Line], *, judged: bool = True) -> str:
    """Of each arm how far it is from BF16; of how many pairs, where that is not the same of all; how many are on two
    kinds of GPU; how many of ``lines`` diverged and came back to a loss that counts; and how many it takes, where it is
    judged and that many do not decide."""
    said = []
    back = Counter(line.spec["arm"] for line in lines if (line.result or {}).get("diverged") and line.result["loss"])
    for arm, values in apart.items():
        open_ = judged and no_worse(values) == "open"
        needed = pairs_needed(values, MARGIN) if open_ and statistics.fmean(values) < MARGIN else None
        diverged = f", {back[arm]} diverged on the way" if back[arm] else ""
        single = hangs_on(values) if judged else 0
        hangs = f", open without any one of {single} of its {len(values)} pairs" if single else ""
        takes = "" if needed is None else f", which takes {max(needed, len(values) + 1)} pairs if its mean is 0"
        gpus = gpu_words(sum(on_two_gpus(lines, arm, "bf16").values()), len(values))
        said.append(f"{arm} {percent(values)}{_in_pairs(apart, arm)}{gpus}{diverged}{', open' * open_}{hangs}{takes}")
    return ("; " if any(", " in one.partition("]")[2] for one in said) else ", ").join(said)


def loss_before(model: str, lines: Sequence[Line]) -> tuple[float, int] | None:
    """Of a checkpoint, in BF16, before it is fine-tuned on the same text in as long sequences: the first record of its
    longest sweep, and of how many tokens it is."""
    of = ("checkpoint", "data", "split", "context")
    tuned = [[line.spec.get(key) for key in of] for line in lines if line.study == "finetune" and line.model == model]
    told = [(loss, line.spec["sweep_tokens"]) for line in lines
            if line.study == "infer" and (loss := line.inference.get("bf16", {}).get("loss")) is not None
            and tuned and all([line.spec.get(key) for key in of] == one for one in tuned)]  # fmt: skip
    return max(told, key=lambda one: one[1]) if told else None


def _in_fp8(arm: str, lines: Iterable[Line]) -> bool:
    return any(line.spec["arm"] == arm and ("recipe" in line.spec or "emulation" in line.spec) for line in lines)


def _is(line: Line, model: str, arm: str) -> bool:
    return line.model == model and line.spec["arm"] == arm


def _per_cent(ratios: Sequence[float]) -> str:
    low, high = (f"{100 * of(ratios):.2f}" for of in (min, max))
    return f"{low} %" if low == high else f"{low} to {high} %"
