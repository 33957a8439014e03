"""The benchmarks measure on a GPU only, but everything they call must go on existing."""

import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_benchmark_runs_dry():
    results = ROOT / "runs" / "dry-run"
    names = runpy.run_path(str(ROOT / "benchmarks" / "__main__.py"))["NAMES"]
    for name in names:
        (results / f"{name}.md").unlink(missing_ok=True)
    run = subprocess.run([sys.executable, "benchmarks", "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    for name in names:
        text = (results / f"{name}.md").read_text()
        assert "a dry run, the figures mean nothing" in text and text.count("\n|") >= 3, name
