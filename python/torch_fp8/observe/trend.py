"""The healthy growth of a number over a run's tokens, and whether new points leave it.

arXiv 2505.20524 calls growth of the kurtosis healthy that is "sub-linear to logarithmic" in tokens, and gives no
number. Here a series is healthy as long as it grows no faster than tokens do: log(value / tokens) falls. That holds for
a logarithm, for every power below 1, and for what stays level. A logarithm that begins late rises against it for a
while: to 1.5 times where its slope is three times the level before it. What diverges, exponentially or by a higher
power, rises against it and goes on; a step stands out until tokens have grown as much.

A loss begins at its highest instead. It is healthy as long as it is near the lowest level that it came to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from ..checks import is_count

LEAST_SIGMA = 0.15  # of log(value): however quiet a series is, less than this is no reason for an alarm
LEAST_SIGMA_OF_FALLING = 0.05  # a loss that came down by half cannot rise by much more than that
_SMOOTH = 5  # points; the median of so many is the level of a series
FIRST = 10  # what begins has no trend yet: points before the first one that can be out
_RECENT = 100  # points of which the noise is taken


class Trend:
    """Of one series. The trend is fitted anew with each point: growth with tokens from the lowest level that
    value / tokens has come to; or, if that is higher, the highest level that the series had until then. Sigma is the
    noise of log(value), by the median of its second differences, which no trend and no outlier moves.

    falls: the trend is the lowest level that the series had."""

    def __init__(self, falls: bool = False) -> None:
        self.falls = falls
        self.values: list[float] = []  # the recent ones
        self.beyond = 0  # points in a row that are out of the trend
        self._inside: list[list[float]] = []  # the last points that were not out: tokens and value
        self._record = -math.inf  # of log(value)
        # Of what falls log(value), else log(value / tokens); and the record then.
        self._lowest: tuple[float, float] | None = None
        self.expected: float | None = None  # the most that the trend has at the last point
        self.excess = 0.0  # how many sigmas the last point is above that

    def add(self, tokens: float, value: float, sigmas: float) -> None:
        """The next point: after more tokens than the last one, positive. A value that is not finite is out."""
        self.values = [*self.values[1 - _RECENT :], value]
        self.excess = math.inf if not math.isfinite(value) else 0.0
        if self._lowest is not None:
            lowest, record = self._lowest
            most = lowest if self.falls else max(record, lowest + math.log(tokens))
            self.expected = math.exp(min(most, 700.0))
            if math.isfinite(value):
                self.excess = (math.log(value) - most) / self._sigma()
        self.beyond = self.beyond + 1 if self.excess > sigmas else 0
        if self.beyond:
            return
        self._inside = [*self._inside[1 - _SMOOTH :], [tokens, value]]
        level = math.log(median(v for _, v in self._inside))
        low = level if self.falls else level - math.log(median(t for t, _ in self._inside))
        self._record = max(self._record, level)
        if len(self.values) >= FIRST - 1 and (self._lowest is None or low <= self._lowest[0]):
            self._lowest = low, self._record

    def _sigma(self) -> float:
        logs = [math.log(value) for value in self.values if math.isfinite(value)]
        second = [abs(a - 2 * b + c) for a, b, c in zip(logs, logs[1:], logs[2:])]
        least = LEAST_SIGMA_OF_FALLING if self.falls else LEAST_SIGMA
        return max(least, 1.4826 * median(second) / math.sqrt(6) if second else 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, list) else value for name, value in vars(self).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    @staticmethod
    def is_state(state: Any) -> bool:
        """Whether ``state_dict`` may have given it, as far as types tell."""
        if not isinstance(state, Mapping) or set(state) != set(vars(Trend())):
            return False
        points, lowest, expected = state["_inside"], state["_lowest"], state["expected"]
        return (
            isinstance(state["falls"], bool)
            and is_count(state["beyond"])
            and are_numbers(state["values"])
            and isinstance(points, list)
            and all(are_numbers(point, 2) for point in points)
            and (lowest is None or are_numbers(lowest, 2))
            and (expected is None or are_numbers([expected]))
            and are_numbers([state["_record"], state["excess"]])
        )


def are_numbers(values: Any, count: int | None = None) -> bool:
    is_row = isinstance(values, list | tuple) and (count is None or len(values) == count)
    return is_row and all(isinstance(value, float | int) and not isinstance(value, bool) for value in values)
