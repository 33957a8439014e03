"""The benchmarks measure on a GPU only, but everything they call must go on existing."""

import runpy
import subprocess
import sys
from pathlib import Path

import torch

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


def test_a_cached_decode_step_gives_the_logits_of_the_whole_prompt(monkeypatch):
    """What decode.py times must be a Llama: positions, mask, grouped queries and the cache, against one prefill."""
    monkeypatch.syspath_prepend(str(ROOT))
    from models.decoder import Decoder
    from models.llama import Shape

    model, ids = (
        Decoder(Shape(hidden=64, ffn=112, heads=4, kv_heads=2), layers=2, vocabulary=64),
        torch.arange(20)[None],
    )
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        whole, cache = model(ids), model.new_cache(24)
        model(ids[:, :17], cache)
        for position in range(17, 20):
            logits = model.step(ids[:, position : position + 1], torch.tensor([position]), cache)
    torch.testing.assert_close(logits, whole)
