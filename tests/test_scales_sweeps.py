"""What is concluded from sweeps of inference: ratios, windows and the scales that tensors want."""

import pytest
from scales_lines import ROOT, drawn, swept, verdicts

from studies.lib.lines import read_lines
from studies.lib.scales_claims import claims
from studies.lib.scales_figures import depth, histograms, policies, windows
from studies.lib.scales_findings import findings
from studies.lib.scales_page import page
from studies.lib.scales_results import Line, sizes_of, told_apart, wanted
from studies.lib.scales_sweeps import Baseline, baselines, best_constant


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
