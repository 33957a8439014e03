"""The picture of a watch: each metric over tokens, a line a layer, with the alarms; loss and gradient norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..files import StrPath
from ..picture import BF16, FP8, INK, caption, picture

if TYPE_CHECKING:
    from .activations import Reading

_ALARM = "#c0392b"
_KINDS = {"qkv": "q, k and v", "ffn": "input of the FFN's second projection", "block": "output of the layer"}


class Alarmed(Protocol):
    @property
    def tokens(self) -> int: ...
    @property
    def metric(self) -> str: ...
    @property
    def layer(self) -> str: ...
    @property
    def value(self) -> float: ...


def draw(path: StrPath, readings: Sequence[Reading], alarms: Sequence[Alarmed], tags: Sequence[str]) -> None:
    """tags: of the series by layer."""
    panels: dict[str, list[str]] = {}
    for tag in tags:
        panels.setdefault("/".join(tag.split("/")[: 1 if tag.startswith("grad_norm/") else 2]), []).append(tag)
    whole = [tag for tag in ("loss", "grad_norm") if any(tag in reading.values for reading in readings)]
    rows = len(panels) + len(whole)
    most = max(reading.tokens or 0 for reading in readings)
    unit, name = next(
        ((u, n) for u, n in ((1e9, "billion "), (1e6, "million "), (1e3, "thousand ")) if most >= u), (1.0, "")
    )
    first = min(alarms, key=lambda alarm: alarm.tokens, default=None)
    with picture(path, "What the activations tell of a run", (10.5, 2.6 * rows + 1.0)) as figure:
        axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        for ax, (panel, of_layers) in zip(axes, panels.items()):
            metric, _, kind = panel.partition("/")
            ax.set_title(f"{metric} of {_KINDS.get(kind, kind or 'each parameter')}, a line a layer")
            for i, tag in enumerate(of_layers):
                _line(ax, readings, tag, unit, color=_shade(i, len(of_layers)), linewidth=1.3)
            _log_scale(ax)
            _say_depth(figure, ax, of_layers)
            for alarm in alarms:
                if alarm.metric in of_layers and math.isfinite(alarm.value):
                    ax.plot([alarm.tokens / unit], [alarm.value], "o", color=_ALARM, markersize=7, zorder=5)
            here = [alarm for alarm in alarms if alarm.metric in of_layers]
            if here:
                worst = min(here, key=lambda alarm: alarm.tokens)
                where = worst.layer or "the model"
                more = f", then {len(here) - 1} more" if len(here) > 1 else ""
                right = worst.tokens > most / 2  # so that the words stay in the picture
                ax.annotate(
                    f"alarm: {where}{more}", (worst.tokens / unit, worst.value if math.isfinite(worst.value) else 1.0),
                    xytext=(-9 if right else 9, 7), textcoords="offset points", ha="right" if right else "left",
                    color=_ALARM, fontweight="bold",
                )  # fmt: skip
        for ax, tag in zip(axes[len(panels) :], whole):
            ax.set_title("loss" if tag == "loss" else "gradient norm, of all parameters")
            _line(ax, readings, tag, unit, color=FP8 if tag == "loss" else INK, linewidth=1.6)
            if tag == "grad_norm":
                _log_scale(ax)
        for ax in axes:
            if first is not None:
                ax.axvline(first.tokens / unit, color=_ALARM, linewidth=1.2, linestyle="--", zorder=1)
        axes[-1].set_xlabel(f"{name}tokens seen")
        caption(figure, _caption(first is not None))


def _caption(alarmed: bool) -> str:
    said = (
        "Kurtosis is mean(x^4) / mean(x^2)^2: 3 where numbers are normal, larger the more a few outweigh the rest."
        "\nHealthy growth is no faster than that of tokens (arXiv 2505.20524)."
    )
    return said + (" Dots: a series that left it. Dashed: the first alarm." if alarmed else " No series left it.")


def _line(ax: Any, readings: Sequence[Reading], tag: str, unit: float, **how: Any) -> None:
    seen = [(r.tokens or 0, r.values[tag]) for r in readings if tag in r.values and math.isfinite(r.values[tag])]
    ax.plot([tokens / unit for tokens, _ in seen], [value for _, value in seen], marker="." * (len(seen) == 1), **how)


def _log_scale(ax: Any) -> None:
    """With plain numbers at its ticks."""
    from matplotlib.ticker import LogFormatter

    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(LogFormatter())
    ax.yaxis.set_minor_formatter(LogFormatter())


def _shade(i: int, count: int) -> Any:
    """From the first layer's light grey to the last one's dark blue."""
    from matplotlib.colors import to_rgb

    share = i / max(1, count - 1)
    return tuple(a + (b - a) * share for a, b in zip(to_rgb(BF16), to_rgb("#063a4d"), strict=True))


def _say_depth(figure: Any, ax: Any, tags: Sequence[str]) -> None:
    """Which shade is which layer: by name where they are few, else a bar from the first to the last."""
    names = [tag.partition("/")[2].partition("/")[2] or tag.partition("/")[2] for tag in tags]
    if len(names) <= 6:
        ax.legend(ax.get_lines()[: len(names)], names, loc="best", fontsize=8)
        return
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    shades = ListedColormap([_shade(i, len(names)) for i in range(len(names))])
    bar = figure.colorbar(ScalarMappable(Normalize(0, len(names) - 1), shades), ax=ax, pad=0.01, fraction=0.03)
    bar.set_ticks([0, len(names) - 1], labels=["first", "last"])
    bar.outline.set_visible(False)
