"""How far runs are, for a bar and in words: in steps, and after a training's last one in policies of its sweep."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from .inference import policies
from .runs import Run, Spec, missing


def length(spec: Spec) -> int:
    """Steps and policies of a whole run."""
    return int(spec["steps"]) + _swept(spec)


def far(run: Run) -> int:
    """Steps and policies that are logged."""
    return run.step() + _measured(run)


def words(run: Run) -> str:
    of = _swept(run.spec)
    swept = f", {_measured(run)} of {of} policies" if of and run.step() == run.spec["steps"] else ""
    return f"{run.step()} of {run.spec['steps']} steps{swept}"


def say_missing(runs: Sequence[Run]) -> str:
    left = missing(runs)
    if not left:
        return f"all {len(runs)} runs are done"
    said = [f"{run.name} ({words(run)})" for run in left]
    return f"{len(runs) - len(left)} of {len(runs)} runs are done; still missing: {', '.join(said)}"


def _swept(spec: Spec) -> int:
    """Policies after a training's end; steps of the study ``infer`` are policies."""
    return len(policies(spec["sweep"])) if spec.get("sweep") and spec["study"] != "infer" else 0


def _measured(run: Run) -> int:
    whole = _swept(run.spec)
    newest = run.newest() if whole else iter(())
    last = next(newest, {})
    if "result" in last:
        return whole
    return sum(1 for _ in itertools.takewhile(lambda record: "policy" in record, itertools.chain([last], newest)))
