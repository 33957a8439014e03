"""What paired differences allow to say: their mean with its 95 % interval by Student's t."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

# The 0.975 quantiles of Student's t with 1, 2, ... degrees of freedom.
_T = (
    *(12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216, 2.22814),
    *(2.20099, 2.17881, 2.16037, 2.14479, 2.13145, 2.11991, 2.10982, 2.10092, 2.09302, 2.08596),
    *(2.07961, 2.07387, 2.06866, 2.06390, 2.05954, 2.05553, 2.05183, 2.04841, 2.04523, 2.04227),
)


class Interval(NamedTuple):
    count: int
    mean: float
    low: float  # minus infinity of a single difference, which says nothing of others
    high: float


def interval(differences: Sequence[float]) -> Interval:
    """Of at least one difference."""
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return Interval(count, mean, -math.inf, math.inf)
    half = _quantile(count - 1) * statistics.stdev(differences) / math.sqrt(count)
    return Interval(count, mean, mean - half, mean + half)


def means_differ(groups: Sequence[Sequence[float]]) -> bool:
    """Whether the 95 % interval of the difference of any two groups' means leaves out 0, by Student's t and with the
    scatter within all of the groups; False where that is not known."""
    groups = [group for group in groups if group]
    degrees = sum(len(group) - 1 for group in groups)
    if degrees < 1:
        return False
    means = [(statistics.fmean(group), len(group)) for group in groups]
    squares = sum((value - mean) ** 2 for group, (mean, _) in zip(groups, means) for value in group)
    reach = _quantile(degrees) * math.sqrt(squares / degrees)
    return any(abs(a - b) > reach * math.sqrt(1 / n + 1 / m) for (a, n), (b, m) in itertools.combinations(means, 2))


def pairs_needed(differences: Sequence[float], margin: float) -> int | None:
    """The fewest differences of this scatter whose 95 % interval would end below ``margin``, were their mean 0; None of
    fewer than two, which have no scatter."""
    if len(differences) < 2:
        return None
    deviation, count = statistics.stdev(differences), 2
    while _quantile(count - 1) * deviation / math.sqrt(count) >= margin:
        count += 1
    return count


def scatter_allowed(count: int, margin: float) -> float:
    """The standard deviation of so many differences at which their 95 % interval would end at ``margin``, were their
    mean 0."""
    return margin * math.sqrt(count) / _quantile(count - 1)


def _quantile(degrees: int) -> float:
    """Beyond the table by the first terms of its expansion about the normal one, right to four digits."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
