"""FP8 with one scale a tensor, by the policies of arXiv 2309.17224, in GPT and Llama models of any size.

    python studies/scales.py tokens --data FILE --tokenizer DIR --tokens TOKENS    # once: the text as token ids
    python studies/scales.py parity --tokens TOKENS --out DIR    # FP8 beside BF16, with paired seeds
    python studies/scales.py window --tokens TOKENS --out DIR    # which constants CSCALE works with, by model size
    python studies/scales.py infer --checkpoint PATH --tokens TOKENS --out DIR    # the same, of a model that is there
    python studies/scales.py finetune --checkpoint PATH --tokens TOKENS --out DIR    # FP8 beside BF16 and FP16
    python studies/scales.py models    # every model by name: what FP8 saves of its memory, and how many FLOPs it takes
    python studies/scales.py report --runs DIR [DIR ...]    # docs/scales.md and its pictures, from all runs so far

parity, window, infer and finetune write a folder of runs, print what is still missing, and go on where they were
interrupted when they are called again with the same arguments; what a runs.jsonl has of them is left out (--kept).
Several runs share a GPU (--jobs), and all GPUs of the machine are used. Each command has an --out of its own.

The defaults are for GPUs. On a CPU, in a few minutes, on the source of Python's standard library:

    python studies/scales.py tokens --tokens text.tokens
    python studies/scales.py window --tokens text.tokens --out window --models gpt-tiny --steps 200 --batch 16 \\
        --context 128 --val-tokens 16384 --sweep-tokens 300000 --constants -8 10
    python studies/scales.py report --runs window --data data --page window.md
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import lib  # noqa: F401 (first, so that Ctrl-C is told in a line while the others are imported)
import torch
from lib.arms import ARMS, DEFAULT_ARMS, arm, inner_layers, make_model, words
from lib.biases import Biases
from lib.bounds import check_bounds
from lib.checkpoints import DITHER, Checkpoint
from lib.corpus import make_tokens, read_corpus, save_corpus, text_of
from lib.costs import costs_table
from lib.inference import check_constant, check_sweep, infer, policies, sweep
from lib.lines import new_lines
from lib.memory import INFERENCE, TRAINING, check_memory
from lib.pool import exit_code, serve, work
from lib.runs import Run, Spec, all_runs
from lib.scales_figures import draw
from lib.scales_page import page
from lib.scales_results import Line, condensed, merged, sizes_of, told_apart
from lib.texts import read_texts
from lib.training import Plan, Training, check_text, in_whole_contexts
from torch_fp8.files import replacing

from examples.gpt.errors import UserError
from examples.gpt.tokens import GPT2, Bytes, Codec, Corpus
from models.names import as_written, named

ROOT = Path(__file__).parents[1]

# ---- the runs --------------------------------------------------------------------------------------------------------


def training_spec(args: argparse.Namespace, corpus: Corpus, model: str, seed: int, lr: float) -> Spec:
    """All that decides a training in 16 bits."""
    tokens = args.batch * args.context
    steps = max(1, round(args.train_tokens / max(1, tokens))) if args.steps is None else args.steps
    return {
        "model": model,
        "seed": seed,
        "steps": steps,
        "batch": args.batch,
        "micro_batch": min(args.micro_batch, args.batch),
        "context": args.context,
        "lr": lr,
        "warm_up": steps // 20,
        "cooldown": steps // 5,
        "schedule": "wsd",
        "validated": in_whole_contexts(args.val_tokens, args.context),
        "dtype": "bfloat16",
        "loss_scale": 1.0,
        **text_of(corpus),
        "device": _device(),
    }


def learning_rate(args: argparse.Namespace, model: str) -> float:
    """Of a training from scratch: by default by the model's width, 6e-4 for GPT-2's 768."""
    shape = named(model).shape
    width = getattr(shape, "n_embd", None) or shape.hidden
    return min(3e-3, 0.46 / width) if args.lr is None else args.lr


def parity_specs(args: argparse.Namespace, corpus: Corpus) -> dict[str, Spec]:
    specs = {}
    for seed in range(args.seeds):  # whole pairs first: an interrupted study can already be read
        for model in args.models:
            for name in args.arms:
                spec = training_spec(args, corpus, model, seed, learning_rate(args, model)) | arm(name)
                record = args.record if seed == 0 else 0
                specs[_folder(model, name, seed)] = {"study": "parity", "arm": name, "record": record, **spec}
    return specs


def window_specs(args: argparse.Namespace, corpus: Corpus) -> dict[str, Spec]:
    constants = _constants(args)
    specs = {}
    for seed in range(args.seeds):
        for model in args.models:
            spec = training_spec(args, corpus, model, seed, learning_rate(args, model))
            more = {"study": "window", "arm": "bf16", "record": args.record, "sweep": constants}
            specs[_folder(model, "bf16", seed)] = more | {
                "sweep_tokens": in_whole_contexts(args.sweep_tokens, args.context),
                **spec,
            }
    return specs


def infer_specs(args: argparse.Namespace, corpus: Corpus) -> dict[str, Spec]:
    constants = _constants(args)
    given = _checkpoint(args.checkpoint, corpus) if args.checkpoint else None
    models = [given.name] if given else args.models
    tokens = in_whole_contexts(args.sweep_tokens, args.context)
    every = {
        "study": "infer",
        "checkpoint": given and given.digest,
        "arm": "bf16",
        "seed": 0,
        "steps": len(policies(constants)),
        "batch": args.micro_batch,
        "micro_batch": args.micro_batch,
        "context": args.context,
        **{"lr": 0.0, "warm_up": 0, "cooldown": 0},
        "validated": tokens,
        "sweep": constants,
        "sweep_tokens": tokens,
        **text_of(corpus),
        "device": _device(),
    }
    return {f"{model}_infer": {"model": model, **every} for model in models}


def finetune_specs(args: argparse.Namespace, corpus: Corpus) -> dict[str, Spec]:
    checkpoint = _checkpoint(args.checkpoint, corpus)
    specs = {}
    for seed in range(args.seeds):
        for name in args.arms:
            spec = training_spec(args, corpus, checkpoint.name, seed, args.lr) | arm(name)
            more = {"study": "finetune", "mode": "train", "checkpoint": checkpoint.digest, "dither": DITHER}
            more |= {"arm": name, "record": 0 if seed else args.record}
            specs[_folder(checkpoint.name, name, seed)] = more | spec
    return specs


SPECS = {"parity": parity_specs, "window": window_specs, "infer": infer_specs, "finetune": finetune_specs}


def _checkpoint(path: Path, corpus: Corpus) -> Checkpoint:
    """Looked at once for all runs, before any begins: a tokenizer takes seconds to read."""
    checkpoint = Checkpoint(path)
    checkpoint.check_bits()
    checkpoint.check_tokens(corpus.vocab)
    return checkpoint


def _known(model: str) -> str:
    """Its name as specs have it."""
    try:
        return as_written(model)
    except ValueError as error:
        raise UserError(f"--models: {error}") from error


def _constants(args: argparse.Namespace) -> list[int]:
    low, high = args.constants
    if low > high:
        raise UserError(f"the sweep is empty: --constants must rise, got {low} and {high}")
    for c in (low, high):
        check_constant(c)
    return list(range(low, high + 1))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _folder(model: str, arm: str, seed: int) -> str:
    return f"{model}_{arm.replace(':', '')}_{seed}"


# ---- one run ---------------------------------------------------------------------------------------------------------


def perform(
    run: Run, corpus: Corpus, device: torch.device, stop: Callable[[], bool], checkpoint: Path | None = None
) -> bool:
    spec = run.spec
    given = Checkpoint(checkpoint) if checkpoint else None
    if spec["study"] == "infer":
        return infer(run, make_model(spec, corpus, device, given, torch.bfloat16), corpus, device, stop)
    model = make_model(spec, corpus, device, given)
    observer = Biases(inner_layers(model), spec["record"], spec["loss_scale"]) if spec["record"] else None
    training = Training(run, model, corpus, device, observer)
    if not spec.get("sweep"):
        return training.go_on(stop)
    return training.go_on(stop, lambda: sweep(run, training.journal, model, corpus, device, stop, spec["steps"]))


# ---- the report ------------------------------------------------------------------------------------------------------


def report(runs: Sequence[Path], data: Path, to: Path) -> None:
    """Add what these folders of runs have to ``data``/runs.jsonl, draw its pictures beside it and write the page."""
    texts = read_texts(data / "texts.json")
    if to.is_dir():
        raise UserError(f"--page must be a file, {to} is a folder")
    new = []
    for folder in runs:
        found = [run for run in all_runs(folder) if run.spec.get("study") in SPECS and "model" in run.spec]
        if not found:
            raise UserError(f"--runs must be folders of runs of this study, {folder} has none")
        new += new_lines(found, condensed)
    lines = told_apart(merged(data / "runs.jsonl", new))
    sizes = sizes_of(lines)
    pictures = draw(data, lines, sizes)
    to.parent.mkdir(parents=True, exist_ok=True)
    with replacing(to) as temporary:
        temporary.write_text(page(lines, pictures, sizes, os.path.relpath(data, to.parent), texts), encoding="utf-8")
    print(f"{to}: {sum(line.result is not None for line in lines)} of {len(lines)} runs, {len(pictures)} pictures")


# ---- the command line ------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)

    add = commands.add_parser("tokens", allow_abbrev=False, help="tokenise a text, once").add_argument
    add("--data", type=Path, metavar="FILE_OR_FOLDER", help="default: the source of Python's standard library")
    which = commands.choices["tokens"].add_mutually_exclusive_group()
    words = "folder with GPT-2's encoder.json and vocab.bpe; default: bytes"
    which.add_argument("--tokenizer", type=Path, metavar="DIR", help=words)
    which.add_argument("--checkpoint", type=Path, metavar="PATH", help="a model whose tokens they are to be")
    add("--tokens", type=Path, required=True, metavar="FILE", help="to write; .xz compresses it")
    add("--val-share", type=float, default=0.19, metavar="X", help="of the documents, for validation (default: 0.19)")

    parity = commands.add_parser("parity", allow_abbrev=False, help="FP8 beside BF16, with paired seeds")
    _add_training(parity, seeds=5, train_tokens=100e6, record=0)
    _add_models(parity, ["gpt-124M", "llama-127M"])
    _add_arms(parity, DEFAULT_ARMS["parity"])

    window = commands.add_parser("window", allow_abbrev=False, help="which constants CSCALE works with")
    _add_training(window, seeds=1, train_tokens=20e6, record=100)
    _add_models(window, ["gpt-31M", "gpt-73M", "cerebras-gpt-111M", "cerebras-gpt-256M"])
    _add_sweep(window)

    infer = commands.add_parser("infer", allow_abbrev=False, help="a checkpoint, or random weights, under every policy")
    _add_runs(infer)
    which = infer.add_mutually_exclusive_group(required=True)
    which.add_argument("--checkpoint", type=Path, metavar="PATH", help="a .gguf file, or a folder of transformers'")
    which.add_argument("--models", nargs="+", metavar="NAME", help="with random weights")
    _add_sweep(infer)

    finetune = commands.add_parser("finetune", allow_abbrev=False, help="a checkpoint, beside BF16 and FP16")
    _add_training(finetune, seeds=3, train_tokens=4e6, record=20, batch=16, lr=1e-4, val_tokens=1 << 20)
    finetune.add_argument("--checkpoint", type=Path, required=True, metavar="PATH", help="a .gguf file, or a folder")
    _add_arms(finetune, DEFAULT_ARMS["finetune"])

    commands.add_parser("models", allow_abbrev=False, help="what FP8 saves in every model by name")

    add = commands.add_parser("report", allow_abbrev=False, help="write docs/scales.md and its pictures").add_argument
    add("--runs", type=Path, nargs="+", default=[], metavar="DIR", help="folders of runs; default: none that are new")
    add(
        "--data", type=Path, default=ROOT / "studies" / "results" / "scales", metavar="DIR", help="what is kept of them"
    )
    add("--page", type=Path, default=ROOT / "docs" / "scales.md", metavar="FILE")
    return parser.parse_args()


def _add_runs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tokens", type=Path, required=True, metavar="FILE", help="what the command `tokens` wrote")
    add("--out", type=Path, required=True, metavar="DIR", help="of this command's runs; what is done is not repeated")
    add("--context", type=int, default=1024, metavar="N", help="tokens of a sequence (default: 1024)")
    add("--micro-batch", type=int, default=16, metavar="N", help="sequences of a pass (default: 16)")
    add("--jobs", type=int, default=1, metavar="N", help="runs beside one another on each GPU (default: 1)")
    add("--kept", type=Path, metavar="FILE", help="runs.jsonl of `report`: what is done there is not repeated")
    add("--minutes", type=float, metavar="N", help="stop, and save what is on its way, after so many")


def _add_training(
    parser: argparse.ArgumentParser,
    *,
    seeds: int,
    train_tokens: float,
    record: int,
    batch: int = 64,
    lr: float | None = None,
    val_tokens: int = 1 << 22,
) -> None:
    _add_runs(parser)
    add = parser.add_argument
    add("--seeds", type=int, default=seeds, metavar="N", help=f"default: {seeds}")
    length = parser.add_mutually_exclusive_group()
    words = f"of each training (default: {train_tokens:,.0f})"
    length.add_argument("--train-tokens", type=float, default=train_tokens, metavar="N", help=words)
    length.add_argument("--steps", type=int, metavar="N", help="of each training, in place of --train-tokens")
    add("--batch", type=int, default=batch, metavar="N", help=f"sequences of an optimizer step (default: {batch})")
    add("--lr", type=float, default=lr, metavar="X", help=f"peak learning rate; default: {lr or 'by the width'}")
    add("--val-tokens", type=int, default=val_tokens, metavar="N", help=f"at the end (default: {val_tokens:,})")
    words = f"record the biases of each so many steps; 0: never (default: {record})"
    add("--record", type=int, default=record, metavar="N", help=words)


def _add_models(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    words = f"default: {' '.join(default)}"
    parser.add_argument("--models", nargs="+", default=list(default), metavar="NAME", help=words)


def _add_arms(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    each = "; ".join(f"{name}: {words(spec).strip('`')}" for name, spec in ARMS.items())
    help = f"{each}; cscale:C, gc-cscale:C: a constant, the loss scaled by 2^16 (default: {' '.join(default)})"
    parser.add_argument("--arms", nargs="+", default=list(default), metavar="ARM", help=help)


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    words = "of CSCALE, c as the paper has it (default: -16 16)"
    add("--constants", type=int, nargs=2, default=(-16, 16), metavar=("LOW", "HIGH"), help=words)
    words = f"of inference under each policy (default: {1 << 19:,})"
    add("--sweep-tokens", type=int, default=1 << 19, metavar="N", help=words)


def check_numbers(args: argparse.Namespace) -> None:
    check_bounds(args, "models", "arms")
    for name in ("lr", "train_tokens"):
        value = getattr(args, name, None)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be positive and finite, got {value}")
    if args.micro_batch < 1:
        raise UserError(f"--micro-batch must be at least 1, got {args.micro_batch}")
    if getattr(args, "record", 0) < 0:
        raise UserError(f"--record must not be negative, got {args.record}")


def main() -> int:
    if sys.argv[1:2] == ["run"]:
        return serve(sys.argv[2:], perform)
    args = parse_arguments()
    if args.command == "tokens":
        if not 0 < args.val_share < 1:
            raise UserError(f"--val-share must be between 0 and 1, got {args.val_share}")
        if args.tokens.exists():
            try:
                read_corpus(args.tokens)
            except UserError as error:
                raise UserError(
                    f"--tokens would replace {args.tokens}, which is no file of tokens; name another"
                ) from error
        corpus = tokenise(args)
        save_corpus(args.tokens, corpus)
        print(f"{args.tokens}: {corpus}")
        return 0
    if args.command == "models":
        print(costs_table())
        return 0
    if args.command == "report":
        report(args.runs, args.data, args.page)
        return 0
    check_numbers(args)
    if getattr(args, "models", None):
        args.models = [_known(model) for model in args.models]
    corpus = read_corpus(args.tokens)
    specs = SPECS[args.command](args, corpus)
    if "bf16" not in getattr(args, "arms", ["bf16"]):
        raise UserError(f"--arms must have bf16, which the others are held to, got {' '.join(args.arms)}")
    for spec in specs.values():
        if "sweep" in spec:
            check_sweep(corpus, spec)
        check_text(corpus, Plan.of(spec))
    checkpoint = getattr(args, "checkpoint", None)
    each = INFERENCE if args.command == "infer" else TRAINING
    for model in [] if checkpoint else args.models:
        build = functools.partial(named(model).build, corpus.vocab, args.context)
        check_memory(model, build, each, "take a smaller one: `studies/scales.py models` says how large models are")
    return work(
        __file__,
        args.out,
        specs,
        args.tokens,
        jobs=args.jobs,
        minutes=args.minutes,
        kept=args.kept,
        kind=Line,
        checkpoint=checkpoint,
    )


def tokenise(args: argparse.Namespace) -> Corpus:
    codec: Codec = Bytes()
    of = "bytes"
    if args.checkpoint:
        checkpoint = Checkpoint(args.checkpoint)
        codec, of = checkpoint.codec(), f"tokens of {checkpoint.name}"
    elif args.tokenizer:
        codec, of = GPT2(args.tokenizer), "GPT-2 BPE"
    return make_tokens(args.data, codec, of, args.val_share)


if __name__ == "__main__":
    sys.exit(exit_code(main))
