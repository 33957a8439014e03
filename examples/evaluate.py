"""What FP8 inference does to a model's predictions: every FP8 arm against BF16, on the same windows of held-out text.

    python examples/evaluate.py --calibration valid.txt --text test.txt docs.txt              # SmolLM2-135M
    python examples/evaluate.py --model DIR --calibration valid.txt --text test.txt --tokens 100000

Beside each FP8 arm runs its emulated twin: the same FP8 codes and scales, multiplied in float32. What the twin differs
from BF16 by is the format's doing, what the arm differs from its twin by is the kernel's. The rule: an arm's mean KLD
is at most 1.1 times its twin's; the exit status is 1 where one breaks it. BF16 runs against itself too, with two
sequences a batch instead of one: a difference below that noise floor is no finding.

The output head stays as it is, and its product is taken in float32 in every arm: logits rounded to BF16 (steps of 1/8
above 16) would drown what is measured. OUT receives report.md and report.png, anew after each text.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch_fp8 as fp8
from gpt.errors import UserError
from gpt.settings import device_name, find_device
from llm import sources, text
from llm.arms import ARMS, build, emulated, full
from llm.text import CONTEXT, Text
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fp8.files import replacing
from torch_fp8.format import BLOCK
from torch_fp8.layers.frozen import frozen_layers
from torch_fp8.observe.evaluation import Flips, Pairs, Report, compare, layer_sqnr
from torch_fp8.picture import BF16 as GREY
from torch_fp8.picture import FP8, INK, caption, picture
from torch_fp8.table import markdown, read_markdown

ALLOWANCE = 1.1  # times the twin's mean KLD
CALIBRATION_TOKENS = 16_384
ITEMS_AT_ONCE = 8  # multiple-choice items: 32 sequences
BASELINE, NOISE, FULL = "BF16", "BF16, batch of 2 (noise floor)", "FP32"
TWIN = ", twin"

Logits = Callable[[Tensor], Tensor]  # ids (batch, tokens) -> (batch, tokens, vocabulary) float32


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    sources.add_arguments(parser)
    add = parser.add_argument
    add("--text", type=Path, nargs="+", required=True, metavar="FILE", help="held-out text; .xz files are read too")
    add("--calibration", type=Path, metavar="FILE", help="other text, for the static scales; without it no static arm")
    add("--calibration-tokens", type=int, metavar="N", help=f"of it (default: {CALIBRATION_TOKENS})")
    add("--tokens", type=int, default=50_000, metavar="N", help="of each text (default: 50000)")
    add("--window", type=int, default=1024, metavar="N", help="tokens of a window (default: 1024)")
    add("--items", type=int, default=200, metavar="N", help="multiple-choice items of each text (default: 200)")
    add("--out", type=Path, default=Path("runs/evaluate"), metavar="DIR", help="default: runs/evaluate")
    return parser.parse_args()


def logits_of(model: nn.Module, head: Tensor) -> Logits:
    decoder = model.get_decoder()
    return lambda ids: F.linear(decoder(input_ids=ids, use_cache=False).last_hidden_state.float(), head)


def measure(arms: dict[str, Logits], held_out: Text, device: torch.device) -> dict[str, Report]:
    """Every arm against BF16; one window at a time, for a window's logits are large."""
    others = [name for name in arms if name != BASELINE]
    windows, pairs = held_out.windows, {name: [] for name in others}
    for _, ids in windows:
        batch = ids.to(device)[None]
        reference = arms[BASELINE](batch)[0]
        for name in others:
            pairs[name].append(compare(reference, arms[name](batch)[0], batch[0]))
    itself = [Pairs(p.nll, p.nll, torch.zeros_like(p.kld), torch.ones_like(p.agree), p.margin) for p in pairs[NOISE]]
    pairs, documents = {BASELINE: itself, **pairs}, [document for document, _ in windows]
    return {name: Report.of(pairs[name], documents) for name in arms}


def answer(arms: dict[str, Logits], held_out: Text, items: int, device: torch.device) -> dict[str, Flips]:
    """Which of four continuations each arm takes for the true one; empty where the text is too short."""
    sequences, answers = text.choices(held_out, items)
    if not len(answers):
        return {}
    batches = sequences.to(device).split(ITEMS_AT_ONCE)
    scores = {name: torch.cat([_likelihoods(arm, batch) for batch in batches]) for name, arm in arms.items()}
    return {name: Flips.of(scores[BASELINE], score, answers) for name, score in scores.items()}


def _likelihoods(logits: Logits, ids: Tensor) -> Tensor:
    """(items, choices, tokens) -> (items, choices): the log-likelihood of each continuation, all of one length."""
    flat = ids.flatten(0, 1)
    log_p = logits(flat)[:, CONTEXT - 1 : -1].log_softmax(-1)
    return log_p.gather(-1, flat[:, CONTEXT:, None]).sum((1, 2)).view(ids.shape[:2]).cpu()


def table(reports: dict[str, Report], flips: dict[str, Flips], sqnr: dict[str, tuple[str, str]]) -> str:
    head = ["arm", "perplexity", "ratio [95 %]", "KLD mean", "median", "p99", "p99.9", "max", "top-1", "confident ≠",
            "RMS Δp", "accuracy, changed (lost, won), p", "SQNR to twin", "SQNR to BF16", "≤ 1.1 × twin"]  # fmt: skip
    rows = []
    for name, r in reports.items():
        f = flips.get(name)
        rows.append([
            name,
            f"{r.perplexity:.4f}",
            f"{r.ppl_ratio:.5f} [{r.ppl_low:.5f}, {r.ppl_high:.5f}]",
            *(f"{kld:.2e}" for kld in (r.kld_mean, r.kld_median, r.kld_p99, r.kld_p999, r.kld_max)),
            f"{r.top1:.2%}",
            f"{r.confident_disagreement:.3%}",
            f"{r.rms_dp:.3%}",
            f"{f.accuracy:.1%}, {f.changed:.1%} ({f.lost}, {f.won}), {f.p:.2g}" if f else "–",
            *sqnr.get(name, ("–", "–")),
            {True: "holds", False: "**BROKEN**", None: "–"}[holds(reports, name)],
        ])  # fmt: skip
    return markdown(head, rows)


def holds(reports: dict[str, Report], name: str) -> bool | None:
    """The rule, for an arm that has a twin."""
    twin = reports.get(name + TWIN)
    return None if twin is None else reports[name].kld_mean <= ALLOWANCE * twin.kld_mean


def mixed(frozen: dict[str, nn.Module]) -> list[str]:
    """Of each W8A8 arm that is not W8A8 in all of its layers, in how many."""
    notes = []
    for name, model in frozen.items():
        layers = frozen_layers(model).values()
        quantised = sum(layer.quantises_input for layer in layers)
        if ARMS[name]["activations"] != "none" and quantised < len(layers):
            notes.append(
                f'* "{name}" has inputs in FP8 in {quantised} of {len(layers)} linear layers; the others, whose '
                f"in_features is no multiple of {BLOCK}, take them in 16 bits"
            )
    return notes


def draw(report: Path) -> None:
    """The picture beside a report, from its tables."""
    page = report.read_text(encoding="utf-8")
    names = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    klds = [{row["arm"]: float(row["KLD mean"]) for row in rows} for rows in read_markdown(page)]
    with picture(report.with_suffix(".png"), "How far FP8 moves a model's predictions from BF16's", (11, 5)) as figure:
        for axes, name, by_arm in zip(figure.subplots(1, len(klds), squeeze=False)[0], names, klds):
            arms = [arm for arm in by_arm if arm + TWIN in by_arm]
            for i, (label, color, suffix) in enumerate((("torch_fp8", FP8, ""), ("the same in float32", GREY, TWIN))):
                places = [group + (i - 0.5) * 0.4 for group in range(len(arms))]
                axes.bar(places, [by_arm[arm + suffix] for arm in arms], 0.38, label=label, color=color)
            if floor := by_arm[NOISE]:
                axes.axhline(floor, color=INK, linewidth=1, label="BF16 in another batch size")
            axes.set_xticks(range(len(arms)), [arm.replace(" ", "\n", 1) for arm in arms])
            axes.tick_params(axis="x", length=0)
            axes.grid(axis="x", visible=False)
            axes.set(ylabel="mean KL divergence, nats a token\nlower is better", title=name)
        figure.axes[0].legend(loc="upper left")
        caption(figure, "W8A16: weights in FP8, inputs in 16 bits. W8A8: both in FP8, inputs scaled by a calibrated "
                        "constant (static), by tensor, by token or by 128 columns\n(block; where 128 does not divide "
                        "a layer's columns, in 16 bits). Grey: the same FP8 codes and scales, multiplied in float32; "
                        "what blue has more is the kernels' doing.")  # fmt: skip


def main(args: argparse.Namespace) -> int:
    began = time.perf_counter()
    device = find_device(args.device)
    if args.calibration_tokens is not None and not args.calibration:
        raise UserError("--calibration-tokens is of the text of --calibration; give that too")
    if args.calibration and args.calibration.resolve() in {path.resolve() for path in args.text}:
        raise UserError("--calibration must be another text than --text: the scales would know what is measured")
    source = sources.load(args, device)
    held_out = [text.load(path, source.encode, args.tokens, args.window) for path in args.text]
    batches = []
    if args.calibration:
        count = CALIBRATION_TOKENS if args.calibration_tokens is None else args.calibration_tokens
        calibration = text.load(args.calibration, source.encode, count, args.window)
        batches = [ids.to(device)[None] for _, ids in calibration.windows]

    bf16, head = source.model, source.model.get_output_embeddings().weight.detach().float()
    wanted = {name: arm for name, arm in ARMS.items() if batches or arm["activations"] != "static"}
    frozen = {name: build(bf16, arm, batches) for name, arm in wanted.items()}
    twins = {name: emulated(model) for name, model in frozen.items()}
    plain = logits_of(bf16, head)
    arms = {BASELINE: plain, NOISE: lambda ids: plain(ids.repeat(2, 1)), FULL: logits_of(full(bf16), head)}
    for name in frozen:
        arms[name], arms[name + TWIN] = logits_of(frozen[name], head), logits_of(twins[name], head)

    _, ids = held_out[0].windows[0]
    sqnr = {}
    for name, model in frozen.items():
        layers, run = frozen_layers(model), lambda model=model: logits_of(model, head)(ids.to(device)[None])
        found = [layer_sqnr(model, reference, layers, run).values() for reference in (twins[name], bf16)]
        sqnr[name] = tuple(f"{min(db):.1f} / {statistics.median(db):.1f}" for db in found)

    layers, info = len(frozen_layers(next(iter(frozen.values())))), fp8.build_info()
    notes = [
        f"* command: `python {shlex.join(sys.argv)}`",
        f"* device: {device_name(device)}; torch {torch.__version__}, torch_fp8 {info['version']}, {info['note']}",
        f"* {layers} linear layers in FP8; embeddings, norms and the output head are not",
        *mixed(frozen),
        f"* windows of {args.window} tokens, none added, none across documents; static scales from "
        f"{sum(batch.numel() for batch in batches)} tokens of {args.calibration or 'nothing'}",
        "* intervals: paired bootstrap over documents, 10,000 draws, seed 0; *confident*: BF16's first choice leads by "
        "more than 1 nat; *accuracy*: which of four continuations of 16 tokens is the true one (seed 0), McNemar's p",
        "* SQNR: minimum / median over layers, in dB, of outputs from the same inputs, in the first window",
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    results, page = [], [f"# FP8 against BF16: {source.name}", ""]
    for one in held_out:
        reports = measure(arms, one, device)
        results.append((one.name, reports))
        flips = answer(arms, one, args.items, device)
        section = [
            f"## {one.name}",
            "",
            f"{reports[BASELINE].tokens} predicted tokens, {len(one.documents)} documents, SHA-256 {one.digest}…",
            "",
            table(reports, flips, sqnr),
            "",
        ]
        print("\n".join(section), flush=True)
        page += section
        # After each text, so that a run that is cut off leaves what it has measured.
        spent = f"* {datetime.date.today()}, {time.perf_counter() - began:.0f} s"
        report = "\n".join([*page, *notes, spent, "", "![mean KLD](report.png)"]) + "\n"
        with replacing(args.out / "report.md") as temporary:
            temporary.write_text(report, encoding="utf-8")
        draw(args.out / "report.md")
    broken = [(one, name) for one, reports in results for name in reports if holds(reports, name) is False]
    for one, name in broken:
        print(f"broken rule: {name} on {one} has more than {ALLOWANCE} times its twin's mean KLD", file=sys.stderr)
    print(f"{args.out / 'report.md'} and report.png, {time.perf_counter() - began:.0f} s")
    return 1 if broken else 0


if __name__ == "__main__":
    try:
        with torch.no_grad():
            sys.exit(main(parse_arguments()))
    except UserError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)
