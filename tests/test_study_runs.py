"""How a study's runs end: done, lost, stopped, killed, and how they go on."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path

import pytest
import torch
import torch_fp8 as fp8
from studying import PLAN, SCALES, TINY, Table, kill, records_of, run, scales, training

from examples.gpt import checkpoint
from examples.gpt.errors import UserError
from examples.gpt.lock import is_locked, locked
from studies.lib import scales_results
from studies.lib.corpus import read_corpus, text_of
from studies.lib.pool import _last_words, how_it_ended, serve, work
from studies.lib.progress import far, length, say_missing
from studies.lib.runs import all_runs, claim, missing


def test_a_run_that_could_say_nothing_is_told_with_the_room_on_its_disk(tmp_path):
    (one,) = claim(tmp_path, {"a": {"steps": 5}})
    one.output.touch()
    assert re.match(r"it said nothing, with [\d,]+ bytes left on the disk", _last_words(one, 1))


def test_what_is_missing_is_said(tmp_path):
    runs = claim(tmp_path, {name: {"steps": 5} for name in "abc"})
    runs[0].log.write_text('{"step": 5, "loss": 1}\n{"step": 5, "result": {"loss": 1}}\n')
    runs[1].log.write_text('{"step": 3, "loss": 1}\n{"step": 4, "lo')  # a kill in the midst of a line
    assert missing(runs) == runs[1:] and runs[0].result() == {"loss": 1}
    assert say_missing(runs) == "1 of 3 runs are done; still missing: b (3 of 5 steps), c (0 of 5 steps)"
    runs[1].log.write_text('{"step": 3, "loss": 1}\n{"step": 3, "biases": {' + '"a": 1,' * 20_000 + "\n")
    assert runs[1].step() == 0


class Failing(Table):
    """Whose loss is not finite in these passes, and these of each so many."""

    def __init__(self, passes):
        super().__init__()
        self.passes, self.done = passes, 0

    def forward(self, tokens):
        self.done += self.training
        return self.table(tokens) * (math.nan if self.done in self.passes and self.training else 1.0)


class Looks:
    """An observer of each third step."""

    def wants(self, step):
        return step % 3 == 0

    def watch(self):
        return nullcontext()

    def seen(self):
        return {"biases": {}}


def test_a_lost_training_ends_and_says_so(tmp_path, corpus):
    one = training(tmp_path, corpus)
    with torch.no_grad():
        one.model.table.weight.fill_(math.nan)
    assert one.go_on(lambda: False)
    result = one.run.result()
    assert result["diverged"] == 1 and result["loss"] is None and one.step == 1


@pytest.mark.parametrize("failing, loss_scale, end", [([13], 1.0, 7), ([13], 8.0, 30), (range(13, 99), 8.0, 26)])
def test_where_a_training_is_lost_does_not_hang_on_when_its_losses_are_looked_at(
    tmp_path, corpus, monkeypatch, failing, loss_scale, end
):
    """Each step has two passes. On a GPU losses are fetched together, at some steps that are observed, and whenever it
    is time for a checkpoint."""
    logs = []
    for name, fetch_every, save, observer in (
        ("each", 1, 60, None), ("late", 20, 60, None), ("saved", 20, 0, None), ("looked", 20, 60, Looks()),
        ("looked at each", 1, 60, Looks()),
    ):  # fmt: skip
        monkeypatch.setattr("studies.lib.training._SAVE", save)
        how = {"loss_scale": loss_scale, "steps": 30}
        one = training(tmp_path / name, corpus, lambda: Failing(failing), observer, **how)
        one._fetch_every = fetch_every
        assert one.go_on(lambda: False) and not one.run.checkpoint.exists()
        logs.append(records_of(tmp_path / name)["run"])
    assert logs[0] == logs[1] == logs[2] and logs[3] == logs[4]
    assert [record for record in logs[3] if "biases" not in record] == logs[0]
    *steps, last = logs[0]
    assert [record["step"] for record in steps] == list(range(1, end + 1)) and last["step"] == end
    assert last["result"]["diverged"] == 7 and (last["result"]["loss"] is None) == (end < 30)


def test_a_study_killed_anywhere_ends_as_if_it_had_not_been(tmp_path, tokens):
    study = ["parity", *TINY, "--arms", "bf16", "cscale:2", "--steps", "30", "--record", "7"]
    whole = run(*study, "--jobs", "2", tokens=tokens, out=tmp_path / "whole")
    assert whole.returncode == 0 and "all 2 runs are done" in whole.stdout, whole.stderr

    out = tmp_path / "killed"
    killed = [*SCALES, *study, "--tokens", str(tokens), "--out", str(out)]
    kill(killed, out / "gpt-tiny_bf16_0" / "log.jsonl", 5)
    # A run that cannot go on does not stop the others.
    (out / "gpt-tiny_bf16_0" / "state.ckpt").write_bytes(b"nothing")
    some = run(*study, tokens=tokens, out=out)
    assert some.returncode == 1 and "gpt-tiny_bf16_0 failed with 2" in some.stderr
    assert "1 of 2 runs are done; still missing: gpt-tiny_bf16_0 (" in some.stdout
    (out / "gpt-tiny_bf16_0" / "state.ckpt").unlink()
    rest = run(*study, tokens=tokens, out=out)
    assert rest.returncode == 0 and "all 2 runs are done" in rest.stdout, rest.stderr
    assert records_of(out) == records_of(tmp_path / "whole") and not list(out.glob("*/state.ckpt"))


def test_a_training_that_was_stopped_goes_on_to_the_bit(tmp_path, corpus):
    whole, part = (
        training(tmp_path / "whole", corpus, loss_scale=8.0),
        training(tmp_path / "part", corpus, loss_scale=8.0),
    )
    assert whole.go_on(lambda: False) and not part.go_on(lambda: part.step == 4)
    assert part.step == 4 and part.run.result() is None
    part.run.log.write_text(part.run.log.read_text() + '{"step": 5, "loss": 9}\n{"step"')  # logged after the checkpoint
    again = training(tmp_path / "part", corpus, loss_scale=8.0)
    assert again.step == 4 and again.go_on(lambda: False)
    assert records_of(tmp_path / "whole") == records_of(tmp_path / "part")
    assert whole.model.table.weight.equal(again.model.table.weight)


@pytest.mark.parametrize("damage", ["gone", "empty", "a step is gone", "twice", "out of order", "the last is gone"])
def test_a_log_that_is_not_the_checkpoints_is_not_gone_on_with(tmp_path, corpus, damage):
    one = training(tmp_path, corpus)
    assert not one.go_on(lambda: one.step == 4)
    first, *rest = lines = one.run.log.read_text().splitlines(keepends=True)
    left = {
        "empty": [], "a step is gone": rest, "twice": [first, *lines], "out of order": [rest[0], first, *rest[1:]],
        "the last is gone": lines[:-1],
    }  # fmt: skip
    if damage == "gone":
        one.run.log.unlink()
    else:
        one.run.log.write_text("".join(left[damage]))
    before = {path: path.read_bytes() for path in one.run.folder.iterdir()}
    with pytest.raises(UserError, match=r"each step up to 4, which state.ckpt goes on from, .* or delete .*/run "):
        training(tmp_path, corpus)
    assert before == {path: path.read_bytes() for path in one.run.folder.iterdir()}
    shutil.rmtree(one.run.folder)  # as was said
    assert training(tmp_path, corpus).go_on(lambda: False) and [one.step() for one in all_runs(tmp_path)] == [10]


@pytest.mark.parametrize("emptied", ["progress", "model", "optimizer", "fp8", "rng"])
def test_a_checkpoint_that_lacks_something_is_not_gone_on_with(tmp_path, corpus, emptied):
    how = {"model": lambda: fp8.convert(torch.nn.Sequential(Table(), torch.nn.Linear(256, 256)), tokens=None)}
    one = training(tmp_path, corpus, **how)
    assert not one.go_on(lambda: one.step == 4)
    torch.save({**torch.load(one.run.checkpoint), emptied: {}}, one.run.checkpoint)
    before = {path: path.read_bytes() for path in one.run.folder.iterdir()}
    with pytest.raises(UserError, match=r"state.ckpt must be a checkpoint of this program, but .*; delete it to start"):
        training(tmp_path, corpus, **how)
    assert before == {path: path.read_bytes() for path in one.run.folder.iterdir()}
    one.run.checkpoint.unlink()  # as was said
    assert training(tmp_path, corpus, **how).go_on(lambda: False)


def test_a_log_is_on_the_disk_before_a_checkpoint_that_goes_on_from_it_and_before_that_is_gone(
    tmp_path, corpus, monkeypatch
):
    monkeypatch.setattr("studies.lib.training._SAVE", 0)
    one, synced = training(tmp_path, corpus), {}
    fsync, save, unlink = os.fsync, checkpoint.save, Path.unlink

    def syncs(handle):
        fsync(handle)
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        synced[path.name] = path.stat().st_size

    def saves(path, state):
        assert synced["log.jsonl"] == one.run.log.stat().st_size
        save(path, state)

    def unlinks(path, **how):
        assert synced["log.jsonl"] == one.run.log.stat().st_size and one.run.result()
        unlink(path, **how)

    monkeypatch.setattr(os, "fsync", syncs)
    monkeypatch.setattr(checkpoint, "save", saves)
    monkeypatch.setattr(Path, "unlink", unlinks)
    assert one.go_on(lambda: False) and not one.run.checkpoint.exists()


def test_a_checkpoint_is_of_one_spec(tmp_path, corpus):
    one = training(tmp_path, corpus, recipe={"kind": "DelayedScaling"})
    assert not one.go_on(lambda: one.step == 4)
    (one.run.folder / "spec.json").write_text(json.dumps({**one.run.spec, "lr": 3e-3}))
    with pytest.raises(UserError, match=r"differs in lr \(was 0.01, is 0.003\)"):
        training(tmp_path, corpus, recipe={"kind": "DelayedScaling"}, lr=3e-3)


def test_a_sweep_after_a_training_is_stopped_between_policies_and_goes_on_to_the_bit(tmp_path, corpus):
    spec = {**PLAN, "study": "window", "model": "gpt-tiny", "arm": "bf16", "record": 0, "dtype": "bfloat16",
            "loss_scale": 1.0, "steps": 6, "sweep": [0], "sweep_tokens": 32}  # fmt: skip
    (whole,), (part,) = claim(tmp_path / "whole", {"run": spec}), claim(tmp_path / "part", {"run": spec})

    def go_on(run, stop):
        torch.manual_seed(0)
        return scales.perform(run, corpus, torch.device("cpu"), stop)

    assert go_on(whole, lambda: False)
    assert not go_on(part, lambda: far(part) == 6)
    assert say_missing([part]).endswith("run (6 of 6 steps, 0 of 8 policies)")
    for done in range(1, 9):  # a policy a call; after the last the validation is left
        before = part.log.read_text()
        assert not go_on(part, lambda done=done: far(part) == 6 + done)
        assert part.log.read_text().startswith(before) and say_missing([part]).endswith(f", {done} of 8 policies)")
        if done == 3:
            assert list(scales_results.condensed(part).policies) == ["bf16", "current", "amax"]
            lines = part.log.read_text().splitlines(keepends=True)
            part.log.write_text("".join(lines[:-2] + lines[-1:]))
            with pytest.raises(UserError, match=r"must have each policy once and in order, but has not; bring the log"):
                go_on(part, lambda: False)
            part.log.write_text("".join(lines) + '{"step": 6, "pol')  # a kill in the midst of a line
    assert go_on(part, lambda: False) and not part.checkpoint.exists()
    assert records_of(tmp_path / "whole") == records_of(tmp_path / "part")
    assert far(part) == length(spec) == 14 and scales_results.condensed(part).policies == {}


def test_a_run_that_was_killed_is_told_by_its_signal():
    assert how_it_ended(-signal.SIGKILL) == (
        "was killed by signal 9 (SIGKILL), for which the machine's memory running out is the common cause"
    )
    assert how_it_ended(-signal.SIGSEGV) == "was killed by signal 11 (SIGSEGV)"
    assert how_it_ended(-99) == "was killed by signal 99" and how_it_ended(2) == "failed with 2"


def test_a_study_whose_run_was_killed_does_not_point_at_the_disk(tmp_path, capsys):
    script_ = tmp_path / "killed.py"
    script_.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    specs = {"a": {"steps": 5, "device": "cpu"}}
    how = {"jobs": 1, "minutes": None, "kept": None, "kind": scales_results.Line}
    assert work(str(script_), tmp_path / "out", specs, tmp_path / "tokens", **how) == 1
    said = capsys.readouterr().err
    assert "a was killed by signal 9 (SIGKILL), for which" in said and "bytes left" not in said
    (tmp_path / "out" / "a" / "output.txt").write_text("a: stopped after 3 of 5 steps\n")  # by an earlier process
    assert work(str(script_), tmp_path / "out", specs, tmp_path / "tokens", **how) == 1
    assert "stopped after 3" not in capsys.readouterr().err


def test_a_run_that_ctrl_c_met_while_it_began_has_not_failed(tmp_path, capsys):
    script_ = tmp_path / "interrupted.py"
    script_.write_text("import os, signal\nsignal.signal(signal.SIGINT, signal.SIG_DFL)\nos.kill(os.getpid(), 2)\n")
    how = {"jobs": 1, "minutes": None, "kept": None, "kind": scales_results.Line}
    assert work(str(script_), tmp_path / "out", {"a": {"steps": 5, "device": "cpu"}}, tmp_path / "tokens", **how) == 0
    said = capsys.readouterr()
    assert "0 of 1 runs are done; still missing: a (" in said.out and "killed" not in said.err


@pytest.mark.parametrize(
    "script_, arguments, reads",
    [("scales.py", ["tokens", "--tokens", "data/tokens"], "tokens"),
     ("scales.py", ["report", "--data", "data", "--page", "page.md"], "texts.json"),
     ("fog.py", ["report", "--data", "data", "--page", "page.md"], "runs.jsonl"),
     ("scales.py", ["models"], "import"), ("fog.py", ["run", "a", "--tokens", "data/tokens"], "import")],
)  # fmt: skip
def test_ctrl_c_is_a_line_wherever_it_comes(tmp_path, script_, arguments, reads):
    """While it waits for what a pipe holds, which stands for a long text or for a module."""
    (tmp_path / "data").mkdir()
    os.mkfifo(tmp_path / "data" / reads)
    if reads == "import":
        (tmp_path / "data" / "torch.py").write_text("open('data/import').read()")
    before = sorted(tmp_path.rglob("*"))
    process = subprocess.Popen(
        [sys.executable, "-B", Path(SCALES[1]).with_name(script_), *arguments], cwd=tmp_path, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "data"), *sys.path])},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    end = None
    while end is None and process.poll() is None:
        with suppress(OSError):  # until it is read
            end = os.open(tmp_path / "data" / reads, os.O_WRONLY | os.O_NONBLOCK)
    process.send_signal(signal.SIGINT)
    os.close(end)  # so that it reads on where the signal came right before it began to wait
    said = process.communicate(timeout=60)[1].decode()
    assert said == f"{script_}: interrupted\n" and process.returncode == -signal.SIGINT
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def serving(tmp_path, tokens, monkeypatch):
    """A run, and what serves it: gives the exit code, and whether ``perform`` saw it locked and was to stop."""
    monkeypatch.setattr(signal, "signal", lambda *ignored: None)
    threads = torch.get_num_threads()
    text = text_of(read_corpus(tokens))
    (one,) = claim(tmp_path / "out", {"a": {"seed": 0, "steps": 5, "device": "cpu", **text}})

    def serves(*more):
        seen = []

        def perform(run, corpus, device, stop):
            seen.append((is_locked(run.folder), stop()))
            return True

        return serve([str(one.folder), "--tokens", str(tokens), *more], perform), seen

    yield one, serves
    torch.set_num_threads(threads)


def test_a_run_waits_for_the_process_that_its_killed_study_left(serving, tokens, tmp_path, capsys):
    one, serves = serving
    held = ExitStack()
    held.enter_context(locked(one.folder))
    assert serves("--until", "1") == (0, []) and "a: stopped after 0 of 5 steps; the same" in capsys.readouterr().out
    script_ = tmp_path / "nothing.py"
    script_.write_text("")
    how = {"jobs": 1, "minutes": None, "kept": None, "kind": scales_results.Line}
    assert work(str(script_), one.folder.parent, {"a": one.spec}, tokens, **how) == 0
    assert "waiting for processes of an interrupted call to end their step: a\n" in capsys.readouterr().out
    ended = threading.Timer(0.3, held.close)
    ended.start()
    assert serves() == (0, [(True, False)]) and ended.finished.is_set()
    assert serves("--parent", "1") == (0, [(True, True)])  # which was gone before this process could see it


def test_what_a_kill_left_of_a_save_is_removed_by_the_process_that_has_the_run(serving):
    one, serves = serving
    left = [one.folder / f".{path.name}.0123abcd.tmp" for path in (one.checkpoint, one.log)]
    for path in left:
        path.write_bytes(b"half")
    with locked(one.folder):
        assert serves("--until", "1") == (0, []) and all(path.exists() for path in left)  # it may be writing them
    assert serves() == (0, [(True, False)]) and not any(path.exists() for path in left)


def test_what_the_left_process_had_ended_is_not_done_again(serving, capsys):
    one, serves = serving
    one.log.write_text('{"step": 5, "result": {"loss": 1}}\n')
    assert serves() == (0, []) and capsys.readouterr().out == "a: done\n"
