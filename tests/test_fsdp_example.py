"""examples/fsdp.py as torchrun starts it, on two CPU ranks."""

import os
import subprocess
import sys
from pathlib import Path

import torch_fp8 as fp8
from scripts import called, script

SCRIPT = Path(__file__).parents[1] / "examples" / "fsdp.py"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(fp8.__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


def run(*command, **more):
    return subprocess.run(
        [sys.executable, *map(str, command)], env={**ENVIRONMENT, **more}, capture_output=True, text=True, timeout=240
    )


def test_both_arms_learn_alike():
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    ended = run(*torchrun, SCRIPT, "--steps", 12, "--lr", 3e-3, "--recompute", "--reduce-amaxes")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ended.stdout.splitlines() if "|" in line]
    losses = {row[0]: [float(cell) for cell in row[1:5]] for row in rows[-2:]}
    assert losses["BF16"] != losses["FP8"]
    for bf16, fp8_ in zip(losses["BF16"], losses["FP8"]):
        assert abs(bf16 - fp8_) < 0.03 * bf16
    assert losses["FP8"][-1] < losses["FP8"][0] - 0.5


def test_bad_starts_are_refused_in_words(monkeypatch):
    alone = ("--precision", "bf16", "--reduce-amaxes")
    refused = "--reduce-amaxes is of the FP8 arm, which --precision bf16 leaves out"
    monkeypatch.delenv("RANK", raising=False)
    for arguments, complaint in (((), "start it with torchrun"), (("--write",), "torchrun"), (alone, refused)):
        if arguments == alone:
            monkeypatch.setenv("RANK", "0")
        ended = called(script("examples/fsdp.py").main, SCRIPT, *arguments)
        assert ended.returncode == 2 and complaint in ended.stderr
