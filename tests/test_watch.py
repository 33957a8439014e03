"""When the watch raises an alarm and when it does not, on synthetic series and in training; what it does then, and that
nothing of it is lost or stays."""

import copy
import gc
import json
import math
import random
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
import torch_fp8 as fp8
from torch import nn
from torch_fp8.observe.trend import Trend
from torch_fp8.observe.watch import read_log

from models.gpt import GPT
from models.gpt import Shape as GptShape

# ---- synthetic series: what is healthy, and what is not -----------------------------------------------------------


def healthy(rng, kind, n, latest_slope=2.0):
    start = rng.uniform(3, 10)
    if kind == "logarithm":
        slope, begin = rng.uniform(0.5, 20), rng.uniform(0.001, 0.05) * n
        return lambda t: start + slope * math.log(1 + t / begin)
    if kind == "power":
        power = rng.uniform(0.1, 0.6)
        return lambda t: start * t**power
    if kind == "late logarithm":
        begin, slope = rng.uniform(0.1, 0.6) * n, start * rng.uniform(0.3, latest_slope)
        return lambda t: start + slope * math.log(max(1.0, t / begin))
    return lambda t: start


def diverging(rng, kind, n):
    before = healthy(rng, rng.choice(KINDS), n)
    begin = rng.uniform(0.3, 0.5) * n
    if kind == "exponential":
        doubling = rng.uniform(0.02, 0.1) * n
        return begin, lambda t: before(t) * 2 ** max(0.0, (t - begin) / doubling)
    if kind == "power":
        power = rng.uniform(2, 4)
        return begin, lambda t: before(min(t, begin)) * max(1.0, t / begin) ** power
    step = rng.uniform(4, 100)
    return begin, lambda t: before(t) * (step if t > begin else 1.0)


KINDS = ("logarithm", "power", "late logarithm", "level")


def with_noise(rng, function, n, cooldown=True, noises=(0.01, 0.03, 0.1, 0.2, 0.3)):
    """Log-normal noise of 1 to 30 %, from sample to sample independent or not; perhaps a cooldown in the last fifth."""
    sigma, memory, noise = rng.choice(noises), rng.choice([0.0, 0.5, 0.9]), 0.0
    cooled = rng.uniform(0.6, 1.5) if cooldown and rng.random() < 0.5 else 1.0
    for i in range(n):
        noise = memory * noise + math.sqrt(1 - memory**2) * rng.gauss(0, 1)
        share = max(0.0, (i / n - 0.8) / 0.2)
        yield i + 1, function(i + 1) * math.exp(sigma * noise) * (1 + (cooled - 1) * (1 - math.sqrt(1 - share)))


def first_alarm(series, **options):
    trend = Trend(**options)
    for tokens, value in series:
        trend.add(tokens, value, 6.0)
        if trend.beyond == 3:
            return tokens
    return None


def test_false_alarms_of_healthy_series():
    """Of 200, 50 of a kind. The docs state the number."""
    rng = random.Random(1)
    alarms = dict.fromkeys(KINDS, 0)
    for i in range(200):
        kind, n = KINDS[i % 4], rng.choice([60, 100, 300])
        alarms[kind] += first_alarm(with_noise(rng, healthy(rng, kind, n), n)) is not None
    print(alarms)
    assert sum(alarms.values()) <= 2
    assert f"{sum(alarms.values())} of 200 synthetic healthy series" in _prose()


def test_a_late_logarithm_that_is_very_steep_is_an_alarm_now_and_then():
    rng = random.Random(2)
    alarms = 0
    for _ in range(100):
        n = rng.choice([60, 100, 300])
        alarms += first_alarm(with_noise(rng, healthy(rng, "late logarithm", n, latest_slope=4.0), n)) is not None
    print(alarms)
    assert alarms <= 8


def test_detection_of_diverging_series():
    """Of 300, 100 of a kind; and by how much each has grown when it is announced. No alarm before it begins."""
    rng = random.Random(3)
    missed, early, grown = 0, 0, []
    for i in range(300):
        n = rng.choice([60, 100, 300])
        begin, function = diverging(rng, ("exponential", "power", "step")[i % 3], n)
        at = first_alarm(with_noise(rng, function, n, cooldown=False))
        missed += at is None
        early += at is not None and at < begin
        if at is not None and i % 3 < 2:
            grown.append(function(at) / function(begin))
    grown.sort()
    print(missed, early, grown[len(grown) // 2], grown[int(0.9 * len(grown))])
    assert missed <= 15 and early <= 1
    assert f"{missed} of 300 diverging ones" in _prose()
    assert grown[len(grown) // 2] < 5  # the paper's grow by orders of magnitude


def _prose():
    return " ".join(fp8.watch.__doc__.split())


def test_the_trend_forgets_no_level_and_takes_what_is_not_finite_for_out():
    trend = Trend()
    for t in range(1, 60):  # falls, and comes back to where it was
        trend.add(t, 100.0 if not 20 < t < 40 else 5.0, 6.0)
        assert not trend.beyond
    for t in range(60, 63):
        trend.add(t, math.nan, 6.0)
    assert trend.beyond == 3 and trend.excess == math.inf
    trend.add(63, 100.0, 6.0)
    assert not trend.beyond
    other = Trend()
    other.load_state_dict(json.loads(json.dumps(trend.state_dict())))
    for t in range(64, 70):
        trend.add(t, 1000.0, 6.0)
        other.add(t, 1000.0, 6.0)
    assert trend.beyond == other.beyond == 6 and trend.excess == other.excess


def test_what_was_out_is_no_level_to_come_back_to():
    trend, alarms = Trend(), []
    for t in range(1, 400):
        trend.add(t, 300.0 if 40 <= t < 60 or t >= 300 else 5.0, 6.0)
        alarms += [t] if trend.beyond == 3 else []
    assert alarms == [42, 302]


# ---- in training ----------------------------------------------------------------------------------------------------


def data(step, sequences=8):
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(0, 90_000, (sequences, 1), generator=generator)
    x = starts + torch.arange(17)
    return (x * x % 31 + x % 7) % 32


def gpt(seed=0, layers=3):
    torch.manual_seed(seed)
    return GPT(GptShape(layers, 2, 32), vocab=32, context=16)


def adamw(model):
    return [torch.optim.AdamW(model.parameters(), 3e-3)]


def muon(model):
    matrices = [p for block in model.blocks for p in block.parameters() if p.dim() == 2]
    ids = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in ids]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, 3e-3)]


def train(model, optimizers, steps, first=0, change=None, sequences=8):
    losses = []
    for step in range(first, first + steps):
        ids = data(step, sequences).to(next(model.parameters()).device)
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if change is not None:
            with torch.no_grad():
                change(model, step)
        losses.append(loss.item())
    return losses


def outlier(begin, factor=1.04, block=1, row=70):
    """A feature of the values, of one block, that grows by construction."""

    def change(model, step):
        if step >= begin:
            model.blocks[block].attn.qkv.weight[row] *= factor

    return change


def test_a_planted_divergence_is_announced_before_the_loss_shows_it():
    alarms = []
    model = gpt()
    watched = fp8.watch(model, every=4, on_alarm=alarms.append)
    losses = train(model, adamw(model), 400, change=outlier(150))
    twin = gpt()
    healthy_losses = train(twin, adamw(twin), 400)
    noise = torch.tensor(healthy_losses[150:]).diff().std() / math.sqrt(2)  # from step to step
    gap = torch.tensor(losses) - torch.tensor(healthy_losses)
    left = next(step for step, g in enumerate(gap.tolist()) if step > 150 and g > 3 * noise)
    assert [alarm.metric for alarm in alarms] == ["kurtosis/qkv/blocks.1.attn"] and alarms == watched.alarms
    alarm = alarms[0]
    assert 150 < alarm.step < left - 50
    assert alarm.layer == "blocks.1" and alarm.value > 2 * alarm.expected and alarm.tokens == (alarm.step + 1) * 8 * 16
    assert f"step {alarm.step}, {alarm.tokens:,} tokens: kurtosis/qkv/blocks.1.attn is" in str(alarm)


def test_what_grows_as_a_whole_is_announced_by_its_rms():
    """All of a block's q, k and v, so that no feature stands out: as before most divergences of docs/fog.md."""

    def change(model, step):
        if step >= 150:
            model.blocks[1].attn.qkv.weight *= 1.01

    model, alarms = gpt(), []
    fp8.watch(model, every=4, metrics=("kurtosis/qkv", "rms/qkv"), on_alarm=alarms.append)
    train(model, adamw(model), 400, change=change)
    assert [alarm.metric for alarm in alarms] == ["rms/qkv/blocks.1.attn"]


@pytest.mark.parametrize("optimizer", [adamw, muon], ids=["AdamW", "Muon"])
@pytest.mark.parametrize("seed", range(3))
def test_no_alarm_in_a_healthy_run(optimizer, seed):
    model = gpt(seed)
    if seed == 2:
        fp8.convert(model, tokens=None)
    watched = fp8.watch(model, every=4)
    losses = train(model, optimizer(model), 300)
    assert losses[-1] < 0.5 * losses[0] and len(watched.readings) == 75
    assert watched.alarms == []


def test_an_alarm_is_a_warning_in_words():
    model = gpt()
    fp8.watch(model, every=2)
    with pytest.warns(UserWarning, match=r"torch_fp8: step .* tokens: kurtosis/qkv/blocks.1.attn is .* sigma above"):
        train(model, adamw(model), 80, change=outlier(30, 1.2))


def test_what_raises_in_on_alarm_leaves_the_watch_whole():
    def fail(alarm):
        raise ZeroDivisionError

    model = gpt()
    watched = fp8.watch(model, every=2, on_alarm=fail)
    optimizers = adamw(model)
    with pytest.raises(ZeroDivisionError):
        train(model, optimizers, 80, change=outlier(30, 1.2))
    assert watched.step == optimizers[0].state[model.ln_f.weight]["step"]
    train(model, optimizers, 10)
    assert (
        watched.step == optimizers[0].state[model.ln_f.weight]["step"]
        and len(watched.readings) == (watched.step + 1) // 2
    )


# ---- tokens ---------------------------------------------------------------------------------------------------------


def test_tokens_are_counted_given_or_told():
    model = gpt()
    optimizers = adamw(model)
    counted, given = fp8.watch(model, every=2), fp8.watch(model, every=2, tokens=1000)
    told = fp8.watch(model, every=2)
    for step in range(5):
        for micro in range(2):
            ids = data(10 * step + micro)
            model(ids[:, :-1], ids[:, 1:]).backward()
        model.eval()
        model(ids[:, :-1], ids[:, 1:])
        model.train()
        with torch.no_grad():
            model(ids[:, :-1], ids[:, 1:])
        told.note(tokens=10, loss=torch.tensor(float(step)), grad_norm=0.5)
        optimizers[0].step()
    assert [reading.tokens for reading in counted.readings] == [256, 768, 1280]
    assert [reading.tokens for reading in given.readings] == [1000, 3000, 5000]
    assert [reading.tokens for reading in told.readings] == [10, 30, 50] and told.tokens == 50
    assert [(r.values["loss"], r.values["grad_norm"]) for r in told.readings] == [(0.0, 0.5), (2.0, 0.5), (4.0, 0.5)]
    told.note(tokens=1000)
    train(model, optimizers, 3)
    assert told.tokens == 50 + 1000 + 2 * 128 and told.readings[-1].values["grad_norm"] != 0.5


class NoEmbedding(nn.Module):
    def __init__(self, embedding=False):
        super().__init__()
        self.layers = nn.ModuleList(fp8.TransformerBlock(16, 2, 48) for _ in range(2))
        if embedding:
            self.unused = nn.Embedding(4, 16)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def test_without_tokens_it_refuses():
    with pytest.raises(ValueError, match="tokens of NoEmbedding cannot be counted.*give tokens="):
        fp8.watch(NoEmbedding())
    model = NoEmbedding(embedding=True)  # which nobody calls
    fp8.watch(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randn(2, 5, 16)).backward()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="no tokens were seen.*tokens="):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


class OnlyFfn(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(4, 8), nn.Linear(8, 4)


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (OnlyFfn, {"tokens": 8}, "OnlyFfn has no metric 'kurtosis/qkv'.*it has kurtosis/ffn, "),
        (gpt, {"metrics": "kurtois"}, "no metric 'kurtois' that can be watched; it has kurtosis/qkv"),
        (gpt, {"metrics": ["kurtosis", "mean/qkv"]}, "no metric 'mean/qkv'"),
        (gpt, {"metrics": []}, "must name a metric"),
        (lambda: NoEmbedding(), {"metrics": "sharpness", "tokens": 8}, "no metric 'sharpness'"),
        (gpt, {"tokens": 0}, "tokens must be a positive number"),
        (gpt, {"tokens": True}, "tokens must be a positive number"),
        (gpt, {"every": 0}, "every must be"),
        (gpt, {"sigmas": 0}, "sigmas must be"),
        (gpt, {"in_a_row": 0}, "in_a_row must be"),
        (gpt, {"hold": -1}, "hold must be"),
        (gpt, {"at_most": 0}, "at_most must be"),
        (gpt, {"action": "8bit"}, 'action must be None or "16bit"'),
        (gpt, {"action": "16bit"}, "no FP8 layer that could compute in 16 bits.*convert"),
        (gpt, {"log": "/nowhere/at/all.jsonl"}, "folder of log=.* does not exist"),
        (gpt, {"points": {"x": "no.such"}}, "matches no module"),
    ],
)
def test_impossible_watches(make, options, match):
    model = make()
    with pytest.raises(ValueError, match=match):
        fp8.watch(model, **options)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---- 16 bits for a while --------------------------------------------------------------------------------------------


def fp8_gpt(layers=3):
    return fp8.convert(gpt(layers=layers), fp8.DelayedScaling(amax_history_len=4), tokens=None)


def in_16_bits(model):
    return {name.split(".attn")[0].split(".mlp")[0] for name, m in model.named_modules()
            if isinstance(m, fp8.Linear) and not m.fp8_enabled}  # fmt: skip


def three_steps(begin):
    """The kurtosis of each block jumps, and most in the middle."""

    def change(model, step):
        if step == begin:
            for block, factor in ((0, 10), (1, 90), (2, 40)):
                outlier(begin, factor, block)(model, step)

    return change


def test_the_largest_first_so_many_at_once_and_undone(tmp_path):
    model = fp8_gpt()
    log = tmp_path / "watch.jsonl"
    watched = fp8.watch(
        model, every=2, in_a_row=2, action="16bit", hold=10, at_most=1, log=log, on_alarm=lambda alarm: None
    )
    optimizers, held = adamw(model), []
    for step in range(90):
        train(model, optimizers, 1, step, three_steps(30), sequences=2)
        held.append(in_16_bits(model))
        assert set(watched.in_16_bits) == held[-1]
    assert max(map(len, held)) == 1
    events = [line for line in read_log(log) if "event" in line]
    acts = [line for line in events if line["event"] in ("16bit", "fp8")]
    assert [line["event"] for line in acts[:4]] == ["16bit", "fp8", "16bit", "fp8"]
    for start, end in zip(acts[::2], acts[1::2]):
        assert (
            start["layer"] == end["layer"]
            and start["until"] == start["step"] + 11
            and end["step"] == start["step"] + 10
        )
        assert all(held[step] == {start["layer"]} for step in range(start["step"], end["step"]))
        assert held[end["step"]] == set()
    alarms = [alarm for alarm in watched.alarms if alarm.step == acts[0]["step"]]
    assert len(alarms) == 3 and alarms[0].layer == acts[0]["layer"] == "blocks.1"  # in the order of their size
    assert [alarm.sigmas for alarm in alarms] == sorted((alarm.sigmas for alarm in alarms), reverse=True)
    assert len({line["layer"] for line in acts}) > 1


def test_what_is_back_in_fp8_is_scaled_by_its_own_amax():
    """Scales of long ago would saturate what has grown meanwhile."""
    model = fp8_gpt(layers=1)
    watched = fp8.watch(
        model, every=2, in_a_row=2, action="16bit", hold=6, metrics="kurtosis/qkv", on_alarm=lambda alarm: None
    )
    optimizers, step = adamw(model), 0
    while not watched.in_16_bits:
        train(model, optimizers, 1, step, outlier(30, 1.5, 0))
        step += 1
        assert step < 100
    assert in_16_bits(model) == {"blocks.0"}
    while watched.in_16_bits:
        train(model, optimizers, 1, step)
        step += 1
    assert not in_16_bits(model)
    for layer in fp8.observe.watch.scaled_modules(model).values():
        assert not layer.fp8_slots[:, 2:].any() and not layer.fp8_history.any()
    with fp8.monitor(model, every=1) as monitor:
        train(model, optimizers, 1, step)
    assert all(abs(sample.unused_binades) < 0.01 for sample in monitor.samples)  # it fits to a rounding


def test_closing_undoes_it():
    model = fp8_gpt()
    watched = fp8.watch(model, every=2, action="16bit", at_most=3, hold=10_000, on_alarm=lambda alarm: None)
    train(model, adamw(model), 60, change=three_steps(30), sequences=2)
    assert in_16_bits(model)
    watched.close()
    watched.close()
    assert not in_16_bits(model) and not watched.in_16_bits
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_without_an_action_training_is_the_same_to_the_bit(tmp_path):
    model = fp8_gpt()
    twin = copy.deepcopy(model)
    fp8.watch(model, every=3, metrics=("kurtosis", "grad_norm", "sharpness", "loss"), log=tmp_path / "log", tokens=7)
    losses = [train(m, muon(m), 12, sequences=2) for m in (model, twin)]
    assert losses[0] == losses[1]
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


# ---- what is kept ---------------------------------------------------------------------------------------------------


def resumable(log=None):
    model = fp8_gpt()
    watched = fp8.watch(
        model, every=3, in_a_row=2, action="16bit", at_most=2, hold=9, log=log, on_alarm=lambda alarm: None
    )
    return model, adamw(model), watched


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
from test_watch import adamw, fp8, gpt, train
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


def test_pictures_and_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    model = fp8_gpt()
    with tensorboard.SummaryWriter(str(tmp_path / "runs")) as writer:
        watched = fp8.watch(model, every=2, metrics=("kurtosis", "grad_norm"), writer=writer, on_alarm=lambda a: None)
        with pytest.raises(RuntimeError, match="nothing to draw"):
            watched.save_png(tmp_path / "watch.png")
        train(model, adamw(model), 1)
        watched.save_png(tmp_path / "first.png")
        train(model, adamw(model), 60, 1, outlier(30, 1.4), sequences=2)
    watched.save_png(tmp_path / "watch.png")
    for name in ("first.png", "watch.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    assert watched.alarms and any((tmp_path / "runs").iterdir())


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


# ---- how training loops step ----------------------------------------------------------------------------------------


def close_over(model, optimizer, step, calls=None):
    def closure():
        optimizer.zero_grad()
        ids = data(step)
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        if calls is not None:
            calls.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())
        return loss

    return closure


@pytest.mark.parametrize("how", ["positional", "keyword", "LBFGS", "accumulated"])
def test_a_step_with_a_closure_is_read_where_its_gradients_are_there(how):
    """Forward and backward run inside of ``optimizer.step``; of LBFGS's several, the first is the step's."""
    model, norms = gpt(), []
    watched = fp8.watch(model, every=1, metrics=["kurtosis", "grad_norm"])
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3) if how == "LBFGS" else adamw(model)[0]
    for step in range(3):
        calls = []
        closure = close_over(model, optimizer, step, calls)
        if how == "accumulated":  # one micro-batch before, as Lightning has it
            closure()
            calls.clear()
        optimizer.step(closure=closure) if how == "keyword" else optimizer.step(closure)
        norms.append(calls[0])
    assert [reading.values["grad_norm"] for reading in watched.readings] == pytest.approx(norms, rel=1e-4)
    each = 256 if how == "accumulated" else 128
    assert [reading.tokens for reading in watched.readings] == [each, 2 * each, 3 * each]
    assert "grad_norm" in watched._trends


def test_a_closure_without_tokens_is_refused_before_a_parameter_changes():
    model = NoEmbedding(embedding=True)
    fp8.watch(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = [p.clone() for p in model.parameters()]

    def closure():
        loss = model(torch.randn(2, 5, 16))
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="no tokens were seen.*tokens="):
        optimizer.step(closure)
    assert all(map(torch.equal, before, model.parameters()))


class Positions(nn.Module):
    """A table of positions that is longer than the vocabulary, and one of biases between positions."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions, self.biases = nn.Embedding(8, 16), nn.Embedding(64, 16), nn.Embedding(32, 2)
        self.layers = nn.ModuleList(fp8.TransformerBlock(16, 2, 48) for _ in range(2))

    def forward(self, ids):
        places = torch.arange(ids.shape[1])
        x = self.tokens(ids) + self.positions(places) + self.biases(places[:, None].expand(-1, len(places))).mean()
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def test_tokens_are_those_of_the_table_of_tokens_not_of_positions():
    model = Positions()
    watched = fp8.watch(model, every=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        for _ in range(3):
            model(torch.randint(8, (5, 20))).backward()
        optimizer.step()
    assert [reading.tokens for reading in watched.readings] == [300, 600]


@pytest.mark.parametrize("parts", ["the same parameters", "other parameters", "two beside each other"])
def test_the_steps_of_a_second_optimizer_count_once_the_first_steps_no_more(parts):
    model = gpt()
    watched = fp8.watch(model, every=2)
    first = muon(model) if parts == "two beside each other" else adamw(model)
    if parts == "other parameters":
        first = [torch.optim.AdamW(model.head.parameters(), 3e-3)]
    train(model, first, 7)
    assert watched.step == 7
    second = muon(model) if parts == "two beside each other" else [torch.optim.AdamW(model.blocks.parameters(), 3e-3)]
    train(model, second, 7, 7)
    assert watched.step == 14 and watched.tokens == 14 * 128
    assert [r.step for r in watched.readings] == [0, 2, 4, 6, 10, 12]  # step 8 was sampled over two, and is left out
    assert all(r.tokens == (r.step + 1) * 128 for r in watched.readings)
    train(model, second, 1, 14)
    assert torch._dynamo.eval_frame._stance.stance == "default" and first


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


def test_a_model_that_goes_before_its_watch_leaves_compilers_as_they_were():
    model = gpt()
    watched = fp8.watch(model)
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    del model
    gc.collect()
    assert torch._dynamo.eval_frame._stance.stance == "default"
    watched.close()


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


def falling(rng, n):
    """A loss: a power of the tokens, from 11 towards 1.5 to 3.5, with noise of 1 to 5 %."""
    floor, power = rng.uniform(1.5, 3.5), rng.uniform(0.4, 0.8)
    return with_noise(rng, lambda t: floor + (11 - floor) * t**-power, n, cooldown=False, noises=[0.01, 0.03, 0.05])


def test_a_loss_that_falls_is_healthy_and_one_that_comes_back_is_not():
    rng = random.Random(4)
    false, missed = 0, 0
    for _ in range(100):
        n = rng.choice([60, 100, 300])
        false += first_alarm(falling(rng, n), falls=True) is not None
        at, back = rng.randrange(n // 2, n - 10), rng.uniform(7, 11)
        series = [(t, value if t < at else max(value, back)) for t, value in falling(rng, n)]
        found = first_alarm(series, falls=True)
        missed += found is None or found < at
    print(false, missed)
    assert false <= 1 and missed <= 2


def test_a_loss_that_diverges_is_an_alarm():
    model = gpt()
    watched = fp8.watch(model, every=2, metrics=["loss"], on_alarm=lambda alarm: None)

    def change(model, step):
        if step >= 100:
            model.head.weight.zero_()  # to where it began

    train(model, adamw(model), 120, change=change)
    alarm = watched.alarms[0]
    assert alarm.metric == "loss" and 100 < alarm.step < 110 and alarm.value > 1.35 * alarm.expected


def test_what_is_watched_and_never_seen_is_said():
    model = Positions()
    model.tokens.requires_grad_(False)
    model.forward = lambda ids: {"x": Positions.forward(model, ids)}
    fp8.watch(model, every=1, metrics=["loss", "grad_norm/tokens.weight", "kurtosis"])
    told = fp8.watch(model, every=1, metrics=["loss"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model(torch.randint(8, (2, 9)))["x"].backward()
            told.note(loss=1.0)
            optimizer.step()
    said = [str(w.message) for w in caught if "torch_fp8" in str(w.message)]
    assert len(said) == 1 and "'loss', 'grad_norm/tokens.weight'" in said[0] and "note(loss=...)" in said[0]


def test_arguments_of_another_kind_are_refused():
    model = gpt()
    for options, match in (
        ({"metrics": [1]}, "metrics must be names"), ({"metrics": None}, "metrics must be names"),
        ({"writer": 3}, "writer must be what has add_scalar"), ({"on_alarm": 3}, "on_alarm must be a function"),
        ({"points": "x"}, "points must be"), ({"log": 3}, "log must be a path"), ({"sigmas": True}, "sigmas must be"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            fp8.watch(model, **options)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for no_model in (None, [model]):
        with pytest.raises(ValueError, match="model must be an nn.Module"):
            fp8.watch(no_model)
    watched = fp8.watch(model)
    for told in ({"loss": "a"}, {"grad_norm": [1.0]}, {"loss": torch.ones(2)}):
        with pytest.raises(ValueError, match=f"{next(iter(told))} must be a number"):
            watched.note(**told)
    assert not watched._told


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


def test_what_is_converted_anew_while_its_layer_is_held_is_held():
    model, optimizers, watched = resumable()
    train(model, optimizers, 40, change=three_steps(30), sequences=2)
    held = set(watched.in_16_bits)
    assert held
    fp8.convert(model, fp8.CurrentScaling(), tokens=None)
    train(model, optimizers, 1, 40, sequences=2)
    assert in_16_bits(model) == set(watched.in_16_bits) == held
    watched.close()
    assert not in_16_bits(model)
