"""What is concluded from sweeps of inference: ratios, windows and the scales that tensors want."""

from scales_lines import drawn, swept

from studies.lib.scales_claims import claims
from studies.lib.scales_figures import depth, histograms
from studies.lib.scales_findings import findings
from studies.lib.scales_page import page
from studies.lib.scales_results import sizes_of, told_apart, wanted


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
