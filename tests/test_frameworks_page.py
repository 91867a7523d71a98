"""The page on training frameworks: its code runs and its links lead somewhere."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "frameworks.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


IDS = ["transformers", "ignite", "fastai", "timm", "GradScaler", "schedule-free", "classes", "state dicts"]
PACKAGES = ["transformers", "ignite", "fastai", "timm", "schedulefree"]


def test_all_blocks_are_found():
    assert len(BLOCKS) == len(IDS)


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")  # accelerate asks for it without a GPU
@pytest.mark.parametrize("block", BLOCKS, ids=IDS)
def test_blocks_run(block):
    for package in PACKAGES:
        if f"import {package}" in block or f"from {package}" in block:
            pytest.importorskip(package)
    exec(compile(block, PAGE.name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)]+)\)", TEXT))
def test_links_lead_somewhere(link):
    page, _, anchor = link.partition("#")
    text = (PAGE.parent / page).read_text(encoding="utf-8") if page else TEXT
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    assert not anchor or anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
