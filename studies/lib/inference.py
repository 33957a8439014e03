"""Inference under every policy: what it keeps of 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch_fp8 as fp8
from torch import nn

from examples.gpt.errors import UserError
from examples.gpt.journal import Journal, Record
from examples.gpt.tokens import Corpus

from .arms import ARMS, constant, inner_layers, make_recipe
from .biases import Biases
from .emulation import Rule, by_amax, by_constant, by_histogram, emulated
from .policies import E4M3, GRAPHCORE_E4M3, Format
from .runs import Run, Spec
from .training import Plan, check_text, gpu_name, validate

Policy = Callable[[nn.Module], AbstractContextManager[None]]  # a model as it is under this policy


def policies(constants: Sequence[int]) -> dict[str, Policy]:
    """By name; BF16 first. Names with ``gc-`` have Graphcore's formats; they and histograms are emulated."""
    found: dict[str, Policy] = {"bf16": lambda model: nullcontext()}
    found |= {name: _in_fp8(ARMS[name]["recipe"]) for name in ("current", "amax")}
    found |= {f"cscale:{c}": _in_fp8(constant(c)["recipe"]) for c in constants}
    found["histogram"] = _emulated(by_histogram, E4M3)
    found["gc-amax"] = _emulated(by_amax, GRAPHCORE_E4M3)
    found["gc-histogram"] = _emulated(by_histogram, GRAPHCORE_E4M3)
    return found | {f"gc-cscale:{c}": _emulated(by_constant(c), GRAPHCORE_E4M3) for c in constants if c % 4 == 0}


def _in_fp8(recipe: Spec) -> Policy:
    @contextmanager
    def within(model: nn.Module) -> Iterator[None]:
        fp8.convert(model, make_recipe(recipe), tokens=None)
        try:
            yield
        finally:
            fp8.revert(model)

    return within


def _emulated(rule: Rule, to: Format) -> Policy:
    return lambda model: emulated(inner_layers(model), rule, to)


def sweep(
    run: Run,
    journal: Journal,
    model: nn.Module,
    corpus: Corpus,
    device: torch.device,
    stop: Callable[[], bool],
    step: int | None = None,
) -> dict[str, Any] | None:
    """Inference under every policy on the same tokens: loss and accuracy by the policy's name, and every tensor's bias
    over one micro-batch. Each policy is a record of the journal once it is measured, and what is there is not measured
    again. None where ``stop`` said so between two.

    step: the last one of a training that this follows; without one a step is a policy."""
    spec, every = run.spec, policies(run.spec["sweep"])
    found = _recorded(run, journal.records, list(every))
    for number, (name, policy) in enumerate(every.items(), start=1):
        if name in found:
            continue
        if stop():
            return None
        found[name] = _measured(model, policy, spec, corpus, device)
        journal.write(step=number if step is None else step, policy=name, **found[name])
        journal.sync()
    return {"inference": found, **inference_biases(model, spec, corpus, device)}


def _recorded(run: Run, records: Iterable[Record], every: Sequence[str]) -> dict[str, dict[str, float]]:
    """UserError where a policy is not there before those that come after it, or twice: some of the log is gone."""
    of = [record for record in records if "policy" in record]
    if [record["policy"] for record in of] != list(every[: len(of)]):
        raise UserError(f"{run.log} must have each policy once and in order, but has not; {run.mend}")
    return {record["policy"]: {"loss": record["loss"], "accuracy": record["accuracy"]} for record in of}


def check_constant(c: int) -> None:
    """UserError where no scale has it."""
    try:
        make_recipe(constant(c)["recipe"])
    except ValueError as error:
        raise UserError(f"--constants: no scale has the constant {c}; {error}") from error


def check_sweep(corpus: Corpus, spec: Spec) -> None:
    """UserError where a sweep of this spec would not come to its end."""
    if spec["sweep_tokens"] < 1:
        raise UserError(f"--sweep-tokens must be at least 1, got {spec['sweep_tokens']}")
    check_text(corpus, Plan.of({**spec, "validated": spec["sweep_tokens"]}), "--sweep-tokens")


def _measured(model: nn.Module, policy: Policy, spec: Spec, corpus: Corpus, device: torch.device) -> dict[str, float]:
    with policy(model):
        return validate(model, corpus, Plan.of({**spec, "validated": spec["sweep_tokens"]}), device)


def inference_biases(model: nn.Module, spec: Spec, corpus: Corpus, device: torch.device) -> dict[str, Any]:
    biases = Biases(inner_layers(model))
    with biases.watch():
        validate(model, corpus, Plan.of({**spec, "validated": spec["micro_batch"] * spec["context"]}), device)
    return biases.seen()


def infer(run: Run, model: nn.Module, corpus: Corpus, device: torch.device, stop: Callable[[], bool]) -> bool:
    """A sweep on its own."""
    journal = Journal(run.log, run.spec["steps"])
    if found := sweep(run, journal, model, corpus, device, stop):
        parameters = sum(parameter.numel() for parameter in model.parameters())
        result = {**found, "parameters": parameters, "gpu": gpu_name(device)}
        journal.write(step=run.spec["steps"], result=result)
    journal.close()
    return found is not None
