"""studies/fog.py: the whole study, tiny; its models; what it refuses."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch_fp8 as fp8
from fog_runs import fog, line
from scripts import called
from studying import kill, records_of
from torch.nn import functional as F
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch_fp8.format import quantize

from examples.gpt.errors import UserError
from examples.gpt.tokens import Bytes
from models.fog import LM
from models.fog_config import SIZES, architecture
from models.fog_fp8 import to_fp8
from studies.lib.corpus import make_tokens, save_corpus
from studies.lib.fog_results import condensed
from studies.lib.kurtosis import Kurtosis
from studies.lib.runs import Run

ROOT = Path(__file__).parents[1]

FOG = [sys.executable, str(ROOT / "studies" / "fog.py")]
TINY = ["--size", "tiny", "--batch", "2", "--micro-batch", "1", "--context", "32", "--val-tokens", "128",
        "--steps", "12", "--every", "4"]  # fmt: skip


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "text").write_text("\n<|endoftext|>\n".join(f"{i} plus {i} is {2 * i}. " * 8 for i in range(200)))
    save_corpus(folder / "tokens", make_tokens(folder / "text", Bytes(), "bytes", 0.2))
    return folder / "tokens"


def command(*arguments, tokens, out):
    return [*FOG, *map(str, arguments), "--tokens", str(tokens), "--out", str(out)]


def run(*arguments, tokens, out):
    """The study; each of its runs is a process of its own, as ever."""
    return called(lambda: fog.exit_code(fog.main), *command(*arguments, tokens=tokens, out=out)[1:])


# ---- whole studies ---------------------------------------------------------------------------------------------------


def test_a_study_killed_anywhere_ends_as_if_it_had_not_been(tmp_path, tokens, monkeypatch):
    study = ["provoke", *TINY, "--architectures", "fog-max", "--arms", "bf16", "fp8-attention", "--rates", "3"]
    whole = run(*study, "--jobs", "2", tokens=tokens, out=tmp_path / "whole")
    assert whole.returncode == 0 and "all 2 runs are done" in whole.stdout, whole.stderr

    out = tmp_path / "killed"
    kill(command(*study, tokens=tokens, out=out), out / "fog-max_x3_bf16_0" / "log.jsonl", 3)
    rest = run(*study, tokens=tokens, out=out)
    assert rest.returncode == 0 and "all 2 runs are done" in rest.stdout, rest.stderr
    assert records_of(out) == records_of(tmp_path / "whole")

    records = records_of(out)["fog-max_x3_fp8-attention_0"]
    assert [record["step"] for record in records if "kurtosis" in record] == [1, 4, 8, 12]
    assert {kind: len(layers) for kind, layers in records[1]["kurtosis"].items()} == {"qkv": 2, "ffn": 2, "block": 2}
    assert "loss_fp8" in records[-1]["result"]

    otherwise = run(*study[:-1], "1", "--lr", "3e-3", tokens=tokens, out=out)  # the same learning rate
    assert otherwise.returncode == 0 and "all 2 runs are done" in otherwise.stdout, otherwise.stderr
    for other in (["--cooldown", "0.5"], ["--steps", "13"]):
        monkeypatch.setattr(sys, "argv", command(*study, *other, tokens=tokens, out=out)[1:])
        with pytest.raises(UserError, match="holds another run: it differs in"):
            fog.main()
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
        (["kurtosis", "--lr", "inf"], "--lr and --rates must be positive and finite"),
        (["provoke", "--rates", "1", "nan"], "--lr and --rates must be positive and finite"),
        (["provoke", "--lr", "1e308", "--rates", "1e9"], "lr must be a finite number"),
        (["parity", "--cooldown", "1"], "must be from 0 to 0.9, got 1.0"),
        (["parity", "--seeds", "0"], "the study is empty"),
        (["parity", "--steps", "9" * 400], "--steps must be within ±2,147,483,647, got 9"),
        (["parity", "--seeds", "9999999"], "at most 10,000 runs, and this would be 89,999,991; give fewer --seeds"),
        (["parity", *TINY, "--minutes", "inf"], "--minutes must be positive and finite, got inf"),
        (["provoke", "--rates", "1", "1.0000001"], "two runs would be called llama3_x1_bf16_0"),
        (["provoke", "--rates", "1", "--arms", "bf16", "bf16"], "give each architecture, arm and rate once"),
    ],
)
def test_bad_input_is_refused_in_words(tmp_path, tokens, arguments, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", command(*arguments, tokens=tokens, out=tmp_path / "out")[1:])
    with pytest.raises(UserError) as refused:
        fog.main()
    assert words in str(refused.value) and not (tmp_path / "out").exists()


def test_a_model_that_no_memory_here_holds_is_refused(tmp_path, tokens, monkeypatch):
    asked = command("parity", *TINY[2:], "--size", "8B", tokens=tokens, out=tmp_path / "out")[1:]
    monkeypatch.setattr(sys, "argv", asked)
    monkeypatch.setitem(fog.check_memory.__globals__, "available", lambda: 100 << 30)
    with pytest.raises(UserError, match=r"fog-max of size 8B needs at least 1\d\d\.\d GiB for its weights, gr"):
        fog.main()
    assert not (tmp_path / "out").exists()


def test_one_learning_rate_is_one_run_however_it_was_typed(tmp_path, tokens, monkeypatch):
    def specs(lr, rate):
        typed = ["provoke", *TINY, "--architectures", "llama3", "--seeds", "1", "--lr", lr, "--rates", rate]
        monkeypatch.setattr(sys, "argv", command(*typed, tokens=tokens, out=tmp_path)[1:])
        return list(fog.specs_of(fog.parse_arguments(), fog.read_corpus(tokens)).values())

    assert specs("0.01", "1") == specs("0.001", "10") == specs("1e-4", "100")
    assert specs("0.003", "1") == specs("3e-4", "10") and specs("3e-4", "10")[0]["rate"] == 3  # 0.0003 * 10 < 0.003
    assert specs("0.003", "1") != specs("0.01", "1")


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


def test_a_cold_start_leaves_weights_to_their_own_amax():
    """The scale 1 does not fit them, and one that does not fit a weight is not used."""
    torch.manual_seed(0)
    layer = fp8.convert(torch.nn.Sequential(torch.nn.Linear(128, 32, bias=False)), fp8.DelayedScaling(), tokens=None)
    fog.start_cold(layer)
    x, weight = torch.randn(64, 128), layer[0].weight.detach()
    x8, (own, one) = quantize(x, torch.ones(())), ((448 / weight.abs().max()), torch.ones(()))
    y = layer(x).detach()
    expected, other = (x8.float() @ (quantize(weight, scale).float() / scale).T for scale in (own, one))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert (y - other).norm() > 0.02 * y.norm()


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


# ---- the report ------------------------------------------------------------------------------------------------------


def test_a_log_with_a_loss_and_no_gradient_norm_is_refused_in_words(tmp_path):
    run = Run(tmp_path / "a", line("llama3").spec)
    run.folder.mkdir()
    run.log.write_text('{"step": 1, "loss": 3.0, "grad_norm": null}\n{"step": 2, "kurtosis": {}}\n')
    assert condensed(run).grad_norms == [None]
    run.log.write_text(run.log.read_text() + '{"step": 2, "loss": 2.5}\n')
    with pytest.raises(UserError, match=r"a.log.jsonl must have a grad_norm beside each loss, but has none in step 2"):
        condensed(run)
    for steps in ([1, 3], [1, 2, 1], [2, 1], [1, 1]):
        run.log.write_text("".join(f'{{"step": {step}, "loss": 3.0, "grad_norm": 1.0}}\n' for step in steps))
        with pytest.raises(UserError, match=r"a.log.jsonl must have each step once and in order, but has not"):
            condensed(run)


def test_a_page_is_written_from_runs_and_again_from_the_data_alone(tmp_path, tokens, monkeypatch):
    for study in ("provoke", "parity", "kurtosis"):
        names = ["llama3", "fog-max"] if study == "kurtosis" else ["fog-max"]
        arms = ["bf16", "bf16-again", "fp8-attention"] if study == "parity" else ["bf16"]
        study_of = [study, *TINY, "--architectures", *names, "--arms", *arms, "--rates", "1", "--seeds", "1"]
        made = run(*study_of, "--jobs", "2", tokens=tokens, out=tmp_path / study)
        assert made.returncode == 0, made.stderr
    to = ["--data", tmp_path / "data", "--page", tmp_path / "page" / "fog.md"]
    folders = ["--runs", *(tmp_path / study for study in ("provoke", "parity", "kurtosis"))]
    made = called(lambda: fog.exit_code(fog.main), FOG[1], "report", *folders, *to)
    assert made.returncode == 0 and "6 of 6 runs, 4 pictures" in made.stdout, made.stderr
    text = (tmp_path / "page" / "fog.md").read_text()
    for drawn in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (tmp_path / "page" / drawn).stat().st_size > 10_000
    assert "1 pair |" in text and "BF16 against itself" in text and "cannot be claimed here" in text
    for folder in folders[1:]:
        shutil.rmtree(folder)
    monkeypatch.setattr(sys, "argv", ["fog.py", "report", *map(str, to)])
    assert fog.main() == 0 and (tmp_path / "page" / "fog.md").read_text() == text
    again = [*FOG, "report", "--runs", str(tmp_path / "data"), *map(str, to)]
    wrong = subprocess.run(again, capture_output=True, text=True)
    assert wrong.returncode == 2 and "must be folders of runs of this study" in wrong.stderr
    assert wrong.stderr.count("\n") == 1
