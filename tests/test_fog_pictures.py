"""The pictures of docs/fog.md: what is in them, and which files are theirs."""

import pytest
from fog_runs import drawn, line, raised, spiked

from studies.lib.divergence import FACTOR
from studies.lib.fog_words import PAPER_ARM


def test_a_panel_shows_its_own_runs_whole(tmp_path, monkeypatch):
    runs = [line(name, arm, rate=rate, to=to) for name, rate, to in (("llama3", 1, 300), ("fog-max", 1, 200))
            for arm in ("bf16", "fp8")]  # fmt: skip
    runs += [line("llama3", "fp8-attention", away=40, lost=60, to=80), line("llama3", "default", to=0)]
    runs += [line("olmo2", rate=10)]  # of another learning rate, and of another picture
    figures = drawn(runs, tmp_path, monkeypatch)
    name = "tiny-300x128-lr0.001"
    assert list(figures) == [f"losses-{name}", f"kurtosis-{name}", f"arms-{name}-llama3",
                             "losses-tiny-300x128-lr0.01", "kurtosis-tiny-300x128-lr0.01"]  # fmt: skip
    for kind in ("losses", "kurtosis"):
        panels = [axes for axes in figures[f"{kind}-{name}"].axes if axes.lines]
        markers = {
            axes.get_title("left").strip(): {one.get_marker() for one in axes.lines} - {"None"} for axes in panels
        }
        assert markers == {"Llama 3": {"v", "X"}, "FOG-max": {"o"}}
        for axes in panels:
            low, high = axes.get_ylim()
            values = [y for one in axes.lines for y in one.get_ydata()[1:-1] if y == y]
            assert low < min(values) and max(values) < high
    arms = {axes.get_title("left").strip(): [one.get_marker() for one in axes.lines].count("None")
            for axes in figures[f"arms-{name}-llama3"].axes if axes.lines}  # fmt: skip
    assert arms == {"FP8 linears": 3, "FP8 linears and attention, as the\npaper": 3}  # BF16's, its own, the warm-up's


def test_pictures_of_two_lengths_of_one_size_have_two_titles(tmp_path, monkeypatch):
    def titles(*lengths):
        runs = [line(name, arm, study=study, steps=steps, to=steps, rate=rate, away=100 * (arm == PAPER_ARM))
                for study, name, arm in (("provoke", "llama3", "bf16"), ("provoke", "llama3", PAPER_ARM),
                                         ("kurtosis", "llama3", "bf16")) for steps, rate in lengths]  # fmt: skip
        figures = drawn(runs, tmp_path, monkeypatch)
        return [figure.get_suptitle() for figure in figures.values()]

    both = titles((300, 1), (400, 1))
    assert len(both) == len(set(both)) == 8 and sum("(size tiny, 400 steps, 128 tokens" in title for title in both) == 4
    each = titles((300, 1), (400, 3))  # of which each rate has one
    assert len(each) == 8 and all("(size tiny, 128 tokens a step)" in title for title in each)


def test_a_panel_says_what_bf16_itself_did(tmp_path, monkeypatch):
    for spoilt, does in ((line("op", lost=250), "is lost"), (raised(line("op"), at=200), "diverges"),
                         (spiked(line("op"), at=200), "rises above its start")):  # fmt: skip
        figure = drawn([spoilt, line("op", PAPER_ARM)], tmp_path, monkeypatch)["losses-tiny-300x128-lr0.001"]
        assert f"BF16 itself {does}" in {text.get_text() for axes in figure.axes for text in axes.texts}


@pytest.mark.parametrize("most, words", [(1e22, "to 1e+22"), (20.0, "to 20")])
def test_what_is_above_a_panel_is_marked_at_its_edge(tmp_path, monkeypatch, most, words):
    runs = [line(name, arm) for name in ("olmo2", "op") for arm in ("bf16", PAPER_ARM)]
    spiked(runs[2], at=100, to=most, steps=40)
    figure = drawn(runs, tmp_path, monkeypatch)["losses-tiny-300x128-lr0.001"]
    olmo2, op = (axes for axes in figure.axes if axes.lines)
    top = FACTOR * runs[2].losses[0]
    assert op.get_ylim()[1] == top and olmo2.get_ylim()[1] < top
    (edge,) = (one for one in op.lines if one.get_marker() == "^")
    assert edge.get_ydata()[0] == top and 100 <= edge.get_xdata()[0] <= 110
    assert max(y for one in op.lines if one.get_marker() == "None" for y in one.get_ydata() if y == y) == top
    texts = {text.get_text() for text in op.texts}
    assert words in texts and "BF16 itself rises above its start" in texts
    assert "FP8 attention: 0 of 1 left" in {text.get_text() for text in olmo2.texts}
    assert not any(one.get_marker() == "^" for one in olmo2.lines)


def test_pictures_that_are_no_longer_drawn_are_deleted_and_nothing_else(tmp_path, monkeypatch):
    setting = "25M-600x16384"
    ours = ["parity", f"layers-{setting}", f"losses-{setting}-lr0.01", f"kurtosis-{setting}-lr1e-05",
            f"arms-{setting}-lr0.01-llama3", f"arms-{setting}-lr0.001-fog-max+qk-norm"]  # fmt: skip
    theirs = ["losses", "losses-mine-lr0.01", f"my-losses-{setting}-lr0.01", f"arms-{setting}-lr0.01-mine", "notes",
              f"losses-{setting}-lr0.01-old", f"layers-{setting}-lr0.01"]  # fmt: skip
    for name in [*ours, *theirs]:
        (tmp_path / f"{name}.png").touch()
    (tmp_path / "runs.jsonl").touch()
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "parity.png").touch()
    figures = drawn([line("llama3", arm) for arm in ("bf16", "fp8")], tmp_path, monkeypatch)
    left = {path.relative_to(tmp_path).with_suffix("").as_posix() for path in tmp_path.rglob("*.*")}
    assert left == {*theirs, *figures, "runs", "below/parity"} and len(figures) == 2


def test_a_picture_of_layers_is_of_runs_in_bf16_that_have_a_sample(tmp_path, monkeypatch):
    begun = line("llama3", study="kurtosis", to=3)
    assert not begun.samples
    begun.kurtosis.clear()
    assert drawn([begun, line("fog-max", "fp8", study="kurtosis")], tmp_path, monkeypatch) == {}
    (figure,) = drawn([begun, line("fog-max", study="kurtosis")], tmp_path, monkeypatch).values()
    assert {axes.get_title("left").partition(":")[0] for axes in figure.axes} == {"FOG-max"}


def test_whatever_draw_may_write_is_a_picture_of_its_own(tmp_path, monkeypatch):
    runs = [line(name, arm, rate=rate, away=200 * (arm == PAPER_ARM), study=study)
            for name in ("llama3", "fog-max:no-qk-norm", "op-frozen-qk") for arm in ("bf16", PAPER_ARM)
            for rate in (0.0101, 10) for study in ("provoke", "parity", "kurtosis")]  # fmt: skip
    assert len(drawn(runs, tmp_path, monkeypatch)) == 2 * (2 + 3) + 2
    drawn([], tmp_path, monkeypatch)
    assert not list(tmp_path.iterdir())
