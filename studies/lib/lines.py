"""A file with a line of JSON for each run: what came out of it, small enough to be kept beside the code."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

from torch_fp8.files import replacing

from examples.gpt.errors import UserError
from examples.gpt.journal import not_finite

from .policies import CLIP
from .runs import Run, Spec, with_split

Line = TypeVar("Line", bound=Any)  # a dataclass with spec, step and result, None of a run that is not done

TEXT, OBJECT, LIST = "a text of one line", "an object", "a list"
WHOLE, COUNT, POSITIVE = "a whole number", "a whole number that is not negative", "a positive whole number"
BIAS_OR_NULL = f"a whole number from {-CLIP} to {CLIP}, or null"
SIZE, SHARE_OR_NULL = "a number that is not negative", "a number from 0 to 1, or null"
SIZE_OR_NULL = "a number that is not negative, or null where it was not finite"
# Others are held to it. It has no bound but that of float32, which one that diverges comes near.
LOSS, LOSS_OR_NULL = "a positive number", "a positive number, or null where it was not finite"
_TYPES: dict[str, tuple[type, ...]] = {
    TEXT: (str,), OBJECT: (dict,), LIST: (list,), WHOLE: (int,), COUNT: (int,), POSITIVE: (int,),
    BIAS_OR_NULL: (int, NoneType), SIZE: (int, float), SIZE_OR_NULL: (int, float, NoneType),
    SHARE_OR_NULL: (int, float, NoneType), LOSS: (int, float), LOSS_OR_NULL: (int, float, NoneType),
}  # fmt: skip
# What is measured is float32; and products of three such whole numbers, and ratios of losses, are still finite floats.
_LARGEST, _LEAST = 2.0**128, 2.0**-149
_WITHIN = {
    WHOLE: (-_LARGEST, _LARGEST), COUNT: (0, _LARGEST), POSITIVE: (1, _LARGEST), BIAS_OR_NULL: (-CLIP, CLIP),
    SIZE: (0, _LARGEST), SIZE_OR_NULL: (0, _LARGEST), SHARE_OR_NULL: (0, 1),
    LOSS: (_LEAST, _LARGEST), LOSS_OR_NULL: (_LEAST, _LARGEST),
}  # fmt: skip


def read_lines(path: Path, kind: type[Line]) -> list[Line]:
    """UserError with the number of a line that is none; ``kind.check`` raises ValueError where one is whole and wrong,
    so that what reads lines need not look again."""
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            line = json.loads(text, parse_constant=not_finite)
            lines.append(kind(**{**line, "spec": with_split(line["spec"])}))
            lines[-1].check()
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise UserError(
                f"{path} must hold a run a line, but line {number} does not: {error}; give the runs.jsonl of this "
                "study, or write it anew from the runs"
            ) from error
    return lines


def new_lines(runs: Iterable[Run], condensed: Callable[[Run], Line]) -> list[Line]:
    """What is condensed of each run, checked as ``read_lines`` checks a line: one that is wrong would go into the file,
    and be in the way of all that read it. UserError with the folder."""
    found = []
    for run in runs:
        try:
            found.append(condensed(run))
            found[-1].check()
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            raise UserError(
                f"{run.folder} must hold a run of this study, but its spec.json or its log does not: {error!r:.200}; "
                "bring them back, or move the folder elsewhere"
            ) from error
    return found


def check_entries(where: str, entries: Any, needed: Mapping[str, str], allowed: Mapping[str, str] = {}) -> None:
    """ValueError where ``entries`` is no object with what is needed, or has it or what is allowed of another type."""
    check_type(where, entries, OBJECT)
    for key, type_ in {**{key: of for key, of in allowed.items() if key in entries}, **needed}.items():
        if key not in entries:
            raise ValueError(f"{where} has no {key}")
        check_type(f"{key} of {where}", entries[key], type_)


def check_type(what: str, value: Any, type_: str) -> None:
    fits = isinstance(value, _TYPES[type_]) and not isinstance(value, bool)
    if fits and isinstance(value, int | float):
        least, most = _WITHIN[type_]
        fits = least <= value <= most and abs(value) < _LARGEST
    if isinstance(value, str):
        fits = fits and value.isprintable() and bool(value.strip())
    if not fits:
        raise ValueError(f"{what} must be {type_}, got {_short(value)}")


def check_all(what: str, values: Any, type_: str) -> None:
    """Of a list."""
    check_type(what, values, LIST)
    for value in values:
        check_type(f"what is in {what}", value, type_)


def check_steps_of(what: str, steps: Any, line: Any) -> None:
    """Of a list of steps: they rise, and none is beyond the line's."""
    check_all(what, steps, POSITIVE)
    if any(a >= b for a, b in itertools.pairwise([*steps, line.step + 1])):
        raise ValueError(f"{what} must rise and end by step {line.step}, how far the run is")


def check_known(what: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise ValueError(f"{what} must be one of {', '.join(filter(None, known))}, got {_short(value)}")


def check_common(line: Any, studies: Collection[str], needed: Mapping[str, str]) -> None:
    """What lines of both studies have: a study of these in the spec, and what else the spec needs; how far it is, which
    is not beyond its end; of a training that is done its loss. One that is done has all its steps or has diverged."""
    check_type("step", line.step, COUNT)
    counts = dict.fromkeys(("steps", "batch", "context"), POSITIVE)
    needed = {"study": TEXT, "arm": TEXT, "seed": COUNT, **counts, **needed}
    texts = {key: TEXT for key, value in line.spec.items() if isinstance(value, str)}  # any may come into the page
    allowed = {**texts, **dict.fromkeys(("data", "device", "dtype", "schedule"), TEXT), "lr": SIZE}
    allowed |= dict.fromkeys(("split", "micro_batch", "validated", "sweep_tokens", "every"), POSITIVE)
    check_entries("the spec", line.spec, needed, allowed | dict.fromkeys(("warm_up", "cooldown"), COUNT))
    check_known("study of the spec", line.study, studies)
    steps, diverged = line.spec["steps"], 0
    if line.result is not None:
        training = {"loss": LOSS_OR_NULL, "diverged": COUNT} if line.study != "infer" else {}
        shares = dict.fromkeys(("accuracy", "accuracy_fp8"), SHARE_OR_NULL)
        allowed = {**shares, "seconds": SIZE_OR_NULL, "loss_fp8": LOSS_OR_NULL, "parameters": POSITIVE}
        check_entries("the result", line.result, {"gpu": TEXT, **training}, allowed)
        diverged = line.result.get("diverged", 0)
    if not diverged <= line.step <= steps:
        raise ValueError(f"step must be from {diverged}, where it diverged, to {steps}, its last, got {line.step}")
    if line.result is not None and line.step < steps and not diverged:
        raise ValueError(
            f"step of a run that is done must be {steps}, its last, where it did not diverge, got {line.step}"
        )


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
    meaning: what a line's arm is. UserError, with nothing written, where there is no run, or where arms of one name are
    two things: runs of both would be counted as one."""
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
                f"{other} {_short(before.result[other])} is kept, {has}, "
                f"and {other} {_short(line.result[other])} is left out"
            )
        else:  # in two runs that came to the same, other clocks
            again = rank(line) > rank(before) or (line.result == before.result and rank(line) == rank(before))
        if again:
            lines[key(line)] = line
    if not lines:
        raise UserError(f"{path} has no run, and --runs gave none; give folders of runs, or another --data")
    for words in said:
        print(words, file=sys.stderr)
    kept = [lines[of] for of in sorted(lines)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        texts = [json.dumps(asdict(line), separators=(",", ":"), allow_nan=False) + "\n" for line in kept]
        temporary.write_text("".join(texts))
    return kept


def _differing(a: dict[str, Any], b: dict[str, Any]) -> str | None:
    """The first thing that both results have, and not the same, but for how long they took on which GPU."""
    keys = [key for key in ("loss", *a) if key in a and key in b and key not in ("seconds", "gpu")]
    return next((key for key in keys if a[key] != b[key]), None)


def _short(value: Any) -> str:
    words = repr(value)  # of one line
    return words if len(words) <= 40 else f"{words[:40]}..."


def _name(spec: Spec) -> str:
    words = [str(spec[key]) for key in ("study", "model", "architecture", "arm") if key in spec]
    return ", ".join([*words, *(f"{key} {spec[key]}" for key in ("lr", "seed") if key in spec)])
