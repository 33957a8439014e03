"""How pictures look: one set of colours, few lines, a title that says what is shown, a caption that explains the words.

Needs matplotlib, which is imported when a picture is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .files import StrPath, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Told apart by people who do not see red or green, and in grey print.
BF16, FP8, SECOND, THIRD, FOURTH = "#a9b4c0", "#0a6c8f", "#e8a33d", "#8a5a9e", "#5b9b6b"
INK, FAINT, GRID = "#22303c", "#5f6f7e", "#e3e8ed"

_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": FAINT,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.titlesize": 14,
    "figure.titleweight": "bold",
    "font.size": 9.5,
    "grid.color": GRID,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
    "ytick.left": False,
}


@contextmanager
def picture(path: StrPath, title: str, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure to draw on, written to ``path`` as PNG at the end of the block: whole, or not at all."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE), replacing(path) as temporary:
        figure = Figure(figsize=size, layout="constrained")  # without pyplot, so without a display
        figure.suptitle(title, x=0.012, ha="left")
        yield figure
        figure.savefig(temporary, dpi=120, format="png")


def caption(figure: Figure, text: str) -> None:
    """What the words in the picture mean, and where its figures come from; at its foot."""
    figure.supxlabel(text, x=0.012, ha="left", color=FAINT, fontsize=8.5)
