"""The README tells the truth: its examples run, its tables are those of the committed results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import readme

TEXT = (readme.ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.splitlines()[-1].split("(")[0])
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_examples_run(example):
    exec(compile(example, "README.md", "exec"), {})


def test_there_is_an_example():
    assert len(EXAMPLES) == 1


def test_it_fits_on_two_screens():
    assert len(TEXT.splitlines()) <= 120


def test_tables_are_those_of_the_committed_results():
    for page in readme.TABLES:
        text = (readme.ROOT / page).read_text(encoding="utf-8")
        assert readme.with_tables(page, text) == text
    assert (readme.ROOT / "docs" / "speed.md").read_text(encoding="utf-8") == readme.speed_page()


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", TEXT))
def test_links_lead_somewhere(link):
    assert (Path(readme.ROOT) / link).exists()
