"""The metrics against sums by hand, and the two inference examples as a user meets them, on a tiny random Llama."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch_fp8.checkpoints.quantize import quantize_checkpoint
from torch_fp8.observe.evaluation import Flips, Pairs, Report, bootstrap, compare, layer_sqnr, shared_copy, sqnr

EXAMPLES = Path(__file__).parents[1] / "examples"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def logits(*rows):
    """Logits whose softmax is the given probabilities, shifted: a constant must not matter."""
    return torch.tensor(rows).log() + 3


def pairs(nll, other_nll, kld=None, agree=None, margin=None):
    n = len(nll)
    return Pairs(
        torch.tensor(nll, dtype=torch.float64),
        torch.tensor(other_nll, dtype=torch.float64),
        torch.tensor(kld or [0.0] * n, dtype=torch.float64),
        torch.tensor(agree or [True] * n),
        torch.tensor(margin or [2.0] * n),
    )


class TestCompare:
    def test_each_figure_by_hand(self):
        p = logits([0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [1 / 3, 1 / 3, 1 / 3])
        q = logits([0.25, 0.5, 0.25], [0.2, 0.6, 0.2], [0.1, 0.1, 0.8])
        result = compare(p, q, torch.tensor([0, 2, 1]))  # the last row predicts what is not there
        assert result.nll.tolist() == pytest.approx([-math.log(0.25), -math.log(0.8)], rel=1e-6)
        assert result.other_nll.tolist() == pytest.approx([-math.log(0.25), -math.log(0.6)], rel=1e-6)
        by_hand = [
            0.5 * math.log(2) + 0.25 * math.log(0.5),
            0.2 * math.log(0.5) + 0.8 * math.log(0.8 / 0.6),
        ]
        assert result.kld.tolist() == pytest.approx(by_hand, rel=1e-5)
        assert result.agree.tolist() == [False, True]
        assert result.margin.tolist() == pytest.approx([math.log(2), math.log(8)], rel=1e-5)

    def test_a_probability_of_zero_adds_nothing(self):
        p = torch.tensor([[0.0, -math.inf], [0.0, 0.0]])
        result = compare(p, p, torch.tensor([0, 0]))
        assert result.kld.tolist() == [0]

    def test_long_windows_are_taken_in_parts_that_fit_together(self):
        p, q, ids = torch.randn(300, 7), torch.randn(300, 7), torch.randint(7, (300,))
        whole = compare(p, q, ids)
        assert len(whole.nll) == 299
        last = compare(p[-2:], q[-2:], ids[-2:])
        assert whole.kld[-1] == last.kld[0] and whole.nll[-1] == last.nll[0]

    def test_sizes_that_do_not_fit_are_refused(self):
        with pytest.raises(ValueError, match="torch_fp8: compare takes .* one window"):
            compare(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2, 3))


class TestReport:
    def test_each_figure_by_hand(self):
        first = pairs([1.0, 2.0], [1.5, 2.0], kld=[0.1, 0.3], agree=[True, False], margin=[0.5, 2.0])
        second = pairs([3.0], [2.0], kld=[0.2], agree=[True], margin=[3.0])
        report = Report.of([first, second], [0, 1])
        assert report.tokens == 3
        assert report.perplexity == pytest.approx(math.exp(5.5 / 3))
        assert report.ppl_ratio == pytest.approx(math.exp(-0.5 / 3))
        assert report.kld_mean == pytest.approx(0.2)
        assert (report.kld_median, report.kld_p99, report.kld_max) == (0.2, 0.3, 0.3)
        assert report.top1 == pytest.approx(2 / 3)
        assert report.confident_disagreement == 0.5  # of the two whose margin is above a nat
        dp = [math.exp(-1.5) - math.exp(-1), 0, math.exp(-2) - math.exp(-3)]
        assert report.rms_dp == pytest.approx(math.sqrt(sum(d * d for d in dp) / 3))

    def test_quantiles_count_tokens(self):
        kld = [i / 1000 for i in range(1, 1001)]
        report = Report.of([pairs([1.0] * 1000, [1.0] * 1000, kld=kld[::-1])], [0])
        assert (report.kld_median, report.kld_p99, report.kld_p999) == (0.5, 0.99, 0.999)

    def test_windows_of_one_document_are_drawn_together(self):
        """Two windows that cancel each other within a document leave no doubt; as two documents they do."""
        up, down = pairs([1.0], [1.5]), pairs([1.0], [0.5])
        together = Report.of([up, down, up, down], [0, 0, 1, 1])
        apart = Report.of([up, down, up, down], [0, 1, 2, 3])
        assert (together.ppl_low, together.ppl_high) == (1, 1)
        assert apart.ppl_low < 0.8 and apart.ppl_high > 1.2

    def test_windows_and_documents_must_match(self):
        with pytest.raises(ValueError, match="one document number for each, got 1 and 2"):
            Report.of([pairs([1.0], [1.0])], [0, 1])


class TestBootstrap:
    def test_two_documents_by_hand(self):
        """Means -1, 0 and 1 with probabilities 1/4, 1/2, 1/4: both ends of the interval are the extremes."""
        assert bootstrap([10.0, -10.0], [10, 10]) == (pytest.approx(math.exp(-1)), pytest.approx(math.exp(1)))

    def test_a_document_weighs_by_its_tokens(self):
        """Of five documents the short one is drawn three times or more in 5.8 % of the draws, four times in 0.7 %."""
        low, high = bootstrap([1.0, 0.0, 0.0, 0.0, 0.0], [1, 99, 99, 99, 99])
        assert (low, high) == (1, pytest.approx(math.exp(3 / (3 * 1 + 2 * 99))))

    def test_normal_theory_agrees(self):
        delta = torch.randn(400, dtype=torch.float64) + 0.3
        low, high = (math.log(end) for end in bootstrap(delta.tolist(), [1] * 400))
        half = 1.96 * float(delta.std()) / 20
        assert low == pytest.approx(float(delta.mean()) - half, abs=0.1 * half)
        assert high == pytest.approx(float(delta.mean()) + half, abs=0.1 * half)

    def test_the_same_seed_gives_the_same_interval(self):
        delta, counts = torch.randn(30).tolist(), [7] * 30
        assert bootstrap(delta, counts) == bootstrap(delta, counts)
        assert bootstrap(delta, counts, seed=1) != bootstrap(delta, counts)

    def test_one_document_says_nothing_of_others(self):
        assert all(math.isnan(end) for end in bootstrap([1.0], [10]))


def test_flips_by_hand():
    answers = torch.zeros(6, dtype=torch.int64)
    right, wrong, other_wrong = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]
    before = torch.tensor([right, right, right, right, wrong, wrong])
    after = torch.tensor([right, wrong, wrong, wrong, right, other_wrong])
    flips = Flips.of(before, after, answers)
    assert (flips.items, flips.lost, flips.won) == (6, 3, 1)
    assert flips.accuracy == pytest.approx(2 / 6) and flips.changed == pytest.approx(5 / 6)
    assert flips.p == pytest.approx(2 * (1 + 4) / 16)  # at most one of four coins, two-sided
    assert Flips.of(before, before, answers).p == 1


class TestSqnr:
    def test_by_hand(self):
        reference = torch.tensor([3.0, 4.0])
        assert sqnr(reference, torch.tensor([3.0, 3.5])) == pytest.approx(20)
        assert sqnr(reference, reference) == math.inf

    def test_a_layer_is_judged_by_its_own_input(self):
        """The error of the first layer reaches the second, and is not the second's."""
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        other = shared_copy(model)
        other[0] = nn.Linear(4, 4)
        with torch.no_grad():
            other[0].weight.copy_(model[0].weight * 1.1)
            other[0].bias.copy_(model[0].bias * 1.1)
        found = layer_sqnr(other, model, ["0", "1"], lambda: other(torch.randn(5, 4)))
        assert found == {"0": pytest.approx(20, abs=1e-3), "1": math.inf}
        assert not other[0]._forward_hooks


def test_a_shared_copy_shares_its_tensors_and_not_its_modules():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    copied = shared_copy(model)
    assert copied[0].weight is model[0].weight and copied[1].running_mean is model[1].running_mean
    copied[0] = nn.Identity()
    assert isinstance(model[0], nn.Linear)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a random Llama whose tokens are bytes, and two texts of several documents."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # else every token is as likely as any other, and nothing is to be lost
    model.bfloat16().save_pretrained(folder / "model")
    for name, sign in (("held-out.txt", "+"), ("calibration.txt", "-")):
        documents = ("\n".join(f"{i} {sign} {j} = {i + j}" for j in range(12)) for i in range(4))
        (folder / name).write_text("\n<|endoftext|>\n".join(documents))
    return folder


def run(script, *arguments):
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments), "--device", "cpu"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_evaluate_reports_every_arm_and_its_twin(tiny, tmp_path):
    code, stdout, stderr = run(
        "evaluate.py", "--model", tiny / "model", "--text", tiny / "held-out.txt", "--calibration",
        tiny / "calibration.txt", "--tokens", 400, "--window", 64, "--items", 5, "--out", tmp_path,
    )  # fmt: skip
    assert code == 0, stdout + stderr
    page = (tmp_path / "report.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    head, rows = cells[0], {row[0]: row for row in cells[2:]}
    kld = {name: float(row[head.index("KLD mean")]) for name, row in rows.items()}
    assert kld["BF16"] == 0 and rows["BF16"][head.index("top-1")] == "100.00%"
    names = ("W8A16", "W8A16 block", "W8A8 static", "W8A8 tensor", "W8A8 token", "W8A8 block")
    for name in names:
        assert 0 < kld[name] <= 1.1 * kld[f"{name}, twin"], page
        assert rows[name][-1] == "holds"
    assert len(rows) == 3 + 2 * len(names)
    # On the CPU nothing but the format makes an error: weights alone make less of it than both operands.
    assert kld["W8A16"] < kld["W8A8 token"] and kld["FP32"] < kld["W8A8 token"]
    # The down projections' alone: 64 columns are no group of 128. No other arm has such a note.
    notes = [line for line in page.splitlines() if "inputs in FP8" in line]
    assert len(notes) == 1 and notes[0].startswith('* "W8A8 block" has inputs in FP8 in 2 of 14 linear layers; ')
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_refuses_to_calibrate_on_what_it_measures(tiny, tmp_path):
    text = tiny / "held-out.txt"
    code, _, stderr = run("evaluate.py", "--model", tiny / "model", "--text", text, "--calibration", text)
    assert code == 2 and stderr.startswith("evaluate.py: --calibration must be another text")
    code, _, stderr = run("evaluate.py", "--model", tiny / "model", "--text", text, "--calibration-tokens", 99)
    assert code == 2 and stderr.startswith("evaluate.py: --calibration-tokens is of the text of --calibration")


def test_inference_generates_in_both(tiny):
    code, stdout, stderr = run("llama_inference.py", "--model", tiny / "model", "--prompt", "1 + 1", "--new-tokens", 4)
    assert code == 0, stdout + stderr
    assert stdout.count("tokens/s") == 4 and "of 4 tokens are the same" in stdout
    bf16, ours = (float(part.split(" MiB")[0]) for part in stdout.split("the linear layers ")[1:])
    assert ours <= bf16


def test_a_model_that_is_quantised_is_refused(tiny, tmp_path):
    """What the examples call BF16 would be FP8."""
    quantize_checkpoint(tiny / "model", tmp_path / "fp8")
    code, _, stderr = run("llama_inference.py", "--model", tmp_path / "fp8")
    assert code == 2 and f"{tmp_path / 'fp8'} is quantised: its config.json has a quantization_config; give" in stderr


def test_generation_is_that_of_transformers(tiny, monkeypatch):
    """The static cache, the mask and the positions of the loop, against the model's own generate."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from llm.generate import generate
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
    ids = list(b"1 + 1 = ")
    with torch.inference_mode():
        ours = generate(model, ids, 12).tokens
        theirs = model.generate(
            torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert ours == theirs[0, len(ids) :].tolist() and len(set(ours)) > 1
