"""Runs of studies/scales.py that were never made, so that what they say is known, and what is said and drawn of them,
for tests."""

import sys
from contextlib import contextmanager
from pathlib import Path

from torch_fp8.picture import picture

from studies.lib.scales_claims import claims
from studies.lib.scales_findings import findings
from studies.lib.scales_results import Line, sizes_of

ROOT = Path(__file__).parents[1]
SPEC = {"steps": 10, "batch": 4, "context": 32, "data": "abc", "seed": 0, "sweep_tokens": 1 << 19}


def line(study="window", model="gpt-31M", arm="bf16", seed=0, result=None, **more):
    spec = {**SPEC, "study": study, "model": model, "arm": arm, "seed": seed}
    if study == "finetune":
        spec |= {"mode": "train", "dither": 2**-9}
    result = result if result is None else {"gpu": "CPU", "diverged": 0, **result}
    return Line(f"{model}_{arm}_{seed}", spec, more.pop("step", 10), result, more.pop("losses", []), [], **more)


def swept(model, works, amax=0.999, tokens=1 << 19):
    """A run whose constants ``works`` keep all of an accuracy of 0.4, and the others half."""
    inference = {"bf16": {"accuracy": 0.4}, "amax": {"accuracy": 0.4 * amax}}
    inference |= {f"cscale:{c}": {"accuracy": 0.4 if c in works else 0.2} for c in range(-16, 17)}
    one = line(model=model, result={"inference": inference})
    one.spec["sweep_tokens"] = tokens
    return one


def verdicts(*lines):
    return [claim.verdict for claim in claims(lines, sizes_of(lines))]


def tuned(arm, losses, **more):
    made = [line("finetune", arm=arm, seed=seed, result={"loss": loss, "accuracy": 0.4 if loss else 0.0})
            for seed, loss in enumerate(losses)]  # fmt: skip
    for one in made:
        one.spec.update({"recipe": {"kind": "CurrentScaling"}} if arm != "bf16" else {}, **more)
    return made


def trained(model, apart, arm="current", **more):
    """Pairs of a training from scratch, whose arm is apart from BF16 by so many per cent, None where it was lost."""
    made = []
    for seed, by in enumerate(apart):
        losses = {"bf16": 2.0, arm: None if by is None else 2.0 * (1 + by / 100)}
        made += [line("parity", model, name, seed, {"loss": loss, "accuracy": 0.4}) for name, loss in losses.items()]
    for one in made:
        one.spec.update(more)
    return made


def together(*lines):
    return [said for said in findings(lines, {}) if " together, " in said]


def on_its_way(arm, seed, losses, result=None):
    one = line("parity", arm=arm, seed=seed, losses=losses, result=result)
    one.spec["steps"] = 20
    return one


def drawn(monkeypatch, path, draws, *arguments):
    """The figure that ``draws`` makes, as it was saved."""
    figures = []

    @contextmanager
    def watched(*arguments):
        with picture(*arguments) as figure:
            yield figure
            figures.append(figure)

    monkeypatch.setattr(sys.modules[draws.__module__], "picture", watched)
    assert draws(path, *arguments)
    return figures[0]
