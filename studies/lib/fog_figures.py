"""The pictures of ``studies/fog.py``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_fp8.picture import BF16, FAINT, FOURTH, FP8, INK, SECOND, THIRD, caption, picture

from .fog_results import KINDS, Line, Outcome, differences, outcomes, smoothed
from .intervals import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 3  # of a legend
SMOOTH = 10  # steps whose median a picture of losses shows
MARGIN = 0.25  # per cent of the loss, fixed before the runs
NAMES = {
    "llama3": "Llama 3", "olmo2": "OLMo 2", "op": "OP", "op-frozen-qk": "OP + frozen QK", "fog-max": "FOG-max",
    "fog-opt": "FOG-opt", "fog-flash": "FOG-flash", "fog-swiglu": "FOG-SwiGLU",
}  # fmt: skip
ARMS = {
    "bf16": "BF16",
    "bf16-again": "BF16, the same again",
    "fp8": "FP8 linears",
    "fp8-attention": "FP8 linears and attention, as the paper",
    "default": "… own scales for q, k, v, no cold start",
    "separate": "… own scales for q, k, v",
    "warm": "… no cold start",
    "history16": "… amaxes of 16 steps",
    "e4m3": "… attention's gradients in E4M3",
    "forward": "… attention's backward in 16 bits",
}
_COLORS = {
    "bf16": BF16, "bf16-again": INK, "fp8": FOURTH, "fp8-attention": FP8, "default": SECOND, "separate": THIRD,
    "warm": "#c2504d", "history16": "#6f8f2f", "e4m3": "#7a5c3e", "forward": "#d48fb0",
}  # fmt: skip
_KURTOSIS = (
    "Kurtosis is mean(x^4) / mean(x^2)^2 over tokens and features: 3 where numbers are normal, larger the more a few "
    "outweigh the rest."
)

_MARKS = (
    "▼: the loss leaves BF16's by 3 σ of its step noise. ✕: the loss is not finite from there on. ○: the run is not "
    "finished.\n●: the watch over the kurtosis of q, k and v raises its alarm. Each panel has its own y axis."
)


def architecture_name(name: str) -> str:
    plain, _, change = name.partition(":")
    return NAMES.get(plain, plain) + {"qk-norm": ",\nwith QK-norm", "no-qk-norm": ",\nno QK-norm", "": ""}[change]


def draw(folder: Path, lines: Sequence[Line]) -> list[str]:
    """Every picture that there are data for; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    begun = [line for line in lines if line.losses]
    made = []
    kinds: dict[str, tuple[str, Callable[[Path, Sequence[Line]], None]]] = {
        "provoke": ("provoke", losses),
        "provoke-kurtosis": ("provoke", kurtosis_of_arms),
        "kurtosis": ("kurtosis", kurtosis_by_layer),
    }
    for name, (study, make) in kinds.items():
        settings = dict.fromkeys(line.setting for line in begun if line.study == study)
        for size, steps, tokens in settings:
            of_setting = [line for line in begun if line.study == study and line.setting == (size, steps, tokens)]
            full = f"{name}-{size}-{steps}x{tokens}"
            make(folder / f"{full}.png", of_setting)
            made.append(full)
    if differences(begun, "fp8-attention"):
        parity(folder / "parity.png", begun)
        made.append("parity")
    return made


def _title(line: Line) -> str:
    size, _, tokens = line.setting
    return f"size {size}, {millions(tokens)} tokens a step"


def millions(count: float) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.0f}"


# ---- (a) -------------------------------------------------------------------------------------------------------------


def _grid(path: Path, lines: Sequence[Line], title: str, foot: str, plot: Callable[[Axes, Line], None]) -> None:
    """A panel with its own y axis for each architecture and learning rate, a colour an arm; seeds lie over one another.
    Steps are on a logarithmic axis, since runs may part in the first of them."""
    from matplotlib.lines import Line2D

    names = sorted({line.architecture for line in lines}, key=_order)
    rates = sorted({line.spec["rate"] for line in lines})
    arms = [arm for arm in ARMS if any(line.arm == arm for line in lines)]
    height = -(-len(arms) // _COLUMNS)  # of the legend, which stands where the title leaves lines free
    size = max(9.5, 3.1 * len(names) + 0.5), 2.6 * len(rates) + 1.8 + 0.25 * height
    with picture(path, f"{title} ({_title(lines[0])})" + "\n" * height, size) as figure:
        grid = figure.subplots(len(rates), len(names), sharex=True, squeeze=False)
        for rate, row in zip(rates, grid):
            for name, axes in zip(names, row):
                here = [line for line in lines if (line.architecture, line.spec["rate"]) == (name, rate)]
                for line in sorted(here, key=lambda line: list(ARMS).index(line.arm)):
                    plot(axes, line)
                axes.set_title(f"{architecture_name(name)}", fontsize=10)
                _log_steps(axes)
            lr = next(line.spec["lr"] for line in lines if line.spec["rate"] == rate)
            row[0].set_ylabel(f"learning rate {lr:g}")
        for axes in grid[-1]:
            axes.set_xlabel("step")
        handles = [Line2D([], [], color=_COLORS[arm], linewidth=3 if arm == "bf16" else 1.8) for arm in arms]
        figure.legend(handles, [ARMS[arm] for arm in arms], loc="upper left", ncols=_COLUMNS,
                      bbox_to_anchor=(0.005, 1 - 0.33 / size[1]))  # fmt: skip
        caption(figure, foot)


def _log_steps(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8)


def _order(name: str) -> tuple[int, str]:
    plain = name.partition(":")[0]
    return (list(NAMES).index(plain) if plain in NAMES else len(NAMES), name)


def losses(path: Path, lines: Sequence[Line]) -> None:
    found = {id(one.line): one for one in outcomes(lines, "provoke")}

    def plot(axes: Axes, line: Line) -> None:
        shown = smoothed(line.losses, SMOOTH)
        steps = range(SMOOTH, len(shown) + 1)
        axes.plot(steps, shown[SMOOTH - 1 :], color=_COLORS[line.arm], linewidth=3 if line.arm == "bf16" else 1.2)
        _mark(axes, found.get(id(line)), line, range(1, len(shown) + 1), shown)

    foot = f"Training loss in nats a token, the median of {SMOOTH} steps.\n{_MARKS}"
    _grid(path, lines, "Losses in FP8 beside BF16", foot, plot)


def _mark(axes: Axes, outcome: Outcome | None, line: Line, steps: Sequence[int], shown: Sequence[float]) -> None:
    """The points of a run's line that are told of: shown at steps."""

    def mark(step: int, marker: str, size: int, **how: str) -> None:
        values = [value for at, value in zip(steps, shown) if at <= step and math.isfinite(value)]
        if values:
            axes.plot([step], values[-1:], marker, color=_COLORS[line.arm], markersize=size, zorder=5, **how)

    if outcome and outcome.left:
        mark(outcome.left, "v", 8)
    if outcome and outcome.alarm:
        mark(outcome.alarm.step, "o", 6)
    if line.lost:
        mark(line.losses.index(None) + 1, "X", 8)
    elif not line.result:
        mark(line.step, "o", 6, markerfacecolor="white")


def kurtosis_of_arms(path: Path, lines: Sequence[Line]) -> None:
    found = {id(one.line): one for one in outcomes(lines, "provoke")}

    def plot(axes: Axes, line: Line) -> None:
        largest = [
            max((v for v in layers if v is not None), default=math.nan) for layers in line.kurtosis.get("qkv", [])
        ]
        axes.plot(line.samples, largest, color=_COLORS[line.arm], linewidth=3 if line.arm == "bf16" else 1.2)
        _log(axes)
        _mark(axes, found.get(id(line)), line, line.samples, largest)

    foot = f"{_KURTOSIS}\nOf q, k and v before any norm of theirs, in the layer where it is largest.\n{_MARKS}"
    _grid(path, lines, "Kurtosis of q, k and v", foot, plot)


def _log(axes: Any) -> None:
    from matplotlib.ticker import LogFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter())
    axes.tick_params(which="both", labelsize=8)


# ---- (c) -------------------------------------------------------------------------------------------------------------


def kurtosis_by_layer(path: Path, lines: Sequence[Line]) -> None:
    """Of the first seed and BF16."""
    from matplotlib.colors import to_rgb

    names = sorted({line.architecture for line in lines}, key=_order)
    first = {line.architecture: line for line in sorted(lines, key=lambda line: -line.spec["seed"])
             if line.arm == "bf16"}  # fmt: skip
    names = [name for name in names if name in first]
    title = f"Kurtosis in BF16, a line a layer ({_title(lines[0])})"
    with picture(path, title, (max(8.0, 4.6 * len(names) + 1.2), 8.6)) as figure:
        grid = figure.subplots(3, len(names), sharex=True, sharey="row", squeeze=False)
        for column, name in enumerate(names):
            line = first[name]
            tokens = [step * line.setting[2] / 1e6 for step in line.samples]
            for row, (kind, words) in enumerate(KINDS.items()):
                axes, samples = grid[row][column], line.kurtosis[kind]
                depth = len(samples[0])
                for layer in range(depth):
                    share = layer / max(1, depth - 1)
                    color = tuple(a + (b - a) * share for a, b in zip(to_rgb(BF16), to_rgb("#063a4d")))
                    values = [math.nan if of[layer] is None else of[layer] for of in samples]
                    axes.plot(tokens, values, color=color, linewidth=1.4, label=f"layer {layer + 1}")
                axes.axhline(3, color=FAINT, linewidth=0.8, linestyle=":")
                axes.set_title(f"{architecture_name(name)}: {words}", fontsize=10)
                _log(axes)
            grid[-1][column].set_xlabel("million tokens")
        handles, labels = grid[0][0].get_legend_handles_labels()
        ends = [0, len(handles) // 2, len(handles) - 1] if len(handles) > 6 else range(len(handles))
        figure.legend([handles[i] for i in ends], [labels[i] for i in ends], loc="outside right upper")
        caption(figure, f"{_KURTOSIS}\nDotted: 3. From the first layer (light) to the last (dark).")


# ---- (b) -------------------------------------------------------------------------------------------------------------


def parity(path: Path, lines: Sequence[Line]) -> None:
    found = {arm: differences(lines, arm) for arm in ("fp8-attention", "bf16-again")}
    keys = sorted({key for of in found.values() for key in of}, key=lambda key: (key[1], _order(key[0])))
    with picture(path, "FOG with FP8 attention beside itself in BF16, at the end of training", (10, 4.8)) as figure:
        axes = figure.subplots()
        axes.axhspan(-MARGIN, MARGIN, color=BF16, alpha=0.25, linewidth=0)
        axes.axhline(0, color=INK, linewidth=1)
        for i, of in enumerate(found.values()):
            color, name = ((FP8, "FP8 against BF16"), (FAINT, "BF16 against itself: the floor"))[i]
            for place, key in enumerate(keys):
                at, values = place + 0.2 * (2 * i - 1), [value for value in of.get(key, []) if math.isfinite(value)]
                axes.plot([at - 0.06] * len(values), values, "o", color=color, alpha=0.45, markersize=4)
                if values:
                    mean = interval(values)
                    axes.plot([at], [mean.mean], "D", color=color, markersize=7, label=name if place == 0 else None)
                    if math.isfinite(mean.low):
                        axes.plot([at, at], [mean.low, mean.high], color=color, linewidth=2)
        axes.set_xticks(range(len(keys)), [f"{architecture_name(name)}\n{size}" for name, (size, *_) in keys])
        axes.set_xlim(-0.5, len(keys) - 0.5)
        axes.grid(axis="x", visible=False)
        axes.set_ylabel("% of the validation loss\nup is worse")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
        foot = (
            "Points: pairs of runs with one seed. Diamond and line: their mean and its 95 % interval by Student's t.\n"
            f"Grey band: the margin of {MARGIN} %, fixed before the runs. Validated in BF16."
        )
        caption(figure, foot)
