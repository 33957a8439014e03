"""A runs.jsonl of either study: what is whole and wrong is refused with its number, before a report is written."""

import json
import math

import pytest
from scripts import script

from examples.gpt.errors import UserError
from studies.lib import scales_results
from studies.lib.lines import read_lines

ONE = {
    "run": "a", "step": 10, "result": {"loss": 1.5, "diverged": 0, "gpu": "CPU"},
    "losses": [[10, 1.5]], "biases": [],
    "spec": {"study": "parity", "arm": "amax", "model": "gpt-31M", "seed": 0, "steps": 10, "batch": 4, "context": 32,
             "data": "abc", "recipe": {"kind": "CurrentScaling"}},
}  # fmt: skip
GONE = object()
EMULATION = {"rule": "amax", "family": "ocp", "constant": 0, "margin": 3}


def changed(one, where, value):
    one = json.loads(json.dumps(one))
    *path, last = where.split(".")
    at = one
    for key in path:
        at = at[key]
    if value is GONE:
        del at[last]
    else:
        at[last] = value
    return one


def refused_lines(study, folder, *lines):
    """What a report says of a file of these lines; nothing else is written."""
    written = (one if isinstance(one, bytes) else json.dumps(one).encode() for one in lines)
    (folder / "runs.jsonl").write_bytes(b"".join(one + b"\n" for one in written))
    before = (folder / "runs.jsonl").read_bytes()
    with pytest.raises(UserError) as caught:
        script(f"studies/{study}.py").report([], folder, folder / "page.md")
    assert [path.name for path in folder.iterdir()] == ["runs.jsonl"]
    assert (folder / "runs.jsonl").read_bytes() == before and "\n" not in str(caught.value)
    return str(caught.value)


SPECS_OF_SCALES = [
    *((f"spec.{key}", GONE) for key in ("study", "arm", "model", "seed", "steps", "batch", "context", "data")),
    ("spec.study", "another"), ("spec.study", ["parity"]), ("spec.seed", "0"), ("spec.seed", 1.5), ("spec.seed", True),
    ("spec.data", 3), ("spec.checkpoint", 3), ("spec.sweep", 3), ("spec.sweep", ["a"]), ("spec.steps", 0),
    ("spec.split", [1]), ("spec.arm", "two\nlines"), ("spec.device", "\ud800"),
    ("spec.recipe", {"kind": "NoScaling"}), ("spec.recipe", {"kind": "convert"}), ("spec.recipe", {"kind": 3}),
    ("spec.recipe", {}), ("spec.recipe", 3),
    ("spec.recipe", {"kind": "CurrentScaling", "colour": 1}),
    ("spec.recipe", {"kind": "DelayedScaling", "margin": "a"}),
    ("spec.emulation", {}), *(("spec.emulation", {**EMULATION, key: of}) for key, of in (
        ("rule", "none"), ("family", "none"), ("constant", "a"), ("margin", None))),
    *(("spec.arm", arm) for arm in ("zz", "bf16", "fp16", "cscale:02", "cscale:-0", "cscale:٣", "cscale:17")),
    ("spec.record", -1), ("spec.loss_scale", 0), ("spec.recipe", GONE),
]  # fmt: skip
RESULTS = [
    ("result.gpu", GONE), ("result.loss", GONE), ("result.diverged", GONE),
    ("result.loss", "low"), ("result.loss", math.nan), ("result.loss", 1e300), ("result.parameters", 0),
    *((f"result.{key}", loss) for key in ("loss", "loss_fp8") for loss in (0, 0.0, -1.5, 1e-300)),
    ("result.loss", True), ("result.diverged", None), ("result.accuracy", "high"), ("result.loss_fp8", [1]),
    ("result", 3), ("step", "a"), ("losses", GONE),
    # What no run can have.
    *((f"result.{key}", share) for key in ("accuracy", "accuracy_fp8") for share in (5.0, -0.1)),
    *(("result.diverged", step) for step in (-1, 11)), ("result.seconds", -1.0), ("spec.seed", -1),
    *((f"spec.{key}", 0) for key in ("steps", "batch", "context", "micro_batch", "validated", "every")),
    *((f"spec.{key}", of) for key in ("lr", "warm_up", "cooldown") for of in (-1, "1")), ("spec.dtype", 16),
    ("spec.split", "1"), *(("step", step) for step in (-1, 9, 11)),
]  # fmt: skip


@pytest.mark.parametrize(
    "where, value",
    [*SPECS_OF_SCALES, *RESULTS, ("losses", [1.5]), ("losses", [[1, "a"]]), ("losses", [[1]]),
     *(("losses", [[10, loss]]) for loss in (0, -1.5, 1e-300, None)), ("biases", [3]), ("policies", 3),
     ("biases", [{"step": 1, "biases": {"blocks.0.mlp.up": 3}}]),
     ("biases", [{"step": 1, "biases": {"blocks.0.mlp.up": {"x": [1]}}}]),
     ("result.biases", {"blocks.0.mlp.up": {"x": "a"}}), ("result.biases", {"blocks.0.mlp.up": {"x": 32}}),
     *(("result.inference", {name: {"accuracy": 0.4}}) for name in ("cscale:a", "cscale:02", "cscale", "zz", "bf16:0")),
     ("result.inference", {"bf16": {"accuracy": 1.5}}), ("policies", []),
     *(("losses", [[a, 1.5], [b, 1.5]]) for a, b in ((0, 10), (5, 5), (10, 5), (5, 11), (5.5, 10))),
     *(("biases", [{"step": step, "biases": {}} for step in steps]) for steps in ((0,), (11,), (5, 5), (5, 1)))],
)  # fmt: skip
def test_a_line_that_is_whole_and_wrong_is_refused_with_its_number(tmp_path, where, value):
    said = refused_lines("scales", tmp_path, ONE, changed(ONE, where, value))
    assert said.startswith(f"{tmp_path}/runs.jsonl must hold a run a line, but line 2 does not: ")


@pytest.mark.parametrize(
    "study, where, value",
    [
        ("infer", "spec.checkpoint", GONE),
        ("infer", "spec.sweep_tokens", GONE),
        ("window", "spec.sweep_tokens", GONE),
        ("window", "spec.model", "nameless"),
        *(
            (study, "result.inference", value)
            for study in ("infer", "window")
            for value in (3, {"bf16": {}}, {"bf16": {"loss": 0, "accuracy": 0.4}})
        ),
    ],
)
def test_a_line_of_a_sweep_that_is_wrong_is_refused(tmp_path, study, where, value):
    spec = {**ONE["spec"], "study": study, "arm": "bf16", "checkpoint": None, "sweep": [0], "sweep_tokens": 64}
    result = {"gpu": "CPU", "inference": {"bf16": {"loss": 1.5, "accuracy": 0.4}}}
    result |= {"loss": 1.5, "diverged": 0} if study == "window" else {}
    one = changed({**ONE, "spec": spec, "result": result}, "spec.recipe", GONE)
    (tmp_path / "runs.jsonl").write_text(json.dumps(one) + "\n")
    assert len(read_lines(tmp_path / "runs.jsonl", scales_results.Line)) == 1
    assert "but line 1 does not: " in refused_lines("scales", tmp_path, changed(one, where, value))


@pytest.mark.parametrize(
    "where, value",
    [*((f"spec.{key}", GONE) for key in ("study", "architecture", "arm", "seed", "steps", "batch", "context")),
     *((f"spec.{key}", GONE) for key in ("size", "lr", "warm_up", "fp8")),
     ("spec.study", "another"), ("spec.seed", "0"), ("spec.lr", "high"), ("spec.fp8", None), *RESULTS,
     ("spec.arm", "bf17"), ("spec.size", "huge"), ("spec.architecture", "ops"), ("spec.architecture", "op:tanh"),
     *((f"result.{key}", value) for key in ("seconds", "parameters") for value in (GONE, None)),
     ("spec.lr", 0), ("spec.arm", "fp8"), ("spec.fp8", {"history": 16}), ("kurtosis.qkv", [[-3.0, 1.0]]),
     ("losses", ["a"]), ("losses", [1.5] * 9 + [-1.5]), ("losses", [1.5] * 9), ("grad_norms", [1.0] * 11),
     ("grad_norms", [-1.0] * 10), ("rms", {"qkv": [[-1.0]]}),
     ("grad_norms", 3), ("samples", [1.5]), ("samples", [0]), ("samples", [11]), ("samples", [1, 2]), ("kurtosis", []),
     ("kurtosis", {}), ("kurtosis.ffn", GONE), *((f"kurtosis.{kind}", of) for kind in ("qkv", "block")
     for of in (3, [], [3], [["a"]], [[1.0]] * 2)), ("rms", {"qkv": [3]}), ("rms", {"qkv": []})],
)  # fmt: skip
def test_a_line_of_fog_that_is_whole_and_wrong_is_refused_with_its_number(tmp_path, where, value):
    spec = {key: of for key, of in ONE["spec"].items() if key not in ("model", "recipe")}
    spec |= {
        "study": "provoke",
        "architecture": "op",
        "arm": "bf16",
        "size": "tiny",
        "lr": 1e-3,
        "warm_up": 1,
        "fp8": {},
    }
    result = {**ONE["result"], "seconds": 1.0, "parameters": 1000}
    one = {"spec": spec, "step": 10, "result": result, "losses": [1.5] * 10, "grad_norms": [1.0] * 10, "samples": [1],
           "kurtosis": {kind: [[3.0, None]] for kind in ("qkv", "ffn", "block")}}  # fmt: skip
    said = refused_lines("fog", tmp_path, one, changed(one, where, value))
    assert said.startswith(f"{tmp_path}/runs.jsonl must hold a run a line, but line 2 does not: ")


@pytest.mark.parametrize(
    "line", [b'{"run": "\xe9"}', "\ufeff{}".encode("utf-16"), b"[" * 100_000, b"\x89PNG\x00", b"3"]
)
@pytest.mark.parametrize("study", ["scales", "fog"])
def test_a_file_of_runs_that_is_none_is_refused(tmp_path, study, line):
    said = refused_lines(study, tmp_path, line)
    assert said.startswith(f"{tmp_path}/runs.jsonl must hold a run a line, but line 1 does not: ")


@pytest.mark.parametrize("study", ["scales", "fog"])
@pytest.mark.parametrize("there", [None, ""])
def test_a_report_of_no_runs_is_refused(tmp_path, study, there):
    data = tmp_path / "data"
    if there is not None:
        data.mkdir()
        (data / "runs.jsonl").write_text(there)
    with pytest.raises(UserError, match="runs.jsonl has no run, and --runs gave none; "):
        script(f"studies/{study}.py").report([], data, tmp_path / "page.md")
    assert [path.name for path in tmp_path.rglob("*")] == ([] if there is None else ["data", "runs.jsonl"])


@pytest.mark.parametrize("words", ["", " ", "two\nlines", "a line\n", 3, None])
def test_words_of_texts_are_read_before_anything_is_written(tmp_path, words):
    (tmp_path / "texts.json").write_text(json.dumps({"abc": {"words": words, "can_be_made": True, "train_tokens": 1}}))
    (tmp_path / "runs.jsonl").write_text(json.dumps(ONE) + "\n")
    with pytest.raises(UserError, match="texts.json must have .* of each text, but has not: words must be"):
        script("studies/scales.py").report([], tmp_path, tmp_path / "page.md")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs.jsonl", "texts.json"]
    assert (tmp_path / "runs.jsonl").read_text() == json.dumps(ONE) + "\n"
