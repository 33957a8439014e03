"""The picture of a run: both losses over the steps, and the FP8 arm's final scales over the depth of the model."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch_fp8.files import replacing

from .journal import Record
from .report import Result

_COLORS = {"bf16": "tab:blue", "fp8": "tab:orange"}
_ROLES = {"input": "input", "weight": "weight", "grad_output": "output gradient"}
_MARKERS = "os^Dvx"


def draw(path: Path, results: list[Result], title: str) -> None:
    figure = Figure(figsize=(13, 6.5), layout="constrained")  # without pyplot, so without a display: Agg draws it
    figure.suptitle(title)
    scales = next((s for result in results for s in [_final_scales(result)] if s), None)
    grid = figure.add_gridspec(len(_ROLES), 2 if scales else 1)
    _draw_losses(figure.add_subplot(grid[:, 0]), results)
    if scales:
        panels = [figure.add_subplot(grid[i, 1]) for i in range(len(_ROLES))]
        for axes, role in zip(panels, _ROLES):
            _draw_scales(axes, scales, role)
        panels[0].set_title("FP8: scales at the end, by layer", pad=32)
        panels[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(_MARKERS), frameon=False)
        panels[-1].set_xlabel("block")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _draw_losses(axes: Axes, results: list[Result]) -> None:
    for result in results:
        color, name = _COLORS[result.name], result.name.upper()
        steps, losses = _curve(result.records, "loss")
        smooth = _smoothed(losses, width=max(1, len(losses) // 50))
        style = {"color": color, "linestyle": "--" if result.name == "fp8" else "-"}  # the curves may coincide
        axes.plot(steps, losses, color=color, alpha=0.15, linewidth=0.8)
        axes.plot(steps, smooth, label=f"{name}, training (smoothed)", linewidth=1.6, **style)
        steps, losses = _curve(result.records, "val_loss")
        marker = "x" if result.name == "fp8" else "o"
        axes.plot(steps, losses, marker, color=color, markersize=7, fillstyle="none", label=f"{name}, validation")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title="Loss")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_scales(axes: Axes, scales: dict[str, dict[str, float | None]], role: str) -> None:
    """One line for each kind of layer (``attn.qkv`` of ``blocks.3.attn.qkv``), a point for each block."""
    kinds: dict[str, dict[int, float]] = {}
    for name, by_role in scales.items():
        _, block, kind = name.split(".", 2)
        scale = by_role[role]
        kinds.setdefault(kind, {})[int(block)] = math.nan if scale is None else math.log2(scale)
    for (kind, points), marker in zip(kinds.items(), _MARKERS):
        axes.plot(points.keys(), points.values(), marker=marker, markersize=4, linewidth=1, label=kind)
    axes.set_ylabel(f"log2 scale\n{_ROLES[role]}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.grid(alpha=0.3)


def _final_scales(result: Result) -> dict[str, dict[str, float | None]] | None:
    return next((record["scales"] for record in reversed(result.records) if "scales" in record), None)


def _curve(records: list[Record], key: str) -> tuple[list[int], list[float]]:
    points = [(record["step"], record[key]) for record in records if key in record]
    return [step for step, _ in points], [math.nan if value is None else value for _, value in points]


def _smoothed(values: list[float], width: int) -> list[float]:
    """The mean of the last ``width`` values at each place."""
    return [sum(part) / len(part) for i in range(len(values)) for part in [values[max(0, i + 1 - width) : i + 1]]]
