"""A file with a line of JSON for each run: what came out of it, small enough to be kept beside the code."""

from __future__ import annotations

import json
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
    try:
        return [of(json.loads(line)) for line in path.read_text().splitlines()]
    except (ValueError, TypeError, LookupError) as error:
        raise UserError(f"{path} must hold a run a line, but does not: {error}; write it anew from the runs") from error


def merge_lines(path: Path, kind: type[Line], new: Iterable[Line], key: Callable[[Line], Any]) -> list[Line]:
    """The file with what is new; of the same run what got furthest, the later one of equals; in the order of keys,
    which have a run's spec, since runs that differ in it are two."""
    lines: dict[Any, Line] = {}
    for line in [*(read_lines(path, kind) if path.exists() else ()), *new]:
        before = lines.get(key(line))
        if before is None or (line.result is not None, line.step) >= (before.result is not None, before.step):
            lines[key(line)] = line
    kept = [lines[of] for of in sorted(lines)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(asdict(line), separators=(",", ":")) + "\n" for line in kept))
    return kept
