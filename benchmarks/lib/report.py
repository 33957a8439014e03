"""What a benchmark leaves behind: results/NAME.md with its head and tables, and results/NAME.png."""

from __future__ import annotations

import datetime
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch_fp8 as fp8
from torch_fp8.files import replacing
from torch_fp8.table import markdown

from .common import clocks, options

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BF16, FP8, OTHER, FOURTH = "tab:gray", "tab:orange", "tab:blue", "tab:green"


def header(title: str) -> str:
    """Command, GPU, clocks, versions, date and regimes; to be called right after the run."""
    info = fp8.build_info()
    command = " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    gpu = "none: a dry run, the figures mean nothing" if options.dry else _gpu()
    return f"""# {title}

* command: `python {command}`
* GPU: {gpu}
* PyTorch {torch.__version__}, CUDA {torch.version.cuda}, cuBLASLt {info["cublaslt"]}, torch_fp8 {info["version"]}
* date: {datetime.date.today()}
* random data; medians; arms interleaved in one run. *GPU*: events, host hidden, boost clock. *loop*: back-to-back wall
  time, host included, sustained clock. *graph*: back-to-back launches in a CUDA graph, over buffers that exceed the L2.
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


def write(name: str, *parts: str) -> None:
    text = "\n".join(parts).rstrip() + "\n"
    with replacing(_folder() / f"{name}.md") as temporary:
        temporary.write_text(text)
    print(text, flush=True)


def plot(name: str, draw: Callable[[Figure], None], height: float = 4.5) -> str:
    """Draw NAME.png; the Markdown that shows it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "(No picture: matplotlib is missing.)\n"
    figure = Figure(figsize=(11, height), layout="constrained")  # without pyplot, so without a display
    draw(figure)
    with replacing(_folder() / f"{name}.png") as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return f"![{name}]({name}.png)\n"


def bars(
    axes: Axes,
    groups: Sequence[str],
    series: Mapping[str, tuple[str, Sequence[float]]],
    targets: Sequence[float | None] = (),
) -> None:
    """Grouped bars: series are label -> (colour, one value a group); a target is a black line over its group."""
    width = 0.8 / len(series)
    for i, (label, (color, values)) in enumerate(series.items()):
        places = [group - 0.4 + (i + 0.5) * width for group in range(len(groups))]
        axes.bar(places, values, width, label=label, color=color)
    aims = [(group, target) for group, target in enumerate(targets) if target]
    if aims:
        axes.hlines([t for _, t in aims], [g - 0.42 for g, _ in aims], [g + 0.42 for g, _ in aims],
                    color="black", linewidth=1.5, label="target")  # fmt: skip
    axes.set_xticks(range(len(groups)), groups, fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def legend(figure: Figure) -> None:
    """One for all panels, below them: bars leave no room inside."""
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)


def _folder() -> Path:
    root = Path(__file__).parents[2]
    folder = root / "runs" / "dry-run" if options.dry else root / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
