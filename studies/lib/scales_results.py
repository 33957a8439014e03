"""What came out of runs, small enough to be kept beside the code: a file with a line of JSON for each run.

{"run": name, "spec": {...}, "step": how far it is, "result": {...} or null,
 "losses": [[step, mean of the steps up to it], ...], "biases": [{"step": ..., "biases": {layer: {role: bias}}}, ...]}
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch_fp8.files import replacing

from examples.gpt.errors import UserError
from models.names import MODELS, parameter_count

from .runs import Run, Spec, with_split

CRITERION = 0.995  # of 16 bits, by which the paper calls a policy good
STRETCHES, LOOKS = 50, 60  # of a run's losses and of its records of biases, as many are kept


@dataclass(frozen=True)
class Line:
    run: str
    spec: Spec
    step: int
    result: dict[str, Any] | None
    losses: list[list[float]]
    biases: list[dict[str, Any]]

    @property
    def study(self) -> str:
        return self.spec["study"]

    @property
    def model(self) -> str:
        return self.spec["model"]


def condensed(run: Run) -> Line:
    records = run.records()
    losses = [(record["step"], record["loss"]) for record in records if record.get("loss") is not None]
    biases = [record for record in records if "biases" in record]
    step = max((record["step"] for record in records), default=0)
    stretches = [
        [part[-1][0], statistics.fmean(loss for _, loss in part)] for part in _parts(losses, STRETCHES) if part
    ]
    looks = [part[-1] for part in _parts(biases, LOOKS) if part]
    return Line(run.name, run.spec, step, run.result(), stretches, looks)


def _parts(items: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """At most so many, in order, whose lengths differ by at most one."""
    bounds = [len(items) * i // count for i in range(count + 1)]
    return [items[low:high] for low, high in itertools.pairwise(bounds)]


def read_lines(path: Path) -> list[Line]:
    if not path.exists():
        return []
    try:
        lines = [Line(**json.loads(line)) for line in path.read_text().splitlines()]
        return [replace(line, spec=with_split(line.spec)) for line in lines]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} must hold a run a line, but does not: {error}; write it anew from the runs") from error


def merged(path: Path, new: Iterable[Line]) -> list[Line]:
    """The file with what is new in place of what it had of the same runs, in the order of names. UserError, with
    nothing written, where a run of that name was another one."""
    lines = {(line.study, line.run): line for line in read_lines(path)}
    for line in new:
        before = lines.get((line.study, line.run))
        if before and before.spec != line.spec:
            raise UserError(f"{path} has a run {line.run} of another spec; remove the file, or give another --data")
        if not before or line.step >= before.step:
            lines[line.study, line.run] = line
    kept = [lines[key] for key in sorted(lines)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(asdict(line)) + "\n" for line in kept))
    return kept


# ---- what is read off lines ------------------------------------------------------------------------------------------


def done(lines: Iterable[Line], *studies: str) -> list[Line]:
    return [line for line in lines if line.result is not None and line.study in studies]


def inference_ratios(lines: Iterable[Line]) -> dict[str, dict[str, float]]:
    """{model: {policy: next-token accuracy over that of 16 bits}}, the mean over seeds. Random weights have none."""
    found: dict[str, dict[str, list[float]]] = {}
    for line in lines:
        if line.study == "infer" and not line.spec["checkpoint"]:
            continue
        inference = (line.result or {}).get("inference", {})
        whole = inference.get("bf16", {}).get("accuracy")
        for policy, entry in inference.items():
            if whole and policy != "bf16":
                ratio = (entry["accuracy"] or 0.0) / whole
                found.setdefault(line.model, {}).setdefault(policy, []).append(ratio)
    return {model: {name: statistics.fmean(r) for name, r in of.items()} for model, of in found.items()}


def constants(ratios: Mapping[str, float], family: str = "cscale") -> dict[int, float]:
    """{c: ratio} of the policies ``cscale:c``, in order."""
    found = {int(name.partition(":")[2]): ratio for name, ratio in ratios.items() if name.startswith(f"{family}:")}
    return dict(sorted(found.items()))


def window(ratios: Mapping[int, float]) -> tuple[int, int] | None:
    """The longest run of neighbouring constants whose ratio is at least CRITERION; None where there is none."""
    best: list[int] = []
    run: list[int] = []
    for c in sorted(ratios):
        if ratios[c] < CRITERION:
            run = []
        else:
            run = [*run, c] if run and run[-1] == c - 1 else [c]
            best = max(best, run, key=len)
    return (best[0], best[-1]) if best else None


def pairs(lines: Iterable[Line], arm: str, against: str, key: str) -> dict[str, list[float]]:
    """{model: relative differences of ``result[key]``, one for each seed that both arms have done}, in per cent. A run
    that was lost has no such figure; its pair is infinite."""
    by_seed: dict[tuple[str, int], dict[str, float | None]] = {}
    for line in lines:
        if line.result is not None:
            by_seed.setdefault((line.model, line.spec["seed"]), {})[line.spec["arm"]] = line.result.get(key)
    found: dict[str, list[float]] = {}
    for (model, _), arms in sorted(by_seed.items()):
        if arm in arms and against in arms:
            mine, theirs = arms[arm], arms[against]
            lost = mine is None or theirs is None
            found.setdefault(model, []).append(float("inf") if lost else 100 * (mine / theirs - 1))
    return found


def sizes_of(lines: Iterable[Line]) -> dict[str, float]:
    """Parameters by model: as published, or as the run of a checkpoint counted them."""
    told = {line.model: line.result["parameters"] for line in lines if "parameters" in (line.result or {})}
    models = {line.model for line in lines}
    return told | {model: parameter_count(MODELS[model]) for model in models if model in MODELS}


def trained_tokens(line: Line) -> int:
    """Of the whole training; 0 of inference, whose steps are policies."""
    return 0 if line.study == "infer" else line.spec["steps"] * line.spec["batch"] * line.spec["context"]


def arms_of(lines: Iterable[Line]) -> list[str]:
    """By name, BF16's first."""
    return sorted({line.spec["arm"] for line in lines}, key=lambda arm: (not arm.startswith("bf16"), arm))


LINEARS = {  # by how the last parts of a layer's name begin
    "qkv": r"(qkv|[qkv](_proj)?)$",
    "attention out": r"(attn\.proj|attention\.o|o_proj)$",
    "MLP up, gate": r"(up|gate)(_proj)?$",
    "MLP down": r"down(_proj)?$",
}


def place(layer: str) -> tuple[int, str]:
    """Depth and type of a linear layer, by its name."""
    depth = re.search(r"\.(\d+)\.", f".{layer}.")
    kind = next((kind for kind, pattern in LINEARS.items() if re.search(rf"(^|\.){pattern}", layer)), "other")
    return int(depth[1]) if depth else 0, kind


def biases_of(line: Line, phase: str) -> list[dict[str, Any]]:
    """Records of a run's biases: all of ``"training"``, or the one of ``"inference"``."""
    if phase == "training":
        return line.biases
    seen = (line.result or {}).get("biases")
    return [{"step": line.step, "biases": seen}] if seen else []
