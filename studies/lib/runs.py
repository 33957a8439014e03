"""A folder of runs. Each run is a folder with ``spec.json``, a plain dict of all that decides what comes out of it,
``log.jsonl``, what came out, and while it is on its way ``state.ckpt``.

A run is done when its log has a record with a ``result``. One that a kill interrupted goes on from its checkpoint; one
without (the log alone came back from another machine) starts again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_fp8.files import replacing

from examples.gpt.errors import UserError
from examples.gpt.journal import Record, not_finite, read_journal, record_of

Spec = dict[str, Any]

_TAIL = 1 << 16  # bytes at the end of a log that hold a whole record
_SPLITS = {"8e6e3b7e09571699": 25_624_999}  # of the texts of specs that have no ``split``, which were made before it


@dataclass(frozen=True)
class Run:
    folder: Path
    spec: Spec

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def log(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "state.ckpt"

    @property
    def output(self) -> Path:
        return self.folder / "output.txt"

    @property
    def mend(self) -> str:
        """What helps where the log is not what it was."""
        return f"bring the log back whole, or delete {self.folder} and run it again, from its first step"

    def records(self) -> list[Record]:
        return read_journal(self.log, self.mend)

    def result(self) -> dict[str, Any] | None:
        """What came out at the end, or None of a run that is not done."""
        return next((record["result"] for record in reversed(self.records()) if "result" in record), None)

    def step(self) -> int:
        """How far the log is, without reading all of it."""
        return next((record["step"] for record in self.newest()), 0)

    def newest(self) -> Iterator[Record]:
        """The last records, from the last one on, as far as a part of the log has them. What ``records`` refuses is
        left out."""
        if not self.log.exists():
            return
        with open(self.log, "rb") as file:
            file.seek(max(0, os.path.getsize(self.log) - _TAIL))
            lines = file.read().split(b"\n")[:-1]
        for line in reversed(lines):
            with suppress(ValueError, RecursionError):  # half a line
                yield record_of(line)


def check_steps(run: Run, steps: Sequence[int]) -> None:
    """UserError where a log has not each step of the training once and in order."""
    if list(steps) != list(range(1, len(steps) + 1)):
        raise UserError(
            f"{run.log} must have each step once and in order, but has not: losses would be held to those of other "
            f"steps; {run.mend}"
        )


def check_resumable(run: Run, step: int) -> None:
    """UserError where the log has not what was logged until the run's checkpoint, which is of ``step``: the training
    would go on, and nobody could read what came out of it."""
    logged = [record["step"] for record in losses_in(run.records()) if record["step"] <= step]
    if logged != list(range(1, step + 1)):
        raise UserError(
            f"{run.log} must have each step up to {step}, which {run.checkpoint.name} goes on from, once and in order, "
            f"but has not; {run.mend}"
        )


def losses_in(records: Iterable[Record]) -> list[Record]:
    """Those of a training's steps."""
    return [record for record in records if "loss" in record and "policy" not in record]


def open_run(folder: Path) -> Run:
    """A run whose ``spec.json`` is there."""
    try:
        return Run(folder, with_split(json.loads((folder / "spec.json").read_text(), parse_constant=not_finite)))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{folder} must be the folder of a run, but its spec.json is none ({error}); bring that back whole, or "
            "move the folder elsewhere"
        ) from error


def plain(spec: Spec) -> Spec:
    """As it is read back from JSON."""
    return json.loads(json.dumps(spec))  # type: ignore[no-any-return]


def with_split(spec: Spec) -> Spec:
    """A spec that was read, with the ``split`` of its text, its number of training tokens, where that is known."""
    if not isinstance(spec, dict):
        raise ValueError(f"a spec must be a JSON object, got {spec!r}")
    split = _SPLITS.get(str(spec.get("data")))
    return spec if "split" in spec or split is None else {**spec, "split": split}


def claim(root: Path, specs: Mapping[str, Spec]) -> list[Run]:
    """The runs of these names and specs. UserError, with nothing written, where a folder has a run of another spec or
    what is left of one without its spec."""
    runs = [Run(root / name, plain(spec)) for name, spec in specs.items()]
    new = [run for run in runs if not (run.folder / "spec.json").exists()]
    for run in runs:
        if run not in new and (differing := _differing(open_run(run.folder).spec, run.spec)):
            raise UserError(
                f"{run.folder} holds another run: it differs in {', '.join(differing)}; give the same values, or "
                "another --out"
            )
    for run in new:
        if left := next((path for path in (run.log, run.checkpoint) if path.exists()), None):
            raise UserError(f"{left} is of a run whose spec.json is gone; delete {run.folder}, or give another --out")
    for run in new:
        run.folder.mkdir(parents=True, exist_ok=True)
        with replacing(run.folder / "spec.json") as temporary:
            temporary.write_text(json.dumps(run.spec, indent=1) + "\n")
    return runs


def all_runs(root: Path) -> list[Run]:
    """Every run of a folder, in the order of names. UserError where one has lost its ``spec.json``."""
    for log in sorted(root.glob("*/log.jsonl")):
        if not (log.parent / "spec.json").exists():
            raise UserError(f"{log} is of a run whose spec.json is gone; bring it back, or move {log.parent} elsewhere")
    return [open_run(path.parent) for path in sorted(root.glob("*/spec.json"))]


def missing(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.result() is None]


def _differing(there: Spec, asked: Spec) -> list[str]:
    keys = dict.fromkeys([*there, *asked])
    return [f"{key} (was {there.get(key)}, is {asked.get(key)})" for key in keys if there.get(key) != asked.get(key)]
