"""The picture of a run: both losses and their distance, and the FP8 arm's scales, all over the steps."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch_fp8.picture import BF16, FAINT, FOURTH, FP8, INK, SECOND, THIRD, caption, picture

from .journal import Record
from .report import Result

_COLORS = {"bf16": FAINT, "fp8": FP8}
_KIND_STYLES = tuple(itertools.product(("-", "--"), (FP8, SECOND, THIRD, FOURTH)))
_ROLES = {"input": "inputs", "weight": "weights", "grad_output": "output gradients"}
_CAPTION = (
    "Before a tensor is rounded to FP8 it is multiplied by its scale, which brings its largest value to the end of "
    "FP8's range: the smaller the values, the larger the scale."
)


def draw(path: Path, results: list[Result], title: str) -> None:
    with picture(path, title, (13, 7)) as figure:
        fill(figure, results)


def fill(figure: Figure, results: list[Result]) -> None:
    scales = next((s for result in results for s in [_scales(result.records)] if s), None)
    columns = figure.add_gridspec(1, 2 if scales else 1)
    left, compared = columns[0].subgridspec(3, 1), len(results) == 2
    losses = figure.add_subplot(left[:2] if compared else left[:])
    _draw_losses(losses, results)
    if compared:
        distance = figure.add_subplot(left[2], sharex=losses)
        _draw_distance(distance, *(dict(_curve(result.records, "val_loss")) for result in results))
    figure.axes[-1].set_xlabel("optimizer step")
    if scales:
        right = columns[1].subgridspec(len(_ROLES), 1)
        panels = [figure.add_subplot(right[i]) for i in range(len(_ROLES))]
        for axes, (role, name) in zip(panels, _ROLES.items()):
            _draw_scales(axes, scales, role)
            axes.set_title(f"Scales of the {name}")
        panels[0].legend(loc="lower right", bbox_to_anchor=(1, 1), borderpad=0, ncols=5, fontsize=8, columnspacing=1)
        panels[-1].set_xlabel("optimizer step")
        caption(figure, _CAPTION)


def _draw_losses(axes: Axes, results: list[Result]) -> None:
    for result in results:
        color, name = _COLORS[result.name], result.name.upper()
        steps, losses = zip(*_curve(result.records, "loss"))
        smooth = _smoothed(losses, width=max(1, len(losses) // 50))
        style = {"color": color, "linestyle": "--" if result.name == "fp8" else "-"}  # the curves may coincide
        axes.plot(steps, losses, color=color, alpha=0.2, linewidth=0.8)
        axes.plot(steps, smooth, label=f"{name}, training (smoothed)", linewidth=1.8, **style)
        marker = "x" if result.name == "fp8" else "o"
        points = zip(*_curve(result.records, "val_loss"))
        axes.plot(*points, marker, color=color, markersize=7, fillstyle="none", label=f"{name}, validation")
    axes.set(ylabel="loss, nats a token\nlower is better", title="Loss", ylim=(0, None))
    axes.legend()


def _draw_distance(axes: Axes, bf16: dict[int, float], fp8: dict[int, float]) -> None:
    percent = {step: 100 * (fp8[step] / bf16[step] - 1) for step in bf16.keys() & fp8.keys()}
    steps = sorted(percent)
    axes.plot(steps, [percent[step] for step in steps], "x-", color=FP8, linewidth=1)
    axes.axhline(0, color=INK, linewidth=1)
    axes.set(ylabel="%, below 0:\nFP8 is better", title="Validation loss, FP8 against BF16")
    most = max([1.0, *(1.1 * abs(p) for p in percent.values() if math.isfinite(p))])  # so that noise looks like noise
    axes.set_ylim(-most, most)


def _draw_scales(axes: Axes, scales: dict[int, dict[str, dict[str, float | None]]], role: str) -> None:
    """The range of all layers, and the median of each kind (``attn.qkv`` of ``blocks.3.attn.qkv``)."""
    by_kind: dict[str, dict[int, list[float]]] = {}
    for step, layers in scales.items():
        for name, by_role in layers.items():
            if (scale := by_role[role]) is not None:
                by_kind.setdefault(name.split(".", 2)[2], {}).setdefault(step, []).append(scale)
    by_step: dict[int, list[float]] = {}
    for points in by_kind.values():
        for step, values in points.items():
            by_step.setdefault(step, []).extend(values)
    low, high = ([end(values) for values in by_step.values()] for end in (min, max))
    axes.fill_between(list(by_step), low, high, color=BF16, alpha=0.35, linewidth=0, label="all")
    marker = "." if len(by_step) == 1 else ""
    for (kind, points), (line, color) in zip(by_kind.items(), _KIND_STYLES):
        medians = [median(values) for values in points.values()]
        axes.plot(list(points), medians, marker=marker, linestyle=line, color=color, linewidth=1.5, label=kind)
    axes.set_yscale("log", base=2)
    axes.set_ylabel("scale")


def _scales(records: list[Record]) -> dict[int, dict[str, dict[str, float | None]]]:
    return {record["step"]: record["scales"] for record in records if "scales" in record}


def _curve(records: list[Record], key: str) -> list[tuple[int, float]]:
    return [(r["step"], math.nan if r[key] is None else r[key]) for r in records if key in r]


def _smoothed(values: tuple[float, ...], width: int) -> list[float]:
    """The mean of the last ``width`` values at each place."""
    return [sum(part) / len(part) for i in range(len(values)) for part in [values[max(0, i + 1 - width) : i + 1]]]
