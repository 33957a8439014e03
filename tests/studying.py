"""What tests of studies share: a text, a plan, a model, and how a study is called."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from scripts import called, script

from examples.gpt.tokens import Bytes
from studies.lib.corpus import make_tokens, save_corpus
from studies.lib.runs import all_runs, claim
from studies.lib.training import Training

ROOT = Path(__file__).parents[1]
scales = script("studies/scales.py")
SCALES = [sys.executable, str(ROOT / "studies" / "scales.py")]
PLAN = {
    **{"seed": 0, "steps": 10, "batch": 4, "micro_batch": 2, "context": 16, "lr": 1e-2, "warm_up": 2, "cooldown": 4},
    **{"validated": 256, "schedule": "wsd"},
}
TINY = ["--models", "gpt-tiny", "--seeds", "1", "--batch", "4", "--micro-batch", "2", "--context", "32",
        "--val-tokens", "512"]  # fmt: skip
QUICK = [*TINY, "--steps", "2"]


def write_tokens(folder):
    """The path of a few thousand tokens, which are bytes."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "then", "it", "sleeps"]
    generator = torch.Generator().manual_seed(0)
    lines = [" ".join(words[i] for i in torch.randint(len(words), (40,), generator=generator)) for _ in range(300)]
    (folder / "text").write_text("\n<|endoftext|>\n".join(lines))
    save_corpus(folder / "tokens.xz", make_tokens(folder / "text", Bytes(), "bytes", 0.2))
    return folder / "tokens.xz"


def command(*arguments):
    return called(lambda: scales.exit_code(scales.main), SCALES[1], *arguments)


def run(*arguments, tokens, out):
    """A study; each of its runs is a process of its own, as ever."""
    return command(*arguments, "--tokens", tokens, "--out", out)


def kill(command, log, records):
    """Start a study as a process of its own, and kill it and its runs once ``log`` has so many records."""
    parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not log.exists() or log.read_bytes().count(b"\n") < records:
        time.sleep(0.01)
    children = map(int, Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split())  # one a GPU
    for process in (*children, parent.pid):
        os.kill(process, signal.SIGKILL)
    parent.wait()


def records_of(out):
    """Of every run, all but what a clock wrote."""
    found = {run.name: run.records() for run in all_runs(out)}
    for records in found.values():
        for record in records:
            record.get("result", {}).pop("seconds", None)
    return found


class Table(torch.nn.Module):
    """A model of pairs of bytes."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(256, 256)

    def forward(self, tokens):
        return self.table(tokens)


def training(folder, corpus, model=Table, observer=None, **changed):
    torch.manual_seed(0)
    (run,) = claim(folder, {"run": {**PLAN, **changed}})
    return Training(run, model(), corpus, torch.device("cpu"), observer)
