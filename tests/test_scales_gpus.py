"""What is said of pairs whose two runs were on two kinds of GPU: between these a difference can be the GPU's."""

import pytest
from scales_lines import together, trained, tuned

from studies.lib.scales_claims import claims
from studies.lib.scales_findings import findings
from studies.lib.scales_page import page
from studies.lib.scales_results import on_two_gpus, pairs
from studies.lib.scales_words import BY_CHANCE


def on_another(lines, *seeds):
    """The same, of which these seeds ran on another GPU."""
    for one in lines:
        if one.spec["seed"] in seeds:
            one.result["gpu"] = "another"
    return lines


BF16, DELAYED, LESS = [2.0] * 4, [2.02] * 4, [2.010, 2.011, 2.009, 2.010]


@pytest.mark.parametrize(
    "seeds, word, mark",
    [
        ((), "lower with", ""),
        ((0, 1, 2, 3), "not told from a change of GPU:", " (4 of 4 pairs on two kinds of GPU)"),
        ((0, 1, 2), "not told from a change of GPU:", " (3 of 4 pairs on two kinds of GPU)"),  # one pair shows nothing
        ((0, 1), "lower with", " (2 of 4 pairs on two kinds of GPU)"),
    ],
)
def test_a_lever_has_the_difference_that_pairs_on_one_gpu_show_by_themselves(seeds, word, mark):
    lines = [*tuned("bf16", BF16), *tuned("delayed", DELAYED), *on_another(tuned("dgrad16", LESS), *seeds)]
    (said,) = findings(lines, {})
    assert f"with one change to it: {word} dgrad16 (the input gradient's product in 16 bits) -0.50 % [" in said
    assert said.endswith(f"]{mark}." + f" {BY_CHANCE}" * (word == "lower with"))
    assert f"dgrad16 +0.50 % [+0.44, +0.56]{mark}" in said
    assert ("two kinds" in page(lines, [], {}, "data")) == bool(mark)


def test_what_is_not_seen_or_was_lost_is_so_on_whatever_gpus():
    lines = [*tuned("bf16", BF16), *tuned("delayed", DELAYED)]
    lines += on_another([*tuned("wgrad16", DELAYED), *tuned("e4m3", [2.02, None, 2.02, 2.02])], 0, 1, 2, 3)
    (said,) = findings(lines, {})
    assert (
        "no difference seen with wgrad16 (the weight gradient's product in 16 bits) +0.00 % [+0.00, +0.00] (4" in said
    )
    assert "lost with e4m3 (gradients in E4M3) +0.00 % [+0.00, +0.00], 1 lost (4 of 4 pairs" in said


def test_pairs_on_two_gpus_are_told_of_each_comparison():
    amax = on_another(tuned("amax", [2.01] * 4), 1, 2)
    lines = [*tuned("bf16", BF16), *on_another(tuned("fp16", BF16), 2), *tuned("power-of-two", DELAYED), *amax]
    assert on_two_gpus(lines, "amax", "fp16") == {"gpt-31M": 1} and on_two_gpus(lines, "power-of-two", "bf16") == {}
    assert len(pairs(lines, "amax", "fp16", "accuracy", one_gpu=True)["gpt-31M"]) == 3
    assert claims(lines, {})[1].found.endswith("; seeds: 4 (1 of 4 pairs on two kinds of GPU)")
    assert (
        "* gpt-31M, pairs whose two runs were on two kinds of GPU: against bf16 amax in 2, fp16 in 1; against fp16 "
        "amax in 1; against power-of-two amax in 2; what that does alone was not measured\n"
    ) in page(lines, [], {}, "data")
    lines += on_another(tuned("bf16-again", BF16), 0)
    assert "bf16-again in 1" in (said := page(lines, [], {}, "data")) and "was not measured" not in said


def test_pairs_on_two_gpus_are_counted_over_models_that_are_put_together():
    lines = [*trained("gpt-31M", [0.0, 0.1, 0.2]), *trained("llama-49M", [0.3, 0.4, 0.5])]
    on_another([one for one in lines if one.spec["arm"] == "current"], 2)
    (said,) = together(*lines)
    assert "] (2 of 6 pairs on two kinds of GPU). " in said
