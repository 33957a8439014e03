"""The benchmarks measure on a GPU only, but everything they call must go on existing."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch_fp8.table import markdown, read_markdown

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))
# python benchmarks, but its processes are forked from one that has imported PyTorch, which each would do for itself.
DRY_RUN = """
import multiprocessing, os, runpy, subprocess, sys, torch

def call(command):
    sys.argv = [str(word) for word in command[1:]]
    sys.path[0] = os.path.dirname(sys.argv[0])
    how = {"args": sys.argv[:1], "kwargs": {"run_name": "__main__"}}
    process = multiprocessing.get_context("fork").Process(target=runpy.run_path, **how)
    process.start()
    process.join()
    return process.exitcode

subprocess.call = call
sys.argv = ["benchmarks", "--dry-run"]
runpy.run_path("benchmarks", run_name="__main__")
"""


def test_every_benchmark_runs_dry():
    results = ROOT / "runs" / "dry-run"
    names = runpy.run_path(str(ROOT / "benchmarks" / "__main__.py"))["NAMES"]
    for name in names:
        (results / f"{name}.md").unlink(missing_ok=True)
    run = subprocess.run([sys.executable, "-c", DRY_RUN], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    for name in names:
        text = (results / f"{name}.md").read_text()
        assert "a dry run, the figures mean nothing" in text and text.count("\n|") >= 3, name


@pytest.mark.parametrize(
    "study, words",
    [
        ("fused", ("2 LlamaDecoderLayer", "FP8 fused against FP8: ")),
        ("attention", ("all linear layers in BF16", "fp8_forward against BF16: ")),
    ],
)
def test_the_small_trainings_run_dry_and_repeat_nothing(tmp_path, study, words):
    pytest.importorskip("transformers")
    text, runs, page = tmp_path / "text", tmp_path / "runs.jsonl", ROOT / "runs" / "dry-run" / f"{study}_training.md"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 1000)
    page.unlink(missing_ok=True)
    arguments = ["--dry-run", f"--study={study}", "--steps=3", "--seeds=2", f"--data={text}", f"--runs={runs}"]
    command = [sys.executable, "benchmarks/small_training.py", *arguments]
    for _ in range(2):
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
        assert len(runs.read_text().splitlines()) == 6
    assert all(word in page.read_text() for word in words)


@pytest.mark.parametrize("name", [p.stem for p in SCRIPTS if (RESULTS / f"{p.stem}.png").exists()])
def test_pictures_show_figures_of_the_page_and_begin_at_0(name, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    page, figure = (RESULTS / f"{name}.md").read_text(), Figure()
    runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"))["draw"](figure, read_markdown(page))
    words = " ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))
    assert "is better" in words and any(regime in words for regime in ("GPU", "loop", "graph"))
    there = {float(number) for number in re.findall(r"\d+(?:\.\d+)?", page)}
    for axes in figure.axes:
        assert axes.get_ylim()[0] == 0
        assert {bar.get_height() for bar in axes.patches} <= there


def test_a_table_is_read_as_it_was_written():
    rows = [{"a": "1.50 / 1.56", "b": "–"}, {"a": "x", "b": ""}]
    text = f"words\n\n{markdown(['a', 'b'], [['**1.50 / 1.56**', '–'], ['x', '']])}\n\n| c |\n| --- |\n"
    assert read_markdown(text) == [rows, []]


@pytest.mark.parametrize("aligned", [False, True])
def test_a_bar_in_a_cell_ends_no_cell(aligned):
    text = markdown(["model|text", "loss"], [["a|b (x)", "1|"], ["|", "2"]], aligned=aligned)
    bars = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines()}
    assert bars == {3} and r"a\|b (x)" in text
    assert read_markdown(text) == [[{"model|text": "a|b (x)", "loss": "1|"}, {"model|text": "|", "loss": "2"}]]


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
