"""What no study is beyond, said before anything is written: numbers with a digit too many hang, or fill a disk with
what no report reads."""

from __future__ import annotations

import argparse
import math

from examples.gpt.errors import UserError

LARGEST, RUNS = 2**31 - 1, 10_000


def check_bounds(args: argparse.Namespace, *kinds: str) -> None:
    """UserError where a whole number among the options is too large, or there are too many runs: one of each seed and
    each of these ``kinds``, which are lists."""
    for name, value in vars(args).items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int):
                check_largest(f"--{name.replace('_', '-')}", number)
    runs = math.prod([getattr(args, "seeds", 1), *(len(getattr(args, kind, None) or [None]) for kind in kinds)])
    if runs > RUNS:
        raise UserError(f"a study has at most {RUNS:,} runs, and this would be {runs:,}; give fewer --seeds")


def check_largest(option: str, number: int) -> None:
    if abs(number) > LARGEST:
        raise UserError(f"{option} must be within ±{LARGEST:,}, got {number}")
