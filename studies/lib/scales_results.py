"""What came out of runs, small enough to be kept beside the code: a file with a line of JSON for each run.

{"run": name, "spec": {...}, "step": how far it is, "result": {...} or null,
 "losses": [[step, mean of the steps up to it], ...], "biases": [{"step": ..., "biases": {layer: {role: bias}}}, ...],
 "policies": {policy: {"loss": ..., "accuracy": ...}} of a sweep that is not finished}
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from models.names import MODELS, parameter_count

from .arms import CONSTANT, find_arm, make_emulation, make_recipe
from .checkpoints import DITHER
from .emulation import FAMILIES
from .inference import policies
from .lines import (
    BIAS_OR_NULL,
    COUNT,
    LIST,
    LOSS,
    LOSS_OR_NULL,
    OBJECT,
    POSITIVE,
    SHARE_OR_NULL,
    TEXT,
    WHOLE,
    check_all,
    check_common,
    check_entries,
    check_known,
    check_steps_of,
    check_type,
    merge_lines,
)
from .runs import Run, Spec, check_steps, losses_in

CRITERION = 0.995  # of 16 bits, by which the paper calls a policy good
OF_ARMS = ("recipe", "emulation", "dtype", "loss_scale")  # what of a spec an arm is
_USUAL = {"dtype": "bfloat16", "loss_scale": 1.0}
STUDIES = ("parity", "window", "infer", "finetune")
STRETCHES, LOOKS = 50, 60  # of a run's losses and of its records of biases, as many are kept


@dataclass(frozen=True)
class Line:
    run: str
    spec: Spec
    step: int
    result: dict[str, Any] | None
    losses: list[list[float]]
    biases: list[dict[str, Any]]
    policies: dict[str, dict[str, Any]] = field(default_factory=dict)

    def check(self) -> None:
        """ValueError where it is not what this file says of a line, or has what none of its readers can use."""
        check_common(self, STUDIES, {"model": TEXT, "data": TEXT})
        check_type("run", self.run, TEXT)
        if self.study in ("window", "infer"):
            check_entries("the spec", self.spec, {"sweep_tokens": POSITIVE})
        if self.study == "infer" and "checkpoint" not in self.spec:
            raise ValueError("the spec has no checkpoint; null stands for random weights")
        if self.study == "finetune":
            check_entries("the spec", self.spec, {"validated": POSITIVE, "checkpoint": TEXT})
            if self.spec.get("mode") != "train" or self.spec.get("dither") != DITHER:
                raise ValueError("it was fine-tuned in eval(), or from weights on rounding ties; run it anew")
        if self.spec.get("checkpoint") is not None:
            check_type("checkpoint of the spec", self.spec["checkpoint"], TEXT)
        if self.spec.get("sweep") is not None:
            check_all("sweep of the spec", self.spec["sweep"], WHOLE)
        if self.study == "window" and self.model not in sizes_of([self]):
            raise ValueError(f"the model's name must have its size, as in gpt-31M, got {self.model}")
        _check_arm(self.spec)
        check_all("losses", self.losses, LIST)
        if any(len(stretch) != 2 for stretch in self.losses):
            raise ValueError("losses must be pairs of a step and a loss")
        check_steps_of("steps of losses", [step for step, _ in self.losses], self)
        check_all("losses", [loss for _, loss in self.losses], LOSS)
        if self.result is not None:
            check_entries("the result", self.result, {}, {"inference": OBJECT, "biases": OBJECT})
        check_all("biases", self.biases, OBJECT)
        for record in [*self.biases, *biases_of(self, "inference")]:
            check_entries("a record of biases", record, {"step": POSITIVE, "biases": OBJECT})
            for layer, roles in record["biases"].items():
                check_entries(f"biases of {layer}", roles, {}, dict.fromkeys(("x", "w", "dy"), BIAS_OR_NULL))
        check_steps_of("steps of biases", [record["step"] for record in self.biases], self)
        check_type("policies", self.policies, OBJECT)
        for name, entry in self.inference.items():
            check_entries(f"the policy {name}", entry, {"accuracy": SHARE_OR_NULL}, {"loss": LOSS_OR_NULL})
            check_known("a policy, with 0 for its constant,", CONSTANT.sub(":0", name), policies([0]))

    @property
    def study(self) -> str:
        return self.spec["study"]

    @property
    def inference(self) -> dict[str, dict[str, Any]]:
        """What inference under each policy gave, as far as the sweep is."""
        return self.policies if self.result is None else self.result.get("inference", {})

    @property
    def model(self) -> str:
        return self.spec["model"]

    @property
    def is_random(self) -> bool:
        """Whether its weights are random: they have no accuracy to keep, and want other biases than trained ones."""
        return self.study == "infer" and not self.spec.get("checkpoint")

    @property
    def shared(self) -> Spec:
        """What its spec says but for its arm: runs that have it in common have seed, weights at the start and batches
        in common."""
        return {key: value for key, value in sorted(self.spec.items()) if key not in ("arm", *OF_ARMS, "record")}

    @property
    def pair(self) -> str:
        return json.dumps(self.shared)


def _check_arm(spec: Spec) -> None:
    check_entries("the spec", spec, {}, {"record": COUNT, "loss_scale": LOSS})
    known = find_arm(spec["arm"])
    if known is None:
        raise ValueError(f"arm of the spec must be one of this study's, got {spec['arm']!r:.40}")
    if _meaning(spec) != _meaning(known) and not (_is_fp8(spec) and _is_fp8(known)):
        raise ValueError(f"the arm {spec['arm']} of the spec must be {_meaning(known)}, got {_meaning(spec)!r:.80}")
    try:
        if "recipe" in spec:
            make_recipe(spec["recipe"])
        if "emulation" in spec:
            make_emulation(spec["emulation"])
            check_entries("its emulation", spec["emulation"], {"constant": WHOLE, "margin": WHOLE})
            check_known("family of its emulation", spec["emulation"]["family"], FAMILIES)
    except (TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"its arm is none: {error}") from error


def _meaning(spec: Spec) -> Spec:
    """Of its arm."""
    return {key: spec[key] for key in OF_ARMS if spec.get(key) not in (None, _USUAL.get(key))}


def _is_fp8(spec: Spec) -> bool:
    return not spec.keys().isdisjoint(("recipe", "emulation"))


def condensed(run: Run) -> Line:
    records = run.records()
    losses = [(record["step"], record["loss"]) for record in losses_in(records)]
    check_steps(run, [step for step, _ in losses])
    check_all("losses", [loss for _, loss in losses], LOSS_OR_NULL)  # a mean would hide one that is none
    biases = [record for record in records if "biases" in record]
    step = max((record["step"] for record in records), default=0)
    stretches = [  # of steps, finite or not: where one was not, they are held to the same stretches of other runs
        [part[-1][0], statistics.fmean(known)]
        for part in _parts(losses, STRETCHES)
        if (known := [loss for _, loss in part if loss is not None])
    ]
    looks = [part[-1] for part in _parts(biases, LOOKS) if part]
    result = run.result()
    partly = {
        record["policy"]: {"loss": record["loss"], "accuracy": record["accuracy"]}
        for record in records
        if result is None and "policy" in record
    }
    return Line(run.name, run.spec, step, result, stretches, looks, partly)


def _parts(items: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """At most so many, in order, whose lengths differ by at most one."""
    bounds = [len(items) * i // count for i in range(count + 1)]
    return [items[low:high] for low, high in itertools.pairwise(bounds)]


def merged(path: Path, new: Iterable[Line]) -> list[Line]:
    """Of all runs that differ in anything but ``record``, which changes nothing of a training; of two that do the one
    that has records."""
    return merge_lines(
        path,
        Line,
        new,
        lambda line: (line.study, *_place(line.spec), json.dumps({**line.spec, "record": None}, sort_keys=True)),
        lambda line: _meaning(line.spec),
        lambda line: (line.result is not None, line.step, bool(line.biases)),
    )


def _place(spec: Spec) -> tuple[str, int, str, int]:
    """Among lines of a study; a page has models and their lengths in the same order."""
    return spec["model"], spec["steps"], spec["arm"].replace(":", ""), spec["seed"]


def told_apart(lines: Sequence[Line]) -> list[Line]:
    """The same, but where runs of a model are no pairs their model is called by what tells them apart as well: that it
    is a checkpoint where it was trained here too, its text where it has several, and of one study what else differs
    than arm and seed. That weights are random is always said."""
    origins: dict[tuple[str, bool], set[_Origin]] = {}
    alike: dict[tuple[str, str, _Origin], list[Spec]] = {}
    for line in lines:
        origins.setdefault((line.model, line.is_random), set()).add(_origin(line))
        alike.setdefault((line.study, line.model, _origin(line)), []).append(line.shared)
    told = []
    for line in lines:
        parts = ["random weights"] * line.is_random
        parts += _origin_words(_origin(line), origins[line.model, line.is_random])
        parts += _differing(line, alike[line.study, line.model, _origin(line)])
        name = f"{line.model} ({', '.join(parts)})" if parts else line.model
        told.append(replace(line, spec={**line.spec, "model": name}))
    return told


def plain_name(model: str) -> str:
    """Without what ``told_apart`` has added."""
    return model.partition(" (")[0]


class _Origin(NamedTuple):
    checkpoint: str | None
    data: str | None
    split: int | None


def _origin(line: Line) -> _Origin:
    return _Origin(*(line.spec.get(key) for key in _Origin._fields))


def _origin_words(mine: _Origin, others: Collection[_Origin]) -> list[str]:
    words = []
    if mine.checkpoint and len({of.checkpoint for of in others}) > 1:
        words.append(f"checkpoint {mine.checkpoint[:8]}")
    if len({of.data for of in others}) > 1:
        words.append(f"text {mine.data and mine.data[:8]}")
    if len({of.split for of in others if of.data == mine.data}) > 1:
        words.append(f"split at {mine.split}")
    return words


def _differing(line: Line, others: Sequence[Spec]) -> list[str]:
    keys = [key for key in line.shared if key != "seed" and any(of.get(key) != line.shared[key] for of in others)]
    if "steps" in keys:  # which these follow
        keys = [key for key in keys if key not in ("warm_up", "cooldown")]
    return [
        _length_words(line.spec, others)
        if key == "steps"
        else _setting_words(key, line.shared[key], [of.get(key) for of in others])
        for key in keys
    ]


def _length_words(spec: Spec, others: Sequence[Spec]) -> str:
    """Readers think in tokens; steps are said where tokens in short would be the same of two lengths."""
    exact = {(of["steps"], of["batch"], of["context"]) for of in others}
    tokens = {(in_short(_tokens(of)), of["batch"], of["context"]) for of in others}
    return f"{in_short(_tokens(spec))} tokens" if len(tokens) == len(exact) else f"steps {spec['steps']}"


def _setting_words(key: str, value: Any, others: Iterable[Any]) -> str:
    """A number with as few digits, three or more, as tell it from the others."""
    if key == "sweep" and value:
        return f"c from {min(value)} to {max(value)}"
    if isinstance(value, float):
        numbers = {of for of in others if isinstance(of, float)}
        digits = next(n for n in range(3, 18) if len({f"{of:.{n}g}" for of in numbers}) == len(numbers))
        return f"{key.replace('_', ' ')} {value:.{digits}g}"
    return f"{key.replace('_', ' ')} {value}"


# ---- what is read off lines ------------------------------------------------------------------------------------------


def done(lines: Iterable[Line], *studies: str) -> list[Line]:
    return [line for line in lines if line.result is not None and line.study in studies]


def pairs(lines: Iterable[Line], arm: str, against: str, key: str, *, one_gpu: bool = False) -> dict[str, list[float]]:
    """{model: relative differences of ``result[key]``, one for each two runs that differ in their arm alone, in per
    cent}. That of a run that was lost is infinite; where the other was, or diverged, there is none. What an arm has in
    its own FP8, ``loss_fp8``, is held to that of the other, or where that has none to ``loss``. one_gpu: without pairs
    on two kinds of GPU."""
    alike: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for line in lines:
        if line.result is not None:
            alike.setdefault((line.model, line.pair), {})[line.spec["arm"]] = line.result
    found: dict[str, list[float]] = {}
    for (model, _), arms in sorted(alike.items(), key=lambda item: item[0]):
        other = arms.get(against, {})
        theirs = other.get(key, other.get(key.removesuffix("_fp8")))
        apart = one_gpu and arms.get(arm, {}).get("gpu") != other.get("gpu")
        if theirs and is_sound(other) and key in arms.get(arm, {}) and not apart:
            lost = arms[arm][key] is None or arms[arm]["loss"] is None
            found.setdefault(model, []).append(float("inf") if lost else 100 * (arms[arm][key] / theirs - 1))
    return found


def on_two_gpus(lines: Sequence[Line], arm: str, against: str) -> dict[str, int]:
    """{model: how many of the pairs are of runs on two kinds of GPU}, where there are any: what comes out between them
    can be the GPU's."""
    one = pairs(lines, arm, against, "loss", one_gpu=True)
    every = pairs(lines, arm, against, "loss")
    return {model: count for model, of in every.items() if (count := len(of) - len(one.get(model, [])))}


def is_sound(result: dict[str, Any]) -> bool:
    """Whether others can be held to it."""
    return result["loss"] is not None and not result.get("diverged")


def gaps(lines: Iterable[Line], arm: str) -> list[tuple[int, float]]:
    """[(step, by how many per cent the training loss up to it is above BF16's)] of one study and model, after the first
    tenth: at each step of means over the seeds that both arms have there. Seeds whose BF16 diverged do not count, nor
    do lost runs, not even with what they have until they were lost: they are in stretches of other lengths, and the
    mean of one step is not held to that of fifteen."""
    of = {(line.spec["arm"], line.pair): line for line in lines}
    at: dict[int, list[tuple[float, float]]] = {}
    for (name, pair), mine in of.items():
        theirs = of.get(("bf16", pair))
        lost = mine.result is not None and mine.result["loss"] is None
        if name != arm or lost or theirs is None or not (theirs.result is None or is_sound(theirs.result)):
            continue
        a, b = _stretches(mine), _stretches(theirs)
        for begin, end in a.keys() & b.keys():
            if end > mine.spec["steps"] / 10:
                at.setdefault(end, []).append((a[begin, end], b[begin, end]))
    return [(end, 100 * (sum(a for a, _ in at[end]) / sum(b for _, b in at[end]) - 1)) for end in sorted(at)]


def _stretches(line: Line) -> dict[tuple[int, int], float]:
    """{(after which step, up to which step): the mean loss}."""
    ends = [int(end) for end, _ in line.losses]
    return {of: loss for of, (_, loss) in zip(itertools.pairwise([0, *ends]), line.losses)}


def sizes_of(lines: Iterable[Line]) -> dict[str, float]:
    """Parameters by model: as its runs counted them, since a text's tokens decide how large an embedding is; else as
    published, or as its name has it (135M)."""
    lines = list(lines)
    names = {line.model: plain_name(line.model) for line in lines}
    written = {model: re.search(r"(?<![\d.])(\d+(?:\.\d+)?)([MB])(?![a-zA-Z])", name) for model, name in names.items()}
    sizes = {model: float(of[1]) * {"M": 1e6, "B": 1e9}[of[2]] for model, of in written.items() if of}
    sizes |= {model: parameter_count(MODELS[name]) for model, name in names.items() if name in MODELS}
    same = {line.model: (names[line.model], *_weights_of(line.spec)) for line in lines}
    counted = {same[line.model]: line.result["parameters"] for line in lines if "parameters" in (line.result or {})}
    return sizes | {model: counted[key] for model, key in same.items() if key in counted}


def _weights_of(spec: Spec) -> tuple[Any, ...]:
    """What decides how many a model by name has: the checkpoint, or the embeddings' lengths."""
    return (spec["checkpoint"],) if spec.get("checkpoint") else (spec.get("data"), spec["context"])


def family(model: str) -> str:
    """Models of one family are of one architecture, and can be put in a row by size."""
    return model.split("-")[0].replace("cerebras", "gpt")


def trained_tokens(line: Line) -> int:
    """Of the whole training; 0 of inference, whose steps are policies."""
    return _tokens(line.spec)


def _tokens(spec: Spec) -> int:
    return 0 if spec["study"] == "infer" else spec["steps"] * spec["batch"] * spec["context"]


def in_short(count: float) -> str:
    """Of parameters or tokens; a dash of none, or where it is not known."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.995 * unit:
            return f"{count / unit:.{int(count < 9.95 * unit)}f}{name}"
    return f"{count:.0f}" if count else "–"


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
    """Records of a run's biases: all of ``"training"``, or the one of ``"inference"``. Those of a training in FP16 are
    left out: its gradients were recorded with the loss scale, which moves."""
    if phase == "training":
        return [] if line.spec.get("dtype") == "float16" else line.biases
    seen = (line.result or {}).get("biases")
    return [{"step": line.step, "biases": seen}] if seen else []


def wanted(lines: Sequence[Line], role: str) -> dict[str, tuple[int, int]]:
    """{model: the least and the greatest bias that a tensor of this role has in inference}; where none was recorded, of
    fine-tuning's first step, whose weights are the checkpoint's."""
    found: dict[str, list[int]] = {}
    first: dict[tuple[str, _Origin], list[int]] = {}  # of fine-tuning's first step, whatever its rate and length
    same = {line.model: (plain_name(line.model), _origin(line)) for line in lines}
    for line in lines:
        begun = [record for record in biases_of(line, "training") if record["step"] == 1 and line.study == "finetune"]
        found.setdefault(line.model, []).extend(_biases(biases_of(line, "inference"), role))
        first.setdefault(same[line.model], []).extend(_biases(begun, role))
    told = {model: found[model] or first[same[model]] for model in found}
    return {model: (min(of), max(of)) for model, of in told.items() if of}


def _biases(records: Iterable[dict[str, Any]], role: str) -> list[int]:
    return [roles[role] for record in records for roles in record["biases"].values() if roles.get(role) is not None]
