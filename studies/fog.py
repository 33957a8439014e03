"""What arXiv 2505.20524 says of FP8 attention and of its FOG architectures, tried on small models.

    python studies/fog.py provoke --tokens TOKENS --out DIR    # which loss leaves BF16's, and what was seen before
    python studies/fog.py parity --tokens TOKENS --out DIR    # FOG with FP8 attention beside itself in BF16
    python studies/fog.py kurtosis --tokens TOKENS --out DIR    # FOG-max beside Llama 3 in BF16, by layer
    python studies/fog.py report --runs DIR [DIR ...]    # docs/fog.md and its pictures, from all runs so far

TOKENS is what ``studies/scales.py tokens`` wrote. The first three each write a folder of runs, print what is still
missing, and go on where they were interrupted when they are called again with the same arguments; what a runs.jsonl
has of them is left out (--kept). Several runs share a GPU (--jobs), and all GPUs of the machine are used. Each command
has an --out of its own.

The defaults are for GPUs. On a CPU, in a minute, on the source of Python's standard library:

    python studies/scales.py tokens --tokens text.tokens
    python studies/fog.py parity --tokens text.tokens --out parity --architectures fog-max --size tiny --seeds 1 \\
        --steps 60 --batch 8 --context 128 --val-tokens 16384
    python studies/fog.py report --runs parity --data data --page fog.md
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import lib  # noqa: F401 (first, so that Ctrl-C is told in a line while the others are imported)
import torch
import torch_fp8 as fp8
from lib.bounds import check_bounds
from lib.corpus import read_corpus, text_of
from lib.fog_figures import draw
from lib.fog_page import page
from lib.fog_results import STUDIES, USUAL, Line, condensed, learning_rate, merged, times_usual
from lib.kurtosis import Kurtosis
from lib.lines import new_lines
from lib.memory import TRAINING, check_memory
from lib.pool import exit_code, serve, work
from lib.runs import Run, Spec, all_runs
from lib.training import Plan, Training, check_text, in_whole_contexts
from torch import nn
from torch_fp8.files import replacing

from examples.gpt.errors import UserError
from examples.gpt.tokens import Corpus
from models.fog import LM
from models.fog_config import SIZES, Architecture, architecture
from models.fog_fp8 import to_fp8

ROOT = Path(__file__).parents[1]

# How the paper's runs were scaled: scale 1 in the first step and amaxes of 1024 steps; q, k and v have one scale. But
# the weights of linear layers: a delayed scale that does not fit a weight is not used (docs/design.md), 1 does not.
_LINEARS: Spec = {"history": 1024, "cold": True}
# keeps_scores is no switch: attention's backward keeps scores where they were; runs without it were made before that.
_PAPER: Spec = {
    **_LINEARS, "attention": "fp8", "shared_scale": True, "attention_format": "HYBRID", "keeps_scores": True
}  # fmt: skip

ARMS: dict[str, Spec] = {
    "bf16": {},
    "bf16-again": {},  # the same seed twice: what the GPU's order of sums alone does
    "fp8": _LINEARS,
    "fp8-attention": _PAPER,
    # The last one with one thing changed, and with all that this library does otherwise by default.
    "separate": {**_PAPER, "shared_scale": False},
    "warm": {**_PAPER, "cold": False},
    "history16": {**_PAPER, "history": 16},
    "e4m3": {**_PAPER, "attention_format": "E4M3"},  # gradients within attention, dP among them
    "forward": {**_PAPER, "attention": "fp8_forward"},
    "default": {**_PAPER, "shared_scale": False, "cold": False},
}
QK = {"": None, ":qk-norm": "frozen_rms", ":no-qk-norm": "none"}


def named_architecture(name: str) -> Architecture:
    """By name, which may end in ``:qk-norm`` or ``:no-qk-norm``: with RMS norms of q and k that have no gain, or with
    nothing there and the usual softmax scale."""
    plain, colon, change = name.partition(":")
    if colon + change not in QK:
        raise UserError(f"--architectures: a name may end in {' or '.join(filter(None, QK))}, got {name!r}")
    try:
        found = architecture(plain)
    except ValueError as error:
        raise UserError(f"--architectures: {error}") from error
    qk = QK[colon + change]
    return found if qk is None else dataclasses.replace(found, qk=qk, own_scale=found.own_scale and qk != "none")


def arm(name: str) -> Spec:
    if name not in ARMS:
        raise UserError(f"--arms takes {', '.join(ARMS)}, got {name!r}")
    return ARMS[name]


# ---- the runs --------------------------------------------------------------------------------------------------------


def specs_of(args: argparse.Namespace, corpus: Corpus) -> dict[str, Spec]:
    """Every run of a command, in order: whole arms first, of which BF16 is the first, so that an interrupted study can
    already be read."""
    if args.size not in SIZES:
        raise UserError(f"--size must be one of {', '.join(SIZES)}, got {args.size!r}")
    for name in args.architectures:
        named_architecture(name)
    specs = {}
    for seed in range(args.seeds):
        for arm_name in args.arms:
            for rate in args.rates:
                for name in args.architectures:
                    lr = learning_rate(args.lr, rate)
                    times = times_usual(lr)
                    spec = {"study": args.command, "architecture": name, "arm": arm_name, "rate": times}
                    spec |= {"fp8": arm(arm_name), **training_spec(args, corpus, seed), "lr": lr}
                    folder = f"{name.replace(':', '+')}_x{times:g}_{arm_name}_{seed}"
                    if folder in specs:
                        raise UserError(f"two runs would be called {folder}; give each architecture, arm and rate once")
                    specs[folder] = spec
    return specs


def training_spec(args: argparse.Namespace, corpus: Corpus, seed: int) -> Spec:
    return {
        "size": args.size,
        "seed": seed,
        "steps": args.steps,
        "batch": args.batch,
        "micro_batch": min(args.micro_batch, args.batch),
        "context": args.context,
        "warm_up": args.steps // 20,
        "cooldown": round(args.steps * args.cooldown),
        "schedule": "wsd",
        "validated": in_whole_contexts(args.val_tokens, args.context),
        "every": args.every,
        **text_of(corpus),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def make_model(spec: Spec, corpus: Corpus, device: torch.device) -> nn.Module:
    """Random weights of the run's seed, in FP8 as its arm says."""
    with device:
        model = LM(named_architecture(spec["architecture"]), SIZES[spec["size"]], vocab=corpus.vocab)
    if not (how := spec["fp8"]):
        return model
    linears = fp8.DelayedScaling(amax_history_len=how["history"])
    if "attention" in how:
        inside = dataclasses.replace(linears, fp8_format=how["attention_format"])
        to_fp8(
            model, linears, attention=how["attention"], attention_recipe=inside, shared_scale=how["shared_scale"]
        )  # fmt: skip
    else:
        to_fp8(model, linears)
    if how["cold"]:
        start_cold(model)
    return model


def start_cold(model: nn.Module) -> None:
    """Let scales begin at 1, and not at those of the first step's own amaxes: as if there had been a step of zeros.
    Weights are scaled by their own amax even so, since 1 does not fit them."""
    state = fp8.state_dict(model)
    for name, slots in state.items():
        if name.endswith("fp8_slots"):
            scale, cursor = slots[:, 1], slots[:, 3]
            cursor[scale == 1] = 1  # others are constant
    fp8.load_state_dict(model, state)


def perform(run: Run, corpus: Corpus, device: torch.device, stop: Callable[[], bool]) -> bool:
    model = make_model(run.spec, corpus, device)
    return Training(run, model, corpus, device, Kurtosis(model, run.spec["every"])).go_on(stop)


# ---- the report ------------------------------------------------------------------------------------------------------


def report(runs: Sequence[Path], data: Path, to: Path) -> None:
    """Add what these folders of runs have to ``data``/runs.jsonl, draw its pictures beside it and write the page."""
    new = []
    for folder in runs:
        found = [run for run in all_runs(folder) if run.spec.get("study") in STUDIES and "architecture" in run.spec]
        if not found:
            raise UserError(f"--runs must be folders of runs of this study, {folder} has none")
        new += new_lines(found, condensed)
    lines = merged(data / "runs.jsonl", new)
    pictures = draw(data, lines)
    to.parent.mkdir(parents=True, exist_ok=True)
    with replacing(to) as temporary:
        temporary.write_text(page(lines, pictures, os.path.relpath(data, to.parent)), encoding="utf-8")
    print(f"{to}: {sum(line.result is not None for line in lines)} of {len(lines)} runs, {len(pictures)} pictures")


# ---- the command line ------------------------------------------------------------------------------------------------

_FOGS = ["fog-max", "fog-opt", "fog-flash"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    provoke = commands.add_parser("provoke", allow_abbrev=False, help="which loss leaves BF16's")
    _add_training(provoke, architectures=["llama3", "olmo2", "op", *_FOGS], rates=[10, 1, 3], seeds=1, cooldown=0,
                  arms=["bf16", "bf16-again", "fp8-attention", "fp8"])  # fmt: skip
    parity = commands.add_parser("parity", allow_abbrev=False, help="FOG with FP8 attention beside itself in BF16")
    _add_training(parity, architectures=_FOGS, arms=["bf16", "bf16-again", "fp8-attention"], rates=[1], seeds=3,
                  cooldown=0.2)  # fmt: skip
    kurtosis = commands.add_parser("kurtosis", allow_abbrev=False, help="FOG-max beside Llama 3 in BF16")
    _add_training(kurtosis, architectures=["llama3", "fog-max"], arms=["bf16"], rates=[1], seeds=1, cooldown=0.2)
    add = commands.add_parser("report", allow_abbrev=False, help="write docs/fog.md and its pictures").add_argument
    add("--runs", type=Path, nargs="+", default=[], metavar="DIR", help="folders of runs; default: none that are new")
    add("--data", type=Path, default=ROOT / "studies" / "results" / "fog", metavar="DIR", help="what is kept of them")
    add("--page", type=Path, default=ROOT / "docs" / "fog.md", metavar="FILE")
    return parser.parse_args()


def _add_training(
    parser: argparse.ArgumentParser, *, architectures: list[str], arms: list[str], rates: list[float], seeds: int,
    cooldown: float,
) -> None:  # fmt: skip
    add = parser.add_argument
    ends = " and ".join(filter(None, QK))
    add("--tokens", type=Path, required=True, metavar="FILE", help="what `studies/scales.py tokens` wrote")
    add("--out", type=Path, required=True, metavar="DIR", help="of this command's runs; what is done is not repeated")
    add("--architectures", nargs="+", default=architectures, metavar="NAME",
        help=f"of models/fog_config.py, also with {ends} behind; default: {' '.join(architectures)}")  # fmt: skip
    add("--arms", nargs="+", default=arms, metavar="ARM", help=f"{', '.join(ARMS)}; default: {' '.join(arms)}")
    add("--size", default="100M", metavar="NAME", help=f"{', '.join(SIZES)} (default: 100M)")
    add("--lr", type=float, default=USUAL, metavar="X", help="peak learning rate, times those of --rates")
    add("--rates", type=float, nargs="+", default=rates, metavar="X", help=f"default: {' '.join(map(str, rates))}")
    add("--seeds", type=int, default=seeds, metavar="N", help=f"default: {seeds}")
    add("--steps", type=int, default=1500, metavar="N", help="default: 1500")
    add("--cooldown", type=float, default=cooldown, metavar="X", help=f"share of the steps; default: {cooldown}")
    add("--batch", type=int, default=32, metavar="N", help="sequences of an optimizer step (default: 32)")
    add("--micro-batch", type=int, default=8, metavar="N", help="sequences of a pass (default: 8)")
    add("--context", type=int, default=1024, metavar="N", help="tokens of a sequence (default: 1024)")
    add("--val-tokens", type=int, default=1 << 20, metavar="N", help="of validation at the end (default: 1,048,576)")
    add("--every", type=int, default=10, metavar="N", help="steps from sample to sample of kurtosis (default: 10)")
    add("--jobs", type=int, default=1, metavar="N", help="runs beside one another on each GPU (default: 1)")
    add("--kept", type=Path, metavar="FILE", help="runs.jsonl of `report`: what is done there is not repeated")
    add("--minutes", type=float, metavar="N", help="stop, and save what is on its way, after so many")


def check_numbers(args: argparse.Namespace) -> None:
    check_bounds(args, "architectures", "arms", "rates")
    if args.every < 1:
        raise UserError(f"--every must be at least 1, got {args.every}")
    if not 0 <= args.cooldown <= 0.9:
        raise UserError(f"--cooldown is a share of the steps and must be from 0 to 0.9, got {args.cooldown}")
    if not all(0 < rate < math.inf for rate in (args.lr, *args.rates)):
        raise UserError(f"--lr and --rates must be positive and finite, got {args.lr} and {args.rates}")
    if args.arms and args.arms[0] != "bf16":
        raise UserError(f"--arms must begin with bf16, which the others are held to, got {' '.join(args.arms)}")


def main() -> int:
    if sys.argv[1:2] == ["run"]:
        return serve(sys.argv[2:], perform)
    args = parse_arguments()
    if args.command == "report":
        report(args.runs, args.data, args.page)
        return 0
    check_numbers(args)
    corpus = read_corpus(args.tokens)
    specs = specs_of(args, corpus)
    for spec in specs.values():
        check_text(corpus, Plan.of(spec))
    for name in args.architectures:
        build = functools.partial(LM, named_architecture(name), SIZES[args.size], vocab=corpus.vocab)
        check_memory(f"{name} of size {args.size}", build, TRAINING, f"--size takes {', '.join(SIZES)}")
    return work(
        __file__, args.out, specs, args.tokens, jobs=args.jobs, minutes=args.minutes, kept=args.kept, kind=Line
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(exit_code(main))
