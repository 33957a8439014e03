"""What came out: a table for the terminal, the same in a Markdown page, both from the logs and the checkpoints."""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch_fp8 as fp8
from torch_fp8.files import replacing
from torch_fp8.table import markdown

from .arm import Arm, Progress
from .journal import Record

_LAST = 20  # steps that the final training loss is the mean of
_HEADER = ("arm", "steps", "train loss", "val loss", "tokens/s", "peak GPU memory", "wall time")


@dataclass(frozen=True)
class Result:
    name: str
    progress: Progress
    records: list[Record]
    train_loss: float
    val_loss: float

    @property
    def tokens_per_second(self) -> float:
        """Steady throughput; NaN where no step came after the warm-up."""
        return self.progress.steady_tokens / (self.progress.steady_seconds or math.nan)


def make_result(arm: Arm) -> Result:
    records = arm.journal.records
    train = [_number(record["loss"]) for record in records if "loss" in record][-_LAST:]
    val = [_number(record["val_loss"]) for record in records if "val_loss" in record]
    return Result(arm.name, arm.progress, records, sum(train) / len(train) if train else math.nan, val[-1])


def table(results: list[Result]) -> str:
    """In Markdown, aligned, with a line below that compares the arms where there are two."""
    lines = [markdown(_HEADER, map(_row, results), aligned=True)]
    by_name = {result.name: result for result in results}
    if len(by_name) == 2:
        lines += ["", _comparison(by_name["bf16"], by_name["fp8"])]
    return "\n".join(lines)


def write_summary(
    path: Path, results: list[Result], *, title: str, device: str, command: str, data: str, recipe: fp8.Recipe
) -> None:
    build = fp8.build_info()
    lines = [
        f"# {title}",
        "",
        *([_CPU_NOTE, ""] if device == "CPU" else []),
        table(results),
        "",
        f"* command: `{command}`",
        f"* data: {data}",
        *([f"* FP8 recipe: `{recipe}`"] if any(result.name == "fp8" for result in results) else []),
        f"* device: {device}",
        f"* torch {torch.__version__}",
        f"* torch_fp8 {build['version']} for torch {build['torch']}: {build['note']}",
        f"* {datetime.datetime.now().astimezone().isoformat(sep=' ', timespec='seconds')}",
        "",
        f"Losses are in nats a token: the training loss is the mean of the last {_LAST} steps, the validation loss is "
        "taken on the same batches in both arms, each as it trains. Tokens/s leaves out warm-up, evaluation and "
        "saving.",
        "",
        "![The losses, and the scales of the FP8 arm](loss_and_scales.png)",
    ]
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


_CPU_NOTE = (
    "Measured on a CPU. There FP8 is emulated, exactly and slowly: the losses mean something, the speeds and times say "
    "nothing of a GPU."
)


def _row(result: Result) -> tuple[str, ...]:
    progress, speed = result.progress, result.tokens_per_second
    return (
        result.name.upper(),
        str(progress.step),
        f"{result.train_loss:.4f}",
        f"{result.val_loss:.4f}",
        "n/a" if math.isnan(speed) else f"{speed:,.0f}",
        f"{progress.peak_memory / 2**30:.2f} GiB" if progress.peak_memory else "n/a",
        f"{progress.seconds:.1f} s",
    )


def _comparison(bf16: Result, ours: Result) -> str:
    parts = [f"FP8 / BF16: validation loss x {ours.val_loss / bf16.val_loss:.4f}"]
    speed = ours.tokens_per_second / bf16.tokens_per_second
    if not math.isnan(speed):
        parts.append(f"tokens/s x {speed:.2f}")
    if ours.progress.step != bf16.progress.step:
        parts.append("after different numbers of steps")
    return ", ".join(parts)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
