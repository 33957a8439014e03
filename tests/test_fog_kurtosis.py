"""What docs/fog.md says of kurtosis: which runs a watch announced, and how FOG-max compares with Llama 3."""

import dataclasses

import pytest
from fog_runs import line, verdicts

from studies.lib.fog_claims import CONSISTENT, NOT, OPEN, claims
from studies.lib.fog_findings import findings
from studies.lib.fog_kurtosis import watch_of
from studies.lib.fog_results import FEWEST, alarm, outcomes
from studies.lib.fog_seen import watch_words
from studies.lib.fog_words import PAPER_ARM


def test_a_run_that_leaves_is_held_to_its_own_twin_and_was_announced():
    runs = [line("llama3"), line("llama3", rate=10, away=30), line("llama3", "fp8", away=200, grows=150)]
    (one,) = outcomes(runs, "provoke")
    assert (one.left, one.alarm, one.lead) == (200, (170, 1), 30) and one.further == pytest.approx(1.0)
    assert alarm(runs[0]) is None and outcomes(runs, "parity") == []
    runs[2].kurtosis["qkv"][20][0] = None  # not finite: one such sample is no alarm
    assert alarm(runs[2]) == (170, 1)
    runs[0].rms["qkv"] = [[1.0] for _ in runs[0].samples]
    runs[2].rms["qkv"] = [[1.0 if step <= 100 else 100.0] for step in runs[2].samples]  # above twice the trend
    assert alarm(runs[2], "rms") == (115, 0) and alarm(runs[0], "rms") is None
    (one,) = outcomes(runs, "provoke")
    runs[2].rms["qkv"][3][0] = 0.0  # a watch leaves out what is 0 throughout
    assert alarm(runs[2], "rms") == (115, 0)
    assert watch_words(one) == "alarm 30 steps before, at 170 (layer 2); by rms alarm 85 steps before, at 115 (layer 1)"
    said = (
        "announced 1 of 1 that left, 85 steps before, of those that were sound at the start 1 of 1, where it was "
        "recorded; 0 of 0 others had an alarm of it. The gradient norm jumped before 0 of the 1 left, and in 0 of the "
    )
    assert said in " ".join(findings(runs, ""))
    runs[2].grad_norms[190], runs[0].grad_norms[50] = 1e3, 1e3
    assert "The gradient norm jumped before 1 of the 1 left, and in 0 of the 0 " in " ".join(findings(runs, ""))
    runs[2].losses[100:] = [None]
    assert outcomes(runs, "provoke")[0].left == 101 and outcomes(runs, "provoke")[0].further is None


def test_what_rms_said_too_late_or_not_at_all_is_said():
    def said(**how):
        runs = [line("llama3"), line("llama3", "fp8", **how)]
        grows = how.get("grows", 1000)
        runs[1].rms["qkv"] = [[1.0 if step <= grows else 100.0] for step in runs[1].samples]
        return watch_words(outcomes(runs, "provoke")[0])

    assert said(away=100, grows=150).endswith("; alarm at 170; by rms alarm at 165")
    assert said(away=100).endswith("none out of trend; by rms no alarm")
    assert said() == "no alarm in 60 samples; by rms no alarm"


def test_each_run_that_left_is_told_what_the_watch_said_or_why_it_could_not():
    def said(**how):
        return watch_words(outcomes([line("llama3"), line("llama3", "fp8", **how)], "provoke")[0])

    assert said(away=200, grows=150) == "alarm 30 steps before, at 170 (layer 2)"
    assert said(away=56) == "could not: 11 samples before it, an alarm takes 12"
    assert said(away=56, grows=150) == "could not: 11 samples before it, an alarm takes 12; alarm at 170"
    assert said(away=200) == "no alarm in 39 samples before it: none out of trend"
    assert said(away=161, grows=150).endswith(
        "in 32 samples before it: at most 1 in a row out of trend, an alarm takes 3; alarm at 170"
    )
    assert said() == "no alarm in 60 samples" and said(grows=150) == "alarm at 170"


def test_what_came_back_is_no_divergence_that_a_watch_should_have_told():
    runs = [line("fog-max"), line("fog-max", PAPER_ARM, away=150)]
    runs[1].losses[200:] = runs[0].losses[200:]
    found = outcomes(runs, "provoke")
    assert found[0].came_back and watch_of(found).left == [] and watch_of(found).others == []


def test_kurtosis_foretells_where_every_run_that_left_was_announced():
    words = "The kurtosis of q"
    calm = [line("fog-max"), line("fog-max", "fp8")]
    told = [line("llama3"), line("llama3", "fp8", away=200, grows=150)]
    untold = [line("olmo2"), line("olmo2", "fp8", away=200)]
    assert verdicts(*calm)[words] == OPEN and verdicts(*calm, *told)[words] == CONSISTENT
    assert verdicts(*told, *untold)[words] == OPEN and verdicts(*untold)[words] == NOT
    early = [line("op"), line("op", "fp8", away=60)]  # eleven samples before, and twelve
    late = [line("op"), line("op", "fp8", away=61)]
    assert verdicts(*untold, *early)[words] == NOT and verdicts(*early)[words] == OPEN
    assert verdicts(*told, *early)[words] == CONSISTENT and verdicts(*told, *late)[words] == OPEN
    (claim,) = (claim for claim in claims([*calm, *early]) if claim.words.startswith(words))
    assert claim.found.startswith(f"no run left BF16 late enough; 1 left before {FEWEST} samples") and (
        claim.found.endswith("0 of 1 other had an alarm")
    )
    (claim,) = (claim for claim in claims([*calm, *told]) if claim.words.startswith(words))
    assert claim.found == "the watch announced 1 of 1 run that left BF16, 30 steps before; 0 of 1 other had an alarm"


def test_a_divergence_of_the_start_says_nothing_of_what_kurtosis_foretells():
    words = "The kurtosis of q"
    at_start = [line("op", every=2), line("op", "fp8", away=30, every=2)]
    assert outcomes(at_start, "provoke")[0].watched and verdicts(*at_start)[words] == OPEN
    later = [line("olmo2"), line("olmo2", "fp8", away=200)]
    assert verdicts(*later)[words] == verdicts(*later, *at_start)[words] == NOT
    later[1].grad_norms[28] = 11.0  # what came of it later began there
    assert verdicts(*later)[words] == OPEN
    later[1].grad_norms[28:31] = [1.0, 1.0, 11.0]
    assert verdicts(*later)[words] == NOT


def test_kurtosis_of_lost_runs_is_not_compared():
    words = "FOG-max has as low a loss as Llama 3 in BF16"
    llama, fog_max = line("llama3", study="kurtosis", grows=250), line("fog-max", study="kurtosis")
    assert verdicts(llama, fog_max)[words] == CONSISTENT
    assert (
        verdicts(dataclasses.replace(fog_max, spec=llama.spec), dataclasses.replace(llama, spec=fog_max.spec))[words]
        == OPEN
    )  # as good a loss, and more
    (claim,) = (claim for claim in claims([llama, fog_max]) if claim.words.startswith(words))
    assert "in the largest layer, is lower for q, k and v (4 against 1024), input of the FFN" in claim.found
    assert "in the mean of layers, lower for q, k and v (3.5 against 514), input" in claim.found
    assert "not lower" not in claim.found
    fog_max.result["loss"] = None
    assert verdicts(llama, fog_max)[words] == OPEN


def test_kurtosis_is_compared_between_runs_of_one_seed():
    def made(name, seed, loss, lost=0):
        return line(name, study="kurtosis", seed=seed, loss=loss, lost=lost)

    runs = [made("llama3", 0, 3.0), made("fog-max", 0, None, lost=50), made("llama3", 1, 4.0), made("fog-max", 1, 2.0)]
    (said,) = findings(runs, "")
    assert "loss -50.00 %" in said
    assert "a run of each, of tiny, 38.4k tokens; 1 more lost, or not sound" in [claim.run for claim in claims(runs)]
