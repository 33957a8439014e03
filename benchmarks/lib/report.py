"""What a benchmark leaves behind: results/NAME.md with its head and tables, and results/NAME.png."""

from __future__ import annotations

import datetime
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch_fp8 as fp8
from torch_fp8.files import replacing
from torch_fp8.picture import FP8, INK, SECOND, caption, picture
from torch_fp8.table import markdown, read_markdown

from .common import clocks, options

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draw = Callable[["Figure", list[list[dict[str, str]]]], None]
GPU, LOOP = "GPU time (kernels alone)", "loop (wall time, host included)"
REGIMES = {
    "GPU": "GPU: time of the kernels alone, while the host runs ahead and is hidden.",
    "loop": "loop: wall time of calls back to back, host included, at the clock that the power limit leaves.",
    "graph": "graph: what one launch adds to a CUDA graph of many, over buffers larger than the cache.",
}


def header(title: str, timed: bool = True) -> str:
    """Command, GPU, clocks, versions, date and, where something was timed, regimes; to be called right after the
    run."""
    info = fp8.build_info()
    command = " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    gpu = "none: a dry run, the figures mean nothing" if options.dry else _gpu()
    return f"""# {title}

* command: `python {command}`
* GPU: {gpu}
* PyTorch {torch.__version__}, CUDA {torch.version.cuda}, cuBLASLt {info["cublaslt"]}, torch_fp8 {info["version"]}
* date: {datetime.date.today()}
{_TIMED if timed else ""}"""


_TIMED = """* random data; medians; arms interleaved in one run. *GPU*: events, host hidden, boost clock. *loop*:
  back-to-back wall time, host included, sustained clock. *graph*: back-to-back launches in a CUDA graph, over buffers
  that exceed the L2.
"""


def _gpu() -> str:
    names = {"driver_version": "driver {}", "clocks.sm": "SM clock {} just after the run",
             "clocks.max.sm": "{} at most", "power.limit": "power limit {}"}  # fmt: skip
    index = str(torch.cuda.current_device())
    try:
        smi = subprocess.run(
            ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(names)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        smi = ""
    facts = [form.format(value) for form, value in zip(names.values(), smi.split(", "))] if smi else ["no nvidia-smi"]
    if clocks:
        facts.append(f"SM clock just after each loop {min(clocks)} to {max(clocks)} MHz")
    return "; ".join([torch.cuda.get_device_name(), *facts])


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return markdown(head, rows) + "\n"


def pair(gpu: float, loop: float, digits: int = 2) -> str:
    """The same figure in the two regimes."""
    return f"{gpu:.{digits}f} / {loop:.{digits}f}"


def write(name: str, *parts: str, draw: Draw | None = None) -> None:
    """NAME.md of these parts and, where there is a ``draw``, NAME.png of what is written there."""
    drawn = [f"![{name}]({name}.png)\n"] if draw else []
    text = "\n".join([*parts, *drawn]).rstrip() + "\n"
    with replacing(_folder() / f"{name}.md") as temporary:
        temporary.write_text(text)
    print(text, flush=True)
    if draw:
        try:
            redraw(name, draw)
        except ImportError:
            print("no picture: matplotlib is missing; later, python benchmarks --redraw draws it", flush=True)


# ---- pictures, from the tables as they were written ------------------------------------------------------------------


def redraw(name: str, draw: Draw) -> None:
    """NAME.png of NAME.md. ``draw`` fills a figure with the page's tables; the regimes that it names are explained."""
    from matplotlib.text import Text

    text = (_folder() / f"{name}.md").read_text()
    title = text.partition("\n")[0].removeprefix("# ")
    gpu, date = (re.search(rf"^\* {key}: ([^;\n]*)", text, re.MULTILINE)[1] for key in ("GPU", "date"))
    with picture(_folder() / f"{name}.png", title, size=(11, 5)) as figure:
        draw(figure, read_markdown(text))
        said = " ".join(words.get_text() for words in figure.findobj(Text))
        foot = [words for regime, words in REGIMES.items() if regime in said]
        caption(figure, "\n".join([*foot, f"{gpu}, {date}; figures: {name}.md"]))


def numbers(cell: str) -> list[float]:
    """Those of a cell such as "1.50 / 1.56"; none of "–"."""
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", cell.replace(",", ""))]


def layer_name(shape: str) -> str:
    """What "M8192 K4096 N6144" means."""
    m, k, n = map(int, numbers(shape))
    return f"{m:,} tokens\n{k} → {n}"


def bars(axes: Axes, groups: Sequence[str], series: Mapping[str, tuple[str, Sequence[float]]], form: str) -> None:
    """Grouped bars from 0, each with its figure: series are label -> (colour, one value a group)."""
    from matplotlib.patheffects import withStroke

    above_lines = {"zorder": 4, "path_effects": [withStroke(linewidth=2.5, foreground="white")]}
    width = 0.84 / len(series)
    for i, (label, (color, values)) in enumerate(series.items()):
        places = [group - 0.42 + (i + 0.5) * width for group in range(len(groups))]
        drawn = axes.bar(places, values, width * 0.94, label=label, color=color)
        axes.bar_label(drawn, fmt=form, padding=2, fontsize=7.5, color=INK, **above_lines)
    axes.set_xticks(range(len(groups)), groups, fontsize=8.5)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.12)  # above the bars; below them it stays at 0


def level(axes: Axes, name: str, at: float = 1) -> None:
    """The line that bars are held to, with its name at the right end."""
    axes.axhline(at, color=INK, linewidth=1)
    axes.annotate(name, (1, at), xycoords=("axes fraction", "data"), xytext=(3, 0), textcoords="offset points",
                  va="center", fontsize=8.5)  # fmt: skip


def shares_of_copy(figure: Figure, rows: Sequence[Mapping[str, str]], by: str) -> None:
    """A group of bars for each "pass": its "share of copy", of each value of the column ``by``."""
    axes, kinds = figure.subplots(), dict.fromkeys(row[by] for row in rows)
    series = {
        kind.replace("x", "×"): (color, [numbers(row["share of copy"])[0] for row in rows if row[by] == kind])
        for kind, color in zip(kinds, (FP8, SECOND))
    }
    names = dict.fromkeys(row["pass"] for row in rows)
    bars(axes, [name.replace(" backward", "\nbackward").replace(", ", ",\n") for name in names], series, "%.0f %%")
    level(axes, "copy", 100)
    axes.set(ylabel="% of the copy's speed\nhigher is better", title="Time per launch, graph")
    legend(axes)


def legend(axes: Axes, below: bool = False) -> None:
    """One for all panels, beside the title of the first: bars leave no room inside. below: under the bars, where names
    are too long for that."""
    labels = len(axes.get_legend_handles_labels()[1])
    if below:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.07), borderpad=0, ncols=-(-labels // 2))
    else:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderpad=0, ncols=labels)


def _folder() -> Path:
    root = Path(__file__).parents[2]
    folder = root / "runs" / "dry-run" if options.dry else root / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
