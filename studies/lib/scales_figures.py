"""The pictures of a study of scales."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from torch_fp8.picture import BF16, FAINT, FOURTH, FP8, INK, SECOND, THIRD, caption, picture

from .scales_paired import in_lines, on_the_way, paired
from .scales_results import CRITERION, LINEARS, Line, arms_of, biases_of, family, in_short, place
from .scales_sweeps import constants, inference_ratios, telling_ratios, window
from .scales_words import TOO_FEW

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROLES = {"x": ("inputs", FP8), "w": ("weights", SECOND), "dy": ("output gradients", THIRD)}
COLORS = [FP8, SECOND, THIRD, FOURTH, INK, BF16, "#c2504d", "#6f8f2f"]
FLOOR, CEILING = 0.95, 1.01  # ratios beyond are drawn there
BIAS = "Bias b of FP8-AMAX, at most 31: a tensor is multiplied by 2^b before its cast (E4M3; gradients E5M2, no margin)"


def draw(folder: Path, lines: Sequence[Line], sizes: Mapping[str, float]) -> list[str]:
    """Every picture that there are data for; their names. Those drawn before that there are none for are deleted.
    sizes: parameters by model."""
    lines = [replace(line, spec={**line.spec, "model": _drawn(line.model)}) for line in lines]
    sizes = {_drawn(model): size for model, size in sizes.items()}
    by_size = sorted(lines, key=lambda line: (sizes.get(line.model, 0), line.run))
    pictures: dict[str, Callable[[Path, Sequence[Line], Mapping[str, float]], bool]] = {
        "histograms": histograms,
        "depth": depth,
        "time": over_time,
        "window": windows,
        "amax": policies,
        "gaps": on_the_way,
        "parity": lambda path, lines, sizes: paired(path, lines, "parity", "bf16"),
        "finetune": lambda path, lines, sizes: paired(path, lines, "finetune", "bf16"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    made = [name for name, make in pictures.items() if make(folder / f"{name}.png", by_size, sizes)]
    for name in pictures.keys() - made:
        (folder / f"{name}.png").unlink(missing_ok=True)
    return made


def _drawn(name: str) -> str:
    """As it is written, where matplotlib takes what is between two dollar signs for mathematics."""
    return name.replace("$", r"\$")


def _counts(records: Sequence[dict[str, Any]], role: str) -> dict[int, float]:
    """Share of tensors by bias."""
    found = [roles[role] for record in records for roles in record["biases"].values() if roles.get(role) is not None]
    return {bias: found.count(bias) / len(found) for bias in sorted(set(found))}


def _recorded(lines: Sequence[Line], phase: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if records := biases_of(line, phase):
            found.setdefault(line.model, []).extend(records)
    return found


def histograms(path: Path, lines: Sequence[Line], sizes: Mapping[str, float]) -> bool:
    phases = {phase: _recorded(lines, phase) for phase in ("training", "inference")}
    models = list(dict.fromkeys(model for of in phases.values() for model in of))
    if not models:
        return False
    with picture(path, "Which scales tensors want, by model size", (max(11, 3.0 * len(models) + 1.5), 6.4)) as figure:
        grid = figure.subplots(2, len(models), sharex=True, sharey=True, squeeze=False)
        for row, (phase, of) in zip(grid, phases.items()):
            for axes, model in zip(row, models):
                of_phase = [line for line in lines if line.model == model and biases_of(line, phase)]
                for role, (name, color) in ROLES.items():
                    if counts := _counts(of.get(model, []), role):
                        shares = [100 * share for share in counts.values()]
                        axes.bar(list(counts), shares, 0.85, color=color, alpha=0.6, edgecolor=color, label=name)
                axes.set_title(f"{in_lines(model)}\n{_phase(phase, of_phase)}")
                if model not in of:
                    axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=FAINT)
            row[0].set_ylabel("% of tensors")
        for axes in grid[1]:
            axes.set_xlabel("bias b")
        handles = [axes.get_legend_handles_labels() for axes in grid.flat]
        handles = max(handles, key=lambda pair: len(pair[0]))
        figure.legend(*handles, loc="outside upper right", ncols=3)
        caption(
            figure, f"{BIAS}.\nA tensor: one linear layer's input, weight or output gradient, in one recorded step."
        )
    return True


def _largest(lines: Sequence[Line], phase: str = "training") -> list[Line]:
    """Of the largest model of each family that has records, and of the largest with random weights: its first run with
    them."""
    found: dict[tuple[str, bool], Line] = {}
    for line in lines:  # the last one of a family is the largest
        name = family(line.model), line.is_random
        if biases_of(line, phase) and not (name in found and found[name].model == line.model):
            found[name] = line
    return list(found.values())


def _phase(phase: str, lines: Sequence[Line]) -> str:
    """Of these runs: a checkpoint's training is fine-tuning; and which arms they are, but BF16 alone."""
    studies, arms = {line.study for line in lines}, arms_of(lines)
    name = "fine-tuning" if phase == "training" and studies == {"finetune"} else phase
    return name if arms in ([], ["bf16"]) else f"{name}, {arms[0] if len(arms) == 1 else f'{len(arms)} arms'}"


def depth(path: Path, lines: Sequence[Line], sizes: Mapping[str, float]) -> bool:
    rows = [(line, phase) for phase in ("training", "inference") for line in _largest(lines, phase)]
    if not rows:
        return False
    with picture(path, "Scales by depth and kind of layer", (11, 3.1 * len(rows) + 0.8)) as figure:
        grid = figure.subplots(len(rows), 3, sharey="col", squeeze=False)
        for row, (line, phase) in zip(grid, rows):
            for axes, (role, (name, _)) in zip(row, ROLES.items()):
                _by_depth(axes, biases_of(line, phase), role)
                axes.set_title(f"{name}\n{in_lines(line.model)}\n{_phase(phase, [line])}")
                axes.set_xlabel("layer, from the input to the output")
                if phase == "inference" and role == "dy":
                    axes.set_visible(False)
            row[0].set_ylabel("bias b")
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=4)
        caption(figure, f"{BIAS}.\nMean over the recorded steps, and over layers of a kind; band: standard deviation.")
    return True


def _by_depth(axes: Axes, records: Sequence[dict[str, Any]], role: str) -> None:
    found: dict[str, dict[int, list[int]]] = {}
    for record in records:
        for layer, roles in record["biases"].items():
            at, kind = place(layer)
            if roles.get(role) is not None:
                found.setdefault(kind, {}).setdefault(at, []).append(roles[role])
    for kind, color in zip([*LINEARS, "other"], COLORS):
        if kind in found:
            at = sorted(found[kind])
            means = [statistics.fmean(found[kind][i]) for i in at]
            spread = [statistics.pstdev(found[kind][i]) for i in at]
            axes.plot(at, means, color=color, label=kind, marker="o", markersize=3)
            low, high = ([m + sign * s for m, s in zip(means, spread)] for sign in (-1, 1))
            axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)


def over_time(path: Path, lines: Sequence[Line], sizes: Mapping[str, float]) -> bool:
    rows = _largest(lines)
    if not rows:
        return False
    with picture(path, "Scales over a training", (11, 4.6 * len(rows) + 0.8)) as figure:
        grid = figure.subplots(len(rows), 3, squeeze=False)
        for row, line in zip(grid, rows):
            records = biases_of(line, "training")
            steps = [record["step"] for record in records]
            for axes, (role, (name, _)) in zip(row, ROLES.items()):
                layers = [
                    layer
                    for kind in [*LINEARS, "other"]
                    for layer in records[-1]["biases"]
                    if place(layer)[1] == kind and role in records[-1]["biases"][layer]
                ]
                nan = float("nan")
                values = [
                    [nan if (b := record["biases"].get(layer, {}).get(role)) is None else b for record in records]
                    for layer in layers
                ]
                if values:
                    image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis")
                    bar = figure.colorbar(image, ax=axes, label="bias b" if role == "dy" else None)
                    bar.locator.set_params(integer=True)
                kinds = [place(layer)[1] for layer in layers]
                starts = [i for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind]
                middles = [(a + b - 1) / 2 for a, b in zip(starts, [*starts[1:], len(kinds)])]
                for start in starts[1:]:
                    axes.axhline(start - 0.5, color="white", linewidth=2)
                shown = [kinds[start] for start in starts] if role == "x" else []
                axes.set_yticks(middles if role == "x" else [], shown)
                marks = sorted({round(i * (len(steps) - 1) / 4) for i in range(5)})
                axes.set_xticks(marks, [str(steps[i]) for i in marks])
                axes.grid(visible=False)
                axes.set_title(f"{name}\n{in_lines(line.model)}\n{_phase('training', [line])}")
                axes.set_xlabel("step")
        caption(
            figure, f"{BIAS}.\nA row is a layer; within a kind of layer they go from the first (above) to the last."
        )
    return True


def windows(path: Path, lines: Sequence[Line], sizes: Mapping[str, float]) -> bool:
    """The ratio against the constant, a line a model; and the width of the window against the size."""
    ratios = {model: of for model, of in inference_ratios(lines).items() if constants(of)}
    telling = telling_ratios(lines, sizes)
    if not ratios:
        return False
    with picture(path, "FP8-CSCALE: which constants work", (11, 5.6)) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[3, 2])
        trained = {line.model for line in lines if line.study == "window"}
        widths: dict[str, int] = {}
        for (model, of), color in zip(ratios.items(), COLORS * 9):
            ours = constants(of)
            face = color if model in trained else "white"
            name = in_lines(model) if model in telling else f"{in_lines(model)}\n{TOO_FEW}"
            left.plot(list(ours), [_clipped(r) for r in ours.values()], color=color, marker="o", markersize=3.5,
                      markerfacecolor=face, label=name)  # fmt: skip
            theirs = constants(of, "gc-cscale")
            left.plot(list(theirs), [_clipped(r) for r in theirs.values()], "x", color=color, markersize=8)
            if model not in telling:
                continue
            found = window(ours)
            widths[model] = found[1] - found[0] + 1 if found else 0
            at = sizes.get(model, 0) / 1e6, widths[model]
            right.plot(*at, "o", color=color, markersize=7, markerfacecolor=face)
            right.annotate(f"{found[0]}…{found[1]}" if found else "none", at, xytext=(0, 8),
                           textcoords="offset points", ha="center", fontsize=8.5)  # fmt: skip
        left.axhline(CRITERION, color=INK, linewidth=1)
        left.annotate(f"the paper's {CRITERION}", (0.01, CRITERION), xycoords=("axes fraction", "data"),
                      xytext=(0, 3), textcoords="offset points", fontsize=8.5)  # fmt: skip
        left.set(
            xlabel="c, the paper's constant (this hardware's bias is c + 1)",
            ylabel="next-token accuracy over that of BF16",
            ylim=(FLOOR - 0.001, CEILING + 0.001),
            title="Inference with one constant scale",
        )
        left.xaxis.get_major_locator().set_params(integer=True)
        right.set(xlabel="million parameters", ylabel="constants in a row that work", title="Width of the window",
                  xscale="log", ylim=(-0.7, 2 + max(widths.values(), default=0)))  # fmt: skip
        right.margins(x=0.2)
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper right", ncols=3)
        _plain_ticks(right, [sizes.get(model, 0) / 1e6 for model in widths])
        if not widths:
            right.text(0.5, 0.5, TOO_FEW, transform=right.transAxes, ha="center", color=FAINT)
        caption(
            figure,
            f"At the edges: {FLOOR} or less, {CEILING} or more. ×: the paper's own formats, emulated. Right: first\n"
            f"and last constant of the widest window with a ratio of at least {CRITERION}. Hollow: a checkpoint,\n"
            "trained elsewhere, which says nothing of how the others' windows go with size.",
        )
    return True


def policies(path: Path, lines: Sequence[Line], sizes: Mapping[str, float]) -> bool:
    """The ratio of the policies that look at the tensor, a group of points a model."""
    names = {
        "current": "exact scale of the tensor's own amax",
        "amax": "FP8-AMAX",
        "gc-amax": "FP8-AMAX, the paper's formats",
        "histogram": "histogram",
        "gc-histogram": "histogram, the paper's formats",
    }
    ratios = {model: of for model, of in inference_ratios(lines).items() if "amax" in of}
    telling = telling_ratios(lines, sizes)
    if not ratios:
        return False
    with picture(path, "FP8-AMAX and its neighbours in inference", (11, 4.6)) as figure:
        axes = figure.subplots()
        for i, (policy, name) in enumerate(names.items()):
            at = [place + 0.12 * (i - 2) for place in range(len(ratios))]
            values = [of.get(policy, math.nan) for of in ratios.values()]
            axes.plot(at, values, "o", color=COLORS[i], label=name, markersize=7)
        axes.axhline(CRITERION, color=INK, linewidth=1)
        axes.annotate(f"the paper's {CRITERION}", (0.005, CRITERION), xycoords=("axes fraction", "data"),
                      xytext=(0, 3), textcoords="offset points", fontsize=8.5)  # fmt: skip
        axes.axhline(1, color=FAINT, linewidth=1, linestyle=":")
        few = {model: f"\n{fill(TOO_FEW, 16)}" for model in ratios.keys() - telling.keys()}
        labels = [f"{fill(model, 16)}\n{in_short(sizes.get(model, 0))}{few.get(model, '')}" for model in ratios]
        axes.set_xticks(range(len(ratios)), labels)
        axes.set_xlim(-0.5, len(ratios) - 0.5)
        axes.grid(axis="x", visible=False)
        axes.set(ylabel="next-token accuracy over that of BF16")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
        caption(
            figure,
            "The paper's formats are emulated, and so is the histogram: the scale of least estimated squared error.",
        )
    return True


def _clipped(ratio: float) -> float:
    return min(max(ratio, FLOOR), CEILING)


def _plain_ticks(axes: Axes, at: Sequence[float]) -> None:
    """A tick at each of these, with a label where there is room beside the one before, on an axis of logarithms."""
    ticks, labels, before = sorted(at), [], 0.0
    for value in ticks:
        has_room = value > 1.3 * before
        labels.append(f"{value:.0f}" if has_room and value >= 1 else f"{value:.1g}" if has_room else "")
        before = value if has_room else before
    axes.set_xticks(ticks, labels)
    axes.set_xticks([], minor=True)
