"""When the watch raises an alarm in training and when it does not; what it does then, and that nothing of it stays."""

import copy
import gc
import math
import warnings

import pytest
import torch
import torch_fp8 as fp8
from torch import nn
from torch_fp8.observe.watch import read_log
from watching import adamw, data, fp8_gpt, gpt, in_16_bits, muon, outlier, resumable, three_steps, train


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


def test_a_model_that_goes_before_its_watch_leaves_compilers_as_they_were():
    model = gpt()
    watched = fp8.watch(model)
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    del model
    gc.collect()
    assert torch._dynamo.eval_frame._stance.stance == "default"
    watched.close()


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
