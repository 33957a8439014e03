"""What is concluded from runs: windows, pairs, verdicts, the page.
The runs are made up, so that what they say is known."""

import json
import math
import re
from pathlib import Path

import pytest

from examples.gpt.errors import UserError
from studies.lib.lines import read_lines
from studies.lib.runs import claim
from studies.lib.scales_page import claims, page
from studies.lib.scales_results import (
    Line,
    biases_of,
    condensed,
    constants,
    inference_ratios,
    merged,
    pairs,
    place,
    sizes_of,
    trained_tokens,
    window,
)

ROOT = Path(__file__).parents[1]
SPEC = {"steps": 10, "batch": 4, "context": 32, "data": "abc", "seed": 0}


def line(study="window", model="gpt-31M", arm="bf16", seed=0, result=None, **more):
    spec = {**SPEC, "study": study, "model": model, "arm": arm, "seed": seed}
    result = result if result is None else {"gpu": "CPU", "diverged": 0, **result}
    return Line(f"{model}_{arm}_{seed}", spec, more.pop("step", 10), result, more.pop("losses", []), [], **more)


def swept(model, works, amax=0.999):
    """A run whose constants ``works`` keep all of an accuracy of 0.4, and the others half."""
    inference = {"bf16": {"accuracy": 0.4}, "amax": {"accuracy": 0.4 * amax}}
    inference |= {f"cscale:{c}": {"accuracy": 0.4 if c in works else 0.2} for c in range(-16, 17)}
    return line(model=model, result={"inference": inference})


def verdicts(*lines):
    return [claim.verdict for claim in claims(lines, sizes_of(lines))]


@pytest.mark.parametrize(
    "good, expected",
    [([], None), ([3], (3, 3)), ([-2, -1, 0, 5], (-2, 0)), ([-2, 0, 1, 2, 3, 9], (0, 3)), (range(-16, 17), (-16, 16))],
)
def test_a_window_is_the_longest_run_of_neighbours(good, expected):
    assert window({c: 0.995 if c in good else 0.9949 for c in range(16, -17, -1)}) == expected


def test_constants_that_were_not_swept_part_a_window():
    assert window({0: 1.0, 1: 1.0, 3: 1.0}) == (0, 1)


def test_ratios_are_of_16_bits_and_means_over_seeds():
    one, two = swept("gpt-31M", [0]), swept("gpt-31M", [0, 1])
    assert inference_ratios([one, two])["gpt-31M"]["cscale:1"] == pytest.approx(0.75)
    lost = line(result={"inference": {"bf16": {"accuracy": 0.4}, "cscale:0": {"accuracy": None}}})
    assert inference_ratios([lost])["gpt-31M"] == {"cscale:0": 0.0}
    assert inference_ratios([line(result={"loss": 1.0}), line()]) == {}


def test_pairs_are_of_one_seed_and_one_model_and_a_lost_run_is_infinitely_worse():
    lines = [
        line("parity", arm=arm, seed=seed, result={"loss": loss})
        for seed, arm, loss in [
            (0, "bf16", 2.0),
            (0, "amax", 2.1),
            (1, "bf16", 4.0),
            (1, "amax", 3.0),
            (2, "amax", 9.0),
        ]
    ]
    lines.append(line("parity", "llama-49M", "bf16", 0, {"loss": 7.0}))
    assert pairs(lines, "amax", "bf16", "loss") == {"gpt-31M": [pytest.approx(5.0), -25.0]}
    lines[1] = line("parity", arm="amax", result={"loss": None})
    assert pairs(lines, "amax", "bf16", "loss")["gpt-31M"][0] == math.inf


@pytest.mark.parametrize(
    "layer, expected",
    [
        ("blocks.3.attn.qkv", (3, "qkv")),
        ("blocks.0.attn.proj", (0, "attention out")),
        ("blocks.11.mlp.up", (11, "MLP up, gate")),
        ("blocks.1.mlp.down", (1, "MLP down")),
        ("layers.7.attention.k", (7, "qkv")),
        ("layers.7.attention.o", (7, "attention out")),
        ("layers.2.ffn.gate", (2, "MLP up, gate")),
        ("model.layers.12.self_attn.v_proj", (12, "qkv")),
        ("model.layers.12.self_attn.o_proj", (12, "attention out")),
        ("model.layers.0.mlp.gate_proj", (0, "MLP up, gate")),
        ("model.layers.0.mlp.down_proj", (0, "MLP down")),
        ("router", (0, "other")),
    ],
)
def test_layers_have_a_depth_and_a_kind(layer, expected):
    assert place(layer) == expected


# ---- verdicts --------------------------------------------------------------------------------------------------------


def test_without_data_nothing_can_be_claimed():
    assert verdicts() == verdicts(line(), line("finetune"), line("parity")) == ["cannot be claimed"] * 4


def test_inference_is_judged_by_all_models():
    good, bad = swept("gpt-31M", range(-3, 4)), swept("gpt-73M", range(-3, 4), amax=0.99)
    assert verdicts(good)[0] == "consistent" and verdicts(good, bad)[0] == "cannot be claimed"
    assert verdicts(swept("gpt-31M", [], amax=0.9))[0] == "not"


def test_a_window_has_ends_no_gaps_and_depends_on_the_model():
    small, large = swept("gpt-31M", range(-4, 5)), swept("gpt-73M", range(-3, 5))
    assert verdicts(small, large)[2] == "consistent"
    assert verdicts(small, swept("gpt-73M", range(-4, 5)))[2] == "cannot be claimed"  # the same for both
    assert verdicts(small, swept("gpt-73M", [-4, -3, 0]))[2] == "cannot be claimed"
    assert verdicts(swept("gpt-31M", range(-16, 17)))[2] == "not"


def test_windows_are_ordered_by_size():
    narrower = verdicts(swept("cerebras-gpt-256M", range(-1, 3)), swept("gpt-31M", range(-4, 5)))[3]
    assert narrower == "cannot be claimed (in inference consistent)"
    wider = verdicts(swept("cerebras-gpt-256M", range(-4, 5)), swept("gpt-31M", range(-1, 3)))[3]
    assert wider == "cannot be claimed (in inference not)"
    same = verdicts(swept("cerebras-gpt-256M", range(-1, 3)), swept("gpt-31M", range(-1, 3)))[3]
    assert same == "cannot be claimed (in inference no trend)"


@pytest.mark.parametrize(
    "apart, verdict",
    [
        ([0.0, 0.001, -0.001], "consistent"),
        ([-0.02, -0.021, -0.019], "not"),
        ([-0.02, 0.02, 0.0], "cannot be claimed"),
        ([None, 0.0, 0.0], "not"),
        ([0.0], "cannot be claimed"),  # one seed says nothing
    ],
)
def test_fine_tuning_is_judged_by_its_interval(apart, verdict):
    lines = []
    for seed, a in enumerate(apart):
        lines.append(line("finetune", arm="fp16", seed=seed, result={"accuracy": 0.5}))
        lines.append(line("finetune", arm="amax", seed=seed, result={"accuracy": None if a is None else 0.5 * (1 + a)}))
    assert verdicts(*lines)[1] == verdict


@pytest.mark.parametrize(
    "apart, word", [([0.1, 0.12, 0.11], "yes"), ([0.4, 0.42, 0.41], "no"), ([0.0, 0.3, 0.6], "open"), ([0.1], "open")]
)
def test_parity_is_judged_by_the_margin(apart, word):
    lines = []
    for seed, a in enumerate(apart):
        losses = [[step, 3.0] for step in range(1, 11)]
        above = [[step, 3.0 * (1.5 if step == 1 else 1.01)] for step in range(1, 11)]
        lines.append(line("parity", seed=seed, result={"loss": 2.0, "accuracy": 0.4}, losses=losses))
        result = {"loss": 2.0 * (1 + a / 100), "accuracy": 0.4}
        lines.append(line("parity", arm="delayed", seed=seed, result=result, losses=above))
    text = page(lines, [], {"gpt-31M": 31e6}, "data")
    (row,) = [row for row in text.splitlines() if row.startswith("| gpt-31M | delayed")]
    assert row.endswith(f"| +1.00 % | 0 | {word} |") and f"| {len(apart)} |" in row  # the first tenth does not count


# ---- the file, the page, the pictures --------------------------------------------------------------------------------


def test_runs_are_condensed(tmp_path):
    (run,) = claim(tmp_path, {"a": {**SPEC, "study": "parity", "model": "gpt-31M", "arm": "bf16"}})
    records = [{"step": step, "loss": float(step)} for step in range(1, 201)]
    records.insert(7, {"step": 7, "biases": {"blocks.0.mlp.up": {"x": 1}}})
    run.log.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 201, "lo')
    found = condensed(run)
    assert found.step == 200 and found.result is None and biases_of(found, "inference") == []
    assert len(found.losses) == 50 and found.losses[0] == [4, 2.5] and found.losses[-1] == [200, 198.5]
    assert biases_of(found, "training") == [records[7]]


def test_lines_replace_those_of_the_same_run_and_another_run_is_refused(tmp_path):
    path = tmp_path / "runs.jsonl"
    merged(path, [line(), line(model="gpt-73M")])
    assert merged(path, [line(result={"loss": 1.0}), line(step=3, model="gpt-73M")]) == read_lines(path, Line)
    assert [(one.model, one.step, one.result is None) for one in read_lines(path, Line)] == [
        ("gpt-31M", 10, False),
        ("gpt-73M", 10, True),  # what is known is not lost to an older copy
    ]
    before = path.read_bytes()
    other = line()
    other.spec["lr"] = 1.0
    with pytest.raises(UserError, match="of another spec"):
        merged(path, [other])
    assert path.read_bytes() == before
    path.write_text("{}\n")
    with pytest.raises(UserError, match="must hold a run a line"):
        read_lines(path, Line)


def test_the_page_says_what_is_missing():
    text = page([line("parity", step=4), line("parity", seed=1, result={"loss": 1.0})], [], {"gpt-31M": 31e6}, "data")
    assert "Still missing: gpt-31M_bf16_0 (4 of 10 steps)." in text and "| 1 of 2 |" in text
    assert (
        "Not run yet: `python studies/scales.py window`" in text
        and "Not run yet: `python studies/scales.py finetune`" in text
    )
    assert "None yet." in page([], [], {}, "data")


def test_the_page_in_docs_is_the_one_of_the_data():
    data = ROOT / "studies" / "results" / "scales"
    lines, pictures = read_lines(data / "runs.jsonl", Line), [path.stem for path in data.glob("*.png")]
    shown = (ROOT / "docs" / "scales.md").read_text(encoding="utf-8")
    assert page(lines, pictures, sizes_of(lines), "../studies/results/scales") == shown, "run studies/scales.py report"


def test_readme_says_what_the_data_say():
    """Of the models of the window study: the constants that all of them work with, and the least ratio of AMAX."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("−", "-").replace("\n", " ")
    low, high = map(int, re.search(r"with c from (-?\d+) to (-?\d+) all keep more than 99.5 %", readme).groups())
    lines = read_lines(ROOT / "studies" / "results" / "scales" / "runs.jsonl", Line)
    ratios = inference_ratios([line for line in lines if line.study == "window"])
    windows = [window(constants(of)) for of in ratios.values()]
    assert (low, high) == (max(w[0] for w in windows), min(w[1] for w in windows)) and len(windows) == 4
    assert f"FP8-AMAX keeps {100 * min(of['amax'] for of in ratios.values()):.2f} % or more" in readme
    assert {round(trained_tokens(line) / 1e6) for line in lines if line.study == "window"} == {20}
