"""The pages say what is so: the API page is the one of these docstrings, links lead somewhere, files and commands that
are named exist, README's code runs, and its figures stand in the files that it names."""

import io
import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = sorted(page for folder in ("", "docs", "benchmarks/results") for page in (ROOT / folder).glob("*.md"))


def test_the_api_page_is_up_to_date():
    api = runpy.run_path(str(ROOT / "tools" / "api.py"))
    assert api["PAGE"].read_text(encoding="utf-8") == api["page"](), "run make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_what_is_there(page):
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    anchors += [f"{anchor}-1" for anchor in anchors if anchors.count(anchor) > 1]
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if ":" not in file:
            assert (page.parent / file).exists(), target
            assert file or anchor in anchors, target


BY_HAND = sorted(ROOT.glob("*.md")) + [ROOT / "docs" / "design.md"]
FOLDERS = ("", ".ci/", "benchmarks/**/", "cmake/", "csrc/**/", "docs/", "examples/**/", "include/**/", "models/",
           "python/**/", "studies/**/", "tests/**/", "tools/")  # fmt: skip
SOURCES = [path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in ROOT.glob(f"{folder}*")]


@pytest.mark.parametrize("page", [page for page in BY_HAND if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    """By their end: linear.py stands for some linear.py, ops/linear.cpp for some ops/linear.cpp."""
    named = re.findall(r"[\w./-]+\.(?:py|pyi|cpp|cu|cuh|h|sh|md|toml)\b", page.read_text(encoding="utf-8"))
    assert len(named) >= 5
    missing = {
        name for name in named if "NAME" not in name and not any(f"/{path}".endswith(f"/{name}") for path in SOURCES)
    }
    assert not missing


@pytest.mark.parametrize("page", BY_HAND, ids=lambda page: page.name)
def test_commands_of_make_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", page.read_text(encoding="utf-8"), re.MULTILINE)) <= targets


def test_the_code_of_readme_runs(tmp_path, monkeypatch):
    """All of it, in its order, on a model whose layers are just large enough for convert to take them."""
    transformers = pytest.importorskip("transformers", minversion="5.24")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tokens = torch.arange(32)[None]
    names = {
        "AutoModelForCausalLM": transformers.AutoModelForCausalLM,
        "LlamaForCausalLM": transformers.LlamaForCausalLM,
        "config": transformers.LlamaConfig(
            vocab_size=64, hidden_size=2048, intermediate_size=2048, num_hidden_layers=1, num_attention_heads=16
        ),
        "batches": [(tokens, tokens)] * 2,
        "torch": torch,
        "f": io.BytesIO(),
        "evaluate": lambda model: model.eval()(tokens),
    }
    small = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(small).bfloat16().save_pretrained("in")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(block.replace(".cuda()", "").replace('"cuda"', '"cpu"'), names)
    names["f"].seek(0)
    assert set(torch.load(names["f"])) == {"model", "fp8"}
    assert names["model"].generate(tokens[:, :4], max_new_tokens=2).shape == (1, 6)


def test_figures_of_readme_stand_in_the_files_that_it_names():
    """Each cell of the tables under Measured: its numbers are numbers of the files named in the table, or between it
    and the next one, or the ratio of two."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    measured = text[text.index("## Measured") : text.index("## Recipes")]
    parts = re.split(r"\n\n(?=\|)", measured)[1:]
    assert len(parts) >= 5
    for part in parts:
        there = set()
        for file in re.findall(r"\((benchmarks/results/[\w-]+\.md)\)", part):
            there |= {float(n) for n in NUMBER.findall((ROOT / file).read_text().replace(",", ""))}
        for row in part.partition("\n\n")[0].splitlines()[2:]:
            for cell in row.strip("| ").split(" | ")[1:]:
                numbers = NUMBER.findall(re.sub(r"\(?[+−]?[\d.]+ %\)?", "", cell.replace(",", "")))
                ratio = {float(numbers[1]) / float(numbers[0])} if "→" in cell else set()
                for number in numbers:
                    assert any(_rounds_to(exact, number) for exact in there | ratio), (number, row)


def test_figures_of_fog_stand_in_its_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    said = text[text.index("`studies/fog.py` tries the") : text.index("## Support")]
    there = {float(number) for number in NUMBER.findall((ROOT / "docs" / "fog.md").read_text(encoding="utf-8"))}
    numbers = [float(number) for number in NUMBER.findall(re.sub(r"OLMo 2|Llama 3|BF16|FP8", "", said))]
    assert len(numbers) >= 4 and set(numbers) <= there


NUMBER = re.compile(r"\d+(?:\.\d+)?")


def _rounds_to(exact, shown):
    return abs(exact - float(shown)) <= 0.5001 * 10.0 ** -len(shown.partition(".")[2])
