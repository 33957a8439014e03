"""The pages say what is so: the API page is the one of these docstrings, and links lead somewhere."""

import re
import runpy
from pathlib import Path

import pytest

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
