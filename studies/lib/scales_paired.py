"""The pictures of pairs of runs: how far each arm is from BF16 of the same seed, on the way and at the end."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from torch_fp8.picture import BF16, FAINT, FOURTH, FP8, INK, SECOND, THIRD, caption, picture

from .intervals import interval
from .scales_findings import pooled
from .scales_results import Line, arms_of, done, gaps, pairs
from .scales_words import MARGIN

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {"parity": "Training from scratch", "finetune": "Fine-tuning"}

# ---- on the way ------------------------------------------------------------------------------------------------------

BASE = "delayed"  # that most arms are, with one change: in every panel, so that they can be held to it
GROUPS = {  # the panels of a row; a constant's arm is there by what is before its colon
    "recipes, and what parts them": (BASE, "current", "power-of-two", "grad-margin3", "amax", "cscale"),
    "16 bits, in all products or in one": ("bf16-again", "fp16", "fprop16", "dgrad16", "wgrad16"),
    "delayed with one other change": ("recent", "history16", "margin1", "delayed-power-of-two", "e4m3", "exact-sums"),
    "other arms": (),
}
PALE = "#d3dae1"
LOOKS = list(itertools.product(("-", "--", ":"), (FP8, SECOND, THIRD, FOURTH, "#c2504d", "#d77fa8", "#7a6652")))

Courses = dict[str, list[tuple[int, float]]]  # by arm: (step, how far above BF16)


def on_the_way(path: Path, lines: Sequence[Line], sizes: Mapping[str, float]) -> bool:
    """The training loss against that of BF16 over the steps: a row a study and model, whose panels have a few related
    arms in colour and all others behind them."""
    settings: dict[tuple[str, str], list[Line]] = {}
    for line in [*done(lines, "finetune"), *done(lines, "parity")]:
        settings.setdefault((line.study, line.model), []).append(line)
    every = {key: {arm: gaps(of, arm) for arm in arms_of(of) if arm != "bf16"} for key, of in settings.items()}
    courses = {
        key: found for key, of in every.items() if (found := {arm: course for arm, course in of.items() if course})
    }
    if not courses:
        return False
    looks = _looks({arm for of in courses.values() for arm in of})
    groups = [name for name in GROUPS if any(_group(arm) == name for of in courses.values() for arm in of)]
    width, heights = max(11, 3.7 * len(groups)), [max(1.4, 0.17 * len(of)) for of in courses.values()]
    size = (width, sum(heights) + 0.95 * len(heights) + 1)
    with picture(path, "Training loss on the way, against BF16", size) as figure:
        grid = figure.subplots(len(courses), len(groups), sharey="row", squeeze=False, height_ratios=heights)
        for row, height, ((study, model), of) in zip(grid, heights, courses.items()):
            shown = [[arm for arm in of if _group(arm) == name] for name in groups]
            shown = [[arm for arm in of if arm in arms or arm == BASE] if arms else [] for arms in shown]
            for axes, name, arms in zip(row, groups, shown):
                if arms:
                    _courses(axes, of, arms, looks)
                    axes.annotate(name, (0, 1), (0, 4), "axes fraction", textcoords="offset points", color=FAINT)
                else:
                    axes.set_axis_off()
            for axes, arms in zip(row, shown):  # when the row's scale is known
                axes.set_xlabel("steps")
                _names(axes, {arm: of[arm][-1][1] for arm in arms}, looks, 0.15 / height)
            counts = [len(pairs(settings[study, model], arm, "bf16", "loss").get(model, [])) for arm in of]
            many = " to ".join(dict.fromkeys(str(of(filter(None, counts))) for of in (min, max)))
            seeds = "one pair each, which shows nothing" if max(counts) == 1 else f"means of {many} pairs"
            row[0].set_title(fill(f"{TITLES[study]}, {model}: {seeds}", int(10 * width)), pad=20)
        figure.supylabel("% of the loss; above is worse", fontsize="medium")
        caption(
            figure,
            "Over the steps, of the same seeds. A loss is of the arm's own forward pass, in FP8 where it trains so.\n"
            f"The first tenth is left out. Pale: the other arms of the row; {BASE} is in every panel.\n"
            "Rows have scales of their own. Where arms have not as many pairs each, they are not of the same seeds.",
        )
    return True


def _group(arm: str) -> str:
    return next((name for name, arms in GROUPS.items() if arm.partition(":")[0] in arms), list(GROUPS)[-1])


def _looks(arms: Collection[str]) -> dict[str, tuple[str, str]]:
    """The same of an arm in every picture, but of constants and others, which come after those of their group."""
    looks = {BASE: ("-", INK)}
    for name, known in GROUPS.items():
        others = sorted(arm for arm in arms if _group(arm) == name and arm not in known)
        looks |= zip([arm for arm in (*known, *others) if arm != BASE], LOOKS * 9)
    return looks


def _courses(axes: Axes, of: Courses, arms: Collection[str], looks: Mapping[str, tuple[str, str]]) -> None:
    for arm in sorted(of, key=lambda arm: arm in arms):
        style, color = looks[arm] if arm in arms else ("-", PALE)
        axes.plot(*zip(*of[arm]), style, color=color, label=arm, linewidth=1.3 if arm in arms else 0.8)
    axes.axhline(0, color=INK, linewidth=1)
    axes.margins(x=0)


def _names(axes: Axes, ends: Mapping[str, float], looks: Mapping[str, tuple[str, str]], height: float) -> None:
    """Beside the curves' ends, in their order, moved apart where they would meet. height: of a name, as a share of the
    panel's."""
    low, high = axes.get_ylim()
    order = sorted(ends, key=lambda arm: (ends[arm], arm))
    end = [(ends[arm] - low) / (high - low) for arm in order]
    at = list(itertools.accumulate(end, lambda below, own: max(own, below + height)))
    at[-1:] = [min(1, top) for top in at[-1:]]
    at = list(itertools.accumulate(at[::-1], lambda above, own: min(own, above - height)))[::-1]
    for arm, y, name_y in zip(order, end, at):
        color = looks[arm][1]
        axes.plot((1.01, 1.06), (y, name_y), color=color, linewidth=0.7, transform=axes.transAxes, clip_on=False)
        axes.text(1.07, name_y, arm, color=color, va="center", fontsize=8.5, transform=axes.transAxes)


# ---- at the end ------------------------------------------------------------------------------------------------------


def paired(path: Path, lines: Sequence[Line], study: str, against: str) -> bool:
    """Differences of an arm from BF16 with the same seed: each pair, their mean, its interval. Models that were trained
    alike are there once more, together."""
    of_study = [line for line in lines if line.study == study]
    arms = [arm for arm in arms_of(of_study) if arm != against]
    found = {arm: pairs(of_study, arm, against, "loss") for arm in arms}
    found = {arm: models for arm, models in found.items() if models}
    models = list(dict.fromkeys(line.model for line in of_study if any(line.model in of for of in found.values())))
    if not models:
        return False
    own = {arm: pairs(of_study, arm, against, "loss_fp8") for arm in found}
    together = pooled(of_study)
    for (_, alike), of_arms in together.items():
        models.append(f"{', '.join(alike)} (together)")
        for arm, groups in of_arms.items():
            found[arm] = {**found[arm], models[-1]: list(itertools.chain.from_iterable(groups))}
    most = max(models, key=lambda model: sum(len(of.get(model, [])) > 1 for of in found.values()))
    order = sorted(found, key=lambda arm: statistics.fmean(found[arm].get(most, [math.inf])))
    size = max(11, 2.75 * len(models)), 0.55 * len(found) + 2.6  # titles and the words below do not meet
    with picture(path, f"{TITLES[study]}: validation loss against BF16 of the same seed", size) as figure:
        row = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
        for axes, model in zip(row, models):
            axes.axvline(MARGIN, color=FAINT, linewidth=0.8)
            axes.axvline(0, color=INK, linewidth=1)
            for i, arm in enumerate(order):
                if lost := sum(map(math.isinf, found[arm].get(model, []))):
                    axes.text(0.99, i, f"{lost} lost", transform=axes.get_yaxis_transform(), ha="right", va="center")
                for of, color, marker, at in ((found, FP8, "D", i - 0.1), (own, SECOND, "s", i + 0.32)):
                    values = [value for value in of[arm].get(model, []) if math.isfinite(value)]
                    if values:
                        mean = interval(values)
                        axes.plot([mean.mean], [at], marker, color=color, markersize=6)
                        if math.isfinite(mean.low):
                            heights = [at - 0.13 - 0.08 * (0, 2, 1)[j % 3] for j in range(len(values))]
                            axes.plot(sorted(values), heights, "o", color=FAINT, alpha=0.6, markersize=4,
                                      markeredgewidth=0)  # fmt: skip
                            axes.plot([mean.low, mean.high], [at, at], color=color, linewidth=2)
            low, high = axes.get_xlim()
            axes.axvspan(low, MARGIN, color=BF16, alpha=0.25, linewidth=0)
            axes.set_xlim(low, high)
            alone = all(len(of.get(model, [])) < 2 for of in found.values())
            axes.set_title(in_lines(model) + "\none pair each shows nothing" * alone)
            axes.set_xlabel("% of the loss; to the right is worse")
        row[0].set_yticks(range(len(order)), order)
        row[0].set_ylim(len(found) - 0.5, -0.5)
        caption(
            figure,
            "Diamonds: validated in BF16; squares: in the FP8 of the training, against BF16 in BF16. Each is the mean\n"
            "of pairs of runs, with its 95 % interval by Student's t where there are several. Grey points: the pairs,\n"
            "whose heights only keep them apart. Panels have scales of their own.\n"
            f"Arms are in the order of their means in {most}.\n"
            + "Together: pooled after the runs were seen, in BF16.\n" * bool(together)
            + f"Grey: below the margin of {MARGIN} %, fixed before the runs, where a diamond's interval has to end.",
        )
    return True


def in_lines(model: str) -> str:
    """What tells its runs apart, below its name, and no wider than a panel."""
    return "\n".join(fill(part, 30, break_long_words=False) for part in model.replace(" (", "\n(").splitlines())
