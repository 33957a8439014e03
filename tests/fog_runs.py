"""Runs of studies/fog.py that were never made, for tests of what is said of them."""

import torch
from scripts import script

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
