"""The folder of a study's runs: what is there goes on, what is not a run of it or is damaged is refused in words."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from studying import QUICK, ROOT, TINY, command, run

from examples.gpt.errors import UserError
from examples.gpt.lock import locked
from studies.lib import fog_results, scales_results
from studies.lib.arms import arm
from studies.lib.lines import new_lines, read_lines
from studies.lib.runs import all_runs, claim
from studies.lib.training import in_whole_contexts


def test_a_folder_of_another_run_is_refused_and_nothing_is_written(tmp_path):
    claim(tmp_path, {"a": {"lr": 1.0, "steps": 5}})
    with pytest.raises(UserError, match=r"a holds another run: it differs in lr \(was 1.0, is 2.0\)"):
        claim(tmp_path, {"new": {"lr": 2.0}, "a": {"lr": 2.0, "steps": 5}})
    assert [run.name for run in all_runs(tmp_path)] == ["a"]
    assert claim(tmp_path, {"a": {"lr": 1.0, "steps": 5}})[0].result() is None


def test_a_folder_that_another_process_writes_to_gets_no_runs(tmp_path, tokens):
    with locked(tmp_path):
        refused = run("parity", *QUICK, tokens=tokens, out=tmp_path)
    assert refused.returncode == 2 and "another run is writing to" in refused.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"\xff\0\x80", b"[1]", b"[" * 100_000])
def test_a_spec_that_is_none_is_refused_with_what_to_do(tmp_path, tokens, content):
    (one,) = claim(tmp_path / "out", {"gpt-tiny_bf16_0": {}})
    (one.folder / "spec.json").write_bytes(content)
    said = "but its spec.json is none (", "; bring that back whole, or move the folder elsewhere\n"
    for made in (run("parity", *QUICK, "--arms", "bf16", tokens=tokens, out=tmp_path / "out"),
                 command("report", "--runs", tmp_path / "out", "--data", tmp_path / "data")):  # fmt: skip
        assert made.returncode == 2 and all(words in made.stderr for words in (str(one.folder), *said))
    assert [path.name for path in one.folder.iterdir()] == ["spec.json"] and not (tmp_path / "data").exists()


def test_a_full_disk_is_told_with_what_was_to_be_written_and_what_to_do(tmp_path, tokens):
    def full(path, *_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write has it: of no name

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        made = run("parity", *QUICK, "--arms", "bf16", tokens=tokens, out=tmp_path)
    spec = tmp_path / "gpt-tiny_bf16_0" / "spec.json"
    said = f"could not read or write {spec}: No space left on device; what was there before is unharmed, so make room"
    assert made.returncode == 2 and said in made.stderr and not list(spec.parent.iterdir())


@pytest.mark.parametrize("left", ["log.jsonl", "state.ckpt"])
def test_what_is_left_of_a_run_without_its_spec_is_nobodys(tmp_path, left):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / left).write_text("{}\n")
    with pytest.raises(UserError, match=f"a/{left} is of a run whose spec.json is gone; delete "):
        claim(tmp_path, {"new": {"lr": 1.0}, "a": {"lr": 1.0}})
    assert not (tmp_path / "new").exists()
    if left == "log.jsonl":
        with pytest.raises(UserError, match="spec.json is gone; bring it back, or move .*/a elsewhere"):
            all_runs(tmp_path)


def test_validated_are_whole_contexts_and_so_says_the_spec(tmp_path, tokens):
    assert [in_whole_contexts(tokens, 32) for tokens in (64, 80, 5, 0, -1)] == [64, 64, 32, 0, -1]
    assert in_whole_contexts(5, 0) == 5
    run("infer", "--models", "gpt-tiny", "--context", "32", "--sweep-tokens", "80", "--constants", "0", "0",
        tokens=tokens, out=tmp_path)  # fmt: skip
    assert all_runs(tmp_path)[0].spec["sweep_tokens"] == 64


def test_what_is_kept_of_runs_is_not_repeated(tmp_path, tokens):
    study, kept = ["parity", *QUICK, "--arms"], tmp_path / "data" / "runs.jsonl"
    assert run(*study, "bf16", tokens=tokens, out=tmp_path / "first").returncode == 0
    shutil.copytree(tmp_path / "first" / "gpt-tiny_bf16_0", tmp_path / "first" / "half")
    half = all_runs(tmp_path / "first")[1]
    half.log.write_text('{"step": 1, "loss": 2.0}\n')
    spec = {**half.spec, "arm": "delayed", "recipe": arm("delayed")["recipe"]}
    (half.folder / "spec.json").write_text(json.dumps(spec))
    report = ["report", "--runs", tmp_path / "first", "--data", kept.parent, "--page", tmp_path / "page"]
    assert command(*report).returncode == 0

    again = run(*study, "bf16", "--kept", kept, tokens=tokens, out=tmp_path / "none")
    assert again.returncode == 0 and f"1 of 1 runs are done in {kept}\n" == again.stdout, again.stderr
    assert not (tmp_path / "none").exists()
    recorded = run(*study, "bf16", "--record", "1", "--kept", kept, tokens=tokens, out=tmp_path / "recorded")
    assert "0 of 1 runs are done in" in recorded.stdout
    assert command(*report[:2], tmp_path / "recorded", *report[3:]).returncode == 0
    again = run(*study, "bf16", "--kept", kept, tokens=tokens, out=tmp_path / "none")  # which has none
    assert f"1 of 1 runs are done in {kept}\n" == again.stdout, again.stderr
    more = run(*study, "bf16", "delayed", "--kept", kept, tokens=tokens, out=tmp_path / "second")
    assert more.returncode == 0 and f"1 of 2 runs are done in {kept}\nall 1 runs are done" in more.stdout, more.stderr
    assert [one.name for one in all_runs(tmp_path / "second")] == ["gpt-tiny_delayed_0"]
    longer = run(
        "parity", *TINY, "--steps", "3", "--arms", "bf16", "--kept", kept, tokens=tokens, out=tmp_path / "longer"
    )
    assert "0 of 1 runs are done in" in longer.stdout and all_runs(tmp_path / "longer")

    one = kept.read_text().splitlines()[0]
    for name, line in {
        "none": '{"spec": {}}',
        "wrong": one.replace('"gpu":', '"card":'),
        "latin": '{"run": "\xe9"}',
    }.items():
        (tmp_path / name).write_text(f"{one}\n{line}\n", encoding="latin-1")
    (tmp_path / "deep").write_text(f"{one}\n{'[' * 100_000}\n")
    bad = {
        tmp_path / name: "must hold a run a line, but line 2 does not" for name in ("none", "wrong", "latin", "deep")
    }
    for path, said in {**bad, tmp_path / "gone": "No such file"}.items():
        refused = run(*study, "bf16", "--kept", path, tokens=tokens, out=tmp_path / "not made")
        assert refused.returncode == 2 and said in refused.stderr and str(path) in refused.stderr, refused.stderr
        assert refused.stderr.count("\n") == 1 and not (tmp_path / "not made").exists()


def test_a_model_is_called_as_it_is_written_however_it_was_typed(tmp_path, tokens):
    typed = ["GPT-Tiny" if word == "gpt-tiny" else word for word in QUICK]
    assert run("parity", *typed, "--arms", "bf16", tokens=tokens, out=tmp_path).returncode == 0
    (one,) = all_runs(tmp_path)
    assert (one.name, one.spec["model"]) == ("gpt-tiny_bf16_0", "gpt-tiny")


@pytest.mark.parametrize("kind", [scales_results, fog_results], ids=["scales", "fog"])
@pytest.mark.parametrize("loss", [-7.5, 0, 10**400, 1e300])
def test_a_folder_whose_losses_are_none_does_not_come_into_runs_jsonl(tmp_path, kind, loss):
    """Not even in a long run, whose losses are kept as means of many."""
    study = "fog" if kind is fog_results else "scales"
    line = read_lines(ROOT / "studies" / "results" / study / "runs.jsonl", kind.Line)[-1]
    records = [{"step": step, "loss": 2.0, "grad_norm": 1.0} for step in range(1, 201)]
    records[7]["loss"] = loss
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "spec.json").write_text(json.dumps(line.spec))
    (tmp_path / "a" / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    said = "a must hold a run of this study, but its spec.json or its log"
    if loss > 1e308:  # no float: a log's reader has refused it already
        said = "a/log.jsonl must hold a JSON object with a step a line, but line 8 does not .its loss is '10000"
    with pytest.raises(UserError, match=said):
        new_lines(all_runs(tmp_path), kind.condensed)


@pytest.mark.parametrize("kind", [scales_results, fog_results], ids=["scales", "fog"])
@pytest.mark.parametrize("key", ["lr", "more"])
def test_a_folder_whose_spec_is_not_finite_does_not_come_into_runs_jsonl(tmp_path, kind, key):
    """No reader of runs.jsonl would take it any more."""
    study = "fog" if kind is fog_results else "scales"
    spec = read_lines(ROOT / "studies" / "results" / study / "runs.jsonl", kind.Line)[-1].spec
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "spec.json").write_text(json.dumps({**spec, key: float("nan")}))
    with pytest.raises(UserError, match="spec.json is none .what is not finite must be null, got NaN"):
        new_lines(all_runs(tmp_path), kind.condensed)


@pytest.mark.parametrize("kind", [scales_results, fog_results], ids=["scales", "fog"])
@pytest.mark.parametrize("key", ["lr", "seed", "steps", "batch", "data"])
@pytest.mark.parametrize("value", [None, [1], "gone"])
def test_a_folder_whose_spec_is_wrong_does_not_come_into_runs_jsonl(tmp_path, kind, key, value):
    study = "fog" if kind is fog_results else "scales"
    spec = dict(read_lines(ROOT / "studies" / "results" / study / "runs.jsonl", kind.Line)[-1].spec)
    spec[key] = value
    if value == "gone":
        del spec[key]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "spec.json").write_text(json.dumps(spec))
    if value == "gone" and (study, key) in (("scales", "lr"), ("fog", "data")):  # that nothing needs
        assert new_lines(all_runs(tmp_path), kind.condensed)
        return
    with pytest.raises(UserError, match="a must hold a run of this study, but its spec.json"):
        new_lines(all_runs(tmp_path), kind.condensed)


@pytest.mark.parametrize(
    "line",
    ["3", "{}", "[]", '{"step": "a"}', "null", '{"step": true}', '{"step": 2, "lr": NaN}',
     *(f'{{"step": 2, "loss": {x}}}' for x in ("NaN", "-Infinity", "1e999", "1" + 400 * "0", '"abc"', "[1]", "true"))],
)  # fmt: skip
def test_a_log_that_holds_another_thing_is_refused_in_words(tmp_path, tokens, line):
    study = ["parity", *TINY, "--arms", "bf16", "--steps", "2"]
    assert run(*study, "--minutes", "0.0001", tokens=tokens, out=tmp_path).returncode == 0
    (one,) = all_runs(tmp_path)
    one.log.write_text('{"step": 1, "loss": 2.0}\n' + line + "\n")
    one.checkpoint.write_bytes(b"what a training would go on from")
    assert one.step() == 1
    before = {path: path.read_bytes() for path in one.folder.iterdir()}
    report = ["report", "--runs", tmp_path, "--data", tmp_path / "data", "--page", tmp_path / "page"]
    for made in (run(*study, tokens=tokens, out=tmp_path), command(*report)):
        assert made.returncode == 2 and made.stderr.count("\n") == 1, made.stderr
        assert f"{one.log} must hold a JSON object with a step a line, but line 2 does not (" in made.stderr
        assert "; bring the log back" in made.stderr
    assert before == {path: path.read_bytes() for path in one.folder.iterdir()}
