"""studies/fog.py: the whole study, tiny; what decides it; what it refuses."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch_fp8 as fp8
from torch.nn import functional as F
from torch.optim.optimizer import _global_optimizer_post_hooks

from models.fog import LM
from models.fog_config import SIZES, architecture
from models.fog_fp8 import to_fp8
from studies.lib.corpus import make_tokens, save_corpus
from studies.lib.divergence import FIRST, PATIENCE, leaves, step_noise
from studies.lib.kurtosis import Kurtosis
from studies.lib.runs import all_runs

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "studies"))
import fog  # noqa: E402 (a script, which is beside what it imports)

FOG = [sys.executable, str(ROOT / "studies" / "fog.py")]
TINY = ["--size", "tiny", "--batch", "2", "--micro-batch", "1", "--context", "32", "--val-tokens", "128",
        "--steps", "12", "--every", "4"]  # fmt: skip


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "text").write_text("\n<|endoftext|>\n".join(f"{i} plus {i} is {2 * i}. " * 8 for i in range(200)))
    save_corpus(folder / "tokens", make_tokens(folder / "text", None, 0.2))
    return folder / "tokens"


def command(*arguments, tokens, out):
    return [*FOG, *map(str, arguments), "--tokens", str(tokens), "--out", str(out)]


def run(*arguments, tokens, out):
    return subprocess.run(command(*arguments, tokens=tokens, out=out), capture_output=True, text=True, cwd=ROOT)


def records_of(out):
    """Of every run, all but what a clock wrote."""
    found = {one.name: one.records() for one in all_runs(out)}
    for records in found.values():
        for record in records:
            record.get("result", {}).pop("seconds", None)
    return found


# ---- whole studies ---------------------------------------------------------------------------------------------------


def test_a_study_killed_anywhere_ends_as_if_it_had_not_been(tmp_path, tokens):
    study = ["provoke", *TINY, "--architectures", "fog-max", "--arms", "bf16", "fp8-attention", "--rates", "3"]
    whole = run(*study, "--jobs", "2", tokens=tokens, out=tmp_path / "whole")
    assert whole.returncode == 0 and "all 2 runs are done" in whole.stdout, whole.stderr

    out = tmp_path / "killed"
    parent = subprocess.Popen(command(*study, tokens=tokens, out=out), cwd=ROOT, stdout=subprocess.DEVNULL)
    log = out / "fog-max_x3_bf16_0" / "log.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < 3:
        time.sleep(0.01)
    (child,) = map(int, Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split())
    for process in (child, parent.pid):
        os.kill(process, signal.SIGKILL)
    parent.wait()
    rest = run(*study, tokens=tokens, out=out)
    assert rest.returncode == 0 and "all 2 runs are done" in rest.stdout, rest.stderr
    assert records_of(out) == records_of(tmp_path / "whole")

    records = records_of(out)["fog-max_x3_fp8-attention_0"]
    assert [record["step"] for record in records if "kurtosis" in record] == [1, 4, 8, 12]
    assert {kind: len(layers) for kind, layers in records[1]["kurtosis"].items()} == {"qkv": 2, "ffn": 2, "block": 2}
    assert "loss_fp8" in records[-1]["result"]

    for other in (["--lr", "1e-2"], ["--steps", "13"]):
        refused = run(*study, *other, tokens=tokens, out=out)
        assert refused.returncode == 2 and "holds another run: it differs in" in refused.stderr
    assert records_of(out) == records_of(tmp_path / "whole")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["provoke", "--architectures", "fog-mux"], "no architecture has the name 'fog-mux'; did you mean fog-max"),
        (["provoke", "--architectures", "llama3:norm"], "a name may end in :qk-norm or :no-qk-norm, got 'llama3:norm'"),
        (["parity", "--arms", "bf16", "fp9"], "--arms takes bf16, bf16-again, fp8"),
        (["parity", "--arms", "fp8"], "--arms must begin with bf16, which the others are held to, got fp8"),
        (["kurtosis", "--size", "100"], "--size must be one of tiny, 25M"),
        (["kurtosis", "--every", "0"], "--every must be at least 1, got 0"),
        (["kurtosis", "--lr", "-1"], "--lr and --rates must be positive"),
        (["parity", "--cooldown", "1"], "must be from 0 to 0.9, got 1.0"),
        (["parity", "--seeds", "0"], "the study is empty"),
    ],
)
def test_bad_input_is_one_line(tmp_path, tokens, arguments, words):
    made = run(*arguments, tokens=tokens, out=tmp_path / "out")
    assert made.returncode == 2 and words in made.stderr and made.stderr.count("\n") == 1, made.stderr
    assert not (tmp_path / "out").exists()


# ---- models ----------------------------------------------------------------------------------------------------------


def test_a_norm_of_q_and_k_can_be_taken_off_and_put_on():
    assert fog.named_architecture("llama3:qk-norm").qk == "frozen_rms"
    without = fog.named_architecture("fog-flash:no-qk-norm")
    assert without.qk == "none" and not without.own_scale and without.post == architecture("fog-flash").post
    assert (
        fog.named_architecture("olmo2") == architecture("olmo2") and fog.named_architecture("fog-opt:qk-norm").own_scale
    )


def test_a_cold_start_has_scale_1_in_the_first_step_alone():
    torch.manual_seed(0)
    x, weight = torch.randn(64, 128) / 2**14, torch.randn(32, 128)  # x is nothing in E4M3 as it is
    for cold in (False, True):
        layer = torch.nn.Sequential(torch.nn.Linear(128, 32, bias=False))
        fp8.convert(layer, fp8.DelayedScaling(), tokens=None)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        with torch.no_grad():
            layer[0].weight.copy_(weight)
        if cold:
            fog.start_cold(layer)
        for step in range(2):
            y = layer(x.bfloat16())
            assert (y.abs().max() == 0) == (cold and step == 0)
            y.sum().backward()
            optimizer.step()
        torch.testing.assert_close(y.float(), x @ weight.T, rtol=0.1, atol=2e-4)


def test_a_cold_start_leaves_constant_scales():
    model = to_fp8(LM("fog-max", SIZES["tiny"], vocab=64), attention="fp8")
    fog.start_cold(model)
    slots = fp8.state_dict(model)["blocks.0.attention.attend.fp8_slots"]
    assert slots[:, 1].tolist() == [1, 1, 1, 256, 1, 1, 1, 1, 1, 1] and slots[:, 3].tolist() == [1, 1, 1, 0, *[1] * 6]


# ---- what is seen ----------------------------------------------------------------------------------------------------


def test_kurtosis_is_that_of_the_layers_in_order():
    torch.manual_seed(0)
    model = LM("llama3", SIZES["tiny"], vocab=64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    observer, hooks = Kurtosis(model, 5), len(_global_optimizer_post_hooks)
    assert [step for step in range(1, 12) if observer.wants(step)] == [1, 5, 10]
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, y: seen.append(y.detach().double()))
    inputs, targets = torch.randint(64, (2, 3, 16))
    with observer.watch():
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
    optimizer.step()
    found = observer.seen()
    expected = [(y.pow(4).mean((1, 2)) / y.square().mean((1, 2)).square()).mean().item() for y in seen]
    assert found["kurtosis"]["block"] == pytest.approx(expected, rel=1e-3)
    assert found["rms"]["block"] == pytest.approx([y.square().mean().sqrt().item() for y in seen], rel=1e-3)
    assert not model.head._forward_hooks and len(_global_optimizer_post_hooks) == hooks


def wavering(steps, level=0.0, noise=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    fall = 3 + 6 / torch.arange(1, steps + 1).sqrt()
    return (fall + level + noise * torch.randn(steps, generator=generator)).tolist()


def test_noise_is_that_of_steps_whatever_the_trend():
    assert step_noise(wavering(400)) == pytest.approx(0.1, rel=0.15)
    assert step_noise([*wavering(400), None, 50.0]) == pytest.approx(0.1, rel=0.15)
    assert step_noise([1.0, 2.0]) == float("inf")


def test_a_loss_leaves_by_the_rule():
    reference = wavering(300)
    assert leaves(reference, reference) is None
    assert leaves([loss + 0.2 for loss in reference], reference) is None  # 2 sigma
    away = [loss + (0.5 if step >= 150 else 0.0) for step, loss in enumerate(reference, start=1)]
    assert leaves(away, reference) == 150
    assert leaves([*away[: 150 + PATIENCE - 2], *reference[150 + PATIENCE - 2 :]], reference) is None  # one step short
    assert leaves([*away[:155], None], reference) == 150 and leaves([*reference[:40], None], reference) == 41
    assert leaves([loss + 9 for loss in reference], reference) == FIRST + 1
    assert leaves([*reference[:200], *[None] * 9], [*reference[:100], *[None] * 200]) is None
    assert leaves([loss - 0.5 for loss in reference], reference) is None  # better is not away


def test_two_noises_of_one_level_do_not_leave():
    left = [leaves(wavering(600, seed=2 * seed), wavering(600, seed=2 * seed + 1)) for seed in range(100)]
    assert left == [None] * 100
