"""README says of the scales' trainings what their data says."""

import itertools

from scales_lines import ROOT

from studies.lib.intervals import interval
from studies.lib.lines import read_lines
from studies.lib.scales_results import Line, arms_of, done, in_short, pairs, plain_name, told_apart, trained_tokens
from studies.lib.scales_words import no_worse
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


def test_readme_says_what_the_longest_trainings_came_to():
    readme, lines = readme_and_lines()
    longest = trained_on(lines, "gpt-124M", "100M")
    delayed, current = (against(longest, arm) for arm in ("delayed", "current"))
    assert [no_worse(values) for values in (delayed, current)] == ["yes", "open"]
    of, own, above = map(interval, (delayed, against(longest, "delayed", key="loss_fp8"), current))
    apart = interval(against(longest, "current", "delayed"))
    for said in (
        f"gpt-124M ends {-of.mean:.2f} % below BF16 with delayed scaling (95 % interval −{-of.low:.2f} to "
        f"+{of.high:.3f} %, {of.count} pairs of runs), which is just within the 0.25 %",
        f"in its own FP8 it ends {own.mean:.2f} % above (−{-own.low:.2f} to +{own.high:.2f} %)",
        f"current scaling it ends {above.mean:.2f} % above (−{-above.low:.2f} to +{above.high:.2f} %), too few pairs",
        f"{apart.mean:.2f} % above delayed (+{apart.low:.2f} to +{apart.high:.2f} %)",
    ):
        assert said in readme
    tokens = read_texts(DATA / "texts.json")[longest[0].spec["data"]].train_tokens
    assert round(trained_tokens(longest[0]) / tokens) == 4
    assert f"on 100M tokens, four passes over a text of {in_short(tokens)}, " in readme


def test_readme_says_what_trainings_came_to():
    readme, lines = readme_and_lines()
    finetune = done(lines, "finetune")

    def above(key):
        arms = "current", "amax", "delayed", "fprop16"
        return [[f"{interval(of).mean:.2f}" for of in pairs(finetune, arm, "bf16", key).values()] for arm in arms]

    (one, another), amax, (delayed,), (fprop16,) = above("loss")
    for said in (
        f"ends {one} % above BF16's loss on the first text and {another} % on the other with current scaling, "
        f"{' and '.join(amax)} % with FP8-AMAX, {delayed} % on the other with delayed scaling, ",
        f"and {fprop16} % with that and forward's products in 16 bits. How much of this is FP8's is not known",
    ):
        assert said in readme
    assert "nothing here began so" in readme and not any("dither" in line.spec for line in finetune)
    *most, last = itertools.chain(*above("loss_fp8"))
    assert f"in the FP8 of the training they are {', '.join(most)} and {last} % above" in readme
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
