"""What is concluded from pairs of runs, of which one has an arm and the other BF16: verdicts, levers, what was lost."""

import math

import pytest
from scales_lines import line, on_its_way, swept, together, trained, tuned, verdicts

from studies.lib.arms import ARMS, DEFAULT_ARMS, LEVERS, arm
from studies.lib.intervals import means_differ
from studies.lib.scales_claims import claims
from studies.lib.scales_findings import findings
from studies.lib.scales_page import page
from studies.lib.scales_results import gaps, pairs, sizes_of, told_apart
from studies.lib.scales_words import hangs_on, percent


def test_runs_that_differ_in_more_than_their_arm_are_no_pairs():
    bf16 = tuned("bf16", [2.0, 2.0, 2.0])
    for more in ({"steps": 60}, {"data": "another text"}, {"lr": 3e-3}, {"validated": 9}):
        assert pairs([*bf16, *tuned("current", [1.0] * 3, **more)], "current", "bf16", "loss") == {}
    for more in ({"loss_scale": 8.0}, {"dtype": "float16"}, {"record": 9}):
        found = pairs([*bf16, *tuned("current", [2.2] * 3, **more)], "current", "bf16", "loss")
        assert found["gpt-31M"] == pytest.approx([10.0] * 3)


def test_bf16_that_diverged_is_nothing_to_be_held_to():
    made = [line("parity", arm=arm, seed=seed, result={"loss": loss, "diverged": 40 * (arm == "bf16" and seed == 0)})
            for arm, losses in {"bf16": [7.0, 1.0, 1.0], "current": [1.0, 1.0, 1.0]}.items()
            for seed, loss in enumerate(losses)]  # fmt: skip
    assert pairs(made, "current", "bf16", "loss") == {"gpt-31M": [0.0, 0.0]}
    (said,) = findings(made, {})
    assert "; BF16 itself was lost or diverged in 1, of which no pair counts" in said
    assert "mean of 2 seeds" in page(made, [], sizes_of(made), "data")


@pytest.mark.parametrize("study", ["parity", "finetune"])
def test_one_pair_that_was_lost_shows_something(study):
    made = [line(study, result={"loss": 1.0, "accuracy": 0.4}),
            line(study, arm="current", result={"loss": None, "accuracy": None})]  # fmt: skip
    made[1].spec["recipe"] = {"kind": "CurrentScaling"}
    (said,) = findings(made, {})
    assert "1 lost" in said and "shows nothing" not in said


def test_numbers_have_the_digits_that_tell_them_apart():
    near = [line("parity", result={"loss": 1.0}) for _ in range(2)]
    near[0].spec["lr"], near[1].spec["lr"] = 0.46 / 384, 0.0012
    assert [one.model for one in told_apart(near)] == ["gpt-31M (lr 0.001198)", "gpt-31M (lr 0.0012)"]


def test_levers_differ_from_another_arm_in_one_thing():
    for name, (base, _) in LEVERS.items():
        with_, without = arm(name)["recipe"], arm(base)["recipe"]
        assert len({key for key in {**with_, **without} if with_.get(key) != without.get(key)}) == 1, name
        assert arm(name).keys() == arm(base).keys() == {"recipe"}
    levers = {name for name in ARMS if ARMS[name].get("recipe", {}).get("kind") in ("DelayedScaling", "CurrentScaling")}
    assert levers - LEVERS.keys() == {"delayed"}  # that of the others


def test_it_is_said_which_lever_moves_the_loss_and_which_does_not():
    bf16, delayed = tuned("bf16", [2.0, 3.0, 4.0]), tuned("delayed", [2.02, 3.03, 4.04])
    lines = [*bf16, *delayed, *tuned("fprop16", [2.0, 3.003, 4.0]), *tuned("dgrad16", [2.021, 3.029, 4.04]),
             *tuned("wgrad16", [2.019, 3.031, 4.04]),
             *tuned("e4m3", [2.1, 3.15, 4.21]), *tuned("history16", [2.02, None, 4.04]), *tuned("recent", [2.0]),
             *tuned("power-of-two", [2.01, 3.01, 4.02]), *tuned("amax", [2.0, 3.0, 4.0])]  # fmt: skip
    (said,) = findings(lines, {})
    assert (
        "\nThe loss in BF16 against delayed's, with one change to it: lower with fprop16 (forward's product in 16 "
        "bits) -0.96 % [-1.10, -0.82]; no difference seen with dgrad16 (the input gradient's product in 16 bits) "
        "+0.01 % [-0.10, +0.11], wgrad16 (the weight gradient's product in 16 bits) -0.01 % [-0.11, +0.10]; "
        "higher with e4m3 (gradients in E4M3) +4.04 % [+3.69, +4.40]; lost with history16 (a history of 16 "
        "amaxes) +0.00 % [+0.00, +0.00], 1 lost.\nThe loss in BF16 against power-of-two's, with one change to it: "
        "lower with amax ("
    ) in said.replace(" in 3 pairs", "")  # which is said, since recent has one
    assert "against current's" not in said  # which was not run
    (said,) = findings([*lines, *tuned("current", [2.02, 3.04, 4.06])], {})
    lower = "lower with power-of-two (powers of two as scales) "
    assert f"The loss in BF16 against current's, with one change to it: {lower}" in said
    (said,) = findings([*bf16, *tuned("fprop16", [2.0, 3.003, 4.0])], {})
    assert "with one change" not in said
    scratch = findings([*trained("gpt-31M", [1.0, 1.01], "delayed"), *trained("gpt-31M", [0.0, 0.01], "wgrad16")], {})
    assert (
        "with one change to it: lower with wgrad16 (the weight gradient's product in 16 bits) -0.99 % [" in scratch[0]
    )


def test_a_base_that_was_lost_is_said_and_pairs_are_counted():
    bf16, wgrad16 = tuned("bf16", [2.0, 3.0, 4.0]), tuned("wgrad16", [2.0, 3.0, 4.0])
    (said,) = findings([*bf16, *tuned("delayed", [None] * 3), *wgrad16], {})
    assert "Of changes to delayed nothing can be said; delayed itself was lost or diverged in 3, of which" in said
    (said,) = findings([*bf16, *tuned("delayed", [2.0, 3.01, None]), *wgrad16, *tuned("dgrad16", [2.0, 3.0, 4.0])], {})
    assert (
        "-0.17 % [-2.28, +1.94] in 2 pairs; delayed itself was lost or diverged in 1, of which no pair counts." in said
    )
    arms = [*tuned("delayed", [2.0, 3.01, 4.0]), *wgrad16, *tuned("dgrad16", [2.0, 3.0])]
    (said,) = findings([*bf16, *arms], {})
    assert "product in 16 bits) -0.17 % [-2.28, +1.94] in 2 pairs" in said and "+0.37] in 3 pairs" in said


def test_a_run_that_diverged_and_counts_is_said_to_have_diverged():
    bf16, current = tuned("bf16", [2.0, 3.0, 4.0]), tuned("current", [2.0, 3.0, 4.0])
    current[1].result["diverged"] = 7
    assert "current +0.00 % [+0.00, +0.00], 1 diverged on the way." in findings([*bf16, *current], {})[0]
    both = [*trained("gpt-31M", [0.0] * 3), *trained("llama-49M", [0.0] * 3)]
    both[-1].result["diverged"] = 9
    assert "current +0.00 % [+0.00, +0.00], 1 diverged on the way." in together(*both)[0]


def test_bf16_that_diverged_is_no_gain_of_fine_tuning():
    lines = [*tuned("bf16", [2.0, 2.0, 9.0], validated=8), *tuned("current", [2.0, 2.0, 2.0], validated=8)]
    lines[2].result["diverged"] = 5
    sweep = swept("gpt-31M", range(-2, 3))
    sweep.spec.update(study="infer", checkpoint=None, sweep_tokens=8)
    sweep.inference["bf16"]["loss"] = 3.0
    (said,) = [said for said in findings([*lines, sweep], {}) if "Fine-tuning" in said]
    assert " to 2.0000, on" in said
    assert "Of the gain of 1.0000 in BF16" in page([*lines, sweep], [], sizes_of(lines), "data")


def test_how_many_pairs_are_missing_is_said():
    made = [line("parity", arm=arm, seed=seed, result={"loss": loss})
            for arm, losses in {"bf16": [1.0] * 3, "current": [1.003, 0.997, 1.0]}.items()
            for seed, loss in enumerate(losses)]  # fmt: skip
    (said,) = findings(made, sizes_of(made))
    assert "current -0.00 % [-0.75, +0.75], open, which takes 9 pairs if its mean is 0." in said
    (said,) = findings(
        [one for one in made if one.spec["arm"] == "bf16"] + [line("parity", arm="bf16-again", result={"loss": 1.0})],
        {},
    )
    assert said.endswith("which shows nothing; the same seed again moves BF16 by 0.00 %.")


def test_models_that_were_trained_alike_are_put_together():
    """Five pairs and three, of which each model's alone are open."""
    gpt, llama = [0.1, -0.2, 0.2, -0.1, 0.25], [0.15, -0.15, -0.01]
    lines = [*trained("gpt-31M", gpt), *trained("llama-49M", llama)]
    (said,) = together(*lines)
    assert said.startswith(
        "gpt-31M and llama-49M together, from scratch on 1.3k tokens each, 8 pairs in all, pooled after"
    )
    assert "current +0.03 % [-0.11, +0.17]. The models are not seen to differ" in said  # ± 2.365 * 0.1692 / sqrt(8)
    assert "verdicts stay those of each model" in said and "0.25 %" not in said
    assert "* Models together: " in page(lines, [], sizes_of(lines), "data")
    assert all("pairs: nothing is decided yet" in alone for alone in findings(lines, {})[:2])
    assert "lost" in together(*lines, *trained("gpt-73M", [None, 0.0, 0.0]))[0]


def test_what_a_pair_does_not_know_of_is_said():
    """Two kinds of GPU, pairs that were added, arms that are missing, a loss scale; of the paper's policies which no
    model was trained with."""
    lines = [*trained("gpt-124M", [0.1] * 6), *trained("gpt-124M", [0.1, 0.2], arm="cscale:2", **arm("cscale:2"))]
    lines = [one for one in lines if one.spec["arm"] != "bf16" or "recipe" not in one.spec]
    assert "two kinds of GPU" not in page(lines, [], {}, "data")
    lines[0].result["gpu"] = "NVIDIA H200"
    said = page(lines, [], {}, "data")
    assert (
        "* gpt-124M, pairs whose two runs were on two kinds of GPU: against bf16 cscale:2 in 1, current in 1; what"
        in said
    )
    assert "* More pairs than the five of the study's default: current of gpt-124M. " in said
    assert "* Arms of the study's default that have no two pairs: bf16-again, delayed, amax, e4m3, wgrad16 of" in said
    assert "cscale:2 is `ConstantScaling(bias=3, grad_margin=4)` with the loss scaled by 2^16" in said
    assert "from scratch with FP8-AMAX: no model has two pairs" in said


def test_arms_that_were_planned_are_missing_where_they_are_shorter_or_have_fewer_pairs():
    asked, five = DEFAULT_ARMS["parity"][1:], [0.1] * 5
    long = {"steps": 1526, "batch": 64, "context": 1024}

    def missing(*lines):
        lines = told_apart(lines)
        return page(lines, [], {}, "data").partition(" asks for by default: ")[2].partition("\n")[0]

    every = [one for model in ("gpt-124M", "llama-127M") for name in asked for one in trained(model, five, name)]
    assert missing(*every) == "every arm of gpt-124M; every arm of llama-127M"
    gpt = [one for name in ("delayed", "current") for one in trained("gpt-124M", five, name, **long)]
    again = trained("gpt-124M", five[:4], "bf16-again", **long)
    assert missing(*every, *gpt, *again) == (
        "bf16-again, amax, cscale:2, e4m3, wgrad16 of gpt-124M; every arm of llama-127M"
    )
    for one in every:
        one.spec.update(long)
    assert missing(*every[:-1]) == "wgrad16 of llama-127M" and missing(*every) == ""


def test_models_are_put_together_where_two_have_three_pairs_of_one_length():
    three, lines = [0.0, 0.1, -0.1], trained("gpt-31M", [0.0, 0.1, -0.1])
    assert together(*lines) == together(*lines, *trained("llama-49M", [0.0, 0.1])) == []
    assert together(*lines, *trained("llama-49M", three, steps=20)) == []
    assert together(*lines, *trained("llama-49M", three, arm="bf16-again")) == []
    assert "* Models together" not in page(lines, [], sizes_of(lines), "data")
    twice = [*lines, *trained("gpt-31M", three, lr=0.1)]
    assert together(*told_apart(twice)) == []  # one model, trained in two ways
    assert together(*told_apart([*twice, *trained("llama-49M", three)])) == []
    assert together(*lines, *trained("llama-49M", three, data="another text")) == []
    longer = trained("gpt-31M", three, steps=20)  # of one model, which is no second way of its shorter training
    (said,) = together(*told_apart([*lines, *longer, *trained("llama-49M", three)]))
    assert said.startswith("gpt-31M (1.3k tokens) and llama-49M together, from scratch on 1.3k tokens each, 6 pairs")
    more = [*trained("llama-49M", three), *trained("gpt-73M", three, steps=20), *trained("llama-127M", three, steps=20)]
    assert [said.partition(" together")[0] for said in together(*lines, *more)] == [
        "gpt-31M and llama-49M", "gpt-73M and llama-127M"]  # fmt: skip
    (said,) = together(*lines, *trained("llama-49M", three), *trained("gpt-73M", three))
    assert said.startswith("gpt-31M, llama-49M and gpt-73M together") and "9 pairs in all" in said


def test_models_that_differ_are_told_where_they_are_put_together():
    lines = [*trained("gpt-31M", [0.0, 0.01, -0.01]), *trained("llama-49M", [0.2, 0.21, 0.19])]
    assert "With current the models differ from one another by more than their pairs scatter." in together(*lines)[0]
    lost = [*trained("gpt-31M", [0.0, 0.01, -0.01]), *trained("llama-49M", [None] * 3)]
    assert "With current the models differ" in together(*lost)[0]


@pytest.mark.parametrize(
    "groups, differ",
    [
        ([[0.0, 1.0], [3.9, 4.9]], True),  # 3.9, where the interval's half is 4.303 * sqrt(1/2) = 3.04
        ([[0.0, 1.0], [3.0, 4.0]], False),
        ([[0.0, 1.0], [0.1, 1.1], [3.9, 4.9]], True),
        ([[0.0], [9.0]], False),  # no scatter is known
        ([[], [1.0, 2.0]], False),
        ([[0.0], [2.0, 2.1]], True),  # 2.05 of 12.706 * 0.0707 * sqrt(3/2) = 1.10
    ],
)
def test_means_differ_by_more_than_the_scatter(groups, differ):
    assert means_differ(groups) == differ


def test_each_change_of_a_recipe_has_a_row_with_all_measures():
    """In its own FP8 a recipe is held to the other in its own."""
    made = []
    for name, losses in {"bf16": [2.0, 3.0], "delayed": [2.1, 3.1], "e4m3": [2.1, 3.1]}.items():
        made += tuned(name, losses)
    for one in made:
        if one.spec["arm"] != "bf16":
            one.result.update(loss_fp8=2.2 if one.spec["arm"] == "delayed" else 2.222, accuracy_fp8=0.3)
    flat = "+0.00 % [+0.00, +0.00]"
    row = f"| gpt-31M | delayed, gradients in E4M3 | 2 | {flat} | +1.00 % [+1.00, +1.00] | {flat} | {flat} |"
    text = page(made, [], sizes_of(made), "data")
    assert row in text and text.count("By how much each change moves what comes out.") == 1
    assert "By how much each change" not in page([one for one in made if one.spec["seed"] == 0], [], {}, "data")


def test_no_arm_is_called_apart_that_is_not_decided():
    bf16 = tuned("bf16", [2.0, 2.0, 2.0])
    said = "".join(findings([*bf16, *tuned("current", [2.0, 2.0, 2.03]), *tuned("amax", [2.1] * 3)], {}))
    assert "more than 0.25 % above BF16: amax.\n" in said and "no arm in FP8" not in said
    assert "nothing is decided yet" in "".join(findings([*bf16, *tuned("current", [2.0, 2.0, 2.03])], {}))
    assert "no arm in FP8 ends at most 0.25 % above it" in "".join(findings([*bf16, *tuned("current", [2.1] * 3)], {}))
    assert "one pair each shows nothing" in "".join(findings([*bf16[:1], *tuned("current", [2.0])], {}))


def test_a_lost_run_is_told_and_a_lost_bf16_says_nothing_of_others():
    lost, whole = tuned("current", [2.0, 2.0, None]), tuned("current", [2.0, 2.0, 2.0])
    said = "".join(findings([*tuned("bf16", [2.0] * 3), *lost], {}))
    assert "current +0.00 % [+0.00, +0.00], 1 lost" in said
    assert pairs([*tuned("bf16", [2.0] * 3), *lost], "current", "bf16", "accuracy")["gpt-31M"][2] == math.inf
    for key in ("loss", "accuracy"):
        assert pairs([*tuned("bf16", [2.0, 2.0, None]), *whole], "current", "bf16", key) == {"gpt-31M": [0.0, 0.0]}
        assert pairs([*tuned("bf16", [None] * 3), *whole], "current", "bf16", key) == {}


def test_an_arm_that_was_lost_in_all_seeds_is_called_lost():
    """FP16, by which the claim is judged, or FP8-AMAX; and a text where it was lost leaves open what another shows."""
    whole, lost = [2.0, 2.0, 2.0], [None] * 3
    fp16 = [line("finetune", arm="fp16", seed=s, result={"loss": None, "accuracy": 0.0}) for s in range(3)]
    made = [*tuned("bf16", whole), *tuned("amax", whole), *fp16]
    (said,) = findings(made, {})
    assert "at most 0.25 % above BF16: amax.\n" in said and "fp16 lost in all 3." in said
    claim = claims(made, sizes_of(made))[1]
    assert claim.run == "fine-tuning of gpt-31M" and claim.verdict == "cannot be claimed"
    assert claim.found == "gpt-31M: FP16 was lost or diverged in 3, and no pair counts"
    (said,) = findings([*tuned("bf16", whole), *fp16], {})
    assert said == "Fine-tuning gpt-31M: no arm in FP8 has a pair.\nThe loss against BF16's: fp16 lost in all 3."
    claim = claims([*tuned("bf16", whole), *tuned("amax", lost)], {})[1]
    assert claim.found == "gpt-31M: AMAX was lost or diverged in 3, and no pair counts"

    kept = [
        line("finetune", "gpt-73M", arm, s, {"loss": 2.0, "accuracy": 0.4}) for arm in ("fp16", "amax") for s in (0, 1)
    ]
    assert claims(kept, {})[1].verdict == "consistent"
    both = claims([*made, *kept], {})[1]
    assert both.run == "fine-tuning of gpt-31M, gpt-73M" and both.verdict == "cannot be claimed"
    kept[0].result["diverged"] = 40
    assert claims(kept, {})[1].found.endswith(
        "seeds: 1; FP16 itself was lost or diverged in 1, of which no pair counts"
    )


@pytest.mark.parametrize("study, what", [("parity", "Training gpt-31M from scratch: no arm has a pair"),
                                         ("finetune", "Fine-tuning gpt-31M: no arm in FP8 has a pair")])  # fmt: skip
def test_bf16_that_was_lost_in_all_seeds_is_called_lost(study, what):
    made = [line(study, arm=arm, seed=seed, result={"loss": None if arm == "bf16" else 2.0})
            for arm in ("bf16", "current") for seed in range(3)]  # fmt: skip
    assert findings(made, {}) == [f"{what}; BF16 itself was lost or diverged in 3, of which no pair counts."]


def test_bf16_that_was_lost_when_it_ran_again_is_called_lost():
    made = [line("parity", arm=arm, seed=seed, result={"loss": None if (arm, seed) == ("bf16-again", 1) else 2.0})
            for arm in ("bf16", "bf16-again") for seed in range(2)]  # fmt: skip
    assert "again moves BF16 by 0.00 %; BF16 run again was lost in 1." in findings(made, {})[0]


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


BOTH = "cannot be claimed (by the paper's 0.5 % of accuracy: {}; by 0.25 % of the loss: {})"


@pytest.mark.parametrize(
    "accuracy, own, loss, verdict",
    [
        ([0.0, 0.001, -0.001], [0.0, 0.0, 0.001], [0.0, 0.001, -0.001], "consistent"),
        ([-0.02, -0.021, -0.019], [-0.02, -0.021, -0.019], [0.02, 0.021, 0.019], "not"),
        ([-0.02, 0.02, 0.0], [0.0, 0.0, 0.0], [-0.02, 0.02, 0.0], "cannot be claimed"),
        ([None, 0.0, 0.0], [None, 0.0, 0.0], [None, 0.0, 0.0], "not"),
        ([0.0], [0.0], [0.0], "cannot be claimed"),  # one seed says nothing
        ([0.0, 0.001, -0.001], [0.0, 0.0, 0.001], [0.005, 0.006, 0.007], BOTH.format("consistent", "not")),
        ([0.0, 0.001, -0.001], [-0.02, -0.02, -0.021], [0.0, 0.001, -0.001], BOTH.format("not", "consistent")),
    ],
)
def test_fine_tuning_is_judged_by_its_accuracies_and_its_loss(accuracy, own, loss, verdict):
    lines = []
    for seed, (a, b, c) in enumerate(zip(accuracy, own, loss)):
        lines.append(line("finetune", arm="fp16", seed=seed, result={"accuracy": 0.5, "loss": 2.0}))
        apart = {"accuracy": (0.5, a), "accuracy_fp8": (0.5, b), "loss": (2.0, c)}
        result = {key: None if by is None else of * (1 + by) for key, (of, by) in apart.items()}
        lines.append(line("finetune", arm="amax", seed=seed, result=result))
    assert verdicts(*lines)[1] == verdict


@pytest.mark.parametrize(
    "apart, word",
    [
        ([0.1, 0.12, 0.11], "yes"),
        ([0.4, 0.42, 0.41], "no"),
        ([0.0, 0.3, 0.6], "open"),
        ([0.1], "one pair shows nothing"),
    ],
)
def test_parity_is_judged_by_the_margin(apart, word):
    lines = []
    for seed, a in enumerate(apart):
        losses = [[step, 3.0] for step in range(1, 11)]
        above = [[step, 3.0 * (1.5 if step == 1 else 1.01)] for step in range(1, 11)]
        lines.append(line("parity", seed=seed, result={"loss": 2.0, "accuracy": 0.4}, losses=losses))
        result = {"loss": 2.0 * (1 + a / 100), "accuracy": 0.4, "loss_fp8": 2.2}
        lines.append(line("parity", arm="delayed", seed=seed, result=result, losses=above))
    text = page(lines, [], {"gpt-31M": 31e6}, "data")
    (row,) = [row for row in text.splitlines() if row.startswith("| gpt-31M | delayed")]
    assert row.endswith(f"| +1.00 % | 0 | {word} |") and f"| {len(apart)} |" in row  # the first tenth does not count
    assert "| +10.00 %" in row  # in its own FP8
    assert text.count("asks for by default: every arm of gpt-124M; every arm of llama-127M\n") == 1
    assert ("of one pair each, which shows nothing" in text) == (len(apart) == 1)
    said = {"yes": "at most 0.25 % above BF16: delayed", "no": "more than 0.25 % above BF16: delayed",
            "open": "nothing is decided yet"}  # fmt: skip
    if len(apart) > 1:
        words = f"{said[word]}.\n  * The loss against BF16's: delayed +0."
        assert f"Training gpt-31M from scratch, 3 pairs: {words}" in text


def test_gaps_are_of_the_seeds_that_both_arms_have():
    lines = [on_its_way("bf16", seed, [[i, 2.0] for i in range(1, 21)]) for seed in range(2)]
    lines += [on_its_way("amax", s, [[i, 2.0 + i * s] for i in range(1, 21)]) for s in (1, 2)]
    found = gaps(lines, "amax")
    assert found[0] == (3, pytest.approx(150.0)) and found[-1] == (20, pytest.approx(1000.0)) and len(found) == 18
    assert gaps(lines, "fp16") == []


def test_gaps_of_other_seeds_stay_where_one_is_lost():
    """A lost run is cut into stretches of its own length, which are not those of BF16."""
    end, lost = {"loss": 2.0}, {"loss": None, "diverged": 5}
    whole = [on_its_way("bf16", seed, [[i, 2.0] for i in range(2, 21, 2)], end) for seed in range(3)]
    lines = [*whole, *(on_its_way("amax", seed, [[i, 2.4] for i in range(2, 21, 2)], end) for seed in range(2))]
    lines.append(on_its_way("amax", 2, [[i, 9.0] for i in range(1, 5)], lost))
    assert gaps(lines, "amax") == [(i, pytest.approx(20.0)) for i in range(4, 21, 2)]
    (row,) = [row for row in page(lines, [], {"gpt-31M": 31e6}, "data").splitlines() if "| amax | 3 |" in row]
    assert "| +20.00 % | 1 |" in row
    unfinished = [*lines[:5], on_its_way("amax", 2, [[i, 9.0] for i in range(1, 5)])]
    assert gaps(unfinished, "amax") == gaps(lines, "amax")  # step 4 is one step there, and the mean of two in BF16


def test_gaps_are_of_equal_steps_of_each_seed_after_the_first_tenth():
    lines = []
    for seed, steps in enumerate([range(1, 21), [*range(1, 10), *range(11, 21)]]):  # one step there was not finite
        lines += [on_its_way("bf16", seed, [[i, 2.0] for i in steps])]
        lines += [on_its_way("amax", seed, [[i, 2.2 + seed * i / 10] for i in steps])]
    expected = [(i, pytest.approx(10 + (0 if i == 10 else 2.5 * i))) for i in range(3, 21)]
    assert gaps(lines, "amax") == expected


@pytest.mark.parametrize("unsound", [{"loss": None, "diverged": 5}, {"loss": 2.0, "diverged": 5}])
def test_gaps_are_not_to_a_bf16_that_diverged(unsound):
    steps = [[i, 2.0] for i in range(1, 21)]
    lines = [on_its_way("bf16", 0, [[i, 1.0] for i in range(1, 21)], unsound), on_its_way("amax", 0, steps)]
    assert gaps(lines, "amax") == []
    lines += [on_its_way("bf16", 1, steps, {"loss": 2.0}), on_its_way("amax", 1, steps)]
    assert {apart for _, apart in gaps(lines, "amax")} == {0.0}


def test_a_verdict_that_hangs_on_single_pairs_is_said_to():
    """Without one of the lower four the interval goes up to +0.257, without the highest it is a point."""
    made = trained("gpt-31M", [0.1, 0.1, 0.1, 0.1, 0.25])
    assert hangs_on(pairs(made, "current", "bf16", "loss")["gpt-31M"]) == 4
    (said,) = findings(made, {})
    assert "current +0.13 % [+0.05, +0.21], open without any one of 4 of its 5 pairs" in said
    firm = trained("gpt-31M", [0.1, 0.11, 0.1, 0.11, 0.1])
    assert "open without" not in findings(firm, {})[0] and hangs_on([0.3, 0.3]) == hangs_on([]) == 0


def test_an_interval_has_the_digits_that_tell_its_end_from_the_margin_and_from_nothing():
    assert percent([0.2461 - 0.01, 0.2461 + 0.01]) == "+0.25 % [+0.12, +0.37]"  # a mean decides nothing
    assert percent([0.2461, 0.2461]) == "+0.25 % [+0.2461, +0.2461]"
    assert percent([-0.0004, -0.0004]) == "-0.00 % [-0.0004, -0.0004]"
    assert percent([0.0, 0.0]) == "+0.00 % [+0.00, +0.00]"


def test_losses_in_the_fp8_of_the_training_are_said_beside_those_in_bf16():
    made = [*tuned("bf16", [2.0, 2.0]), *tuned("current", [2.002, 2.002])]
    assert "In the FP8" not in findings(made, {})[0]
    for one in made[2:]:
        one.result["loss_fp8"] = 2.02
    assert "\nIn the FP8 of their training: current +1.00 % [+1.00, +1.00]." in findings(made, {})[0]
