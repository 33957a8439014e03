"""studies/fog.py: the whole study, tiny; what decides it; what it refuses."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch_fp8 as fp8
from scripts import script
from torch.nn import functional as F
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch_fp8.picture import picture
from torch_fp8.table import markdown

from examples.gpt.errors import UserError
from examples.gpt.tokens import Bytes
from models.fog import LM
from models.fog_config import SIZES, architecture
from models.fog_fp8 import to_fp8
from studies.lib import fog_figures
from studies.lib.corpus import make_tokens, save_corpus
from studies.lib.divergence import FIRST, PATIENCE, leaves, step_noise
from studies.lib.fog_page import CONSISTENT, NOT, OPEN, OTHER, PAPER_ARM, _speed, claims, page
from studies.lib.fog_results import Line, alarm, merged, outcomes
from studies.lib.fog_seen import jump, seen
from studies.lib.kurtosis import Kurtosis
from studies.lib.lines import read_lines
from studies.lib.runs import all_runs

ROOT = Path(__file__).parents[1]
fog = script("studies/fog.py")

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
    return subprocess.run(command(*arguments, tokens=tokens, out=out), capture_output=True, text=True, cwd=ROOT)


def records_of(out):
    """Of every run, all but what a clock wrote."""
    found = {one.name: one.records() for one in all_runs(out)}
    for records in found.values():
        for record in records:
            record.get("result", {}).pop("seconds", None)
    return found


# ---- whole studies ---------------------------------------------------------------------------------------------------


def test_a_study_killed_anywhere_ends_as_if_it_had_not_been(tmp_path, tokens, monkeypatch):
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
    ],
)
def test_bad_input_is_refused_in_words(tmp_path, tokens, arguments, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", command(*arguments, tokens=tokens, out=tmp_path / "out")[1:])
    with pytest.raises(UserError) as refused:
        fog.main()
    assert words in str(refused.value) and not (tmp_path / "out").exists()


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


# ---- the report ------------------------------------------------------------------------------------------------------


def line(name, arm="bf16", *, study="provoke", rate=1, seed=0, away=0, grows=0, loss=3.0, lost=0, steps=300, to=300):
    """A run whose loss is the same for all arms of a seed, but higher from the step ``away`` on, and not finite from
    ``lost`` on; and whose kurtosis is level, but doubles with each sample from the step ``grows`` on. It is as far as
    ``to``."""
    spec = {"study": study, "architecture": name, "arm": arm, "rate": rate, "lr": 1e-3 * rate, "fp8": fog.ARMS[arm]}
    spec |= {"size": "tiny", "seed": seed, "steps": steps, "batch": 2, "context": 64, "warm_up": 15}
    losses = [x + (1.0 if away and step >= away else 0.0) for step, x in enumerate(wavering(steps, seed=seed), start=1)]
    losses = [None if lost and step >= lost else loss for step, loss in enumerate(losses[:to], start=1)]
    samples = list(range(5, to + 1, 5))
    level = [4.0 * 2 ** max(0, (step - grows) // 5) if grows and step > grows else 4.0 for step in samples]
    kurtosis = {kind: [[3.0, value] for value in level] for kind in ("qkv", "ffn", "block")}
    result = {"loss": loss, "diverged": lost, "seconds": 1.0, "gpu": "CPU", "parameters": 1000} if to == steps else None
    return Line(spec, to, result, losses, [1.0] * to, samples, kurtosis)


def verdicts(*lines):
    return {claim.words.split(",")[0]: claim.verdict for claim in claims(lines)}


def test_a_run_that_leaves_is_held_to_its_own_twin_and_was_announced():
    runs = [line("llama3"), line("llama3", rate=10, away=30), line("llama3", "fp8", away=200, grows=150)]
    (one,) = outcomes(runs, "provoke")
    assert (one.left, one.alarm, one.lead) == (200, (170, 1), 30) and one.further == pytest.approx(1.0)
    assert alarm(runs[0]) is None and outcomes(runs, "parity") == []
    runs[2].kurtosis["qkv"][20][0] = None  # not finite: one such sample is no alarm
    assert alarm(runs[2]) == (170, 1)
    runs[2].losses[100:] = [None]
    assert outcomes(runs, "provoke")[0].left == 101 and outcomes(runs, "provoke")[0].further is None


def test_what_leaves_is_a_divergence_only_where_bf16_itself_holds():
    words = "Llama 3 diverges with FP8 attention (after 0.7 to 6.6 billion tokens)"
    runs = [line("llama3"), line("llama3", "fp8-attention", away=200), line("llama3", "fp8")]
    assert verdicts(*runs)[words] == OPEN  # who knows what BF16 does the second time
    assert verdicts(*runs, line("llama3", "bf16-again"))[words] == CONSISTENT
    assert verdicts(*runs, line("llama3", "bf16-again", away=250))[words] == OPEN
    assert verdicts(*runs, line("llama3", "bf16-again", to=200 + PATIENCE - 2))[words] == OPEN  # one step short
    assert verdicts(*runs, line("llama3", "bf16-again", to=200 + PATIENCE - 1))[words] == CONSISTENT
    runs[0] = line("llama3", lost=290)
    assert verdicts(*runs, line("llama3", "bf16-again"))[words] == OPEN


@pytest.mark.parametrize(
    "of_attention, of_linears, why",
    [
        ({"away": 30}, {}, f"{OTHER}: at the start of training"),
        ({"away": 31}, {}, CONSISTENT),
        ({"away": 200}, {"away": 250}, f"{OTHER}: FP8 linears alone leave too"),
        ({"away": 200}, {"to": 210}, f"{OTHER}: FP8 linears alone were not run as far"),
        ({"away": 200, "rate": 10}, {"rate": 10}, f"{CONSISTENT}; at 10 × the usual rate"),
    ],
)
def test_a_divergence_of_another_kind_is_told_from_the_papers(of_attention, of_linears, why):
    rate = of_attention.get("rate", 1)
    runs = [line("llama3", rate=rate), line("llama3", "bf16-again", rate=rate), line("llama3", "fp8", **of_linears)]
    runs.append(line("llama3", "fp8-attention", **of_attention))
    assert verdicts(*runs)["Llama 3 diverges with FP8 attention (after 0.7 to 6.6 billion tokens)"] == why
    if why.startswith(OTHER) and rate == 1:  # one more run that diverges as the paper's is enough
        nearer = [line("llama3", arm, rate=3) for arm in ("bf16", "bf16-again", "fp8")]
        nearer.append(line("llama3", PAPER_ARM, rate=3, away=200))
        verdict = verdicts(*runs, *nearer)["Llama 3 diverges with FP8 attention (after 0.7 to 6.6 billion tokens)"]
        assert verdict == f"{CONSISTENT}; at 3 × the usual rate"


def test_an_architecture_that_holds_does_so_as_far_as_it_was_run():
    words = "FOG-max does not diverge with FP8 attention"
    runs = [line("fog-max"), line("fog-max", "bf16-again"), line("fog-max", "fp8-attention")]
    assert verdicts()[words] == OPEN and verdicts(*runs)[words] == f"{CONSISTENT}, as far as these tokens"
    left = line("fog-max", "fp8-attention", away=100)
    assert verdicts(*runs[:2], line("fog-max", "fp8"), left)[words] == NOT
    assert verdicts(*runs[:2], left)[words].startswith(OTHER) and verdicts(runs[0], left)[words] == OPEN
    half = [line("fog-max", to=170), line("fog-max", "fp8-attention", to=250)]
    (claim,) = (claim for claim in claims(half) if claim.words == words)
    assert claim.verdict == f"{CONSISTENT}, as far as these tokens" and claim.found == "none left BF16 by step 170"
    assert "1 of the pairs unfinished" in claim.run and "21.8k tokens" in claim.run


@pytest.mark.parametrize(
    "above, verdict",
    [((0.001, 0.0012, 0.0011), CONSISTENT), ((0.004, 0.0041, 0.0042), NOT), ((0.0, 0.003, 0.006), OPEN),
     ((0.001, 0.002, None), NOT), ((0.001,), OPEN)],
)  # fmt: skip
def test_parity_is_an_interval_below_the_margin(above, verdict):
    runs = []
    for seed, share in enumerate(above):
        runs.append(line("fog-opt", study="parity", seed=seed, loss=3.0))
        loss = None if share is None else 3.0 * (1 + share)
        runs.append(line("fog-opt", "fp8-attention", study="parity", seed=seed, loss=loss))
    assert verdicts(*runs)["FOG-opt with FP8 attention is as good as in BF16"] == verdict


def test_kurtosis_foretells_where_every_run_that_left_was_announced():
    words = "The kurtosis of q"
    calm = [line("fog-max"), line("fog-max", "fp8")]
    told = [line("llama3"), line("llama3", "fp8", away=200, grows=150)]
    untold = [line("olmo2"), line("olmo2", "fp8", away=200)]
    assert verdicts(*calm)[words] == OPEN and verdicts(*calm, *told)[words] == CONSISTENT
    assert verdicts(*told, *untold)[words] == OPEN and verdicts(*untold)[words] == NOT
    early = [line("op"), line("op", "fp8", away=60)]  # eleven samples before, and twelve
    late = [line("op"), line("op", "fp8", away=61)]
    assert verdicts(*untold, *early)[words] == NOT and verdicts(*early)[words] == OPEN
    assert verdicts(*told, *early)[words] == CONSISTENT and verdicts(*told, *late)[words] == OPEN
    (claim,) = (claim for claim in claims([*calm, *early]) if claim.words.startswith(words))
    assert claim.found.startswith("no run left BF16 late enough; 0 of 1 others") and "1 left or ended" in claim.found
    (claim,) = (claim for claim in claims([*calm, *told]) if claim.words.startswith(words))
    assert claim.found == "1 of 1 runs that left BF16 were announced, by 30 to 30 steps; 0 of 1 others had an alarm"


def test_what_was_seen_is_said_in_words_of_the_data():
    lost = line("llama3", "fp8-attention", away=60, lost=70, to=72)
    lost.grad_norms[54] = 11.0
    runs = [line("llama3"), line("llama3", "bf16-again", to=150), lost, line("llama3", "default", away=50, to=170)]
    title, start, arms, why, table = seen(outcomes([*runs, line("fog-max"), line("fog-max", "fp8")], "provoke"))
    assert title == "### What was seen: Llama 3, tiny, learning rate 0.001, seed 0"
    assert "1 times the usual one, the warm-up 15 steps" in start and "BF16 itself, 300 steps, ends at" in start
    again, paper, default = arms.splitlines()
    assert again == "* **BF16, the same again** does not leave BF16 by step 150, where it is so far."
    assert (
        "leaves BF16 at step 60, after 7.68k tokens; its gradient norm, before clipping, has jumped at step 55" in paper
    )
    assert "its kurtosis of q, k and v is 4 at step 55, BF16's 4; its loss is not finite from step 70 on." in paper
    assert "leaves BF16 at step 50" in default and "at step 170 its loss is 4." in default and "jumped" not in default
    assert "BF16 does not leave itself" in why
    assert "Not needed for it: a cold start, one scale for q, k and v; a run without leaves too." in why
    assert "attention's backward in FP8, attention in FP8." in why and "It does not happen with" not in why
    rows = table.splitlines()[4:]
    assert [row.split("|")[1].strip() for row in rows] == [str(step) for step in range(40, 80, 5)]
    assert rows[-1].split("|")[4].strip() == "lost" and "(11)" in rows[3]

    runs[1] = line("llama3", "bf16-again", to=78)  # it may yet leave where the paper's arm did
    assert "BF16 was not run again so far" in seen(outcomes(runs, "provoke"))[3]
    runs[1] = line("llama3", "bf16-again", away=100)
    assert "BF16 leaves itself" in seen(outcomes(runs, "provoke"))[3]
    runs[3] = line("llama3", "default", to=170)
    why = seen(outcomes(runs, "provoke"))[3]
    assert "It does not happen with: … own scales for q, k, v, no cold start." in why and "Not needed" not in why
    assert seen(outcomes([line("op"), line("op", "bf16-again", away=50)], "provoke")) == []


def test_a_gradient_norm_jumps_against_its_own_median():
    assert jump([1.0] * 300) is None and jump([1.0] * 40 + [11.0]) == 41 and jump([1.0] * 40 + [None]) == 41
    assert jump([99.0, *[1.0] * (FIRST - 1)]) is None and jump([9.0] * 40 + [80.0]) is None


def test_a_panel_shows_its_own_runs_whole(tmp_path, monkeypatch):
    figures = []

    @contextmanager
    def kept(path, title, size):
        with picture(path, title, size) as figure:
            figures.append(figure)
            yield figure

    monkeypatch.setattr(fog_figures, "picture", kept)
    runs = [line(name, arm, rate=rate, to=to) for name, rate, to in (("llama3", 1, 300), ("fog-max", 10, 200))
            for arm in ("bf16", "fp8")]  # fmt: skip
    runs += [line("llama3", "fp8-attention", away=40, lost=60, to=80), line("llama3", "default", to=0)]
    names = fog_figures.draw(tmp_path, runs)
    assert names == ["provoke-tiny-300x128", "provoke-kurtosis-tiny-300x128"]
    for figure in figures:
        panels = [axes for axes in figure.axes if axes.lines]
        markers = {axes.get_title("left"): {one.get_marker() for one in axes.lines} - {"None"} for axes in panels}
        assert markers == {"Llama 3": {"v", "X"}, "FOG-max": {"o"}}
        for axes in panels:
            low, high = axes.get_ylim()
            values = [y for one in axes.lines for y in one.get_ydata() if y == y]
            assert low < min(values) and max(values) < high


def test_a_speed_is_that_of_the_layers_step():
    head = ["width", "context", "arm", "attention ran in", "times as fast as Llama BF16 compiled, GPU / loop"]
    layers = f"{CONSISTENT}, for the layers alone"
    for times, mode, verdict in ((1.45, "fp8", layers), (1.2, "fp8", OPEN), (1.45, "16bit", OPEN)):
        rows = [["1.5B", 4096, "FOG-flash, FP8, attention", "fp8", "9 / 9"],
                ["8B", 4096, "FOG-flash, FP8, attention", mode, f"**2.00 / {times}**"]]  # fmt: skip
        found = _speed(markdown(head, rows) + "\n\n" + markdown(head[:3], rows[:1]))
        assert found.verdict == verdict and f"{times:g} times" in found.found and mode in found.found
    assert _speed("").verdict == OPEN


def test_lines_are_kept_and_replaced_by_what_got_further(tmp_path):
    path = tmp_path / "data" / "runs.jsonl"
    done, other = line("llama3"), line("llama3", rate=3, steps=400)
    half = dataclasses.replace(done, step=100, result=None, losses=done.losses[:100])
    assert (
        merged(path, [half, other]) == merged(path, []) == read_lines(path, Line) and len(read_lines(path, Line)) == 2
    )
    assert done in merged(path, [done]) and done in merged(path, [half])
    path.write_text(path.read_text() + "{")
    with pytest.raises(UserError, match="must hold a run a line"):
        merged(path, [done])


def test_the_page_in_docs_is_the_one_of_the_data():
    data = ROOT / "studies" / "results" / "fog"
    lines, pictures = read_lines(data / "runs.jsonl", Line), sorted(path.stem for path in data.glob("*.png"))
    shown = (ROOT / "docs" / "fog.md").read_text(encoding="utf-8")
    assert page(lines, pictures, "../studies/results/fog") == shown, "run studies/fog.py report"


def test_a_page_is_written_from_runs_and_again_from_the_data_alone(tmp_path, tokens, monkeypatch):
    for study in ("provoke", "parity", "kurtosis"):
        names = ["llama3", "fog-max"] if study == "kurtosis" else ["fog-max"]
        arms = ["bf16", "bf16-again", "fp8-attention"] if study == "parity" else ["bf16"]
        study_of = [study, *TINY, "--architectures", *names, "--arms", *arms, "--rates", "1", "--seeds", "1"]
        made = run(*study_of, "--jobs", "2", tokens=tokens, out=tmp_path / study)
        assert made.returncode == 0, made.stderr
    to = ["--data", tmp_path / "data", "--page", tmp_path / "page" / "fog.md"]
    folders = ["--runs", *(tmp_path / study for study in ("provoke", "parity", "kurtosis"))]
    made = subprocess.run([*FOG, "report", *map(str, [*folders, *to])], capture_output=True, text=True)
    assert made.returncode == 0 and "6 of 6 runs, 4 pictures" in made.stdout, made.stderr
    text = (tmp_path / "page" / "fog.md").read_text()
    for drawn in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (tmp_path / "page" / drawn).stat().st_size > 10_000
    assert "1 pairs" in text and "BF16 against itself" in text and "cannot be claimed here" in text
    for folder in folders[1:]:
        shutil.rmtree(folder)
    monkeypatch.setattr(sys, "argv", ["fog.py", "report", *map(str, to)])
    assert fog.main() == 0 and (tmp_path / "page" / "fog.md").read_text() == text
    again = [*FOG, "report", "--runs", str(tmp_path / "data"), *map(str, to)]
    wrong = subprocess.run(again, capture_output=True, text=True)
    assert wrong.returncode == 2 and "must be folders of runs of this study" in wrong.stderr
    assert wrong.stderr.count("\n") == 1
