"""Train a GPT, or a model of models/fog.py, in BF16 and in FP8, from one seed on the same batches, and compare the two.

    python examples/train.py                         # a tiny one on a CPU, a minute; 124M parameters on a GPU
    python examples/train.py --size 355M --data corpus.txt.xz --tokenizer gpt2/ --steps 3000 --out runs/355M
    python examples/train.py --model fog-max --size 100M --attention fp8 --out runs/fog    # attention in FP8 too

The FP8 arm differs by one line, ``fp8.convert(model, recipe, tokens=tokens)`` in gpt/arm.py. Without --data the text is
the source of the running Python's standard library, and a token is a byte. In a text file, a line holding only
<|endoftext|> ends a document. OUT receives, for each arm, ARM.jsonl (the log) and ARM.ckpt (--resume goes on from
there, also after a kill), and at the end summary.md and loss_and_scales.png.
"""

from __future__ import annotations

import argparse
import gc
import os
import shlex
import signal
import sys
from pathlib import Path
from types import FrameType

import torch
from gpt import checkpoint
from gpt.arm import Arm
from gpt.errors import UserError, in_words
from gpt.lock import locked
from gpt.plot import draw
from gpt.report import Result, make_result, table, write_summary
from gpt.settings import MODELS, Settings, device_name, find_device, fitting_micro_batch, make_recipe, sizes_of
from gpt.text import read_documents
from gpt.tokens import GPT2, Bytes, Corpus, check_splits, make_corpus
from torch_fp8.files import remove_leftovers
from torch_fp8.layers.modes import MODES

_BAD_INPUT, _INTERRUPTED = 2, 130
_OF_FP8 = ("recipe", "amax_history_len", "margin", "bias", "attention", "shared_scale")  # options of the FP8 arm alone


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", default="gpt", metavar="NAME", help=f"one of {', '.join(MODELS)} (default: gpt)")
    add("--size", metavar="NAME", help="default: tiny on a CPU; on a GPU 124M, 100M where --model is not gpt")
    add("--data", type=Path, metavar="FILE_OR_FOLDER", help="text; .xz files are read too")
    add("--tokenizer", type=Path, metavar="DIR", help="folder with GPT-2's encoder.json and vocab.bpe; default: bytes")
    add("--precision", choices=("bf16", "fp8", "both"), default="both")
    add("--recipe", choices=("delayed", "current", "constant"), help="how FP8 scales are chosen (default: delayed)")
    add("--amax-history-len", type=int, metavar="N", help="of --recipe delayed: steps whose maximum sets the scale")
    add("--margin", type=int, metavar="N", help="binades left free above the amax; of gradients alone unless delayed")
    add("--bias", type=int, metavar="N", help="of --recipe constant: the scale is 2**N")
    add("--attention", choices=MODES, help="products of the FP8 arm's attention, not of gpt's (default: 16bit)")
    add("--shared-scale", action="store_true", help="of --attention: one scale for q, k and v")
    add("--steps", type=int, metavar="N", help="optimizer steps; this and the next four default to what suits --size")
    add("--lr", type=float, metavar="X", help="peak learning rate")
    add("--context", type=int, metavar="N", help="tokens of a sequence")
    add("--batch-tokens", type=int, metavar="N", help="tokens of an optimizer step")
    add("--micro-batch", type=int, metavar="N", help="sequences of a forward and backward pass")
    add("--warm-up", type=int, metavar="N", help="steps of rising learning rate; default: a twentieth of --steps")
    add(
        "--cooldown", type=int, metavar="N", help="last steps, in which the learning rate falls as 1 - sqrt; default: "
        "a fifth of --steps; for gpt a cosine from the warm-up on",
    )  # fmt: skip
    add("--seed", type=int, default=0)
    add("--eval-every", type=int, metavar="N", help="steps; default: a tenth of --steps")
    add("--eval-batches", type=int, metavar="N", default=8, help="micro-batches of an evaluation (default: 8)")
    add("--save-every", type=int, metavar="N", help="steps; default: a quarter of --steps, 1000 at most")
    add("--time-limit", type=float, metavar="SECONDS", help="of an arm: stop there, evaluate and report")
    add("--out", type=Path, default=Path("runs/train"), metavar="DIR", help="default: runs/train")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="go on from OUT's checkpoints; an arm without one starts")
    start.add_argument("--overwrite", action="store_true", help="start anew where OUT has checkpoints")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add(
        "--num-threads",
        type=int,
        metavar="N",
        help="of the CPU; default: 1 for tiny, else all. With 1, two runs are equal to the bit",
    )
    return parser.parse_args()


def check_arms(args: argparse.Namespace) -> None:
    """UserError where an option is given that no arm of this run reads."""
    values = {name: getattr(args, name) for name in _OF_FP8}
    given = [f"--{n.replace('_', '-')}" for n, value in values.items() if value is not None and value is not False]
    if args.precision == "bf16" and given:
        raise UserError(f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} of the FP8 arm, which --precision "
                        "bf16 leaves out; give --precision fp8 or both")  # fmt: skip


def make_settings(args: argparse.Namespace) -> Settings:
    device = find_device(args.device)
    sizes, of_gpu = sizes_of(args.model), "124M" if args.model == "gpt" else "100M"
    name = args.size or (of_gpu if device.type == "cuda" else "tiny")
    if name not in sizes:
        raise UserError(f"--size of --model {args.model} must be one of {', '.join(sizes)}, got {name!r}")
    size = sizes[name]
    recipe = make_recipe(
        args.recipe or "delayed", amax_history_len=args.amax_history_len, margin=args.margin, bias=args.bias
    )

    given = {option: value for option, value in vars(args).items() if value is not None}
    context = given.get("context", size.context)
    batch_tokens = given.get("batch_tokens", size.batch_tokens)
    steps = given.get("steps", size.steps)
    warm_up = given.get("warm_up", max(1, steps // 20))
    return Settings(
        size=name,
        context=context,
        batch_tokens=batch_tokens,
        micro_batch=given.get("micro_batch", fitting_micro_batch(size, batch_tokens, context)),
        steps=steps,
        lr=given.get("lr", size.lr),
        warm_up=warm_up,
        seed=args.seed,
        recipe=recipe,
        eval_every=given.get("eval_every", max(1, steps // 10)),
        eval_batches=args.eval_batches,
        save_every=given.get("save_every", min(max(1, steps // 4), 1000)),
        time_limit=args.time_limit,
        device=device,
        num_threads=given.get("num_threads", size.num_threads or torch.get_num_threads()),
        out=args.out,
        model=args.model,
        cooldown=given.get("cooldown", None if args.model == "gpt" else max(0, min(steps // 5, steps - warm_up))),
        attention=args.attention or "16bit",
        shared_scale=args.shared_scale,
    )


def load_corpus(args: argparse.Namespace, context: int) -> Corpus:
    codec = GPT2(args.tokenizer) if args.tokenizer else Bytes()  # first: cheaper to find wrong than the text
    documents, source = read_documents(args.data)
    corpus = make_corpus(documents, source, codec)
    check_splits(corpus, context + 1, "give more text or a smaller --context")
    return corpus


def prepare_out(settings: Settings, corpus: Corpus, arms: list[str], *, resume: bool, overwrite: bool) -> None:
    """Leave OUT ready for the arms; nothing is touched before everything is known to fit."""
    out = settings.out
    results = [out / "summary.md", out / "loss_and_scales.png"]
    saved = [out / f"{arm}.ckpt" for arm in ("bf16", "fp8")]
    logs = [path.with_suffix(".jsonl") for path in saved]
    if resume:
        for arm in arms:
            checkpoint.load(out / f"{arm}.ckpt", settings.identity(arm, corpus.fingerprint))
    elif overwrite:
        for path in [*saved, *logs, *results]:
            path.unlink(missing_ok=True)
    elif there := [path for path in [*saved, *results] if path.exists()]:
        raise UserError(f"{there[0]} is of an earlier run; go on with it (--resume), replace it (--overwrite), or give "
                        "another --out")  # fmt: skip
    for path in [*saved, *logs, *results]:
        remove_leftovers(path)  # of runs that were killed; this one has the folder to itself


class Interruption:
    """Ctrl-C asks for an end after the step; a second one ends at once."""

    asked = False

    def listen(self) -> None:
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Not print: the signal may have come in the middle of one.
        os.write(sys.stderr.fileno(), b"\nending after this step; Ctrl-C again ends at once, without saving\n")


def run(args: argparse.Namespace) -> int:
    check_arms(args)
    settings = make_settings(args)
    torch.set_num_threads(settings.num_threads)
    arms = ["bf16", "fp8"] if args.precision == "both" else [args.precision]
    corpus = load_corpus(args, settings.context)
    with locked(settings.out):
        return train(args, settings, corpus, arms)


def train(args: argparse.Namespace, settings: Settings, corpus: Corpus, arms: list[str]) -> int:
    prepare_out(settings, corpus, arms, resume=args.resume, overwrite=args.overwrite)
    print(f"data: {corpus}", flush=True)

    interruption = Interruption()
    interruption.listen()
    results: list[Result] = []
    for name in arms:
        arm = Arm(name, settings, corpus)
        arm.train(lambda: interruption.asked)
        if interruption.asked:
            print(f"interrupted; {arm.path} holds step {arm.progress.step}. To go on: {command('--resume')}")
            return _INTERRUPTED
        results.append(make_result(arm))
        del arm
        gc.collect()  # the layers' cycles would keep the memory of this arm through the next one
        torch.cuda.empty_cache()

    device = device_name(settings.device)
    model = "GPT" if settings.model == "gpt" else settings.model
    title = f"{model} {settings.size} in {' and '.join(name.upper() for name in arms)}, on {device}"
    print(f"{title}:\n{table(results)}")
    draw(settings.out / "loss_and_scales.png", results, title)
    write_summary(
        settings.out / "summary.md",
        results,
        title=title,
        device=device,
        command=command(),
        data=str(corpus),
        recipe=settings.recipe,
    )
    print(f"written: {settings.out}/summary.md and loss_and_scales.png")
    return 0


def command(*extra: str) -> str:
    """The command line that goes on from here, or with nothing extra the present one."""
    dropped = {"--resume", "--overwrite"} if extra else set()
    return shlex.join(["python", *(word for word in sys.argv if word not in dropped), *extra])


def main() -> int:
    args = parse_arguments()
    try:
        return run(args)
    except UserError as error:
        complaint = str(error)
    except OSError as error:
        complaint = in_words(error, args.out)
    except torch.OutOfMemoryError:
        complaint = "the GPU's memory does not suffice; give a smaller --micro-batch"
    except KeyboardInterrupt:
        print("interrupted; nothing was saved since the last checkpoint", file=sys.stderr)
        return _INTERRUPTED
    print(f"{Path(__file__).name}: {complaint}", file=sys.stderr)
    return _BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
