"""Trains a small Llama of transformers for several seeds: in BF16, after fp8.convert, and after fp8.convert and
fp8.fuse; or, with --study attention, with its attention alone in FP8, in each mode. Writes results/fused_training.md or
results/attention_training.md.

Within a seed all arms begin with the same weights and see the same batches. BF16 parameters, AdamW. A token is a byte.
Every training that has ended is a line of --runs, and is not repeated by a run that goes on from there. Speed is not
measured here.

    python benchmarks/small_training.py [--study NAME] [--data FILE] [--seeds N] [--steps N] [--runs FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch_fp8 as fp8
from lib.common import options, start
from lib.report import header, table, write
from torch import nn
from torch.nn import functional as F
from torch_fp8.layers.linear import fp8_layers
from torch_fp8.progress import bar

from examples.gpt.errors import UserError
from examples.gpt.text import read_documents
from examples.gpt.tokens import Bytes, Corpus, check_splits, even_starts, make_corpus, random_starts, windows
from models.llama import SIZES, Shape

ROOT = Path(__file__).parents[1]
LAYERS = 8
CONTEXT, BATCH, LAST = 512, 32, 20  # tokens, sequences, and the steps that a training loss is the mean of
LEARNING_RATE = 1e-3

Run = dict[str, Any]


class Study(NamedTuple):
    name: str
    title: str
    arms: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]  # an arm, and what it is held against
    shape: Shape
    dry_shape: Shape
    what: str


STUDIES = {
    "fused": Study(
        "fused_training",
        "Losses of fused training",
        ("BF16", "FP8", "FP8 fused"),
        (("FP8 fused", "FP8"), ("FP8", "BF16"), ("FP8 fused", "BF16")),
        Shape(512, 1536, 8, 4),
        SIZES["tiny"][0],
        "every linear layer but the head in FP8; in the last arm fuse changed {fused}",
    ),
    "attention": Study(
        "attention_training",
        "Losses of training with FP8 attention",
        ("BF16", "fp8_forward", "fp8"),
        (("fp8_forward", "BF16"), ("fp8", "BF16")),
        Shape(512, 1536, 4, 2),
        Shape(256, 512, 2, 1),
        "QK^T and PV of every layer in FP8, in the last arm the gradient's products too; all linear layers in BF16",
    ),
}


def main() -> None:
    args = start(
        __doc__,
        data={"type": Path, "help": "text, or a folder of it; default: the source of Python's standard library"},
        study={"choices": list(STUDIES), "default": "fused"},
        seeds={"type": int, "default": 3, "metavar": "N"},
        steps={"type": int, "default": 400, "metavar": "N"},
        runs={"type": Path, "default": ROOT / "runs" / "small_training.jsonl", "metavar": "FILE"},
    )
    if args.seeds < 2:
        raise SystemExit(f"small_training.py: --seeds must be at least 2 to show a spread, got {args.seeds}")
    try:
        corpus = make_corpus(*read_documents(args.data), Bytes())
        check_splits(corpus, CONTEXT + 1, "give more text")
    except UserError as error:
        raise SystemExit(f"small_training.py: {error}") from error
    study = STUDIES[args.study]
    runs = [finished(args, study, arm, seed, corpus) for seed in range(args.seeds) for arm in study.arms]
    report(study, runs, args.seeds, corpus)


def finished(args: argparse.Namespace, study: Study, arm: str, seed: int, corpus: Corpus) -> Run:
    """That training, from the file of runs or made now."""
    device = "CPU" if options.dry else torch.cuda.get_device_name()
    what = {"arm": arm, "seed": seed, "steps": args.steps, "device": device, "data": corpus.fingerprint}
    what |= {"size": str(size(study)), "lr": LEARNING_RATE}
    for line in args.runs.read_text().splitlines() if args.runs.exists() else ():
        run = json.loads(line)
        if run.items() >= what.items():
            return run
    run = {**what, **train(study, arm, seed, args.steps, corpus)}
    args.runs.parent.mkdir(parents=True, exist_ok=True)
    with args.runs.open("a") as file:
        file.write(json.dumps(run) + "\n")
    return run


def size(study: Study) -> tuple[Shape, int, int, int]:
    """The layers' shape, their number, tokens of a sequence, sequences of a batch."""
    return (study.dry_shape, 2, 32, 2) if options.dry else (study.shape, LAYERS, CONTEXT, BATCH)


def make_model(study: Study, arm: str, vocabulary: int) -> nn.Module:
    import transformers

    shape, layers, context, _ = size(study)
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.ffn, num_hidden_layers=layers, vocab_size=vocabulary,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, max_position_embeddings=context,
        attn_implementation="sdpa", bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.device(options.device):
        model = transformers.LlamaForCausalLM(config).bfloat16()
    if study.name == "attention_training":
        return model if arm == "BF16" else fp8.fuse(model, attention=arm)
    if arm != "BF16":
        fp8.convert(model, tokens=None)  # the model is too small for FP8 to be faster, and only its losses are wanted
    return fp8.fuse(model) if arm == "FP8 fused" else model


def train(study: Study, arm: str, seed: int, steps: int, corpus: Corpus) -> Run:
    _, _, context, batch = size(study)
    device = torch.device(options.device)
    torch.manual_seed(seed)
    model = make_model(study, arm, corpus.vocab)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(10 * (step + 1) / steps, 0.55 + 0.45 * math.cos(math.pi * step / steps))
    )
    generator = torch.Generator().manual_seed(seed)

    def loss_of(tokens: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        x, y = windows(tokens, starts, context, device)
        return F.cross_entropy(model(input_ids=x, use_cache=False).logits.float().flatten(0, 1), y.flatten())

    losses = []
    for _ in bar(range(steps), desc=f"{arm}, seed {seed}"):
        loss = loss_of(corpus.train, random_starts(corpus.train, batch, context, generator))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
    model.eval()
    with torch.no_grad():
        parts = even_starts(corpus.val, 8 * batch, context).split(batch)
        validation = torch.stack([loss_of(corpus.val, part) for part in parts]).mean().item()
    fused = dict(fp8.summary(model).fused) if fp8_layers(model) else {}
    return {"parameters": sum(p.numel() for p in model.parameters()), "fused": fused,
            "train": torch.stack(losses).tolist(), "validation": validation}  # fmt: skip


def report(study: Study, runs: Sequence[Run], seeds: int, corpus: Corpus) -> None:
    validation = {arm: [run["validation"] for run in runs if run["arm"] == arm] for arm in study.arms}
    training = {arm: [statistics.mean(run["train"][-LAST:]) for run in runs if run["arm"] == arm] for arm in study.arms}
    rows = [
        [
            seed,
            *(f"{training[arm][seed]:.4f}" for arm in study.arms),
            *(f"{validation[arm][seed]:.4f}" for arm in study.arms),
        ]
        for seed in range(seeds)
    ]
    for name, of in (("mean", statistics.mean), ("standard deviation", statistics.stdev)):
        rows.append([name, *(f"{of(losses[arm]):.4f}" for losses in (training, validation) for arm in study.arms)])
    # What seeds differ by within an arm, of all arms together.
    spread = statistics.mean(statistics.variance(losses) for losses in validation.values()) ** 0.5
    lines = []
    for arm, against in study.pairs:
        apart = [a - b for a, b in zip(validation[arm], validation[against])]
        mean, error = statistics.mean(apart), statistics.stdev(apart) / seeds**0.5
        verdict = "within" if abs(mean) <= spread else "**beyond**"
        lines.append(f"* {arm} against {against}: {mean:+.4f} ± {error:.4f} (standard error of the mean), {verdict} it")
    fused = {", ".join(f"{n} {kind}" for kind, n in run["fused"].items()) for run in runs if run["fused"]}
    shape, layers, context, batch = size(study)
    note = f"""{__doc__.split(chr(10) * 2)[1]}

* model: transformers' Llama with {runs[0]["parameters"] / 1e6:.1f}M parameters: {layers} layers, {shape}
* {runs[0]["steps"]} steps of {batch} × {context} tokens: {corpus}
* `DelayedScaling()`, {study.what.format(fused="".join(fused))}

Losses are in nats a byte: in training the mean of the last {LAST} steps, the validation loss at the end, of
each arm as it trains.
"""
    result = f"""The seeds' spread is the standard deviation of validation losses between seeds, of all arms together: {spread:.4f}.

{chr(10).join(lines)}
"""  # noqa: E501
    head = ["seed", *(f"{arm}, {kind}" for kind in ("training", "validation") for arm in study.arms)]
    write(study.name, header(study.title, timed=False), note, table(head, rows), result)


if __name__ == "__main__":
    main()
