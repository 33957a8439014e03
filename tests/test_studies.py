"""The studies' machinery: a training, whole studies, and what is computed from runs."""

import functools
import math
import re
import subprocess

import pytest
import torch
import torch_fp8 as fp8
from studying import PLAN, QUICK, ROOT, SCALES, TINY, Table, command, records_of, run, scales, training
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from examples.gpt.errors import UserError
from models.names import MODELS, named, parameter_count
from studies.lib.arms import ARMS, arm, inner_layers, make_model, make_recipe, words
from studies.lib.costs import costs
from studies.lib.divergence import FACTOR, PATIENCE, Divergence
from studies.lib.emulation import Emulated
from studies.lib.intervals import interval
from studies.lib.memory import INFERENCE, TRAINING, check_memory
from studies.lib.progress import far, length
from studies.lib.runs import all_runs, claim
from studies.lib.training import Plan, Training, validate

# ---- a training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule, cooldown", [("wsd", 4), ("cosine", 0)])
def test_learning_rates_rise_stay_and_fall_to_zero(schedule, cooldown):
    plan = Plan(**{**PLAN, "schedule": schedule, "cooldown": cooldown})
    rates = [plan.learning_rate(step) for step in range(11)]
    assert rates[0] == pytest.approx(plan.lr / 3) and rates[2] == plan.lr and rates[10] == pytest.approx(0)
    if schedule == "wsd":
        assert rates[2:7] == [plan.lr] * 5 and rates[8] == pytest.approx(plan.lr * (1 - math.sqrt(0.5)))
    else:
        assert rates[6] == pytest.approx(plan.lr * 0.5)


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("steps", 0, "--steps must be at least 1"),
        ("validated", 0, "--val-tokens must be at least 1"),
        ("lr", math.inf, "--lr must be a finite number"),
        ("lr", math.nan, "--lr must be a finite number"),
        ("micro_batch", 3, "--batch must be a multiple of --micro-batch = 3"),
        ("schedule", "linear", "schedule must be"),
        ("dtype", "float8", "dtype must be"),
        ("warm_up", 9, "must fit into the 10 steps"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(field, value, words):
    with pytest.raises(UserError, match=words):
        Plan(**{**PLAN, field: value})


def test_validation_is_the_mean_over_the_held_out_tokens(corpus):
    torch.manual_seed(0)
    plan, model = Plan(**{**PLAN, "batch": 6, "micro_batch": 6}), Table()
    found = validate(model, corpus, plan, torch.device("cpu"))
    starts = torch.linspace(0, corpus.val.numel() - 17, 16, dtype=torch.float64).long()
    losses, right = [], []
    for start in starts.tolist():
        ids = corpus.val[start : start + 17].long()
        log_p = model.table.weight.double()[ids[:-1]].log_softmax(-1)
        losses.append(-log_p.gather(1, ids[1:, None]).mean())
        right.append((log_p.argmax(-1) == ids[1:]).double().mean())
    assert found["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)
    assert found["accuracy"] == pytest.approx(torch.stack(right).mean().item(), abs=1e-9)


def test_gradients_of_micro_batches_add_up_to_those_of_the_batch(tmp_path, corpus):
    """And a constant loss scale changes nothing, for it is a power of two."""
    weights = []
    for name, changed in {"a": {}, "b": {"micro_batch": 4}, "c": {"loss_scale": 2.0**10}}.items():
        one = training(tmp_path / name, corpus, **changed)
        assert one.go_on(lambda: False)
        weights.append(one.model.table.weight.detach().clone())
    assert torch.allclose(weights[0], weights[1], atol=1e-5) and weights[0].equal(weights[2])


def test_vectors_do_not_decay(tmp_path, corpus):
    (run,) = claim(tmp_path, {"run": PLAN})
    other = Training(run, torch.nn.Linear(4, 4), corpus, torch.device("cpu"))
    decays = {p.dim(): group["weight_decay"] for group in other._optimizer.param_groups for p in group["params"]}
    assert decays == {2: 0.1, 1: 0.0}


def test_divergence_is_noted_by_the_rule():
    one = Divergence(2.0 if step < 30 else 2.0 * FACTOR * 1.01 for step in range(1, 60))
    assert one.at == 30 + PATIENCE - 1
    two = Divergence(2.0 if step % PATIENCE else 9.0 for step in range(1, 60))  # now and then a step is no divergence
    assert two.at == 0 and not two.lost
    two.add(math.nan)
    assert two.at == 60 and two.lost
    two.add(2.0)
    assert two.lost


def test_a_loss_scale_bears_losses_that_are_not_finite_as_long_as_it_can_help():
    """It leaves these steps out; a loss that stays so is lost at a step of its own."""
    one = Divergence([math.inf, 2.0, *[math.nan] * (PATIENCE - 1), 2.0], skips=True)
    assert one.at == 1 and not one.lost
    for _ in range(PATIENCE):
        assert not one.lost
        one.add(None)
    assert one.lost


@pytest.mark.parametrize("name", ["histogram", "gc-amax", "gc-histogram", "gc-cscale:2", "cscale:2"])
def test_arms_that_the_hardware_has_not_are_emulated(tmp_path, corpus, name):
    """They train otherwise than BF16, nearly as well, and are validated in 16 bits like all others."""
    results = {}
    for each in ("bf16", name):
        torch.manual_seed(0)
        plan = {**PLAN, **arm(each), "model": "gpt-tiny", "lr": 1e-3}
        (one,) = claim(tmp_path, {each.replace(":", ""): plan})
        model = make_model(one.spec, corpus, torch.device("cpu"))
        assert isinstance(model.blocks[0].mlp.up, Emulated) == (each == name != "cscale:2")
        assert not isinstance(model.head, Emulated)
        assert Training(one, model, corpus, torch.device("cpu")).go_on(lambda: False)
        results[each] = one.result()
    assert 0 < abs(results[name]["loss"] - results["bf16"]["loss"]) < 0.05
    assert ("loss_fp8" in results[name]) == (name == "cscale:2")


@pytest.mark.parametrize("name", ["delayed", "gc-amax"])
def test_a_model_that_comes_in_eval_is_trained_as_in_train(tmp_path, corpus, name):
    """As transformers gives what it loads. In eval() delayed scaling records nothing and emulation is not done."""
    for mode in ("eval", "train"):
        torch.manual_seed(0)
        (one,) = claim(tmp_path / mode, {"run": {**PLAN, **arm(name), "model": "gpt-tiny", "lr": 1e-3}})
        model = getattr(make_model(one.spec, corpus, torch.device("cpu")), mode)()
        assert Training(one, model, corpus, torch.device("cpu")).go_on(lambda: False) and model.training
    in_eval, in_train = (records_of(tmp_path / mode) for mode in ("eval", "train"))
    assert in_eval == in_train and len(in_eval["run"]) == PLAN["steps"] + 1


def test_no_two_arms_are_one_training(tmp_path, corpus):
    """Of a model that comes in eval(); but for those that ten small steps on a CPU do not part."""
    found = {}
    for name in [*ARMS, "cscale:2"]:
        torch.manual_seed(0)
        spec = {**PLAN, **arm(name), "model": "gpt-tiny", "lr": 1e-2}
        (one,) = claim(tmp_path, {name.replace(":", ""): spec})
        model = make_model(one.spec, corpus, torch.device("cpu")).eval()
        assert Training(one, model, corpus, torch.device("cpu")).go_on(lambda: False)
        found.setdefault(one.result()["loss"], []).append(name)
    assert [names for names in found.values() if len(names) > 1] == [
        ["bf16", "bf16-again"],
        ["delayed", "history16", "exact-sums"],  # no amax is forgotten, and all sums are float32's
        ["current", "grad-margin3"],  # no gradient is near the ends of E5M2
        ["amax", "power-of-two"],
        ["histogram", "gc-histogram"],  # whose formats differ at their ends alone
    ]


def test_amax_is_parted_from_current_by_two_arms():
    """Which have the power of two and the gradients' margin of 3, each alone."""
    found = {}
    for name in ("current", "power-of-two", "grad-margin3", "amax"):
        x, _, dy = (make_recipe(ARMS[name]["recipe"]).options().cast(role) for role in range(3))
        found[name] = x.power_of_two, dy.power_of_two, x.target, dy.target
    assert found == {
        "current": (False, False, 448, 57344),
        "power-of-two": (True, True, 448, 57344),
        "grad-margin3": (False, False, 448, 7168),
        "amax": (True, True, 448, 7168),
    }


def test_arms_are_told_by_their_recipes():
    told = {name: words(spec) for name, spec in ARMS.items()}
    assert told["power-of-two"] == "`CurrentScaling(power_of_two=True)`" and told["delayed"] == "`DelayedScaling()`"
    assert told["delayed-power-of-two"] == "`DelayedScaling(power_of_two=True)`"
    assert (told["bf16"], told["fp16"]) == ("BF16", "FP16") and "the paper's formats" in told["gc-amax"]


# ---- whole studies ---------------------------------------------------------------------------------------------------


def test_a_window_study_has_every_policy(tmp_path, tokens):
    made = run("window", *TINY, "--steps", "4", "--constants", "-1", "1", "--sweep-tokens", "64", tokens=tokens,
               out=tmp_path)  # fmt: skip
    assert made.returncode == 0, made.stdout + made.stderr
    (one,) = all_runs(tmp_path)
    result = one.result()
    policies = ["current", "amax", "cscale:-1", "cscale:0", "cscale:1", "histogram", "gc-amax", "gc-histogram"]
    assert list(result["inference"]) == ["bf16", *policies, "gc-cscale:0"]
    losses = {name: entry["loss"] for name, entry in result["inference"].items()}
    assert len(set(losses.values())) >= 5 and max(losses.values()) - min(losses.values()) < 0.01
    # A constant of Graphcore's is the same grid as ours, where nothing is as large as its last code; and powers of two
    # change nothing, where nothing is so small. A tensor core sums products of FP8 in fewer bits than those of an
    # emulation.
    apart = 1e-3 if torch.cuda.is_available() else 1e-5
    assert losses["gc-cscale:0"] == pytest.approx(losses["cscale:0"], abs=apart)
    assert losses["gc-amax"] == pytest.approx(losses["amax"], abs=apart)
    assert set(result["biases"]["blocks.0.attn.qkv"]) == {"x", "w"}

    measured = [record for record in one.records() if "policy" in record]
    assert [record.pop("policy") for record in measured] == list(result["inference"])
    assert [{"step": 4, **entry} for entry in result["inference"].values()] == measured
    assert (far(one), length(one.spec)) == (4 + len(measured), 4 + len(measured))

    # And the report on it, while another study is still to be done.
    out, data = tmp_path / "other", tmp_path / "kept"
    run("parity", *TINY, "--arms", "bf16", "amax", "--steps", "9", "--minutes", "0.0001", tokens=tokens, out=out)
    report = [*SCALES, "report", "--runs", tmp_path, out, "--data", data, "--page", tmp_path / "page.md"]
    said = subprocess.run(report, capture_output=True, text=True, cwd=ROOT)
    assert said.returncode == 0 and "1 of 3 runs" in said.stdout, said.stderr
    text = (tmp_path / "page.md").read_text()
    assert "gpt-tiny: bf16, seed 0; amax, seed 0\n" in text
    pictures = {"histograms", "depth", "time", "window", "amax"}
    assert {path.stem for path in data.glob("*.png")} == pictures == set(re.findall(r"!\[(\w+)\]\(kept/", text))
    empty = command("report", "--runs", data, "--page", tmp_path / "none")
    assert empty.returncode == 2 and "must be folders of runs" in empty.stderr and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["parity", "--models", "gpt-124"], "no model is called 'gpt-124'; near it are gpt-124M"),
        (["parity", "--arms", "cscale:17"], "cscale:C with C from -16 to 16, as in cscale:-3, got 'cscale:17'"),
        (["parity", "--seeds", "0"], "the study is empty"),
        (["window", "--constants", "3", "-3"], "the sweep is empty: --constants must rise"),
        (["window", "--constants", "-33", "3", *QUICK], "--constants: no scale has the constant -33"),
        (["window", "--sweep-tokens", "0", *QUICK], "--sweep-tokens must be at least 1, got 0"),
        (["window", "--sweep-tokens", "999999", *QUICK], "give a smaller --sweep-tokens"),
        (["infer", "--models", "gpt-tiny", "--sweep-tokens", "0"], "--sweep-tokens must be at least 1, got 0"),
        (["parity", "--arms", "cscale:--2"], "cscale:C with C from -16 to 16, as in cscale:-3, got 'cscale:--2'"),
        (["parity", "--arms", "cscale:²"], "cscale:C with C from -16 to 16, as in cscale:-3, got 'cscale:²'"),
        *(
            (["parity", "--arms", "bf16", f"{kind}:{c}"], f"from -16 to 16, as in cscale:-3, got '{kind}:{c}'")
            for kind in ("cscale", "gc-cscale")
            for c in ("02", "-0", "+2", "٣", "9" * 5000)
        ),
        (["parity", "--train-tokens", "nan", *TINY], "--train-tokens must be positive and finite, got nan"),
        (["parity", "--train-tokens", "-1", *TINY], "--train-tokens must be positive and finite, got -1"),
        (["parity", "--lr", "-1", *QUICK], "--lr must be positive and finite, got -1"),
        (["parity", "--lr", "nan", *QUICK], "--lr must be positive and finite, got nan"),
        (["parity", "--arms", "delayed", *QUICK], "--arms must have bf16, which the others are held to, got delayed"),
        (["parity", "--record", "-1", *QUICK], "--record must not be negative, got -1"),
        (["parity", "--val-tokens", "1000000"], "give a smaller --val-tokens"),
        (["parity", "--val-tokens", "0", "--steps", "1"], "--val-tokens must be at least 1, got 0"),
        (["parity", "--context", "20000", "--val-tokens", "9"], "give a smaller --context"),
        (["infer", "--models", "gpt-tiny", "--micro-batch", "0"], "--micro-batch must be at least 1, got 0"),
        (["parity", *TINY, "--batch", "0"], "--batch must be at least 1, got 0"),
        (["parity", *TINY, "--batch", "3"], "--batch must be a multiple of --micro-batch = 2, got 3"),
        (["parity", "--jobs", "0", *TINY], "--jobs must be at least 1"),
        (["parity", "--steps", "0", *TINY], "--steps must be at least 1"),
        (["parity", "--steps", "99999999999999999999", *TINY], "--steps must be within ±2,147,483,647, got 9999"),
        (["parity", "--train-tokens", "1e300", *TINY], "--steps, or those that --train-tokens makes, must be within "),
        (["parity", "--context", "9" * 400], "--context must be within ±2,147,483,647"),
        (["infer", "--models", "gpt-tiny", "--sweep-tokens", "9" * 20], "--sweep-tokens must be within ±"),
        (
            ["parity", "--seeds", "100000000"],
            "at most 10,000 runs, and this would be 1,600,000,000; give ",
        ),
        (["parity", "--seeds", "5001", *TINY[:2], "--arms", "bf16", "current"], "this would be 10,002; give fewer"),
        (["window", "--constants", "-999999999", "3", *QUICK], "--constants: no scale has the constant -999999999"),
        (["window", "--constants", "-3", "999999999", *QUICK], "--constants: no scale has the constant 999999999"),
        (["parity", "--minutes", "inf", *QUICK], "--minutes must be positive and finite, got inf"),
    ],
)
def test_bad_input_is_one_line(tmp_path, tokens, arguments, words):
    made = run(*arguments, tokens=tokens, out=tmp_path / "out")
    assert made.returncode == 2 and words in made.stderr and made.stderr.count("\n") == 1, made.stderr


def test_a_model_that_no_memory_here_holds_is_refused(tmp_path, tokens, monkeypatch):
    monkeypatch.setitem(scales.check_memory.__globals__, "available", lambda: 100 << 30)
    models = ["--models", "gpt-tiny", "llama-2-70B"]
    for study, needed in {
        ("parity", *QUICK[2:]): r"1,0\d\d\.\d GiB for its weights, gradients and AdamW's moments",
        ("infer", "--context", "32", "--sweep-tokens", "64"): r"12\d\.\d GiB for its weights",
    }.items():
        refused = run(*study, *models, tokens=tokens, out=tmp_path / "out")
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
        assert re.search(f"llama-2-70B needs at least {needed} alone, and .* has 100.0; take a smaller", refused.stderr)


def test_a_model_is_refused_where_not_even_its_parameters_fit(monkeypatch):
    """Of 2^20 parameters, none of which is allocated."""
    build = functools.partial(torch.nn.Linear, 1 << 10, 1 << 10, bias=False)
    for each in (TRAINING, INFERENCE):
        monkeypatch.setattr("studies.lib.memory.available", lambda has=each: has << 20)
        check_memory("a", build, each, "take another")
        monkeypatch.setattr("studies.lib.memory.available", lambda has=each: (has << 20) - 1)
        with pytest.raises(UserError, match="a needs at least 0.0 GiB for its weights"):
            check_memory("a", build, each, "take another")


def test_the_length_of_a_training_is_said_once(tmp_path, tokens):
    made = run("parity", *QUICK, "--train-tokens", "1000", tokens=tokens, out=tmp_path / "out")
    assert made.returncode == 2 and "argument --train-tokens: not allowed with argument --steps" in made.stderr


# ---- statistics and models -------------------------------------------------------------------------------------------


def test_intervals_are_those_of_students_t():
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3 and found.high - 3 == pytest.approx(2.77645 * math.sqrt(2.5 / 5), rel=1e-6)
    assert interval([1.0]).high == math.inf


PUBLISHED = {
    "gpt-124M": 124_439_808,
    "cerebras-gpt-111M": 111_050_496,
    "cerebras-gpt-256M": 255_977_024,
    "cerebras-gpt-590M": 590_310_912,
    "cerebras-gpt-1.3B": 1_315_723_264,
    "cerebras-gpt-2.7B": 2_651_553_280,
    "cerebras-gpt-6.7B": 6_658_404_352,
    "cerebras-gpt-13B": 12_853_386_240,
    "llama-2-7B": 6_738_415_616,
    "llama-2-13B": 13_015_864_320,
    "llama-2-70B": 68_976_648_192,
    "llama-3-8B": 8_030_261_248,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_models_have_the_published_number_of_parameters(name):
    assert parameter_count(named(name)) == PUBLISHED[name]


def test_names_are_found_whatever_their_case_and_others_answered_with_near_ones():
    assert named("Llama-2-7b") is MODELS["llama-2-7B"]
    with pytest.raises(ValueError, match="no model is called 'cerebras-gpt-1.3M'; near it are cerebras-gpt-1.3B"):
        named("cerebras-gpt-1.3M")
    with pytest.raises(ValueError, match="there are gpt-tiny"):
        named("xyz")


def test_small_models_train_and_give_logits():
    for name in ("gpt-tiny", "llama-tiny"):
        model = named(name).build(100, 16)
        inputs, targets = torch.randint(100, (2, 2, 16))
        logits = model(inputs)
        assert logits.shape == (2, 16, 128)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        assert loss.item() == pytest.approx(math.log(128), abs=0.3)
        assert sum(p is model.head.weight for p in model.parameters()) == 1  # tied


@pytest.mark.parametrize("name", ["gpt-tiny", "llama-tiny"])
def test_what_fp8_saves_is_what_a_frozen_model_and_a_count_of_flops_say(name):
    size = named(name)._replace(context=48)
    of, model = costs(size), size.build().bfloat16()

    def bytes_of(model):
        return sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()})

    assert of.all == sum(p.numel() for p in model.parameters()) and of.bytes_16 == bytes_of(model)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 48, dtype=torch.int64))
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(flops for op, flops in counted.items() if "bmm" in op)
    assert (of.linear + of.head) * 48 == sum(counted.values()) - attention
    assert of.attention * 48 == attention / 2 * 49 / 48 > 0  # which counts what is masked
    fp8.freeze(model, activations="token", weight="tensor")
    assert of.bytes_fp8 <= bytes_of(model) <= of.bytes_fp8 + 64 * len(inner_layers(named(name).build()))
    assert of.inputs == {"gpt-tiny": 2 * (3 + 4) * 64, "llama-tiny": 2 * (3 * 64 + 128)}[name]


def test_what_fp8_saves_in_the_largest_models():
    """By the shapes of the papers: attention out and qkv, gate and up and down; q, k and v read one tensor."""
    llama, gpt = costs(named("llama-2-70B")), costs(named("cerebras-gpt-13B"))
    assert llama.weights == 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672) == llama.linear // 2
    assert gpt.weights == 40 * 12 * 5120**2 and gpt.inputs == 40 * 7 * 5120
    assert llama.inputs == 80 * (3 * 8192 + 28672) and llama.head == 2 * 8192 * 32_000
    assert gpt.attention == 40 * 2 * 5120 * 2049 and llama.parameters == 68_976_648_192
