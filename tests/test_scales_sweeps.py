"""What is concluded from sweeps of inference: ratios, windows and the scales that tensors want."""

import pytest
from scales_lines import ROOT, SPEC, drawn, line, swept, verdicts

from studies.lib.lines import read_lines
from studies.lib.runs import claim
from studies.lib.scales_claims import claims
from studies.lib.scales_figures import depth, histograms, policies, windows
from studies.lib.scales_findings import findings
from studies.lib.scales_page import page
from studies.lib.scales_results import Line, condensed, sizes_of, told_apart, wanted
from studies.lib.scales_sweeps import Baseline, baselines, best_constant, inference_ratios, window


def biased(one, bias):
    """The same, in whose inference every tensor wants this bias."""
    one.result["biases"] = {"layers.0.mlp.up": {"x": bias, "w": bias + 1}}
    return one


def random_weights(model="gpt-31M", accuracy=0.0001, bias=9):
    one = biased(swept(model, range(-16, 17)), bias)
    one.spec.update(study="infer", checkpoint=None)
    for entry in one.inference.values():
        entry["accuracy"] = accuracy
    return one


def test_random_weights_are_apart_from_trained_ones():
    trained, random = biased(swept("gpt-31M", range(-2, 3)), 5), random_weights()
    random.spec["data"] = "def"  # which is another text of random weights alone, and names the trained ones by nothing
    told = told_apart([trained, random])
    assert [one.model for one in told] == ["gpt-31M", "gpt-31M (random weights)"]
    assert wanted(told, "x") == {"gpt-31M": (5, 5), "gpt-31M (random weights)": (9, 9)}
    text, sizes = page(told, [], sizes_of(told), "data"), sizes_of(told)
    assert "| gpt-31M | 31M | -2 … 2 | -1 … 3 | 5 | -2 (1.0000) | 5 … 5 | 6 … 6 |" in text
    assert "| gpt-31M (random weights) | 31M | – | – | – | – | 9 … 9 | 10 … 10 |" in text
    assert "Random\nweights predict nothing" in text
    assert "| inference under every policy | gpt-31M (random weights) |" in text
    assert not any("random" in said for said in [*findings(told, sizes), *map(str, claims(told, sizes))])
    assert "Random" not in page([trained], [], sizes, "data")


def test_random_weights_alone_have_a_row_and_a_loss_of_no_ratio():
    told = told_apart([random_weights(accuracy=0.0), random_weights("gpt-73M")])
    assert [one.model for one in told] == ["gpt-31M (random weights)", "gpt-73M (random weights)"]
    text = page(told, [], sizes_of(told), "data")
    assert "| gpt-31M (random weights) | 31M | – | – | – | – | 9 … 9 | 10 … 10 |" in text
    assert findings(told, {}) == []  # not that BF16 predicts no token right, which is no news of random weights


def test_random_weights_have_panels_of_their_own(monkeypatch, tmp_path):
    told = told_apart([biased(swept("gpt-31M", range(-2, 3)), 5), random_weights(), random_weights("gpt-73M")])
    names = ["gpt-31M", "gpt-31M\n(random weights)", "gpt-73M\n(random weights)"]
    axes = drawn(monkeypatch, tmp_path / "histograms.png", histograms, told, {}).axes
    assert [one.get_title(loc="left") for one in axes[3:]] == [f"{name}\ninference" for name in names]
    assert [{round(bar.get_center()[0]) for bar in one.patches} for one in axes[3:]] == [{5, 6}, {9, 10}, {9, 10}]
    axes = drawn(monkeypatch, tmp_path / "depth.png", depth, told, {}).axes
    assert [one.get_title(loc="left") for one in axes[::3]] == [
        f"inputs\n{of}\ninference" for of in (names[0], names[2])
    ]


def test_a_sweep_tells_where_its_tokens_resolve_the_criterion():
    """Of an accuracy of 0.4 the half-width of 230,490 tokens is 0.5 %: 0.6 / 0.4 * (1.96 / 0.005)^2 = 230,496."""
    assert Baseline(0.4, 230_500).tells and not Baseline(0.4, 230_490).tells and not Baseline(0.4, 0).tells
    assert Baseline(0.4, 10_000).half_width == pytest.approx(0.0096, rel=1e-3)
    kept = told_apart(read_lines(ROOT / "studies" / "results" / "scales" / "runs.jsonl", Line))
    assert len(baselines(kept)) == 6 and all(of.tells for of in baselines(kept).values())


def test_a_sweep_of_few_tokens_is_marked_and_of_no_verdict_or_finding(monkeypatch, tmp_path):
    few, many = swept("gpt-31M", range(-2, 3), tokens=64), swept("gpt-73M", range(-3, 4), amax=0.9)
    assert verdicts(few) == ["cannot be claimed"] * 4 and findings([few], {}) == []
    assert all(claim.run in ("nothing yet that can tell", claims([], {})[-1].run) for claim in claims([few], {}))
    both, sizes = [few, many], sizes_of([few, many])
    assert claims(both, sizes) == claims([many], sizes) and findings(both, sizes) == findings([many], sizes)
    text = page(both, [], sizes, "data")
    assert "| gpt-31M | 31M | too few tokens to tell | – | – | – | – | – |\n" in text
    assert "| gpt-31M | – | 0.9990 | – | – | – | 0.4000 ± 0.1200 | 64, too few tokens to tell |\n" in text
    assert "| gpt-73M | – | 0.9000 | – | – | – | 0.4000 ± 0.0013 | 524,288 |\n" in text
    left, right = drawn(
        monkeypatch, tmp_path / "window.png", windows, [few, many], {"gpt-31M": 31e6, "gpt-73M": 73e6}
    ).axes
    assert left.get_legend_handles_labels()[1] == ["gpt-31M\ntoo few tokens to tell", "gpt-73M"]
    assert [text.get_text() for text in right.texts] == ["-3…3"]
    (axes,) = drawn(monkeypatch, tmp_path / "amax.png", policies, both, sizes).axes
    assert [tick.get_text().count("few") for tick in axes.get_xticklabels()] == [1, 0]
    drawn(monkeypatch, tmp_path / "window.png", windows, [few], sizes)


def test_the_best_constant_is_the_windows_where_there_is_one():
    wide = swept("gpt-31M", range(-4, 7))
    wide.inference["cscale:2"]["accuracy"], wide.inference["cscale:-6"]["accuracy"] = 0.401, 0.41
    assert "| gpt-31M | 31M | -4 … 6 | -3 … 7 | 11 | 2 (1.0025) |" in page([wide], [], sizes_of([wide]), "data")
    assert claims([wide], sizes_of([wide]))[0].found == "gpt-31M: AMAX 0.9990, the best constant 1.0025"
    assert best_constant({-1: 0.9, 0: 0.99, 2: 0.98}) == 0  # which are no window


def test_a_size_of_less_than_a_million_is_not_written_as_none(monkeypatch, tmp_path):
    sizes = {"gpt-31M": 4.2e5, "gpt-73M": 7.3e7}
    lines = [swept(model, range(-2, 3)) for model in sizes]
    _, right = drawn(monkeypatch, tmp_path / "window.png", windows, lines, sizes).axes
    assert [tick.get_text() for tick in right.get_xticklabels()] == ["0.4", "73"]


def test_a_sweep_finds_the_biases_of_fine_tuning_at_whatever_rate():
    sweep, slow, fast = (line(study, result={"loss": 1.0}) for study in ("infer", "finetune", "finetune"))
    slow.biases.append({"step": 1, "biases": {"layer": {"x": 3}}})
    fast.biases.append({"step": 1, "biases": {"layer": {"x": 5}}})
    slow.spec["lr"], fast.spec["lr"] = 1e-4, 1e-3
    for one in (sweep, slow, fast):
        one.spec["checkpoint"] = "abc"
    assert wanted(told_apart([sweep, slow, fast]), "x")["gpt-31M"] == (3, 5)


def test_a_sweep_whose_bf16_is_never_right_is_said():
    sweep = swept("gpt-31M", range(-2, 3))
    sweep.inference["bf16"]["accuracy"] = 0.0
    assert "Of gpt-31M no ratio can be said: BF16 itself predicts no token right." in findings([sweep], {})


def test_the_best_constant_is_of_those_that_have_constants():
    whole, begun = swept("gpt-31M", [], amax=0.9), swept("gpt-73M", [], amax=0.8)
    for c in range(-16, 17):
        del begun.inference[f"cscale:{c}"]
    claim = claims([whole, begun], {"gpt-31M": 1, "gpt-73M": 2})[0]
    assert claim.found == "gpt-31M, gpt-73M: AMAX 0.8000 to 0.9000, the best constant of gpt-31M 0.5000"


def test_a_sweep_that_ends_within_a_window_shows_no_window():
    runs = [swept("gpt-31M", range(-3, 4)), swept("gpt-73M", range(-2, 3))]
    assert verdicts(*runs)[2] == "consistent" and "in inference no larger one's is wider" in verdicts(*runs)[3]
    for one in runs:
        inference = one.result["inference"]
        for c in range(-16, 17):
            if c < -2 or c > 2:
                del inference[f"cscale:{c}"]
    assert verdicts(*runs)[2:] == ["cannot be claimed: a window may go on where its sweep ends",
                                   "cannot be claimed (a window may go on where its sweep ends)"]  # fmt: skip
    everything = [swept("gpt-31M", range(-16, 17))]
    assert verdicts(*everything)[2] == "not"


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
    assert narrower == "cannot be claimed (in inference no larger one's is wider)"
    wider = verdicts(swept("cerebras-gpt-256M", range(-4, 5)), swept("gpt-31M", range(-1, 3)))[3]
    assert wider == "cannot be claimed (in inference not)"
    same = verdicts(swept("cerebras-gpt-256M", range(-1, 3)), swept("gpt-31M", range(-1, 3)))[3]
    assert same == "cannot be claimed (in inference no trend)"


def test_windows_of_two_families_are_not_put_in_a_row():
    lines = [swept("gpt-31M", range(-4, 5)), swept("cerebras-gpt-256M", range(-1, 3))]
    wide = [swept("llama-49M", range(-8, 9)), swept("llama-127M", range(-7, 9))]
    found = claims([*lines, *wide], sizes_of([*lines, *wide]))[3]
    assert found.found.endswith(": gpt 9, 4; llama 17, 16") and found.verdict.endswith(
        "(in inference no larger one's is wider)"
    )
    assert verdicts(lines[0], wide[0])[3] == "cannot be claimed"
    checkpoint = swept("gpt-9M", range(-1, 1))
    checkpoint.spec.update(study="infer", checkpoint="abc")
    assert claims([*lines, checkpoint], sizes_of([*lines, checkpoint]))[3].found.endswith(": 9, 4")


def unfinished(policies, model="Other-135M-Q4"):
    spec = {**SPEC, "study": "infer", "model": model, "arm": "bf16", "checkpoint": "abc", "sweep": list(range(-4, 5))}
    spec |= {"sweep_tokens": 900_000}
    return Line(f"{model}_infer", spec, len(policies), None, [], [], policies)


def test_a_sweep_that_is_not_finished_says_what_it_can():
    """Of constants nothing, unless all of them are done; and a finished one does not keep what it was on its way."""
    done = {name: {"loss": 2.0, "accuracy": 0.4} for name in ["bf16", "current", "amax", "cscale:-4", "cscale:-3"]}
    assert inference_ratios([unfinished(done)]) == {"Other-135M-Q4": {"current": 1.0, "amax": 1.0}}
    done |= {f"cscale:{c}": {"loss": 2.0, "accuracy": 0.4 if c in (0, 1) else 0.2} for c in range(-4, 5)}
    lines = [unfinished(done), line("finetune", "Other-135M-Q4", result={"loss": 1.5, "accuracy": 0.5})]
    lines.append(line("finetune", "Other-135M-Q4", "amax", result={"loss": 1.53, "accuracy": 0.5, "loss_fp8": 1.6}))
    lines[-1].spec["recipe"] = {"kind": "CurrentScaling"}
    for one in lines[1:]:
        one.spec.update(checkpoint="abc", validated=512)
    text = page(lines, [], sizes_of(lines), "data")
    assert "| Other-135M-Q4 | 135M | 0 … 1 |" in text and "Nothing of Other-135M-Q4 in 16 bits" in text
    assert (
        "Other-135M-Q4: unfinished, histogram, gc-amax, gc-histogram, gc-cscale:-4, gc-cscale:0, gc-cscale:4 missing\n"
        in text
    )
    assert (
        "from 2.0000 nats a token, on 900,000 of the text, to 1.5000, on 512; one pair each shows nothing"
        in "".join(findings(lines, {}))
    )
    assert "on 900,000 tokens of the text, where fine-tuning has 512. Of the gain of 0.5000 in BF16" in text
    lines[0].spec["data"] = "another text"
    assert "nats a token;" not in "".join(findings(lines, {})) and "Of the gain" not in page(lines, [], {}, "data")
    assert "Of the gain of 0.5000 in BF16 the other arms lose: amax +6.0 %" in text
    lines[0].spec["data"] = "abc"
    lines[0].spec["context"] = 8  # in other sequences the same text has another loss
    assert "nats a token;" not in "".join(findings(lines, {}))
    lines[0].spec["context"] = lines[1].spec["context"]
    short = unfinished({"bf16": {"loss": 9.9, "accuracy": 0.1}})
    short.spec["sweep_tokens"] = 64
    assert "from 2.0000 nats a token, on 900,000" in "".join(findings([short, *lines], {}))
    for before in ({"loss": None, "accuracy": 0.0}, {"accuracy": 0.4}):  # not finite, or not recorded
        of_none = [unfinished({**done, "bf16": before}), *lines[1:]]
        assert "nats a token;" not in "".join(findings(of_none, {}))
        assert "Of the gain" not in page(of_none, [], {}, "data")
    lines[-1].result["loss"] = None
    assert "Of the gain" not in page(lines, [], {}, "data")  # nobody is left who could lose of it


def test_a_sweep_is_condensed_with_its_policies(tmp_path):
    (run,) = claim(tmp_path, {"a": unfinished({}).spec})
    run.log.write_text('{"step": 1, "policy": "bf16", "loss": 2.0, "accuracy": 0.4}\n')
    assert condensed(run).inference == {"bf16": {"loss": 2.0, "accuracy": 0.4}}
    with open(run.log, "a") as file:
        file.write('{"step": 2, "result": {"inference": {"bf16": {"loss": 2.0, "accuracy": 0.4}}}}\n')
    found = condensed(run)
    assert found.policies == {} and found.inference["bf16"]["accuracy"] == 0.4
