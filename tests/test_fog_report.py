"""What docs/fog.md says of runs, by rule: which loss leaves, what a claim comes to."""

import dataclasses
import re
from pathlib import Path

import pytest
from fog_runs import drawn, line, old, raised, spiked, verdict, verdicts, wavering
from torch_fp8.table import markdown

from examples.gpt.errors import UserError
from studies.lib.divergence import FACTOR, FIRST, PATIENCE, above_start, jump, leaves, step_noise
from studies.lib.fog_claims import CONSISTENT, NOT, OPEN, OTHER, _speed, claims
from studies.lib.fog_findings import findings
from studies.lib.fog_kurtosis import watch_of
from studies.lib.fog_page import _by_arm, _every_run, _parity, page
from studies.lib.fog_results import Line, differences, merged, outcomes
from studies.lib.fog_seen import seen
from studies.lib.fog_words import PAPER_ARM, told_apart
from studies.lib.intervals import pairs_needed, scatter_allowed
from studies.lib.lines import read_lines

ROOT = Path(__file__).parents[1]


# ---- which loss leaves -----------------------------------------------------------------------------------------------


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


# ---- what is said of runs --------------------------------------------------------------------------------------------


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


LLAMA = "Llama 3 diverges with FP8 attention (after 0.7 to 6.6 billion tokens)"


def test_an_old_run_that_left_is_shown_and_judged_nowhere(tmp_path, monkeypatch):
    runs = [line("llama3"), line("llama3", "bf16-again"), line("llama3", "fp8")]
    before, since = old(line("llama3", PAPER_ARM, away=200)), line("llama3", PAPER_ARM, away=200)
    assert before.old and not since.old and not runs[2].old and before.pair == since.pair
    assert verdict(LLAMA, *runs, before) == OPEN and verdict(LLAMA, *runs, since) == CONSISTENT
    (claim,) = (claim for claim in claims([*runs, before]) if claim.words == LLAMA)
    assert claim.run == "only 1 aside †" and claim.found == "–"
    assert findings([*runs, before], "") == [] and len(findings([*runs, since], "")) == 3
    found = outcomes([*runs, before], "provoke")
    assert watch_of(found).left == [] and len(watch_of(outcomes([*runs, since], "provoke")).left) == 1
    assert "| (200) † |" in _by_arm(found) and "| (200) † |" in _every_run(found)
    assert len(seen(found)) == 3 and "(200) †" in seen(found)[2]  # no word of what it needs
    text = page([*runs, before], [], "")
    assert "**Marked †:** 1 run with FP8 attention was made before a fault" in text
    assert "Of these 1 did not, which proves nothing of FP8, and stands aside.\n" in text
    name = "losses-tiny-300x128-lr0.001"
    figures = drawn([*runs, before], tmp_path, monkeypatch)
    assert list(figures) == [name, name.replace("losses", "kurtosis")]
    (panel,) = (axes for axes in figures[name].axes if axes.lines)
    assert [one.get_marker() for one in panel.lines] == ["None"] * 4  # three runs, the warm-up, and none has left
    for mixed in (line("llama3", "warm", away=100), line("llama3", "warm")):  # beside one that proves something
        (first, *_) = findings([*runs, before, mixed], "")
        assert f"{int(mixed.losses[-1] > 4)} of 1 run" in first and "variants" not in first


def test_an_old_run_that_held_counts_and_is_marked():
    words = "FOG-max does not diverge with FP8 attention"
    runs = [line("fog-max"), line("fog-max", "bf16-again"), old(line("fog-max", PAPER_ARM))]
    assert verdict(words, *runs) == f"{CONSISTENT}, as far as these tokens"
    assert "| not by 300 † |" in _by_arm(outcomes(runs, "provoke"))
    (holding,) = findings(runs, "")
    assert "0 of 1 run with FP8 attention left**, in 300 steps at learning rate 0.001: FOG-max †." in holding
    assert "Of these 1 held all the same, and counts.\n" in page(runs, [], "")
    spiked(runs[2])  # it did not leave, and did not hold either
    assert verdict(words, *runs) == OPEN and "and stands aside" in page(runs, [], "")


def test_an_old_run_gives_way_to_the_same_run_made_since():
    runs = [line("llama3"), line("llama3", "bf16-again"), line("llama3", "fp8")]
    before, since = old(line("llama3", PAPER_ARM, away=200)), line("llama3", PAPER_ARM)
    for both in ([before, since], [since, before]):
        assert [one.line for one in outcomes([*runs, *both], "provoke")] == [*runs[1:], since]
        text = page([*runs, *both], [], "")
        assert "Of these 1 was made again since, and the old stay in runs.jsonl alone.\n" in text
    assert "Marked †:" not in page([*runs, since], [], "")
    begun = line("llama3", PAPER_ARM, to=290)
    assert [one.line for one in outcomes([*runs, begun, before], "provoke")] == [*runs[1:], before]
    assert "made again" not in page([*runs, begun, before], [], "")


def test_old_pairs_may_show_parity_and_never_that_there_is_none():
    words = "FOG-opt with FP8 attention is as good as in BF16"

    def runs(*losses):
        made = [line("fog-opt", study="parity", seed=seed) for seed in range(len(losses))]
        return made + [
            old(line("fog-opt", PAPER_ARM, study="parity", seed=i, loss=loss)) for i, loss in enumerate(losses)
        ]

    assert verdict(words, *runs(3.003, 3.0036, 3.0033)) == CONSISTENT
    for worse in ((3.012, 3.0123, 3.0126), (3.003, None)):
        assert verdict(words, *runs(*worse)).endswith("what is marked † proves nothing against FP8")
        assert f"| {len(worse)} pairs † |" in _parity(runs(*worse))


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
    assert claim.verdict == f"{CONSISTENT}, as far as these tokens" and claim.found == "none left BF16 in 170 steps"
    assert claim.run.endswith("21.8k tokens; 1 not finished, or BF16 beside it is not")


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


def part(lines, which):
    """The start, what it needs, and the rows of the first architecture that left: its cells by arm."""
    _, start, why, table = seen(outcomes(lines, "provoke"))[:4]
    rows = [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in table.splitlines()[2:]]
    return {"start": start, "why": why, "rows": {(row[0], row[1]): row[2:] for row in rows}}[which]


def test_what_was_seen_is_said_in_words_of_the_data():
    lost = line("llama3", "fp8-attention", away=60, lost=70, to=72)
    lost.grad_norms[54] = 11.0
    runs = [line("llama3"), line("llama3", "bf16-again", to=150), lost, line("llama3", "default", away=50, to=170)]
    title, start, why, _ = seen(outcomes([*runs, line("fog-max"), line("fog-max", "fp8")], "provoke"))
    assert title == "### Llama 3, tiny, 300 × 128 tokens, learning rate 0.001"
    assert start.startswith("Learning rate 0.001; the warm-up is 15 steps long") and "(seed 0)" in start
    rows = part(runs, "rows")
    assert rows["BF16, the same again", "0"][:2] == ["not by 150, unfinished", "–"]
    paper = rows["FP8 linears and attention, as the paper", "0"]
    assert paper[:4] == ["**60**", "55", "4 (step 55)", "4"] and paper[5:] == ["not finite from 70 on", "–"]
    default = rows["… own scales for q, k, v, no cold start", "0"]
    assert default[:2] == ["**50**", "–"] and default[5].endswith("(step 170)")
    assert why.startswith("BF16, run again with each seed, does not leave itself by step 79")
    assert "a cold start (1 of 1 run without it left too), one scale for q, k and v (1 of 1 run" in why
    assert (
        "attention's backward in FP8, attention in FP8, q and k without norms." in why and "does not happen" not in why
    )

    runs[1] = line("llama3", "bf16-again", to=78)  # it may yet leave where the paper's arm did
    assert "BF16 was not run again so far" in part(runs, "why")
    runs[1] = line("llama3", "bf16-again", away=100)
    assert "BF16, run again, leaves itself" in part(runs, "why")
    runs[3] = line("llama3", "default", to=170)
    why = part(runs, "why")
    assert "does not happen with … own scales for q, k, v, no cold start (0 of 1 left by step 170)" in why
    assert "Not needed" not in why
    assert seen(outcomes([line("op"), line("op", "bf16-again", away=50)], "provoke")) == []


def test_all_seeds_and_samplings_of_a_training_are_one_part_and_each_has_its_own_bf16():
    runs = [line("llama3", arm, seed=seed, every=every, away=away) for seed, every, arm, away in (
        (0, 5, "bf16", 0), (0, 5, "warm", 60), (0, 1, "bf16", 0), (0, 1, PAPER_ARM, 50), (0, 1, "bf16-again", 0),
        (1, 5, "bf16", 0), (1, 5, "warm", 0), (1, 5, "fp8", 40))]  # fmt: skip
    found = outcomes(runs, "provoke")
    assert [one.reference for one in found] == [runs[0], runs[2], runs[2], runs[5], runs[5]]
    assert len([text for text in seen(found) if text.startswith("###")]) == 1
    rows = part(runs, "rows")
    assert [row[1] for row in rows] == [
        "0, sampled every step",
        "1",
        "0, sampled every step",
        "0, sampled every 5 steps",
        "1",
    ]
    assert "a cold start (1 of 2 runs without it left too)" in part(runs, "why")
    for table in (_by_arm(found), _every_run(found)):
        assert table.count("| 0, sampled every step |") >= 1 and "| 0, sampled every 5 steps |" in table
    assert [words[-1] for words in told_apart(runs).values()] == [
        "0, sampled every step",
        "0, sampled every 5 steps",
        "1",
    ]
    other = dataclasses.replace(runs[5], spec={**runs[5].spec, "data": "b"})
    assert [words[-1] for words in told_apart([runs[5], other]).values()] == ["1, data b", "1, data None"]


def test_norms_of_q_and_k_are_named_where_they_alone_make_it_hold():
    words = "Norms of q and k"
    plain = [line("llama3", rate=10), line("llama3", "bf16-again", rate=10), line("llama3", "fp8", rate=10)]
    plain.append(line("llama3", PAPER_ARM, rate=10, away=200))
    normed = [line("llama3:qk-norm", arm, rate=10) for arm in ("bf16", PAPER_ARM)]
    why = part([*plain, *normed], "why")
    held = "norms of q and k and nothing else changed (Llama 3 with QK-norm, FP8 attention: 0 of 1 left by step 300)"
    assert held in why and "q and k without norms" not in why
    assert "q and k without norms." in part(
        [*plain, *(line("llama3:qk-norm", arm) for arm in ("bf16", PAPER_ARM))], "why"
    )
    assert "q and k without norms." in part(
        [*plain, *(line("olmo2", arm, rate=10) for arm in ("bf16", PAPER_ARM))], "why"
    )
    short = [normed[0], line("llama3:qk-norm", PAPER_ARM, rate=10, to=210)]
    assert "nothing else changed" not in part([*plain, *short], "why") and verdicts(*plain, *short)[words] == OPEN
    left = [normed[0], line("llama3:qk-norm", PAPER_ARM, rate=10, away=250)]
    assert "q and k without norms (Llama 3 with QK-norm: 1 of 1 run " in part([*plain, *left], "why")

    assert verdicts(*plain)[words] == verdicts(*normed)[words] == OPEN
    (claim,) = (claim for claim in claims([*plain, *normed]) if claim.words.startswith(words))
    assert claim.run.startswith("1 pair of runs of Llama 3,")
    assert verdicts(*plain, *normed)[words] == CONSISTENT and verdicts(*plain, *left)[words] == NOT
    assert verdicts(plain[0], *plain[2:], *normed)[words] == OPEN  # BF16 was not run again
    before = [*plain[:3], old(plain[3])]
    assert verdict(words, *before, *normed) == OPEN  # it is no pair
    assert verdict(words, *plain, normed[0], old(normed[1])) == CONSISTENT  # it held with the fault
    assert verdict(words, *plain, left[0], old(left[1])) == OPEN
    early = [*plain[:3], line("llama3", PAPER_ARM, rate=10, away=25)]
    assert verdicts(*early, *normed)[words] == f"{CONSISTENT}, but of another divergence than the paper's"


def test_a_gradient_norm_jumps_against_its_own_median():
    assert jump([1.0] * 300) is None and jump([1.0] * 40 + [11.0]) == 41 and jump([1.0] * 40 + [None]) == 41
    assert jump([99.0, *[1.0] * (FIRST - 1)]) is None and jump([9.0] * 40 + [80.0]) is None


def test_a_run_that_came_back_has_left_but_not_diverged():
    """The mean of its last losses decides, and no other."""
    held, left = "FOG-max does not diverge with FP8 attention", "OLMo 2 diverges with FP8 attention"
    for name, words, expected in (("fog-max", held, CONSISTENT), ("olmo2", left, OPEN)):
        runs = [line(name, rate=10), line(name, "bf16-again", rate=10), line(name, "fp8", rate=10)]
        runs.append(line(name, PAPER_ARM, rate=10, away=40))
        (gone,) = (claim for claim in claims(runs) if claim.words.startswith(words))
        assert gone.verdict.startswith((NOT, OTHER, CONSISTENT)) and not gone.verdict.startswith(f"{CONSISTENT}, as")
        runs[-1].losses[200:] = runs[0].losses[200:]
        (back,) = (claim for claim in claims(runs) if claim.words.startswith(words))
        assert back.verdict.startswith(expected) and back.found.endswith("it came back")
        assert "**40**, came back |" in _by_arm(outcomes(runs, "provoke"))
        assert any("at step 40" in said and "; it came back;" in said for said in findings(runs, ""))
        runs[-1].losses[-10:] = [loss + 2 for loss in runs[0].losses[-10:]]
        (gone_again,) = (claim for claim in claims(runs) if claim.words.startswith(words))
        assert "came back" not in gone_again.found


# ---- BF16 that is not sound itself -----------------------------------------------------------------------------------


def test_a_loss_that_rose_above_its_start_is_told_though_it_came_back():
    losses = wavering(100)
    most = FACTOR * losses[0]
    assert above_start(losses) == 0 and above_start([*losses[:50], most + 0.1, *losses[50:]]) == 51
    assert above_start([*losses[:50], most - 0.1, *losses[50:]]) == 0 and above_start([*losses[:50], None]) == 51
    assert above_start([losses[0], *[99.0] * (FIRST - 1), *losses[FIRST:]]) == 0  # among the first anything may come
    assert above_start([None, *losses]) == FIRST + 1 and above_start([]) == 0
    assert spiked(line("op")).diverged == 0 and spiked(line("op")).unsound == 40
    assert line("op", lost=30).unsound == 30


@pytest.mark.parametrize("spoilt", [0, 1])
def test_what_is_held_to_a_bf16_that_is_not_sound_counts_for_nothing(spoilt):
    """Neither where BF16 itself spikes, nor where the same again does."""

    def runs(name, away=0, to=300):
        made = [line(name), line(name, "bf16-again"), line(name, "fp8"), line(name, PAPER_ARM, away=away, to=to)]
        spiked(made[spoilt], at=250)  # after all that the short runs have
        return made

    left = "Llama 3 diverges with FP8 attention (after 0.7 to 6.6 billion tokens)"
    held = "FOG-max does not diverge with FP8 attention"
    for to in (300, 240):
        said = verdicts(*runs("llama3", away=200, to=to), *runs("fog-max", to=to))
        assert said[left] == said[held] == said["The kurtosis of q"] == OPEN
    (claim,) = (claim for claim in claims(runs("fog-max")) if claim.words == held)
    assert claim.run == "only 1 beside a BF16 that is not sound itself" and claim.found == "–"
    (said,) = findings(runs("llama3", away=200), "")
    assert said.startswith("1 more run of Llama 3 was beside a BF16 that is not sound") and said.endswith(
        "not counted."
    )
    if not spoilt:
        found = outcomes(runs("llama3", away=200), "provoke")
        assert "| (200) |" in _by_arm(found) and "**200**" not in _by_arm(found)
        assert "not sound from step 250 on" in _every_run(found)
        parts = seen(found)
        assert len(parts) == 3 and "BF16 itself is not sound: it rises above its start" in parts[1]


def test_a_run_in_fp8_that_rises_above_its_start_does_not_hold_though_it_comes_back():
    held = "FOG-max does not diverge with FP8 attention"
    runs = [line("fog-max"), line("fog-max", "bf16-again"), line("fog-max", PAPER_ARM)]
    assert verdicts(*runs)[held].startswith(CONSISTENT)
    spiked(runs[2])
    (claim,) = (claim for claim in claims(runs) if claim.words == held)
    assert claim.verdict.startswith(OPEN) and claim.found.endswith(
        "1 more rose above the loss of the first step on the way"
    )
    assert "not by 300, but above its start at 40" in _by_arm(outcomes(runs, "provoke"))


def test_a_run_that_goes_wrong_where_bf16_has_not_come_yet_is_said_to_have_done_what_it_did():
    """Lost, diverged by itself, or above its start."""
    half = [line("fog-max", to=150), line("fog-max", "bf16-again", to=150)]
    lost, risen = line("fog-max", PAPER_ARM, lost=200, to=210), spiked(line("fog-max", PAPER_ARM), at=200)
    for one, cell, did in (
        (lost, "not finite at 200", "came to a loss that is not finite, further than BF16 went"),
        (raised(line("fog-max", PAPER_ARM), at=200), "diverged at 219", "diverged by itself"),
        (risen, "above its start at 200", "rose above the loss of the first step on the way"),
    ):
        assert f"| not by 150, unfinished, but {cell} |" in _by_arm(outcomes([*half, one], "provoke"))
        (claim,) = (one for one in claims([*half, one]) if one.words == "FOG-max does not diverge with FP8 attention")
        assert claim.found == f"none left BF16 in 150 steps; 1 more {did}"
        why = (
            "BF16 was not run as far as what was lost" if one is lost else "it may yet come, after so many tokens more"
        )
        assert claim.verdict == f"{OPEN}: {why}"
        assert f"Of those that did not leave, 1 {did}." in findings([*half, one], "")[0]
    whole = [line("llama3", arm, seed=1, away=away) for arm, away in (("bf16", 0), (PAPER_ARM, 100))]
    half = [line("llama3", to=150), line("llama3", PAPER_ARM, lost=200, to=210)]
    assert "; 1 more came to a loss that is not finite, further than BF16 went; " not in findings(whole, "")[0]
    assert "; 1 more came to a loss that is not finite, further than BF16 went; " in findings([*whole, *half], "")[0]


def test_pairs_whose_bf16_is_not_sound_are_no_pairs():
    runs = [line("fog-opt", arm, study="parity", seed=seed, loss=3.0 + 0.001 * seed)
            for seed in range(4) for arm in ("bf16", PAPER_ARM)]  # fmt: skip
    runs[0].result["loss"] = None  # lost in BF16, which is no fault of FP8's
    spiked(runs[2])
    (pairs,) = differences(runs, PAPER_ARM).values()
    assert pairs.values == [0.0, 0.0] and pairs.unsound == 2
    assert verdicts(*runs)["FOG-opt with FP8 attention is as good as in BF16"] == CONSISTENT
    assert "2 pairs, and 2 whose BF16 is not sound itself" in _parity(runs)
    other = [line("fog-opt", arm, study="parity", rate=3, loss=loss) for arm, loss in (("bf16", 3.0), (PAPER_ARM, 6.0))]
    found = differences([*runs, *other], PAPER_ARM)
    assert [pairs.values for pairs in found.values()] == [[0.0, 0.0], [100.0]]  # another rate, another row
    assert _parity([*runs, *other]).count("| FOG-opt |") == 2


def test_an_architecture_with_no_sound_bf16_has_its_word_on_parity():
    def runs(name, spoilt):
        made = [line(name, arm, study="parity", seed=seed) for seed in range(2) for arm in ("bf16", PAPER_ARM)]
        return [spiked(one) if spoilt and one.arm == "bf16" else one for one in made]

    words = "FOG-opt of tiny not shown: 0 pairs, and 2 whose BF16 is not sound itself."
    (both,) = findings([*runs("fog-max", False), *runs("fog-opt", True)], "")
    assert "FOG-max of tiny shown, +0.00 ± 0.00 % in 2 pairs. " in both and both.endswith(words)
    (alone,) = findings(runs("fog-opt", True), "")
    assert alone.endswith(f"above BF16's loss:** {words}")
    (claim,) = (
        claim for claim in claims(runs("fog-opt", True)) if claim.words.startswith("FOG-opt with FP8 attention")
    )
    assert claim.verdict == f"{OPEN}: not shown, no pair has a BF16 that is sound itself" and claim.found == "–"
    single = [line("fog-opt", arm, study="parity") for arm in ("bf16", PAPER_ARM)]
    assert verdict("FOG-opt with FP8 attention is as good", *single).endswith("above the margin of 0.25 %")


# ---- findings --------------------------------------------------------------------------------------------------------


def test_findings_are_sentences_of_the_data():
    assert findings([], "") == []
    runs = [line("llama3", arm, rate=10, away=away) for arm, away in
            (("bf16", 0), ("bf16-again", 0), ("fp8", 0), (PAPER_ARM, 25), ("warm", 200))]  # fmt: skip
    runs += [line("llama3:qk-norm", arm, rate=10) for arm in ("bf16", PAPER_ARM)]
    runs += [line("fog-max", arm) for arm in ("bf16", PAPER_ARM)]
    first, second = findings(runs, "")[:2]
    assert "above BF16's, in nats: with FP8 attention +1.00; with FP8 linears alone +0.00; BF16 run" in first
    assert first.startswith(
        "**Llama 3 of tiny at learning rate 0.01, 10 × the usual one: 2 of 2 runs with FP8 attention"
    )
    assert (
        "in 2 variants, left BF16's loss**, at steps 25 to 200 (3.2k to 25.6k tokens); 0" in first
        and "0 of 1 with FP8 linears alone did" in first
    )
    assert "0 of 1 of BF16 run again did; 1 of 2 left within 2 times the warm-up of 15 steps" in first
    assert second.startswith("**With norms or a tanh of q and k 0 of 2 runs with FP8 attention left**, in 300 steps at")
    assert "Llama 3 with QK-norm and FOG-max. How far the mean of the last 50 losses lies above BF16's" in second
    assert (
        "in nats: +0.00. By learning rate: 0 of 1 at 0.01, 0 of 1 at 0.001. "
        "Llama 3 with QK-norm is Llama 3 with nothing else changed" in second
    )
    assert "At the usual rate 0 of 1 run with FP8 attention left, of 1 architecture, in 38.4k tokens." in second
    pairs = [line("fog-max", arm, study="parity", seed=seed, loss=loss) for seed, arm, loss in
             ((0, "bf16", 3.0), (0, PAPER_ARM, 3.03), (1, "bf16", 3.0), (1, PAPER_ARM, 2.97))]  # fmt: skip
    runs += [line("op", arm, rate=3, lost=50) for arm in ("bf16", PAPER_ARM)]
    said = "1 more run of OP was beside a BF16 that is not sound, or leaves itself when it is run again: not counted."
    assert said in findings(runs, "")[1]
    (parity,) = findings(pairs, "")
    assert parity.endswith(
        "FOG-max of tiny not shown, +0.00 ± 12.71 % in 2 pairs; at this scatter it takes 126, if its mean is 0."
    )


def test_runs_without_a_bf16_beside_them_are_counted_and_named():
    sound = [line("fog-max"), line("fog-max", PAPER_ARM)]
    lonely = line("llama3", PAPER_ARM, seed=1, away=100)
    (*rest, last) = findings([*sound, lonely], "")
    where = "Llama 3, tiny, 300 × 128 tokens, learning rate 0.001, seed 1"
    assert rest == findings(sound, "")
    assert last == (
        f"**1 run with no BF16 beside it**, which says nothing: {where} (FP8 linears and attention, as the paper)."
    )
    more = [line("llama3", "fp8", seed=1), line("fog-opt", "bf16-again", rate=3), line("op", "fp8", to=0)]
    more += [line("llama3", seed=1, to=0), line("fog-opt", PAPER_ARM, study="parity", rate=3)]
    (*_, last) = findings([*sound, lonely, *more], "")
    assert last.startswith("**4 runs with no BF16 beside them**, which say nothing: Llama 3, ")
    assert f"{where} (FP8 linears, FP8 linears and attention, as the paper); FOG-opt, tiny" in last
    assert last.count("FOG-opt, ") == 2 and "study provoke" in last and "study parity" in last and "OP" not in last
    assert findings([*sound, lonely, line("llama3", seed=1)], "")[-1] != last


@pytest.mark.parametrize(
    "study, words",
    [("provoke", "FOG-opt does not diverge"), ("parity", "FOG-opt with FP8 attention is as good")],
)
def test_a_claim_tells_of_runs_without_a_bf16_beside_them(study, words):
    def ran(*lines):
        return next(claim.run for claim in claims(lines) if claim.words.startswith(words))

    pair = [line("fog-opt", arm, study=study) for arm in ("bf16", PAPER_ARM)]
    lonely = [line("fog-opt", PAPER_ARM, study=study, seed=seed) for seed in (1, 2)]
    others = [line("fog-opt", "fp8", study=study, seed=3), line("fog-max", PAPER_ARM, study=study, seed=3)]
    assert ran(*others) == "nothing yet" and ran(lonely[0]) == "only 1 with no BF16 beside it"
    assert ran(*pair, *lonely, *others) == f"{ran(*pair)}; 2 with no BF16 beside them"


def test_a_new_run_that_was_lost_takes_the_place_of_its_old_twin():
    runs = [line("olmo2"), line("olmo2", PAPER_ARM), line("olmo2", PAPER_ARM, lost=100, to=120)]
    runs[1].spec["fp8"] = {key: value for key, value in runs[1].spec["fp8"].items() if key != "keeps_scores"}
    (one,) = outcomes(runs, "provoke")
    assert one.line is runs[2] and one.left == 100


def typed(one, rate):
    """The same run, but asked for by another --lr and as so many times that."""
    return dataclasses.replace(one, spec={**one.spec, "rate": rate})


def test_one_learning_rate_is_one_setting_however_it_was_typed(tmp_path):
    runs = [line("llama3", arm, rate=10, away=100 * (arm == PAPER_ARM)) for arm in ("bf16", "bf16-again", PAPER_ARM)]
    runs += [line("llama3"), line("llama3", PAPER_ARM)]
    others = [typed(runs[0], 10.0), typed(runs[1], 1), typed(runs[2], 1.0), typed(runs[3], 0.1), typed(runs[4], 3)]
    assert page(others, [], "") == page(runs, [], "")
    first, second, *_ = findings(others, "")
    assert first.startswith("**Llama 3 of tiny at learning rate 0.01, 10 × the usual one: 1 of 1 run")
    assert second.startswith("At the usual rate 0 of 1 run")
    assert verdict(LLAMA, *others, line("llama3", "fp8", rate=10)) == f"{CONSISTENT}; at 10 × the usual rate"
    assert "at the usual rate it is" in part(others, "start")
    assert len(merged(tmp_path / "runs.jsonl", [*runs, *others])) == len(runs)


def test_parity_of_two_lengths_has_two_names():
    pairs = [line("fog-max", arm, study="parity", seed=seed, loss=loss, steps=steps, to=steps)
             for steps in (300, 400) for seed, arm, loss in
             ((0, "bf16", 3.0), (0, PAPER_ARM, 3.03), (1, "bf16", 3.0), (1, PAPER_ARM, 2.97))]  # fmt: skip
    (said,) = findings(pairs, "")
    assert "FOG-max of tiny, 300 × 128 tokens, learning rate 0.001 not shown" in said
    assert "FOG-max of tiny, 400 × 128 tokens, learning rate 0.001 not shown" in said
    (run,) = (claim.run for claim in claims(pairs) if claim.words.startswith("FOG-max with FP8 attention is as good"))
    lengths = [f"2 pairs of tiny, {steps} × 128 tokens, learning rate 0.001" for steps in (300, 400)]
    assert run == "; ".join(lengths)


def test_two_lengths_of_one_size_have_two_headings():
    def runs(steps, away, rate=10):
        return [line("llama3", arm, rate=rate, steps=steps, to=steps, away=away * (arm == PAPER_ARM))
                for arm in ("bf16", "bf16-again", "fp8", PAPER_ARM)]  # fmt: skip

    both = [*runs(300, away=100), *runs(400, away=120)]
    first, second, *_ = findings([*both, *runs(500, away=0, rate=1)], "")
    assert first.startswith("**Llama 3 of tiny, 300 × 128 tokens at learning rate 0.01, 10 × the usual one: 1 of 1")
    assert second.startswith("**Llama 3 of tiny, 400 × 128 tokens at learning rate 0.01, 10 × the usual one: 1 of 1")
    (found,) = (claim.found for claim in claims(both) if claim.words == LLAMA)
    steps = [f"step {at} ({at * 0.128:.3g}k tokens; tiny, {of} × 128 tokens, learning rate 0.01)"
             for at, of in ((100, 300), (120, 400))]  # fmt: skip
    assert found == f"2 of 2 left BF16, at {' and '.join(steps)}"
    alone = findings([*runs(300, away=100), *runs(400, away=120, rate=3)], "")  # each rate has one length
    assert alone[0].startswith("**Llama 3 of tiny at learning rate 0.01, 10") and alone[1].startswith(
        "**Llama 3 of tiny at learning rate 0.003, 3"
    )


def sized(one, size, tokens):
    return dataclasses.replace(one, spec={**one.spec, "size": size, "batch": tokens // one.spec["context"]})


def test_another_size_is_a_finding_of_its_own_whether_its_runs_leave_or_hold():
    def runs(size, tokens, away, lost=0):
        made = [line("llama3", arm, rate=10) for arm in ("bf16", "bf16-again", "fp8")]
        made += [line("llama3", PAPER_ARM, rate=10, away=away, lost=lost)]
        return [sized(one, size, tokens) for one in made]

    small = runs("25M", 1024, away=100)
    for away, lost, said in ((0, 0, "0 of 1 run with FP8 attention left BF16's loss** in 300 steps (614k tokens)"),
                             (150, 0, "1 of 1 run with FP8 attention left BF16's loss**, at step 150 (307k tokens)"),
                             (150, 290, "in nats: with FP8 attention 1 lost; with")):  # fmt: skip
        both = [*runs("100M", 2048, away, lost), *small]
        first, second, *_ = findings(both, "")
        assert first.startswith("**Llama 3 of 25M") and second.startswith("**Llama 3 of 100M") and said in second
        table = _by_arm(outcomes(both, "provoke"))
        assert table.index("| 25M, ") < table.index("| 100M, ") and "something changed" not in table
        (claim,) = (claim for claim in claims(both) if claim.words == LLAMA)
        assert claim.run == "2 runs of 25M and 100M, learning rate 0.01, 307k to 614k tokens"
        assert f"{1 + bool(away)} of 2 left BF16, at step 100 (102k tokens; 25M, learning rate 0.01)" in claim.found


def test_no_sentence_counts_one_in_the_plural_or_says_a_range_of_one():
    runs = [line("llama3", arm, rate=10, away=200 * (arm == PAPER_ARM), grows=150 * (arm == PAPER_ARM))
            for arm in ("bf16", "bf16-again", "fp8", PAPER_ARM)]  # fmt: skip
    runs += [line(name, arm) for name in ("fog-max",) for arm in ("bf16", PAPER_ARM)]
    runs += [line("fog-max", arm, study="parity") for arm in ("bf16", PAPER_ARM)]
    text = page([*runs, old(line("op", PAPER_ARM)), line("op")], [], "")
    assert not re.findall(r"\b(?:of )?1 (?:\w+ )?(?:runs|pairs|steps|samples|architectures|others)\b", text)
    assert not re.findall(r"\b([\d.]+\w?) to \1\b", text) and "learning rates 0.01;" not in text
    assert "run of tiny, learning rate 0.01, " in text and "29 steps" not in text


def test_a_speed_is_that_of_the_layers_step():
    head = ["width", "context", "arm", "attention ran in", "times as fast as Llama BF16 compiled, GPU / loop"]
    layers = f"{CONSISTENT}, for the layers alone"
    for times, mode, expected in ((1.45, "fp8", layers), (1.2, "fp8", OPEN), (1.45, "16bit", OPEN)):
        rows = [["1.5B", 4096, "FOG-flash, FP8, attention", "fp8", "9 / 9"],
                ["8B", 16384, "FOG-flash, FP8, attention", "fp8", "9 / 1.9"],
                ["8B", 4096, "FOG-flash, FP8, attention", mode, f"**2.00 / {times}**"]]  # fmt: skip
        found = _speed(markdown(head, rows) + "\n\n" + markdown(head[:3], rows[:1]))
        assert found.verdict.split(":")[0] == expected and f"{times:g} times" in found.found
        assert f"attention ran in {'FP8' if mode == 'fp8' else '16 bits'}" in found.found.partition(";")[2]
        assert (
            "at context 16384 1.9 times" in found.found and "at context 16384" in findings([], markdown(head, rows))[0]
        )
    assert _speed("").verdict == OPEN


def test_pairs_are_counted_by_students_t():
    assert pairs_needed([-1.0, 1.0], 0.25) == 126 and pairs_needed([1.0], 0.25) is None
    assert scatter_allowed(3, 0.25) == pytest.approx(0.25 * 3**0.5 / 4.30265)
    for count in (3, 31, 32, 200):  # at the standard deviation that so many allow, one more is enough, one less is not
        one = scatter_allowed(count, 0.25) / 2**0.5  # of [-one, one]
        assert pairs_needed([-one * 0.999, one * 0.999], 0.25) == count
        assert pairs_needed([-one * 1.001, one * 1.001], 0.25) == count + 1
    for degrees, exact in ((31, 2.0395), (60, 2.0003), (120, 1.9799), (1000, 1.9623)):
        assert 0.25 * (degrees + 1) ** 0.5 / scatter_allowed(degrees + 1, 0.25) == pytest.approx(exact, abs=1e-4)


def test_lines_are_kept_and_replaced_by_what_got_further(tmp_path):
    path = tmp_path / "data" / "runs.jsonl"
    done, other = line("llama3"), line("llama3", rate=3, steps=400)
    half = line("llama3", to=100)
    assert (
        merged(path, [half, other]) == merged(path, []) == read_lines(path, Line) and len(read_lines(path, Line)) == 2
    )
    before = path.read_text()
    assert done in merged(path, [done]) and done in merged(path, [half])
    path.write_text(path.read_text() + before)
    assert len(read_lines(path, Line)) == 4 and done in merged(path, []) and len(read_lines(path, Line)) == 2
    path.write_text(path.read_text() + "{")
    with pytest.raises(UserError, match="must hold a run a line"):
        merged(path, [done])


def test_the_page_in_docs_is_the_one_of_the_data():
    data = ROOT / "studies" / "results" / "fog"
    lines, pictures = read_lines(data / "runs.jsonl", Line), sorted(path.stem for path in data.glob("*.png"))
    shown = (ROOT / "docs" / "fog.md").read_text(encoding="utf-8")
    assert page(lines, pictures, "../studies/results/fog") == shown, "run studies/fog.py report"
    assert "(../my%20data/runs.jsonl)" in page(lines, pictures, "../my data")


def test_readme_says_what_the_data_say():
    root = Path(__file__).parents[1]
    readme = (root / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    shown = (root / "docs" / "fog.md").read_text(encoding="utf-8")
    high, middle, usual = re.search(r"By learning rate: (.*) at 0.01, (.*) at 0.003, (.*) at 0.001", shown).groups()
    assert f"with norms or a tanh of q and k {high} runs of both sizes do, and come back, and {middle} at 3" in readme
    all_usual = re.search(r"At the usual rate (.* of \d+ runs) with FP8 attention left, of 6", shown)[1]
    assert f"At the usual rate {all_usual} leave in 9.83M tokens" in readme and usual.startswith("0")
    llama = re.search(r"\*\*Llama 3 of 25M at learning rate 0.01, 10 × the usual one: (\d+ of \d+ runs)", shown)[1]
    assert f"At 25M {llama} of Llama 3 with FP8 attention leave at 10 times the rate" in readme
    left, announced = re.search(r"Of (\d+) runs in FP8 that .* good, their kurtosis announced (\d+);", shown).groups()
    rms = re.search(r"announced (\d+) of (\d+) that left, (\d+) to (\d+) steps before, of .* 0 of 19 others", shown)
    told, of, fewest, most = rms.groups()
    assert f"kurtosis announced {announced} of {left}; the rms of q, k and v {told} of the {of} of which" in readme
    jumped = re.search(r"gradient norm jumped before (\d+) of the \d+ left, and in (\d+ of the \d+) that did", shown)
    said = f"steps before; gradient norms jumped before {jumped[1]} of them, and in {jumped[2]} that stayed"
    assert f"recorded, {fewest} to {most} {said}" in readme
