"""A file with a line of JSON for each run: what came out of it, small enough to be kept beside the code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from torch_fp8.files import replacing

from examples.gpt.errors import UserError

from .runs import Spec, with_split

Line = TypeVar("Line", bound=Any)  # a dataclass with spec, step and result, None of a run that is not done


def read_lines(path: Path, kind: type[Line]) -> list[Line]:
    return _read(path, lambda line: kind(**{**line, "spec": with_split(line["spec"])}))


def finished_specs(path: Path) -> list[Spec]:
    """Of the runs that are done, of whichever study."""
    read = _read(path, lambda line: (with_split(line["spec"]), line["result"]))
    return [spec for spec, result in read if result is not None]


def _read(path: Path, of: Callable[[dict[str, Any]], Line]) -> list[Line]:
    lines = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            lines.append(of(json.loads(line)))
        except (ValueError, TypeError, LookupError) as error:
            raise UserError(
                f"{path} must hold a run a line, but line {number} does not: {error}; write it anew from the runs"
            ) from error
    return lines


def merge_lines(
    path: Path,
    kind: type[Line],
    new: Iterable[Line],
    key: Callable[[Line], Any],
    meaning: Callable[[Line], Any],
    rank: Callable[[Line], Any] = lambda line: (line.result is not None, line.step),
) -> list[Line]:
    """The file with what is new; of the same run the one with the highest ``rank``, the later one of equals, which may
    be condensed anew; in the order of keys, which have a run's spec, since runs that differ in it are two. Where a run
    was made twice, with another result, the first one stays, which the file has, and that is said.
    meaning: what a line's arm is. UserError, with nothing written, where arms of one name are two things: runs of both
    would be counted as one."""
    lines: dict[Any, Line] = {}
    arms: dict[str, Any] = {}
    there = read_lines(path, kind) if path.exists() else []
    said = []
    for line in [*there, *new]:
        name, this = line.spec["arm"], meaning(line)
        if arms.setdefault(name, this) != this:
            raise UserError(f"{path} and the new runs have two arms called {name}: {arms[name]} and {this}; "
                            "give one of them another name, or the new runs another --data")  # fmt: skip
        before = lines.get(key(line))
        if before is None or before.result is None or line.result is None:
            again = before is None or rank(line) >= rank(before)
        elif other := _differing(before.result, line.result):
            again = False
            has = f"which {path} has" if before in there else "which was read first"
            said.append(
                f"the run {_name(line.spec)} was made twice, with another result: "
                f"{other} {_short(before.result[other])} is kept, {has}, and {other} {_short(line.result[other])} is left out"
            )
        else:  # in two runs that came to the same, other clocks
            again = rank(line) > rank(before) or (line.result == before.result and rank(line) == rank(before))
        if again:
            lines[key(line)] = line
    for words in said:
        print(words, file=sys.stderr)
    kept = [lines[of] for of in sorted(lines)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(asdict(line), separators=(",", ":")) + "\n" for line in kept))
    return kept


def _differing(a: dict[str, Any], b: dict[str, Any]) -> str | None:
    """The first thing that both results have, and not the same, but for how long they took on which GPU."""
    keys = [key for key in ("loss", *a) if key in a and key in b and key not in ("seconds", "gpu")]
    return next((key for key in keys if a[key] != b[key]), None)


def _short(value: Any) -> str:
    words = str(value)
    return words if len(words) <= 40 else f"{words[:40]}..."


def _name(spec: Spec) -> str:
    words = [str(spec[key]) for key in ("study", "model", "architecture", "arm") if key in spec]
    return ", ".join([*words, *(f"{key} {spec[key]}" for key in ("lr", "seed") if key in spec)])
