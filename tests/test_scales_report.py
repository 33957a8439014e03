"""What is concluded from runs: names, windows, policies, the page, and how runs come into it."""

import json
import math
import os
import re

import pytest
from scales_lines import ROOT, SPEC, line, swept, tuned, verdicts
from torch_fp8.table import read_markdown

from examples.gpt.errors import UserError
from studies.lib import fog_results
from studies.lib.lines import read_lines
from studies.lib.runs import claim
from studies.lib.scales_claims import claims
from studies.lib.scales_figures import draw
from studies.lib.scales_page import page
from studies.lib.scales_results import (
    Line,
    biases_of,
    condensed,
    in_short,
    merged,
    pairs,
    place,
    sizes_of,
    told_apart,
    trained_tokens,
)
from studies.lib.scales_sweeps import constants, inference_ratios, window
from studies.lib.texts import Text, is_closed, read_texts


def test_trainings_of_a_model_that_differ_have_names_and_rows_of_their_own():
    """Two texts, and of one of them two lengths; a sweep has the name of its text."""
    lines = [*tuned("bf16", [1.0, 1.0]), *tuned("amax", [1.1, 1.1])]
    other = [*tuned("bf16", [2.0, 2.0], data="def"), *tuned("amax", [2.0, 2.01], data="def")]
    longer = [*tuned("bf16", [1.5, 1.5], data="def", steps=20), *tuned("amax", [1.4, 1.4], data="def", steps=20)]
    sweep = swept("gpt-31M", range(-2, 3))
    assert told_apart([*lines, sweep]) == [*lines, sweep]  # nothing to tell apart
    told = told_apart([*lines, *other, *longer, sweep])
    names = {"gpt-31M (text abc)", "gpt-31M (text def, 1.3k tokens)", "gpt-31M (text def, 2.6k tokens)"}
    assert {one.model for one in told} == names and told[-1].model == "gpt-31M (text abc)"
    found = pairs(told, "amax", "bf16", "loss")
    assert {model: len(of) for model, of in found.items()} == dict.fromkeys(names, 2)
    assert found["gpt-31M (text abc)"] == pytest.approx([10, 10])
    assert set(sizes_of(told).values()) == set(sizes_of(lines).values())
    text = page(told, [], sizes_of(told), "data")
    assert all(text.count(f"| {name} | amax | 2 |") == 1 for name in names)
    assert "| gpt-31M (text abc) | 31M | -2 … 2 |" in text


def test_shorter_trainings_of_a_model_come_first(tmp_path):
    lines = [line("parity", arm="amax"), line("parity"), line("parity", seed=1)]
    for one, steps in zip(lines, (100, 100, 9)):
        one.spec.update(steps=steps)
    assert [one.spec["steps"] for one in merged(tmp_path / "none", lines)] == [9, 100, 100]


@pytest.mark.parametrize(
    "lengths, said",
    [
        ([(763, 64), (1526, 64)], ["50M tokens", "100M tokens"]),
        ([(763, 64), (764, 64)], ["steps 763", "steps 764"]),  # of as many tokens in short
        ([(763, 64), (1526, 32)], ["batch 64, 50M tokens", "batch 32, 50M tokens"]),
        ([(763, 64), (764, 64), (763, 128)], ["batch 64, steps 763", "batch 64, steps 764", "batch 128, steps 763"]),
    ],
)
def test_lengths_are_told_apart_by_their_tokens(lengths, said):
    lines = [line("parity") for _ in lengths]
    for one, (steps, batch) in zip(lines, lengths):
        one.spec.update(steps=steps, batch=batch, context=1024)
    assert [one.model for one in told_apart(lines)] == [f"gpt-31M ({words})" for words in said]


def test_sweeps_which_have_no_tokens_of_a_training_are_told_apart_by_their_steps():
    lines = [line("infer"), line("infer")]
    for one, policies in zip(lines, (40, 41)):
        one.spec.update(checkpoint="0123456789", steps=policies)
    assert [one.model for one in told_apart(lines)] == ["gpt-31M (steps 40)", "gpt-31M (steps 41)"]


def test_a_checkpoint_of_a_models_name_is_another_model():
    ours, theirs = swept("gpt-31M", range(-2, 3)), swept("gpt-31M", [], amax=0.5)
    theirs.spec.update(study="infer", checkpoint="0123456789")
    theirs.result["parameters"] = 3e6
    told = told_apart([ours, theirs])
    assert [one.model for one in told] == ["gpt-31M", "gpt-31M (checkpoint 01234567)"]
    assert {model: of["amax"] for model, of in inference_ratios(told).items()} == {
        "gpt-31M": pytest.approx(0.999), "gpt-31M (checkpoint 01234567)": 0.5}  # fmt: skip
    assert sizes_of(told)["gpt-31M (checkpoint 01234567)"] == 3e6 != sizes_of(told)["gpt-31M"]


def test_trainings_of_one_model_are_no_two_sizes():
    wide, narrow = swept("gpt-31M", range(-4, 5)), swept("gpt-31M", range(-2, 3))
    narrow.spec["lr"] = 0.00123456
    told = told_apart([wide, narrow])
    assert told[1].model == "gpt-31M (lr 0.00123)"
    assert claims(told, sizes_of(told))[-1].run.startswith("fewer than two sizes of a family")
    narrow.spec.update(lr=None, sweep=[-3, 3], steps=20, warm_up=2)
    wide.spec.update(lr=None, sweep=[-16, 16], warm_up=1)
    assert told_apart([wide, narrow])[1].model == "gpt-31M (2.6k tokens, c from -3 to 3)"


def test_sizes_in_a_row_were_trained_alike():
    small, large = swept("gpt-31M", range(-4, 5)), swept("gpt-73M", range(-2, 3))
    assert "9, 5" in claims([small, large], sizes_of([small, large]))[-1].found
    other = line("parity", result={"loss": 1.0})  # of another text: it gives the first one another name, and no more
    other.spec["data"] = "def"
    told = told_apart([small, large, other])
    assert "9, 5" in claims(told, sizes_of(told))[-1].found
    large.spec["steps"] = 40
    assert claims([small, large], sizes_of([small, large]))[-1].run.startswith("fewer than two sizes")


def test_a_run_in_another_folder_is_the_same(tmp_path):
    one = line("parity", result={"loss": 1.0})
    copy = Line("elsewhere", one.spec, 10, one.result, [], [])
    assert merged(tmp_path / "runs.jsonl", [one, copy]) == [copy]


@pytest.mark.parametrize("both_new", [False, True])
def test_of_a_run_that_was_made_twice_the_first_result_is_kept_and_said(tmp_path, capsys, both_new):
    path = tmp_path / "runs.jsonl"
    first, second = (line("parity", result={"loss": loss, "seconds": 9.0}) for loss in (1.5, 2.5))
    second.biases.append({"step": 5, "biases": {}})  # records of another result
    before = merged(path, [first])
    assert merged(path, [first, second] if both_new else [second]) == [first] == before
    said = capsys.readouterr().err
    assert said == (
        f"the run parity, gpt-31M, bf16, seed 0 was made twice, with another result: loss 1.5 is kept, which {path} "
        "has, and loss 2.5 is left out\n"
    )
    path.unlink()
    assert merged(path, [second, first]) == [second]
    assert "loss 2.5 is kept, which was read first, and loss 1.5 is left out" in capsys.readouterr().err


def test_of_a_run_that_was_made_twice_with_one_result_nothing_is_said(tmp_path, capsys):
    first, second = (line("parity", result={"loss": 1.5, "seconds": seconds}) for seconds in (9.0, 8.0))
    half = line("parity", step=3)
    assert merged(tmp_path / "runs.jsonl", [half, first, second, first, half]) == [first]
    assert capsys.readouterr().err == ""
    second.biases.append({"step": 5, "biases": {}})
    assert merged(tmp_path / "runs.jsonl", [second]) == [second]
    assert capsys.readouterr().err == ""


def test_a_run_of_fog_that_was_made_twice_keeps_its_first_result(tmp_path, capsys):
    spec = {**SPEC, "study": "provoke", "architecture": "op", "arm": "bf16", "lr": 0.003, "fp8": {}, "size": "tiny"}
    results = [{"loss": loss, "diverged": 0} for loss in (1.5, None)]
    first, second = (fog_results.Line(spec, 10, result, [], [], [], {}) for result in results)
    assert fog_results.merged(tmp_path / "runs.jsonl", [first, second]) == [first]
    said = capsys.readouterr().err
    assert "the run provoke, op, bf16, lr 0.003, seed 0 was made twice" in said and "loss None is left out" in said


def test_runs_that_differ_in_their_records_alone_are_one(tmp_path):
    seen, unseen = line("parity", result={"loss": 1.0}), line("parity", result={"loss": 1.0})
    seen.spec["record"], unseen.spec["record"] = 5, 0
    seen.biases.append({"step": 5, "biases": {}})
    for order in ([seen, unseen], [unseen, seen]):
        assert merged(tmp_path / f"{order[0].spec['record']}.jsonl", order) == [seen]


def test_an_arm_is_one_thing(tmp_path):
    path, one = tmp_path / "runs.jsonl", line("parity", arm="current", result={"loss": 1.0})
    other = line("parity", arm="current", seed=1, result={"loss": 1.0})
    one.spec["recipe"] = {"kind": "CurrentScaling"}
    other.spec["recipe"] = {"kind": "CurrentScaling", "power_of_two": True}
    merged(path, [one])
    before = path.read_bytes()
    with pytest.raises(UserError, match="two arms called current: .*give one of them another name"):
        merged(path, [other])
    assert path.read_bytes() == before


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


def test_without_data_nothing_can_be_claimed():
    assert verdicts() == verdicts(line(), line("finetune"), line("parity")) == ["cannot be claimed"] * 4


def test_gradients_with_a_loss_scale_that_moves_are_not_shown():
    records = [{"step": 1, "biases": {"blocks.0.mlp.up": {"dy": 12}}}]
    both = [Line("a", {**SPEC, "dtype": dtype}, 1, None, [], records) for dtype in ("bfloat16", "float16")]
    assert [biases_of(one, "training") for one in both] == [records, []]


def test_runs_are_condensed(tmp_path):
    (run,) = claim(tmp_path, {"a": {**SPEC, "study": "parity", "model": "gpt-31M", "arm": "bf16"}})
    records = [{"step": step, "loss": float(step)} for step in range(1, 201)]
    records.insert(7, {"step": 7, "biases": {"blocks.0.mlp.up": {"x": 1}}})
    run.log.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 201, "lo')
    found = condensed(run)
    assert found.step == 200 and found.result is None and biases_of(found, "inference") == []
    assert len(found.losses) == 50 and found.losses[0] == [4, 2.5] and found.losses[-1] == [200, 198.5]
    assert biases_of(found, "training") == [records[7]]


def test_a_loss_that_is_not_finite_moves_no_stretch_of_the_others(tmp_path):
    """A loss scale leaves such a step out, and the training goes on: its stretches stay those of BF16's."""
    (run,) = claim(tmp_path, {"a": {**SPEC, "study": "parity", "model": "gpt-31M", "arm": "fp16"}})
    records = [{"step": step, "loss": None if step in (150, *range(161, 165)) else 2.0} for step in range(1, 201)]
    run.log.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert condensed(run).losses == [[end, 2.0] for end in range(4, 201, 4) if end != 164]


def test_parameters_are_those_of_the_run_whose_text_has_fewer_kinds_of_tokens():
    bytes_ = line(model="gpt-124M", result={"loss": 1.0, "parameters": 86_000_000})
    begun = line(model="gpt-124M", seed=1)
    assert sizes_of([bytes_, begun]) == {"gpt-124M": 86_000_000}
    assert sizes_of([begun]) == {"gpt-124M": 124_439_808}


def test_lines_replace_those_of_the_same_run_and_of_no_other(tmp_path):
    path = tmp_path / "runs.jsonl"
    merged(path, [line(), line(model="gpt-73M")])
    assert merged(path, [line(result={"loss": 1.0}), line(step=3, model="gpt-73M")]) == read_lines(path, Line)
    assert [(one.model, one.step, one.result is None) for one in read_lines(path, Line)] == [
        ("gpt-31M", 10, False),
        ("gpt-73M", 10, True),  # what is known is not lost to an older copy
    ]
    other = line()
    other.spec["lr"] = 1.0
    assert len(merged(path, [other])) == 3  # of one name, and another run
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(UserError, match="must hold a run a line, but line 4 does not"):
        read_lines(path, Line)


@pytest.mark.parametrize(
    "count, said",
    [(0, "–"), (640, "640"), (7_680, "7.7k"), (60_000, "60k"), (994_000, "994k"), (999_424, "1.0M"), (9.97e6, "10M"),
     (255_977_024, "256M"), (999.9e6, "1.0B"), (6.7e9, "6.7B"), (13e9, "13B")],
)  # fmt: skip
def test_a_count_in_short_keeps_two_digits(count, said):
    assert in_short(count) == said


def test_names_of_models_have_digits_of_their_text_where_it_is_said():
    lines = [line("parity"), line("parity", "gpt-73M")]
    assert "*Text* is a digest of the tokens.\n" in page(lines, [], sizes_of(lines), "data")
    lines[0].spec["data"], other = "0123456789", line("parity")
    told = told_apart([*lines, other])
    text = page(told, [], sizes_of(told), "data")
    assert "*Text* is a digest of the tokens, of which names of models have the first eight digits.\n" in text
    assert "| gpt-31M (text 01234567) |" in text


def test_links_go_to_a_folder_of_any_name():
    text = page([line("parity")], ["gaps"], {}, "../my data (1)/café")
    assert "(../my%20data%20%281%29/caf%C3%A9/runs.jsonl)" in text
    assert "![gaps](../my%20data%20%281%29/caf%C3%A9/gaps.png)" in text


def test_the_page_says_what_is_missing():
    text = page([line("parity", step=4), line("parity", seed=1, result={"loss": 1.0})], [], {"gpt-31M": 31e6}, "data")
    assert "gpt-31M: bf16, seed 0 (4 of 10 steps)\n" in text and "| 1 of 2 |" in text
    assert (
        "Not run yet: `python studies/scales.py window`" in text
        and "Not run yet: `python studies/scales.py finetune`" in text
    )
    assert "None yet." in page([], [], {}, "data")


def test_a_bar_in_the_name_of_a_checkpoint_ends_no_cell_of_the_page():
    lines = [*tuned("bf16", [1.0, 1.0], model="a|b-31M"), *tuned("amax", [1.1, 1.1], model="a|b-31M")]
    rows = [row for table in read_markdown(page(lines, [], sizes_of(lines), "data")) for row in table]
    ours = [row for row in rows if row.get("model") == "a|b-31M"]
    assert [(row.get("pairs"), row.get("runs done")) for row in ours] == [("2", None), (None, "4 of 4")]


def test_what_is_missing_on_a_text_that_cannot_be_made_again_is_closed():
    lines = [line("parity", step=4), line("parity", "gpt-73M")]
    lines[1].spec["data"] = "def"
    texts = {digest: Text(f"text {digest}", digest != "def", 1280) for digest in ("abc", "def")}
    text = page(lines, [], sizes_of(lines), "data", texts)
    open_, closed = text.partition("Still missing")[2].partition("## ")[0].split("Closed, and not to be run any more")
    assert "gpt-31M: bf16, seed 0 (4 of 10 steps)" in open_ and "gpt-73M" not in open_
    assert "gpt-73M: bf16, seed 0" in closed and "gpt-31M" not in closed and "given again" not in closed
    assert "* abc: text abc; 1.3k of its tokens are for training\n* def: text def; 1.3k of its tokens are for" in text
    assert "for training; it cannot be made again\n" in text
    text = page(lines[1:], [], sizes_of(lines), "data", texts)
    assert "Still missing" not in text and "gpt-73M: bf16, seed 0" in text
    assert "Still missing" in page(lines[1:], [], sizes_of(lines), "data")  # a text that nothing is known of


@pytest.mark.parametrize("key", ["mode", "dither"])
@pytest.mark.parametrize("value", [None, "eval", 0, -1, True, [1], math.nan])
def test_a_fine_tuning_in_eval_or_from_ties_is_no_run_of_its_arm(key, value):
    (one,) = tuned("amax", [1.0], validated=512, checkpoint="0123456789")
    one.check()
    one.spec[key] = value
    with pytest.raises(ValueError, match=r"fine-tuned in eval\(\), or from weights on rounding ties; run it anew"):
        one.check()


def test_a_fine_tuning_has_a_checkpoint():
    (one,) = tuned("amax", [1.0], validated=512)
    for one.spec["checkpoint"] in (None, 3, ""):
        with pytest.raises(ValueError, match="checkpoint of the spec must be a text"):
            one.check()


def test_how_often_a_training_meets_its_text_is_said():
    lines = [line("parity"), line("parity", "gpt-73M"), swept("gpt-124M", [1])]
    lines[0].spec.update(steps=39)
    lines[1].spec["data"] = "def"
    lines[2].spec.update(study="infer", checkpoint="0123456789")
    text = page(lines, [], sizes_of(lines), "data", {"abc": Text("text", True, 1280)})
    rows = [row for table in read_markdown(text) for row in table if "passes over the text" in row]
    assert {row["model"]: row["passes over the text"] for row in rows} == {
        "gpt-31M": "3.9", "gpt-73M": "–", "gpt-124M": "–"}  # fmt: skip


@pytest.mark.parametrize("content", ['{"abc": "words"}', '{"abc": {"words": "w"}}', "[]", "{", "3",
                                     '{"abc": {"words": "w", "can_be_made": "no", "train_tokens": 1}}',
                                     '{"abc": {"words": "w", "can_be_made": true, "train_tokens": 0}}',
                                     '{"abc": {"words": "w", "can_be_made": true, "train_tokens": "1M"}}',
                                     '{"abc": {"words": "w", "can_be_made": true}}'])  # fmt: skip
def test_texts_that_do_not_say_what_a_page_says_of_them_are_refused(tmp_path, content):
    assert read_texts(tmp_path / "texts.json") == {}
    (tmp_path / "texts.json").write_text(content)
    with pytest.raises(UserError, match="texts.json must have .* of each text, but has not"):
        read_texts(tmp_path / "texts.json")


def test_pictures_that_there_are_no_data_for_are_deleted_and_nothing_else(tmp_path):
    for name in ("window.png", "parity.png", "mine.png", "runs.jsonl"):
        (tmp_path / name).touch()
    assert draw(tmp_path, [], {}) == [] and sorted(os.listdir(tmp_path)) == ["mine.png", "runs.jsonl"]


def test_the_page_in_docs_is_the_one_of_the_data():
    data = ROOT / "studies" / "results" / "scales"
    lines, pictures = told_apart(read_lines(data / "runs.jsonl", Line)), [path.stem for path in data.glob("*.png")]
    shown = (ROOT / "docs" / "scales.md").read_text(encoding="utf-8")
    texts = read_texts(data / "texts.json")
    made = page(lines, pictures, sizes_of(lines), "../studies/results/scales", texts)
    assert made == shown, "run studies/scales.py report"


def test_readme_says_what_the_data_say():
    """Of the models of the window study: the constants that all of them work with, and the least ratio of AMAX."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("−", "-").replace("\n", " ")
    low, high = map(int, re.search(r"with c from (-?\d+) to (-?\d+) all keep more than 99.5 %", readme).groups())
    lines = told_apart(read_lines(ROOT / "studies" / "results" / "scales" / "runs.jsonl", Line))
    ratios = inference_ratios([line for line in lines if line.study == "window"])
    windows = [window(constants(of)) for of in ratios.values()]
    assert (low, high) == (max(w[0] for w in windows), min(w[1] for w in windows)) and len(windows) == 4
    assert f"FP8-AMAX keeps {100 * min(of['amax'] for of in ratios.values()):.2f} % or more" in readme
    assert {round(trained_tokens(line) / 1e6) for line in lines if line.study == "window"} == {20}
    ratios = inference_ratios([line for line in lines if line.study == "infer"]).values()
    one, another = sorted(((100 * max(constants(of).values()), 100 * of["amax"]) for of in ratios), reverse=True)
    said = f"keeps {one[0]:.2f} % with its best constant and {one[1]:.2f} % with FP8-AMAX, on another text "
    said += f"{another[0]:.2f} % and {another[1]:.2f} %. The first text cannot be made again, and its sweep was not"
    assert f"{said} finished" in readme
    (unfinished,) = [line for line in lines if line.study == "infer" and line.result is None]
    texts = read_texts(ROOT / "studies" / "results" / "scales" / "texts.json")
    closed = {model for model, of in inference_ratios(lines).items() if 100 * of["amax"] == one[1]}
    assert closed == {unfinished.model} and is_closed(unfinished.spec["data"], texts)
