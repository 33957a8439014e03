"""How far the losses of BF16 and FP8 lie apart, and how far two seeds of one precision do. Writes results/seeds.md.

examples/train.py for several seeds at once on one GPU: in each both arms begin with the same weights and see the same
batches. A single pair says little: a rounding that differs in the first step shifts the moment at which a model learns
something, and the distance stays. Speed is not measured here; the runs disturb one another.

    python benchmarks/seeds.py [--seeds N] [arguments of examples/train.py]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from lib.report import header, table, write

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "seeds"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    args, of_training = parser.parse_known_args()
    if args.seeds < 2:
        parser.error(f"--seeds must be at least 2 to show a spread, got {args.seeds}")

    RUNS.mkdir(parents=True, exist_ok=True)
    train(args.seeds, of_training)
    losses = {seed: validation_losses(RUNS / str(seed)) for seed in range(args.seeds)}
    rows = [[seed, f"{bf16:.4f}", f"{fp8:.4f}", f"{fp8 / bf16 - 1:+.2%}"] for seed, (bf16, fp8) in losses.items()]
    ratios = [fp8 / bf16 - 1 for bf16, fp8 in losses.values()]
    error = statistics.stdev(ratios) / len(ratios) ** 0.5
    bf16_spread, fp8_spread = (statistics.stdev(arm) / statistics.mean(arm) for arm in zip(*losses.values()))
    write("seeds", f"""{header("Validation losses of BF16 and FP8 over several seeds", timed=False)}
Training: `examples/train.py {" ".join(of_training)}`, `DelayedScaling()`; validation loss in nats a token at the end.

{table(["seed", "BF16", "FP8", "FP8 against BF16"], rows)}
* FP8 against BF16, mean over the seeds: {statistics.mean(ratios):+.2%} ± {error:.2%} (standard error)
* standard deviation of one such pair: {statistics.stdev(ratios):.2%}; between seeds: BF16 {bf16_spread:.2%}, FP8
  {fp8_spread:.2%}
""")  # fmt: skip


def train(seeds: int, arguments: list[str]) -> None:
    """Run all seeds at once; one that fails ends the benchmark with its last words."""
    logs = [open(RUNS / f"{seed}.log", "w+") for seed in range(seeds)]  # noqa: SIM115
    jobs = [
        subprocess.Popen(
            [sys.executable, ROOT / "examples" / "train.py", *arguments, "--seed", str(seed),
             "--precision", "both", "--overwrite", "--out", str(RUNS / str(seed))],
            stdout=log, stderr=subprocess.STDOUT,
        )
        for seed, log in enumerate(logs)
    ]  # fmt: skip
    codes = [job.wait() for job in jobs]
    for seed, (code, log) in enumerate(zip(codes, logs)):
        log.seek(0)
        text = log.read()
        log.close()
        if code:
            sys.exit(f"seed {seed} failed with {code}:\n{text[-2000:]}")


def validation_losses(run: Path) -> tuple[float, float]:
    """The last of BF16 and of FP8."""

    def last(arm: str) -> float:
        records = [json.loads(line) for line in (run / f"{arm}.jsonl").read_text().splitlines()]
        return [record["val_loss"] for record in records if "val_loss" in record][-1]

    return last("bf16"), last("fp8")


if __name__ == "__main__":
    main()
