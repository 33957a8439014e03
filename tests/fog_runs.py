"""Runs of studies/fog.py that were never made, and what is said and drawn of them, for tests."""

import dataclasses
from contextlib import contextmanager

import torch
from scripts import script
from torch_fp8.picture import picture

from studies.lib import fog_figures
from studies.lib.fog_claims import OPEN, claims
from studies.lib.fog_results import Line

fog = script("studies/fog.py")


def wavering(steps, level=0.0, noise=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    fall = 3 + 6 / torch.arange(1, steps + 1).sqrt()
    return (fall + level + noise * torch.randn(steps, generator=generator)).tolist()


def line(
    name, arm="bf16", *, study="provoke", rate=1, seed=0, away=0, grows=0, loss=3.0, lost=0, steps=300, to=300, every=5
):
    """A run whose loss is the same for all arms of a seed, but higher from the step ``away`` on, and not finite from
    ``lost`` on; and whose kurtosis is level, but doubles with each sample from the step ``grows`` on. It is as far as
    ``to``."""
    spec = {"study": study, "architecture": name, "arm": arm, "rate": rate, "lr": 1e-3 * rate, "fp8": fog.ARMS[arm]}
    spec |= {"size": "tiny", "seed": seed, "steps": steps, "batch": 2, "context": 64, "warm_up": 15, "every": every}
    losses = [x + (1.0 if away and step >= away else 0.0) for step, x in enumerate(wavering(steps, seed=seed), start=1)]
    losses = [None if lost and step >= lost else loss for step, loss in enumerate(losses[:to], start=1)]
    samples = list(range(every, to + 1, every))
    level = [4.0 * 2 ** max(0, (step - grows) // every) if grows and step > grows else 4.0 for step in samples]
    kurtosis = {kind: [[3.0, value] for value in level] for kind in ("qkv", "ffn", "block")}
    result = {"loss": loss, "diverged": lost, "seconds": 1.0, "gpu": "CPU", "parameters": 1000} if to == steps else None
    return Line(spec, to, result, losses, [1.0] * to, samples, kurtosis)


def verdicts(*lines):
    """Without the reasons why nothing can be claimed."""
    return {claim.words.split(",")[0]: OPEN if claim.verdict.startswith(OPEN) else claim.verdict
            for claim in claims(lines)}  # fmt: skip


def verdict(words, *lines):
    (one,) = (claim.verdict for claim in claims(lines) if claim.words.startswith(words))
    return one


def old(one):
    """As if it had been run before attention's backward was mended."""
    how = {key: value for key, value in one.spec["fp8"].items() if key != "keeps_scores"}
    return dataclasses.replace(one, spec={**one.spec, "fp8": how})


def spiked(one, at=40, to=1e8, steps=5):
    """Its loss is far above its start for some steps, and comes back."""
    one.losses[at - 1 : at - 1 + steps] = [to] * steps
    return one


def raised(one, at):
    """Its loss rises by two from that step on, which is not above its start."""
    one.losses[at - 1 :] = [loss + 2 for loss in one.losses[at - 1 :]]
    return one


def drawn(lines, folder, monkeypatch):
    """{name: figure} of the pictures."""
    figures = {}

    @contextmanager
    def kept(path, title, size):
        with picture(path, title, size) as figure:
            figures[path.stem] = figure
            yield figure

    monkeypatch.setattr(fog_figures, "picture", kept)
    assert fog_figures.draw(folder, lines) == list(figures)
    return figures
