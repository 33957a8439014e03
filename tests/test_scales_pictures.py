"""The pictures of pairs of runs: what is in which panel, and that nothing in them meets or hides another."""

import itertools

import pytest
from scales_lines import drawn, line, swept, trained
from torch_fp8.picture import picture

from studies.lib.arms import ARMS, LEVERS
from studies.lib.scales_figures import draw
from studies.lib.scales_paired import BASE, GROUPS, PALE, on_the_way, paired
from studies.lib.scales_results import sizes_of, told_apart


def test_a_picture_of_pairs_has_titles_that_do_not_meet_and_shows_what_was_lost(monkeypatch, tmp_path):
    lines = [*trained("gpt-31M", [0.1]), *trained("gpt-124M", [0.1, 0.2, None]), *trained("llama-127M", [0.1, 0.3])]
    axes = drawn(monkeypatch, tmp_path / "parity.png", paired, lines, "parity", "bf16").axes
    boxes = [one._left_title.get_window_extent() for one in axes]
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
    assert [[text.get_text() for text in one.texts] for one in axes] == [[], ["1 lost"], []]


def test_a_picture_of_pairs_is_as_wide_as_its_panels_need(monkeypatch, tmp_path):
    """A model with one pair each, one in two lengths, and two together."""
    lines = [*trained("gpt-31M", [0.1]), *trained("gpt-124M", [0.1, 0.2, 0.3]), *trained("llama-127M", [0.1, 0.2, 0.3])]
    lines = told_apart([*lines, *trained("gpt-124M", [0.1, 0.2, 0.3], steps=20)])
    axes = drawn(monkeypatch, tmp_path / "parity.png", paired, lines, "parity", "bf16").axes
    figure = axes[0].figure
    figure.draw_without_rendering()  # what is measured has the dpi of the file until then
    for words in ([one._left_title for one in axes], [one.xaxis.label for one in axes]):
        boxes = [one.get_window_extent() for one in words]
        assert len(boxes) == 5 and boxes[-1].x1 <= figure.bbox.x1
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


def on_its_way_tuned(monkeypatch, path, arms, models=("gpt-31M",)):
    """The axes of a picture of arms whose losses all end near 2 but the last one's, far below."""
    ends = [2.0 + j / 1e6 for j in range(len(arms))] + [1.0]
    lines = [line("finetune", model, arm, losses=[[i, ends[j]] for i in range(20)], result={"loss": 2.0})
             for model in models for j, arm in enumerate(("bf16", *arms))]  # fmt: skip
    return drawn(monkeypatch, path / "gaps.png", on_the_way, lines, {}).axes


def coloured(axes):
    """{arm: its look} of a panel."""
    return {one.get_label(): (one.get_color(), one.get_linestyle()) for one in axes.get_lines()
            if not one.get_label().startswith("_") and one.get_color() != PALE}  # fmt: skip


def test_a_name_with_dollar_signs_is_drawn_as_it_is_written(tmp_path):
    name = r"a$\q_$ 31M"
    lines = [*trained(name, [0.1, 0.2]), swept(name, range(-4, 5))]
    assert draw(tmp_path, lines, sizes_of(lines)) == ["window", "amax", "parity"]


def test_a_scale_of_powers_has_its_ticks_as_powers(tmp_path):
    with picture(tmp_path / "a.png", "a", (4, 3)) as figure:
        axes = figure.subplots()
        axes.set_yscale("log")
        axes.plot([1, 2], [1, 1e4])
        assert all(tick.get_parse_math() for tick in axes.get_yticklabels())


def test_panels_are_of_arms_that_there_are():
    known = [arm for arms in GROUPS.values() for arm in arms]
    assert len(known) == len(set(known)) and set(known) - {"cscale"} <= ARMS.keys()
    assert {LEVERS[arm][0] for arm in GROUPS["delayed with one other change"]} == {BASE}


def test_each_arm_has_one_panel_and_a_look_of_its_own_there(monkeypatch, tmp_path):
    arms = [arm for arm in ARMS if arm != "bf16"] + ["cscale:-3", "cscale:2", "gc-cscale:0"]
    panels = on_its_way_tuned(monkeypatch, tmp_path, arms)
    looks = [coloured(axes) for axes in panels]
    assert sorted(arm for of in looks for arm in of if arm != "delayed") == sorted(set(arms) - {"delayed"})
    assert all("delayed" in of and len(set(of.values())) == len(of) for of in looks)
    assert all(len([one for one in axes.get_lines() if one.get_label() in arms]) == len(arms) for axes in panels)


def test_an_arm_looks_the_same_in_all_rows_and_whatever_else_there_is(monkeypatch, tmp_path):
    few, again = ("amax", "fp16", "wgrad16", "e4m3"), {}
    for axes in on_its_way_tuned(monkeypatch, tmp_path, few, ("gpt-31M", "gpt-73M")):
        for name, look in coloured(axes).items():
            assert again.setdefault(name, look) == look
    more = [coloured(axes) for axes in on_its_way_tuned(monkeypatch, tmp_path, [arm for arm in ARMS if arm != "bf16"])]
    assert set(again) == set(few) and all(of.get(arm, look) == look for of in more for arm, look in again.items())


def test_names_of_curves_that_end_together_do_not_meet(monkeypatch, tmp_path):
    panels = on_its_way_tuned(monkeypatch, tmp_path, [arm for arm in ARMS if arm != "bf16"])
    for axes in panels:
        names = sorted((one for one in axes.texts if one.get_text() in ARMS), key=lambda one: one.get_position()[1])
        boxes = [one.get_window_extent() for one in names]
        assert len(names) == len(coloured(axes)) and all(a.y1 <= b.y0 for a, b in itertools.pairwise(boxes))
        assert boxes[-1].y1 < axes._left_title.get_window_extent().y0 or not axes.get_title(loc="left")


def test_a_row_has_no_panel_for_what_it_has_no_arms_of(monkeypatch, tmp_path):
    lines = [line("parity", model, arm, losses=[[i, 2.0] for i in range(20)], result={"loss": 2.0})
             for model, arms in {"gpt-31M": ("delayed", "e4m3"), "gpt-73M": ("delayed",)}.items()
             for arm in ("bf16", *arms)]  # fmt: skip
    axes = drawn(monkeypatch, tmp_path / "gaps.png", on_the_way, lines, {}).axes
    assert [sorted(coloured(one)) for one in axes] == [["delayed"], ["delayed", "e4m3"], ["delayed"], []]
    assert [bool(one.axison) for one in axes] == [True, True, True, False]


def test_arms_are_in_the_order_of_their_means_where_most_have_several_pairs(monkeypatch, tmp_path):
    lines = [*trained("gpt-31M", [0.0], "delayed"), *trained("gpt-31M", [-9.0], "fp16")]
    lines += [*trained("gpt-31M", [1.0], "amax"), *trained("gpt-124M", [0.3, 0.5], "amax")]
    lines += [*trained("gpt-124M", [0.1, 0.2], "current"), *trained("gpt-124M", [0.1, None], "delayed")]
    axes = drawn(monkeypatch, tmp_path / "parity.png", paired, lines, "parity", "bf16").axes
    assert [tick.get_text() for tick in axes[0].get_yticklabels()] == ["current", "amax", "delayed", "fp16"]


def test_pairs_that_coincide_hide_none(monkeypatch, tmp_path):
    (axes,) = drawn(monkeypatch, tmp_path / "parity.png", paired, trained("gpt-31M", [0.1] * 3), "parity", "bf16").axes
    (points,) = (one for one in axes.get_lines() if one.get_marker() == "o")
    assert len(set(points.get_ydata())) == 3 and set(points.get_xdata().round(9)) == {0.1}


def test_models_that_are_put_together_have_a_picture_of_all_their_pairs(monkeypatch, tmp_path):
    lines = [*trained("gpt-31M", [0.0, 0.1, 0.2]), *trained("llama-49M", [0.3, 0.4, 0.5])]
    *_, last = drawn(monkeypatch, tmp_path / "parity.png", paired, lines, "parity", "bf16").axes
    assert last.get_title(loc="left") == "gpt-31M, llama-49M\n(together)"
    (points,) = (line.get_xdata() for line in last.get_lines() if len(line.get_xdata()) > 2)
    assert sorted(points) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
