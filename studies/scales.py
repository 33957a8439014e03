"""FP8 with one scale a tensor, by the policies of arXiv 2309.17224, in GPT and Llama models of any size.

    python studies/scales.py tokens --data FILE --tokenizer DIR --tokens TOKENS    # once: the text as token ids
    python studies/scales.py parity --tokens TOKENS --out DIR    # FP8 beside BF16, with paired seeds
    python studies/scales.py window --tokens TOKENS --out DIR    # which constants CSCALE works with, by model size
    python studies/scales.py report --runs DIR [DIR ...]    # docs/scales.md and its pictures, from all runs so far

parity and window each write a folder of runs, print what is still missing, and go on where they were interrupted when
they are called again with the same arguments. Several runs share a GPU (--jobs), and all GPUs of the machine are used.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch_fp8 as fp8
from lib.biases import Biases
from lib.corpus import make_tokens, read_corpus, save_corpus
from lib.emulation import by_amax, by_constant, by_histogram, emulated
from lib.figures import draw
from lib.page import page
from lib.policies import E4M3, GRAPHCORE_E4M3
from lib.pool import BAD_INPUT, serve, work
from lib.results import condensed, merged, sizes_of
from lib.runs import Run, Spec, all_runs, claim
from lib.training import Plan, Training, check_text, validate
from torch import nn
from torch_fp8.files import replacing

from examples.gpt.errors import UserError
from examples.gpt.tokens import Corpus
from models.names import named

ROOT = Path(__file__).parents[1]

# The paper's constant c is one for all tensors, and gradients have a margin of 3 besides. On this hardware's E4M3,
# whose exponent bias is lower by one, that is c + 1 for inputs and weights; E5M2 is the same: c - 3.
_GRAD_MARGIN = 3
_LOSS_SCALE = 2.0**16  # with constants: BF16's gradients are far below what a constant that suits weights can hold


def constant(c: int) -> Spec:
    """FP8-CSCALE with the paper's constant c."""
    recipe = {"kind": "ConstantScaling", "bias": c + 1, "grad_margin": _GRAD_MARGIN + 1}
    return {"recipe": recipe, "loss_scale": _LOSS_SCALE}


ARMS: dict[str, Spec] = {
    "bf16": {},
    "bf16-again": {},  # the same seed twice: what the GPU's order of sums alone does
    "fp16": {"dtype": "float16"},
    "delayed": {"recipe": {"kind": "DelayedScaling"}},
    "current": {"recipe": {"kind": "CurrentScaling"}},
    "amax": {"recipe": {"kind": "CurrentScaling", "power_of_two": True, "grad_margin": _GRAD_MARGIN}},
    "e4m3": {"recipe": {"kind": "DelayedScaling", "fp8_format": "E4M3"}},
    "wgrad16": {"recipe": {"kind": "DelayedScaling", "fp8_gemms": ["fprop", "dgrad"]}},
    "dgrad16": {"recipe": {"kind": "DelayedScaling", "fp8_gemms": ["fprop", "wgrad"]}},
    "fprop16": {"recipe": {"kind": "DelayedScaling", "fp8_gemms": ["dgrad", "wgrad"]}},
    "recent": {"recipe": {"kind": "DelayedScaling", "amax_compute_algo": "most_recent"}},
    "history16": {"recipe": {"kind": "DelayedScaling", "amax_history_len": 16}},
    "margin1": {"recipe": {"kind": "DelayedScaling", "margin": 1}},
    "exact-sums": {"recipe": {"kind": "DelayedScaling", "fast_accum": []}},
}


def arm(name: str) -> Spec:
    """What an arm changes of a training; ``cscale:C`` has the constant C."""
    if name in ARMS:
        return ARMS[name]
    kind, _, value = name.partition(":")
    if kind == "cscale" and value.lstrip("-").isdigit() and -16 <= int(value) <= 16:
        return constant(int(value))
    raise UserError(f"--arms takes {', '.join(ARMS)} and cscale:C with C from -16 to 16, got {name!r}")


# ---- the runs --------------------------------------------------------------------------------------------------------


def training_spec(args: argparse.Namespace, corpus: Corpus, model: str, seed: int) -> Spec:
    """All that decides a training in 16 bits."""
    try:
        size = named(model)
    except ValueError as error:
        raise UserError(f"--models: {error}") from error
    tokens = args.batch * args.context
    steps = max(1, round(args.train_tokens / max(1, tokens))) if args.steps is None else args.steps
    width = getattr(size.shape, "n_embd", None) or size.shape.hidden
    return {
        "model": model,
        "seed": seed,
        "steps": steps,
        "batch": args.batch,
        "micro_batch": min(args.micro_batch, args.batch),
        "context": args.context,
        "lr": min(3e-3, 0.46 / width) if args.lr is None else args.lr,  # 6e-4 for GPT-2's width of 768
        "warm_up": steps // 20,
        "cooldown": steps // 5,
        "schedule": "wsd",
        "validated": args.val_tokens,
        "dtype": "bfloat16",
        "loss_scale": 1.0,
        "data": corpus.fingerprint,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def parity_specs(args: argparse.Namespace, corpus: Corpus) -> dict[str, Spec]:
    specs = {}
    for seed in range(args.seeds):  # whole pairs first: an interrupted study can already be read
        for model in args.models:
            for name in args.arms:
                spec = training_spec(args, corpus, model, seed) | arm(name)
                record = args.record if seed == 0 else 0
                specs[_folder(model, name, seed)] = {"study": "parity", "arm": name, "record": record, **spec}
    return specs


def window_specs(args: argparse.Namespace, corpus: Corpus) -> dict[str, Spec]:
    constants = list(range(args.constants[0], args.constants[1] + 1))
    if not constants:
        raise UserError(f"the sweep is empty: --constants must rise, got {args.constants[0]} and {args.constants[1]}")
    specs = {}
    for seed in range(args.seeds):
        for model in args.models:
            spec = training_spec(args, corpus, model, seed)
            more = {"study": "window", "arm": "bf16", "record": args.record, "sweep": constants}
            specs[_folder(model, "bf16", seed)] = more | {"sweep_tokens": args.sweep_tokens, **spec}
    return specs


def _folder(model: str, arm: str, seed: int) -> str:
    return f"{model}_{arm.replace(':', '')}_{seed}"


# ---- one run ---------------------------------------------------------------------------------------------------------


def make_recipe(recipe: Spec) -> fp8.Recipe:
    return getattr(fp8, recipe["kind"])(**{name: value for name, value in recipe.items() if name != "kind"})


def make_model(spec: Spec, corpus: Corpus, device: torch.device) -> nn.Module:
    """Random weights of the run's seed, with every linear layer but the head in FP8 where the arm has a recipe."""
    with device:
        model = named(spec["model"]).build(corpus.vocab, spec["context"])
    return fp8.convert(model, make_recipe(spec["recipe"]), tokens=None) if "recipe" in spec else model


def inner_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that FP8 takes: all but the head."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    return {name: layer for name, layer in layers.items() if name != "head"}


def perform(run: Run, corpus: Corpus, device: torch.device, stop: Callable[[], bool]) -> bool:
    spec = run.spec
    model = make_model(spec, corpus, device)
    observer = Biases(inner_layers(model), spec["record"], spec["loss_scale"]) if spec["record"] else None
    training = Training(run, model, corpus, device, observer)
    finish = (lambda: sweep(model, spec, corpus, device)) if spec.get("sweep") else None
    return training.go_on(stop, finish)


def sweep(model: nn.Module, spec: Spec, corpus: Corpus, device: torch.device) -> dict[str, Any]:
    """Inference under every policy on the same tokens: loss and accuracy by the policy's name, and every tensor's bias
    over one micro-batch. Names with ``gc-`` have Graphcore's formats; they and histograms are emulated."""
    plan = Plan.of({**spec, "validated": spec["sweep_tokens"]})
    layers = inner_layers(model)
    found = {"bf16": validate(model, corpus, plan, device)}
    biases = Biases(layers)
    with biases.watch():
        validate(model, corpus, Plan.of({**spec, "validated": spec["micro_batch"] * spec["context"]}), device)
    recipes = {name: ARMS[name]["recipe"] for name in ("current", "amax")}
    recipes |= {f"cscale:{c}": constant(c)["recipe"] for c in spec["sweep"]}
    for name, recipe in recipes.items():
        fp8.convert(model, make_recipe(recipe), tokens=None)
        found[name] = validate(model, corpus, plan, device)
        fp8.revert(model)
    rules = {"histogram": (by_histogram, E4M3), "gc-amax": (by_amax, GRAPHCORE_E4M3)}
    rules["gc-histogram"] = by_histogram, GRAPHCORE_E4M3
    rules |= {f"gc-cscale:{c}": (by_constant(c), GRAPHCORE_E4M3) for c in spec["sweep"] if c % 4 == 0}
    for name, (rule, to) in rules.items():
        with emulated(layers, rule, to):
            found[name] = validate(model, corpus, plan, device)
    return {"inference": found, **biases.seen()}


# ---- the report ------------------------------------------------------------------------------------------------------


def report(runs: Sequence[Path], data: Path, to: Path) -> None:
    """Add what these folders of runs have to ``data``/runs.jsonl, draw its pictures beside it and write the page."""
    new = []
    for folder in runs:
        found = all_runs(folder)
        if not found:
            raise UserError(f"--runs must be folders of runs, {folder} has none")
        new += [condensed(run) for run in found]
    lines = merged(data / "runs.jsonl", new)
    sizes = sizes_of(lines)
    pictures = draw(data, lines, sizes)
    to.parent.mkdir(parents=True, exist_ok=True)
    with replacing(to) as temporary:
        temporary.write_text(page(lines, pictures, sizes, os.path.relpath(data, to.parent)), encoding="utf-8")
    print(f"{to}: {sum(line.result is not None for line in lines)} of {len(lines)} runs, {len(pictures)} pictures")


# ---- the command line ------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)

    add = commands.add_parser("tokens", allow_abbrev=False, help="tokenise a text, once").add_argument
    add("--data", type=Path, metavar="FILE_OR_FOLDER", help="default: the source of Python's standard library")
    add("--tokenizer", type=Path, metavar="DIR", help="folder with GPT-2's encoder.json and vocab.bpe; default: bytes")
    add("--tokens", type=Path, required=True, metavar="FILE", help="to write; .xz compresses it")
    add("--val-share", type=float, default=0.19, metavar="X", help="of the documents, for validation (default: 0.19)")

    parity = commands.add_parser("parity", allow_abbrev=False, help="FP8 beside BF16, with paired seeds")
    _add_training(parity, seeds=5, models=["gpt-124M", "llama-127M"], train_tokens=100e6, record=0)
    parity.add_argument(
        "--arms",
        nargs="+",
        default=["bf16", "bf16-again", "delayed", "current", "amax", "cscale:2", "e4m3", "wgrad16"],
        metavar="ARM",
        help=f"{', '.join(ARMS)}, cscale:C",
    )

    window = commands.add_parser("window", allow_abbrev=False, help="which constants CSCALE works with")
    sizes = ["gpt-31M", "gpt-73M", "cerebras-gpt-111M", "cerebras-gpt-256M"]
    _add_training(window, seeds=1, models=sizes, train_tokens=20e6, record=100)
    window.add_argument("--constants", type=int, nargs=2, default=(-16, 16), metavar=("LOW", "HIGH"))
    window.add_argument("--sweep-tokens", type=int, default=1 << 19, metavar="N", help="of inference under each policy")

    add = commands.add_parser("report", allow_abbrev=False, help="write docs/scales.md and its pictures").add_argument
    add("--runs", type=Path, nargs="+", default=[], metavar="DIR", help="folders of runs; default: none that are new")
    add(
        "--data", type=Path, default=ROOT / "studies" / "results" / "scales", metavar="DIR", help="what is kept of them"
    )
    add("--page", type=Path, default=ROOT / "docs" / "scales.md", metavar="FILE")
    return parser.parse_args()


def _add_training(
    parser: argparse.ArgumentParser, *, seeds: int, models: list[str], train_tokens: float, record: int
) -> None:
    add = parser.add_argument
    add("--tokens", type=Path, required=True, metavar="FILE", help="what the command `tokens` wrote")
    add("--out", type=Path, required=True, metavar="DIR", help="a folder of runs; what is done there is not repeated")
    add("--models", nargs="+", default=models, metavar="NAME", help=f"default: {' '.join(models)}")
    add("--seeds", type=int, default=seeds, metavar="N")
    add("--train-tokens", type=float, default=train_tokens, metavar="N", help="of each training; or --steps")
    add("--steps", type=int, metavar="N")
    add("--batch", type=int, default=64, metavar="N", help="sequences of an optimizer step (default: 64)")
    add("--micro-batch", type=int, default=16, metavar="N", help="sequences of a pass (default: 16)")
    add("--context", type=int, default=1024, metavar="N", help="tokens of a sequence (default: 1024)")
    add("--lr", type=float, metavar="X", help="peak learning rate; default: by the model's width")
    add("--val-tokens", type=int, default=1 << 22, metavar="N", help="of validation at the end (default: 4,194,304)")
    add("--record", type=int, default=record, metavar="N", help="record the biases of each so many steps; 0: never")
    add("--jobs", type=int, default=1, metavar="N", help="runs beside one another on each GPU")
    add("--minutes", type=float, metavar="N", help="stop, and save what is on its way, after so many")


def main() -> int:
    if sys.argv[1:2] == ["run"]:
        return serve(sys.argv[2:], perform)
    args = parse_arguments()
    if args.command == "tokens":
        if not 0 < args.val_share < 1:
            raise UserError(f"--val-share must be between 0 and 1, got {args.val_share}")
        corpus = make_tokens(args.data, args.tokenizer, args.val_share)
        save_corpus(args.tokens, corpus)
        print(f"{args.tokens}: {corpus}")
        return 0
    if args.command == "report":
        report(args.runs, args.data, args.page)
        return 0
    corpus = read_corpus(args.tokens)
    specs = {"parity": parity_specs, "window": window_specs}[args.command](args, corpus)
    for spec in specs.values():
        check_text(corpus, Plan.of(spec))
    runs: Sequence[Run] = claim(args.out, specs)
    return work(__file__, args.out, runs, args.tokens, jobs=args.jobs, minutes=args.minutes)


def _complain(words: str) -> int:
    print(f"{Path(__file__).name}: {words}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    try:
        code = main()
    except UserError as error:
        code = _complain(str(error))
    except OSError as error:
        code = _complain(f"could not read or write {error.filename}: {error.strerror}")
    except torch.OutOfMemoryError:
        code = _complain("the GPU's memory does not suffice; give a smaller --micro-batch, or fewer --jobs")
    sys.exit(code)
