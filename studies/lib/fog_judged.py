"""Which runs count for what is said of FP8, and what is counted of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .fog_results import ABOVE, DIVERGED, LOST, Outcome
from .fog_words import millions, plural, span

EARLY = 2  # times the warm-up: a divergence before is one of the start
# What a run in FP8 did that has not left its BF16. Within the latter's steps a loss that is not finite leaves it.
_DID = {
    ABOVE: "rose above the loss of the first step on the way",
    DIVERGED: "diverged by itself",
    LOST: "came to a loss that is not finite, further than BF16 went",
}


def judged(found: Sequence[Outcome]) -> list[Outcome]:
    """The runs in FP8 that count, where BF16 itself stayed sound the second time too, and was not left by itself, as
    far as it was run."""
    unsteady = {one.line.pair for one in found if one.line.arm == "bf16-again" and not one.holds}
    in_fp8 = [one for one in found if one.line.arm != "bf16-again" and one.counts]
    return [one for one in in_fp8 if one.line.pair not in unsteady]


def count_left(of: Sequence[Outcome], noun: str = "") -> str:
    many = plural(len(of), noun) if noun else str(len(of))
    return f"{sum(bool(one.left) for one in of)} of {many}"


def tally(of: Sequence[Outcome]) -> list[str]:
    """How many runs in FP8 left BF16: of those with linears alone, and of those with attention."""
    kinds = {"FP8 linears": [one for one in of if one.line.arm == "fp8"],
             "FP8 attention": [one for one in of if one.attention]}  # fmt: skip
    return [f"{name}: {count_left(runs)} left" for name, runs in kinds.items() if runs]


def of_the_start(one: Outcome) -> list[str]:
    """Why a divergence is one of the start of training, if it is."""
    assert one.left is not None
    early = EARLY * one.line.spec["warm_up"]
    if one.left <= early:
        return ["at the start of training"]
    jumped = one.line.jumped
    return [f"begun at the start of training, where its gradient norm jumped (step {jumped})"] * bool(
        jumped and jumped <= early
    )


def tokens_words(of: Sequence[Outcome]) -> str:
    return f"{span([one.seen * one.line.setting[2] for one in of], millions)} tokens"


def steps_words(of: Sequence[Outcome]) -> str:
    return f"{span([one.seen for one in of])} steps"


def back_words(of: Sequence[Outcome]) -> str:
    """How many of those that left came back."""
    left, back = sum(bool(one.left) for one in of), sum(one.came_back for one in of)
    if not back:
        return ""
    return f"{back} of these came back" if back < left else f"{'it' if left == 1 else 'all'} came back"


def unheld(of: Sequence[Outcome]) -> list[tuple[int, str]]:
    """How many of those that count did not leave and do not hold either, and what each of them did."""
    faults = Counter(one.line.fault for one in of if not one.left and not one.holds)
    return [(faults[fault], words) for fault, words in _DID.items() if faults[fault]]
