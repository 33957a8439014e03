"""What a watch keeps: its state, with which training goes on, and its log."""

import copy
import json
import math
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
import torch_fp8 as fp8
from torch_fp8.observe.watch import read_log
from watching import adamw, fp8_gpt, gpt, in_16_bits, resumable, three_steps, train


@pytest.mark.parametrize("at", [20, 38, 40])
@pytest.mark.parametrize("way", ["torch", "json"])
def test_resumed_it_goes_on_as_if_nothing_had_been(tmp_path, at, way):
    whole, optimizers, uncut = resumable(tmp_path / "whole.jsonl")
    train(whole, optimizers, 70, change=three_steps(30), sequences=2)
    model, optimizers, watched = resumable(tmp_path / "log.jsonl")
    train(model, optimizers, at, change=three_steps(30), sequences=2)
    parts = {"model": model.state_dict(), "fp8": fp8.state_dict(model), "optimizer": optimizers[0].state_dict()}
    state = copy.deepcopy(parts)
    if way == "torch":
        torch.save(watched.state_dict(), tmp_path / "watch.pt")
        saved = torch.load(tmp_path / "watch.pt", weights_only=True)
    else:
        saved = json.loads(json.dumps(watched.state_dict()))
    train(model, optimizers, 8, at, three_steps(30), sequences=2)  # what a kill takes
    del watched

    model, optimizers, watched = resumable(tmp_path / "log.jsonl")
    fp8.load_state_dict(model, state["fp8"])
    model.load_state_dict(state["model"])
    optimizers[0].load_state_dict(state["optimizer"])
    watched.load_state_dict(saved)
    assert in_16_bits(model) == set(watched.in_16_bits)
    if at > 30:
        assert watched.in_16_bits
    train(model, optimizers, 70 - at, at, three_steps(30), sequences=2)
    assert watched.alarms == uncut.alarms and watched.in_16_bits == uncut.in_16_bits and watched.alarms
    assert [r.step for r in watched.readings] == [r.step for r in uncut.readings]
    assert watched.readings[-1] == uncut.readings[-1]
    assert all(map(torch.equal, model.parameters(), whole.parameters()))
    logs = [read_log(tmp_path / name) for name in ("log.jsonl", "whole.jsonl")]
    assert logs[0] == logs[1] and len(logs[0]) > 24


def test_states_that_do_not_fit():
    model, _, watched = resumable()
    good = watched.state_dict()
    for bad in ({}, 3, {**good, "more": 1}):
        with pytest.raises(ValueError, match="a watch's state has"):
            watched.load_state_dict(bad)
    other = gpt(layers=4)
    of_other = fp8.watch(other, every=1)
    train(other, adamw(other), 2)
    with pytest.raises(ValueError, match=r"kurtosis/qkv/blocks.3.attn, which this one has not"):
        watched.load_state_dict(of_other.state_dict())
    held = {**good, "held": {"blocks.9": {"modules": ["blocks.9.attn.qkv"], "until": 5}}}
    with pytest.raises(ValueError, match=r"blocks.9.attn.qkv"):
        watched.load_state_dict(held)
    assert watched.state_dict() == good and not in_16_bits(model)


KILLED = """
import sys
sys.path[:0] = {path!r}
import torch_fp8 as fp8
from watching import adamw, gpt, train
model = gpt()
fp8.watch(model, every=1, log={log!r})
train(model, adamw(model), 100_000, sequences=2)
"""


def test_a_kill_leaves_whole_lines(tmp_path):
    log = tmp_path / "watch.jsonl"
    process = subprocess.Popen([sys.executable, "-c", KILLED.format(path=sys.path, log=str(log))])
    try:
        deadline = time.monotonic() + 60
        while not (log.exists() and log.read_bytes().count(b"\n") > 20):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    lines = read_log(log)
    assert [line["step"] for line in lines] == list(range(len(lines))) and len(lines) >= 20
    with open(log, "ab") as file:  # as if the kill had torn a line
        file.write(b'{"step": 99999, "kurt')
    model = gpt()
    watched = fp8.watch(model, every=1, log=log)
    train(model, adamw(model), 3, sequences=2)
    assert [line["step"] for line in read_log(log)] == [0, 1, 2]  # of the last run, whole
    assert b"99999" in log.read_bytes()  # what was there stays
    assert read_log(log)[0]["kurtosis/qkv/blocks.0.attn"] == watched.readings[0].values["kurtosis/qkv/blocks.0.attn"]


def test_values_that_are_not_finite_are_null_in_the_log(tmp_path):
    model = gpt()
    alarms = []
    watched = fp8.watch(model, every=1, log=tmp_path / "log", on_alarm=alarms.append)
    optimizers = adamw(model)
    train(model, optimizers, 2)
    with torch.no_grad():
        model.blocks[2].attn.qkv.weight[3, 3] = math.nan
    train(model, optimizers, 4)
    assert {alarm.metric for alarm in alarms} >= {"kurtosis/qkv/blocks.2.attn"}
    assert read_log(tmp_path / "log")[2]["kurtosis/qkv/blocks.2.attn"] is None
    json.dumps(watched.state_dict())
    of_log, kept = read_log(tmp_path / "log"), [set(reading.values) for reading in watched.readings]
    assert all({"rms/block/blocks.0", "grad_norm/ln_f.bias"} <= line.keys() for line in of_log if "event" not in line)
    assert "grad_norm/ln_f.bias" in kept[-1] and "grad_norm/ln_f.bias" not in kept[-2]  # a long run has thousands
    watched.save_png(tmp_path / "watch.png")


def test_a_log_that_cannot_be_written_is_refused_before_anything_hangs(tmp_path):
    model = gpt()
    with pytest.raises(ValueError, match=r"torch_fp8: log=.* cannot be written: Is a directory"):
        fp8.watch(model, log=tmp_path)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch._dynamo.eval_frame._stance.stance == "default"
    train(model, adamw(model), 1)
    with pytest.raises(ValueError, match="every must be"):
        fp8.watch(model, 0, log=tmp_path / "log")
    assert not (tmp_path / "log").exists()


class Full:
    def add_scalar(self, tag, value, step):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("what", ["log", "writer", "monitor"])
def test_a_full_disk_does_not_end_training(tmp_path, monkeypatch, what):
    model = fp8_gpt()
    if what == "monitor":
        watched = fp8.monitor(model, every=1, writer=Full())
    else:
        watched = fp8.watch(model, every=1, log=tmp_path / "log", writer=Full() if what == "writer" else None)
    optimizers = adamw(model)
    if what == "log":
        monkeypatch.setattr("builtins.open", lambda *args, **kwargs: Full().add_scalar(0, 0, 0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizers, 3)
    said = [str(w.message) for w in caught if "torch_fp8" in str(w.message)]
    name = "log" if what == "log" else "writer"
    assert len(said) == 1 and f"the {name} cannot be written" in said[0] and "No space left on device" in said[0]
    assert watched.step == 3 == len({sample.step for sample in getattr(watched, "samples", None) or watched.readings})


@pytest.mark.parametrize("back_to", [0, 6])
def test_a_log_keeps_what_was_before_a_rollback_in_the_same_process(tmp_path, back_to):
    model = gpt()
    watched = fp8.watch(model, every=2, log=tmp_path / "log")
    optimizers = adamw(model)
    states = {}
    for step in range(10):
        states[step] = watched.state_dict()
        train(model, optimizers, 1, step)
    watched.load_state_dict(states[back_to])
    train(model, optimizers, 3)
    kept = range(0, back_to + 3, 2)
    assert [line["step"] for line in read_log(tmp_path / "log")] == list(kept)
    again = gpt()
    resumed = fp8.watch(again, every=2, log=tmp_path / "log")
    train(again, adamw(again), 1)  # a step before the state is loaded is of no run
    resumed.load_state_dict(states[6])
    assert [line["step"] for line in read_log(tmp_path / "log")] == [step for step in kept if step < 6]


def test_loading_keeps_the_scales_of_what_was_held_since():
    """In README's order, FP8's state before the watch's."""
    model, optimizers, watched = resumable()
    train(model, optimizers, 20, sequences=2)
    saved = copy.deepcopy((fp8.state_dict(model), watched.state_dict()))
    train(model, optimizers, 20, 20, three_steps(30), sequences=2)
    assert watched.in_16_bits
    fp8.load_state_dict(model, saved[0])
    watched.load_state_dict(saved[1])
    assert not in_16_bits(model) and not watched.in_16_bits
    for name, state in fp8.state_dict(model).items():
        assert torch.equal(state, saved[0][name]), name


@pytest.mark.parametrize(
    "part, change",
    [
        ("trends", lambda trends: trends.update({3: trends.popitem()[1]})),
        ("trends", lambda trends: trends.popitem()[1].update(_inside=[1, 2])),
        ("trends", lambda trends: trends.popitem()[1].update(_lowest=3)),
        ("trends", lambda trends: trends.popitem()[1].update(values="abc")),
        ("trends", lambda trends: trends.popitem()[1].update(beyond=None)),
        ("trends", lambda trends: trends.popitem()[1].update(_record="x")),
        ("alarms", lambda alarms: alarms[0].update(value="x")),
        ("alarms", lambda alarms: alarms[0].update(layer=3)),
        ("alarms", lambda alarms: alarms[0].update(step=None)),
        ("readings", lambda readings: readings[0].__setitem__(0, "1")),
        ("readings", lambda readings: readings[0][2].update(loss="x")),
        ("held", lambda held: held[next(iter(held))].update(modules=[3])),
    ],
)
def test_a_damaged_state_is_refused_before_it_breaks_a_training(part, change):
    model, optimizers, watched = resumable()
    train(model, optimizers, 40, change=three_steps(30), sequences=2)
    good = watched.state_dict()
    bad = json.loads(json.dumps(good))
    last = next(reversed(bad["trends"]))
    damaged = bad["trends"][last]
    change(bad[part])
    if part == "trends":  # popitem took it
        bad["trends"].setdefault(last, damaged)
    with pytest.raises(ValueError, match=f"torch_fp8: a watch's state .*{part}"):
        watched.load_state_dict(bad)
    assert watched.state_dict() == good and in_16_bits(model) == set(good["held"])
    watched.load_state_dict(json.loads(json.dumps(good)))


@pytest.mark.parametrize("part", ["trends", "alarms", "readings", "held", "step"])
def test_a_state_with_a_part_that_is_none_leaves_the_watch_as_it_was(part):
    model, optimizers, watched = resumable()
    train(model, optimizers, 40, change=three_steps(30), sequences=2)
    good = copy.deepcopy(watched.state_dict())
    layer = next(iter(good["held"]))
    bad = {
        "trends": {**good["trends"], next(iter(good["trends"])): {"values": []}},
        "alarms": [*good["alarms"], {"step": 3}],
        "readings": [*good["readings"], [1, 2]],
        "held": {layer: {"modules": good["held"][layer]["modules"]}},
        "step": "3",
    }[part]
    with pytest.raises(ValueError, match=f"torch_fp8: a watch's state .*{part}"):
        watched.load_state_dict({**good, part: bad})
    assert watched.state_dict() == good and in_16_bits(model) == set(good["held"])
