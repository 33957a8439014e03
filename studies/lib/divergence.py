"""When a loss diverges by itself, and when it leaves another's, by rules that were written before any run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

# A loss leaves that of the same seed and batches in 16 bits at the first of PATIENCE steps on end, after the first
# FIRST, in all of which it is higher by SIGMAS standard deviations of the latter's noise; or where it is not finite.
# The noise is what a step's loss adds to its neighbours' trend, by the median of second differences over the WINDOW
# steps before, so that neither the trend nor a spike counts.
SIGMAS, PATIENCE, FIRST, WINDOW = 3.0, 20, 20, 100

# A loss diverges by itself where it is not finite, or where it stays above FACTOR times the median of the MEDIAN steps
# before for PATIENCE steps on end.
MEDIAN, FACTOR = 200, 1.25

JUMP = 10.0  # times the median of its last WINDOW steps: a gradient norm that is larger has jumped

Loss = float | None  # None: not finite


class Divergence:
    """Judges a training's losses one after another.

    skips: whether a loss scale leaves out steps whose gradients are not finite, so that the weights stay finite.
    at: the step, from 1, at which the losses had diverged, or 0.
    lost: whether nothing can come of what follows. A loss that is not finite has reached every weight by its gradients;
        where such steps are left out, it is PATIENCE of them on end, in which a loss scale is halved to a millionth.
    """

    def __init__(self, losses: Iterable[Loss] = (), *, skips: bool = False) -> None:
        self.losses: list[Loss] = []
        self.lost = False
        self.at = self._above = self._gone = 0
        self._deadly = PATIENCE if skips else 1  # losses on end that are not finite
        for loss in losses:
            self.add(loss)

    def add(self, loss: Loss) -> None:
        before = [known for known in self.losses[-MEDIAN:] if known is not None]
        not_finite = loss is None or not math.isfinite(loss)
        high = before and (loss is None or not loss <= FACTOR * statistics.median(before))
        self._above = self._above + 1 if high else 0
        self.losses.append(None if not_finite else loss)
        if not self.at and (not_finite or self._above >= PATIENCE):
            self.at = len(self.losses)
        self._gone = self._gone + 1 if not_finite else 0
        self.lost = self.lost or self._gone == self._deadly


def step_noise(losses: Sequence[Loss]) -> float:
    """The standard deviation of what a step adds to the trend of its neighbours; infinite of fewer than three."""
    known = [loss for loss in losses if loss is not None]
    second = [abs(a - 2 * b + c) for a, b, c in zip(known, known[1:], known[2:])]
    return 1.4826 * statistics.median(second) / math.sqrt(6) if second else math.inf


def leaves(losses: Sequence[Loss], reference: Sequence[Loss]) -> int | None:
    """The step, from 1, at which ``losses`` leave ``reference``, as far as both go; None where they do not."""
    above = 0
    for i, (loss, other) in enumerate(zip(losses, reference)):
        if other is None:
            return None  # there is nothing left to leave
        if loss is None:
            return i + 1 - above
        higher = i >= FIRST and loss > other  # else the noise, which takes a sort, need not be known
        higher = higher and loss - other > SIGMAS * step_noise(reference[max(0, i - WINDOW) : i])
        above = above + 1 if higher else 0
        if above == PATIENCE:
            return i + 2 - PATIENCE
    return None


def above_start(losses: Sequence[Loss]) -> int:
    """The step, from 1 and after the first FIRST, at which a loss is not finite or above FACTOR times that of the first
    step, so that the model predicts worse than its random weights did; or 0. It may come back from there."""
    for i in range(FIRST, len(losses)):
        loss, start = losses[i], losses[0]
        if loss is None or start is None or not loss <= FACTOR * start:
            return i + 1
    return 0


def jump(grad_norms: Sequence[Loss]) -> int | None:
    """The step, from 1, at which a gradient norm is not finite, or JUMP times as large as its median before; not among
    the FIRST."""
    for i in range(FIRST, len(grad_norms)):
        norm, before = grad_norms[i], [n for n in grad_norms[max(0, i - WINDOW) : i] if n is not None]
        if norm is None or (before and norm > JUMP * statistics.median(before)):
            return i + 1
    return None
