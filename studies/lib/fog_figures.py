"""The pictures of ``studies/fog.py``."""

from __future__ import annotations

import math
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_fp8.picture import BF16, FAINT, FOURTH, FP8, INK, SECOND, caption, picture

from models.fog_config import ARCHITECTURES, SIZES

from .divergence import FACTOR
from .fog_claims import needed_words
from .fog_judged import count_left, tally
from .fog_results import ABOVE, DIVERGED, KINDS, LOST, Line, Outcome, current, differences, outcomes, smoothed
from .fog_words import (
    ARMS,
    MARGIN,
    PAPER_ARM,
    architecture_name,
    architecture_order,
    arm_order,
    has_one_length,
    millions,
    plural,
    rate_words,
    sizes_in,
    told_apart,
)  # fmt: skip
from .intervals import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3, 4  # of panels, whichever leaves fewer places empty
SMOOTH = 10  # steps whose median a picture of losses shows
_COLORS = {"bf16": BF16, "bf16-again": INK, "fp8": FOURTH, PAPER_ARM: FP8}
_OTHERS = SECOND  # of arms that are the paper's with something changed
_LEGEND = {"bf16": ARMS["bf16"], "bf16-again": ARMS["bf16-again"], "fp8": ARMS["fp8"], PAPER_ARM: ARMS[PAPER_ARM],
           "": "FP8 linears and attention, something changed"}  # fmt: skip
_SETTING, _RATE = rf"({'|'.join(SIZES)})-\d+x\d+", r"lr\d[\d.e+-]*"
_NAMES = "|".join(map(re.escape, ARCHITECTURES))
_STYLES = ("-", (0, (4, 1.4)), (0, (1, 1)), (0, (5, 1, 1, 1)))  # of seeds
_KURTOSIS = (
    "Kurtosis is mean(x^4) / mean(x^2)^2 over tokens and features: 3 where numbers are normal, larger the more a few "
    "outweigh the rest."
)
_MARKS = (
    "▼: the loss leaves BF16's by 3 σ of its step noise. ✕: the loss is not finite from there on. ○: the run is not "
    "finished. ●: the watch raises its alarm.\nDotted, upright: the end of the warm-up. Each panel has its own y axis."
)
_CUT = (
    f"▲ at the upper edge: the loss goes on above {FACTOR:g} times that of the first step, where a panel ends; beside "
    "it, the most that it comes to."
)
_DOES = {ABOVE: "rises above its start", DIVERGED: "diverges", LOST: "is lost"}


# What ``draw`` may call a picture, and nothing else: such a file in its folder is one of its own.
_DRAWN = re.compile(
    rf"parity|layers-{_SETTING}|(losses|kurtosis)-{_SETTING}-{_RATE}|arms-{_SETTING}-{_RATE}-({_NAMES})(\+(no-)?qk-norm)?"
)


def draw(folder: Path, lines: Sequence[Line]) -> list[str]:
    """Every picture that there are data for; their names. Those drawn before that there are none for are deleted."""
    folder.mkdir(parents=True, exist_ok=True)
    begun = current(line for line in lines if line.losses)
    aside = {id(one.line) for one in outcomes(begun, "provoke") if one.aside}
    begun = [line for line in begun if id(line) not in aside]
    made: list[str] = []

    def add(name: str, make: Callable[[Path, Sequence[Line], str], None], of: Sequence[Line]) -> None:
        make(folder / f"{name}.png", of, _trained(of[0], begun))
        made.append(name)

    for of in _alike(begun, "provoke", "lr"):
        name = f"{_name(of[0])}-lr{of[0].spec['lr']:g}"
        add(f"losses-{name}", losses, of)
        add(f"kurtosis-{name}", kurtosis_of_arms, of)
        for architecture in sorted({line.architecture for line in of}, key=architecture_order):
            of_one = [line for line in of if line.architecture == architecture]
            if any(one.gone and one.counts and one.attention for one in outcomes(of_one, "provoke")):
                add(f"arms-{name}-{architecture.replace(':', '+')}", losses_by_arm, of_one)
    if any(pairs.values for pairs in differences(begun, PAPER_ARM).values()):
        parity(folder / "parity.png", begun)
        made.append("parity")
    for of in _alike([line for line in begun if line.arm == "bf16" and line.samples], "kurtosis"):
        add(f"layers-{_name(of[0])}", kurtosis_by_layer, of)
    for path in folder.glob("*.png"):
        if _DRAWN.fullmatch(path.stem) and path.stem not in made:
            path.unlink()
    return made


def _alike(lines: Sequence[Line], study: str, *keys: str) -> list[list[Line]]:
    """The lines of a study by their setting, and by these keys of their specs."""
    found: dict[tuple[object, ...], list[Line]] = {}
    for line in lines:
        if line.study == study:
            found.setdefault((line.setting, *(line.spec[key] for key in keys)), []).append(line)
    return [found[key] for key in sorted(found)]


def _name(line: Line) -> str:
    size, steps, tokens = line.setting
    return f"{size}-{steps}x{tokens}"


def _trained(line: Line, among: Iterable[Line]) -> str:
    """How it was trained, for titles; for how many steps, where its study has several lengths of one size."""
    size, steps, tokens = line.setting
    alone = has_one_length(line, (other for other in among if other.study == line.study))
    return f"size {size}, {'' if alone else f'{steps} steps, '}{millions(tokens)} tokens a step"


# ---- (a) -------------------------------------------------------------------------------------------------------------


def _color(arm: str) -> str:
    return _COLORS.get(arm, _OTHERS)


def _style(line: Line, styles: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    """styles: of seeds; none where arms alone are told apart."""
    wide = line.arm == "bf16"
    style = "-" if wide else styles.get(line.pair, "-")
    return {"color": _color(line.arm), "linewidth": 3 if wide else 1.2, "linestyle": style}


def _seeds(lines: Sequence[Line]) -> dict[tuple[str, ...], tuple[str, Any]]:
    """{pair: seed, style of its lines}; the seed of most runs first."""
    words = {pair: what[-1] for pair, what in told_apart(lines).items()}
    many = Counter(words[line.pair] for line in lines)
    styles = dict(zip(sorted(many, key=lambda seed: (-many[seed], seed)), _STYLES * len(many)))
    return {pair: (seed, styles[seed]) for pair, seed in words.items()}


def _grid(
    path: Path, title: str, foot: str, panels: Mapping[str, Sequence[Line]], legend: Callable[[Figure, float], None],
    plot: Callable[[Axes, str, Sequence[Line]], None], ylabel: str,
) -> None:  # fmt: skip
    """A panel with its own y axis for each name. Steps are on a logarithmic axis, since runs may part in the first of
    them. legend: draws one under the title of a figure so high."""
    columns = min(_COLUMNS, key=lambda count: (-len(panels) % count, -count))
    rows = -(-len(panels) // columns)
    width, height = max(9.5, 3.2 * columns + 0.5), 2.75 * rows + 2.1
    with picture(path, title + "\n" * 2, (width, height)) as figure:
        grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        for axes, (name, of) in zip(grid.flat, panels.items()):
            plot(axes, name, of)
            axes.axvline(of[0].spec["warm_up"], color=FAINT, linewidth=0.9, linestyle=":", zorder=0)
            _log_steps(axes)
        for row in grid:
            row[0].set_ylabel(ylabel)
        for i, axes in enumerate(grid.flat[: len(panels)]):
            if i + columns >= len(panels):
                axes.set_xlabel("step")
                axes.xaxis.set_tick_params(labelbottom=True)
        legend(figure, height)
        caption(figure, foot)


def _legend_of_arms(lines: Sequence[Line]) -> Callable[[Figure, float], None]:
    from matplotlib.lines import Line2D

    arms = [arm for arm in _LEGEND if any((line.arm if line.arm in _COLORS else "") == arm for line in lines)]
    handles = [Line2D([], [], color=_color(arm), linewidth=3 if arm == "bf16" else 1.8) for arm in arms]
    return lambda figure, height: _legend(figure, height, handles, [_LEGEND[arm] for arm in arms])


def _legend_of_seeds(lines: Sequence[Line]) -> Callable[[Figure, float], None]:
    from matplotlib.lines import Line2D

    styles = dict(sorted(_seeds(lines).values(), key=lambda of: _STYLES.index(of[1])))
    handles = [Line2D([], [], color=BF16, linewidth=3)]
    handles += [Line2D([], [], color=INK, linewidth=1.5, linestyle=style) for style in styles.values()]
    return lambda figure, height: _legend(figure, height, handles, [ARMS["bf16"], *(f"seed {seed}" for seed in styles)])


def _legend(figure: Figure, height: float, handles: Sequence[Any], words: Sequence[str]) -> None:
    figure.legend(handles, words, loc="upper left", ncols=3, bbox_to_anchor=(0.005, 1 - 0.62 / height))


def _log_steps(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8)


def _head(axes: Axes, name: str, below: Sequence[str]) -> None:
    """The panel's name, and under it in small type what it says."""
    title = textwrap.fill(name, 34)
    axes.set_title("\n".join([title, *[""] * len(below)]), fontsize=10)
    axes.annotate("\n".join(below), (0, 1), xytext=(0, 4), textcoords="offset points", xycoords="axes fraction",
                  fontsize=8.5, color=FAINT, va="bottom")  # fmt: skip


def losses(path: Path, lines: Sequence[Line], trained: str) -> None:
    """A panel an architecture, a colour a kind of arm."""
    found = outcomes(lines, "provoke")

    def plot(axes: Axes, name: str, of: Sequence[Line]) -> None:
        here = [one for one in found if architecture_name(one.line.architecture) == name]
        faults = [one.reference.fault for one in here if not one.steady]
        _head(axes, name, [f"BF16 itself {_DOES[faults[0]]}"] if faults else tally(here))
        _plot_losses(axes, of, here, {})

    title = f"Losses in FP8 beside BF16, {rate_words(lines[0])}\n({trained})"
    foot = f"Training loss in nats a token, the median of {SMOOTH} steps.\n{_MARKS}\n{_CUT}"
    _grid(path, title, foot, _panels(lines), _legend_of_arms(lines), plot, "loss")


def _panels(lines: Sequence[Line]) -> dict[str, Sequence[Line]]:
    names = sorted({line.architecture for line in lines}, key=architecture_order)
    return {architecture_name(name): [line for line in lines if line.architecture == name] for name in names}


def losses_by_arm(path: Path, lines: Sequence[Line], trained: str) -> None:
    """Of one architecture: a panel an arm, a style a seed."""
    found, seeds = outcomes(lines, "provoke"), _seeds(lines)
    styles = {pair: style for pair, (_, style) in seeds.items()}
    arms = sorted({one.line.arm for one in found}, key=arm_order)

    def plot(axes: Axes, name: str, of: Sequence[Line]) -> None:
        here = [one for one in found if ARMS[one.line.arm] == name]
        left = [f"{one.left} (seed {seeds[one.line.pair][0]})" for one in here if one.left]
        words = f"left at {', '.join(left)}" if left else f"{count_left(here)} left"
        _head(axes, name, textwrap.wrap(words, 42))
        _plot_losses(axes, of, here, styles)

    panels = {ARMS[arm]: [line for line in lines if line.arm in ("bf16", arm)] for arm in arms}
    title = f"{architecture_name(lines[0].architecture)}, arm by arm, {rate_words(lines[0])}\n({trained})"
    foot = (
        "… : FP8 linears and attention, as the paper, but with this changed. Training loss in nats a token, the median "
        f"of {SMOOTH} steps.\n{_MARKS}\n{_CUT}"
    )
    _grid(path, title, foot, panels, _legend_of_seeds(lines), plot, "loss")


def _plot_losses(axes: Axes, of: Sequence[Line], found: Sequence[Outcome], styles: dict[tuple[str, ...], Any]) -> None:
    by_line = {id(one.line): one for one in found}
    starts = [line.losses[0] for line in of if line.arm == "bf16" and line.losses[0] is not None]
    top = FACTOR * max(starts) if starts else math.inf
    most = -math.inf
    for line in sorted(of, key=lambda line: arm_order(line.arm)):
        shown = smoothed(line.losses, SMOOTH)
        steps = range(SMOOTH, len(shown) + 1)
        axes.plot(steps, _up_to(top, shown[SMOOTH - 1 :]), **_style(line, styles))
        _mark(
            axes, by_line.get(id(line)), line, range(1, len(shown) + 1), [min(top, y) if y == y else y for y in shown]
        )
        if above := [(step, y) for step, y in zip(steps, shown[SMOOTH - 1 :]) if y > top]:
            most = max(most, *(y for _, y in above))
            axes.plot([above[0][0]], [top], "^", color=_color(line.arm), markersize=8, zorder=6, clip_on=False)
    if most > top:
        axes.set_ylim(top=top)
        axes.annotate(f"to {most:.2g}", (1, 1), xytext=(0, 7), textcoords="offset points", xycoords="axes fraction",
                      ha="right", va="bottom", fontsize=8.5, color=FAINT)  # fmt: skip


def _up_to(top: float, values: Sequence[float]) -> list[float]:
    """What is above the top is cut off, where the line goes through it."""
    cut = []
    for i, value in enumerate(values):
        near = values[max(0, i - 1) : i + 2]
        cut.append(value if not value > top else top if any(other <= top for other in near) else math.nan)
    return cut


def _mark(axes: Axes, outcome: Outcome | None, line: Line, steps: Sequence[int], shown: Sequence[float]) -> None:
    """The points of a run's line that are told of: shown at steps."""

    def mark(step: int, marker: str, size: int, **how: Any) -> None:
        values = [value for at, value in zip(steps, shown) if at <= step and math.isfinite(value)]
        if values:
            axes.plot(
                [step], values[-1:], marker, color=_color(line.arm), markersize=size, zorder=5, clip_on=False, **how
            )

    if outcome and outcome.left and outcome.counts:
        mark(outcome.left, "v", 7)
    if outcome and outcome.alarm:
        mark(outcome.alarm.step, "o", 6)
    if line.lost:
        mark(line.losses.index(None) + 1, "X", 7)
    elif not line.result:
        mark(line.step, "o", 6, markerfacecolor="white")


def kurtosis_of_arms(path: Path, lines: Sequence[Line], trained: str) -> None:
    found = {id(one.line): one for one in outcomes(lines, "provoke")}

    def plot(axes: Axes, name: str, of: Sequence[Line]) -> None:
        _head(axes, name, [])
        for line in sorted(of, key=lambda line: arm_order(line.arm)):
            largest = [
                max((v for v in layers if v is not None), default=math.nan) for layers in line.kurtosis.get("qkv", [])
            ]
            axes.plot(line.samples, largest, **_style(line, {}))
            _mark(axes, found.get(id(line)), line, line.samples, largest)
        _log(axes)

    title = f"Kurtosis of q, k and v, {rate_words(lines[0])}\n({trained})"
    foot = f"{_KURTOSIS}\nOf q, k and v before any norm of theirs, in the layer where it is largest.\n{_MARKS}"
    _grid(path, title, foot, _panels(lines), _legend_of_arms(lines), plot, "kurtosis")


def _log(axes: Any) -> None:
    from matplotlib.ticker import LogFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter())
    axes.tick_params(which="both", labelsize=8)


# ---- (c) -------------------------------------------------------------------------------------------------------------


def kurtosis_by_layer(path: Path, lines: Sequence[Line], trained: str) -> None:
    """Of the first seed."""
    from matplotlib.colors import to_rgb

    names = sorted({line.architecture for line in lines}, key=architecture_order)
    first = {line.architecture: line for line in sorted(lines, key=lambda line: -line.spec["seed"])}
    title = f"Kurtosis in BF16, a line a layer ({trained})"
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
    found = {arm: differences(lines, arm) for arm in (PAPER_ARM, "bf16-again")}
    of = {shared: pairs for shared, pairs in found[PAPER_ARM].items() if pairs.values}
    words = told_apart([pairs.line for pairs in of.values()], "seed")
    sizes = sizes_in(words)
    with picture(path, "FOG with FP8 attention beside itself in BF16, at the end of training", (10, 4.8)) as figure:
        axes = figure.subplots()
        axes.axhline(MARGIN, color=FAINT, linewidth=0.8)
        axes.axhline(0, color=INK, linewidth=1)
        for i, by_key in enumerate(found.values()):
            color, name = ((FP8, "FP8 against BF16"), (FAINT, "BF16 against itself: the floor"))[i]
            for place, key in enumerate(words):
                values = [value for value in by_key[key].values if math.isfinite(value)] if key in by_key else []
                at = place + 0.2 * (2 * i - 1)
                axes.plot([at - 0.06] * len(values), values, "o", color=color, alpha=0.45, markersize=4)
                if values:
                    mean = interval(values)
                    axes.plot([at], [mean.mean], "D", color=color, markersize=7, label=name if place == 0 else None)
                    if math.isfinite(mean.low):
                        axes.plot([at, at], [mean.low, mean.high], color=color, linewidth=2)
        axes.set_xticks(range(len(words)), [_tick(words[key], sizes[key], of[key].values) for key in words])
        axes.set_xlim(-0.5, len(words) - 0.5)
        low, high = axes.get_ylim()
        axes.axhspan(low, MARGIN, color=BF16, alpha=0.25, linewidth=0)
        axes.set_ylim(low, high)
        axes.grid(axis="x", visible=False)
        axes.set_ylabel("% of the validation loss\nup is worse")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
        foot = (
            "Points: pairs of runs with one seed. Diamond and line: their mean and its 95 % interval by Student's t.\n"
            f"Grey: below the margin of {MARGIN} %, fixed before the runs; the whole interval has to be there. Needed: "
            "pairs at\nthis scatter, for an interval that ends there. Validated in BF16."
        )
        caption(figure, foot)


def _tick(words: tuple[str, ...], size: str, values: Sequence[float]) -> str:
    name, length, rate = words
    pairs = f"{plural(len(values), 'pair')}, {needed_words(values)} needed"
    of = f"{size}, rate {rate}" if length.startswith(f"{size},") else f"{length},\nrate {rate}"
    return f"{name}\n{of}\n{pairs}"
