"""README says of the scales' trainings what their data says."""

from scales_lines import ROOT

from studies.lib.arms import LEVERS
from studies.lib.intervals import interval
from studies.lib.lines import read_lines
from studies.lib.scales_results import Line, arms_of, done, in_short, pairs, plain_name, told_apart, trained_tokens
from studies.lib.scales_words import MARGIN, hangs_on, no_worse
from studies.lib.texts import read_texts

DATA = ROOT / "studies" / "results" / "scales"


def readme_and_lines():
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    return readme, told_apart(read_lines(DATA / "runs.jsonl", Line))


def trained_on(lines, model, tokens):
    """The finished trainings from scratch of a model in one length, whatever the page calls it."""
    return [one for one in done(lines, "parity") if plain_name(one.model) == model
            and in_short(trained_tokens(one)) == tokens]  # fmt: skip


def against(lines, arm, base="bf16", key="loss"):
    """Of the one model there is."""
    (values,) = pairs(lines, arm, base, key).values()
    return values


def ends(of):
    return f"(−{-of.low:.2f} to +{of.high:.2f} %"


def test_readme_says_what_the_longest_trainings_came_to():
    readme, lines = readme_and_lines()
    longest = trained_on(lines, "gpt-124M", "100M")
    losses = {arm: against(longest, arm) for arm in ("delayed", "amax", "current", "e4m3")}
    assert [no_worse(values) for values in losses.values()] == ["yes", "yes", "open", "open"]
    delayed, amax, current, e4m3 = map(interval, losses.values())
    own, other = (interval(against(longest, arm, key="loss_fp8")) for arm in ("delayed", "amax"))
    assert f"{own.mean:.2f}" == f"{other.mean:.2f}"
    apart, again = interval(against(longest, "current", "delayed")), interval(against(longest, "bf16-again"))
    (needed,) = {hangs_on(losses[arm]) for arm in ("delayed", "amax")}
    assert no_worse(against(longest, "bf16-again")) == "open"
    for said in (
        f"gpt-124M ends {-delayed.mean:.2f} % below BF16 with delayed scaling (95 % interval −{-delayed.low:.2f} to "
        f"+{delayed.high:.3f} %, {delayed.count} pairs of runs), and {-amax.mean:.2f} % below with FP8-AMAX "
        f"{ends(amax)}), both within the 0.25 %, but by a hair, and against the same runs in BF16: without "
        f"any one of {needed} of their {amax.count} pairs either would be open, as BF16 run again is "
        f"{ends(again)}, {again.count} pairs). In their own FP8 both end {own.mean:.2f} % above "
        f"{ends(own)}, {ends(other)[1:]})",
        f"current scaling it ends {current.mean:.2f} % above {ends(current)}), with gradients in E4M3 "
        f"{e4m3.mean:.2f} % {ends(e4m3)}), too few pairs to say so of either; current ends {apart.mean:.2f} % "
        f"above delayed (+{apart.low:.2f} to +{apart.high:.2f} %)",
    ):
        assert said in readme
    tokens = read_texts(DATA / "texts.json")[longest[0].spec["data"]].train_tokens
    assert round(trained_tokens(longest[0]) / tokens) == 4
    assert f"on 100M tokens, four passes over a text of {in_short(tokens)}, " in readme


def test_readme_says_what_fine_tuning_came_to():
    readme, lines = readme_and_lines()
    finetune = done(lines, "finetune")
    arms = "delayed", "current", "amax", "fprop16"
    delayed, current, amax, fprop16 = (interval(against(finetune, arm)) for arm in arms)
    changes = [arm for arm, (base, _) in LEVERS.items() if base == "delayed" and arm != "fprop16"]
    found = {arm: interval(against(finetune, arm, "delayed")) for arm in changes}
    name, most = max(found.items(), key=lambda one: abs(one[1].mean))
    *own, last = (f"{interval(against(finetune, arm, key='loss_fp8')).mean:.2f}" for arm in arms)
    for said in (
        f"that model ends {delayed.mean:.2f} % above BF16's loss with delayed scaling (95 % interval "
        f"+{delayed.low:.3f} to +{delayed.high:.2f} %, {delayed.count} pairs of runs: by a hair open to be within the "
        f"{MARGIN} % that were fixed beforehand), {current.mean:.2f} % with current scaling, "
        f"{amax.mean:.2f} % with FP8-AMAX, and {fprop16.mean:.2f} % with delayed scaling and "
        f"forward's products in 16 bits (+{fprop16.low:.2f} to +{fprop16.high:.2f} %): forward's rounding is nearly "
        "all that FP8 costs there",
        f"Of nine other changes to delayed scaling none moves the mean by more than {abs(most.mean):.2f} %; powers of "
        f"two as scales do most, −{-most.mean:.2f} % {ends(most)})",
        f"in the FP8 of the training they are {', '.join(own)} and {last} % above",
    ):
        assert said in readme
    assert len(changes) == 9 and name == "delayed-power-of-two"
    assert no_worse(against(finetune, "delayed")) == "open"


def test_readme_says_what_shorter_trainings_came_to():
    readme, lines = readme_and_lines()
    short = {model: trained_on(lines, model, "50M") for model in ("gpt-124M", "llama-127M")}
    parity = [against(of, "delayed") for of in short.values()]
    gpt, llama = map(interval, parity)
    half, other = (one.high - one.mean for one in (gpt, llama))
    said = f"gpt-124M ends {-gpt.mean:.2f} % below BF16 (± {half:.2f} %, {gpt.count} pairs) and "
    said += f"llama-127M {llama.mean:.2f} % above (± {other:.2f} %, {llama.count} pairs): too few for either"
    assert f"On 50M tokens with delayed scaling {said}" in readme
    assert all(no_worse(values) == "open" for values in parity)
    arms = set(arms_of(short["gpt-124M"])) - {"bf16", "bf16-again", "delayed"}
    found = [against(short["gpt-124M"], arm) for arm in arms]
    fewest, most = (of(map(len, found)) for of in (min, max))
    said = f"nor is one of the five other recipes tried on gpt-124M there, in {fewest} to {most} pairs each, told apart"
    assert said in readme and len(found) == 5
    assert all(interval(values).low < 0 < interval(values).high for values in found)
