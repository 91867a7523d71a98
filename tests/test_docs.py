"""The pages of docs/ and CONTRIBUTING.md tell the truth: code runs, the site builds, what is named is there.

The code of the pages on recalibration and on training frameworks is run in test_examples.py and
test_frameworks_page.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

import runningbn
from benchmarks import readme

DOCS = readme.ROOT / "docs"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(readme.ROOT)}
CONTRIBUTING = (readme.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PAGES = sorted({path.stem for path in DOCS.glob("*.md")} - {"recalibration", "frameworks"})


def blocks(page):
    """The Python code of a page, each with the heading above it as its id."""
    heading = page
    for found in re.finditer(r"^#+ ([^\n]*)$|^```python\n(.*?)^```", text(page), re.MULTILINE | re.DOTALL):
        if found[1]:
            heading = found[1]
        else:
            yield pytest.param(page, found[2], id=f"{page}-{heading}")


def text(page):
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")


BLOCKS = [block for page in PAGES for block in blocks(page)]


def test_all_blocks_are_found():
    assert len(BLOCKS) == 27


@pytest.mark.parametrize(("page", "code"), BLOCKS)
def test_blocks_run(page, code):
    exec(compile(code, f"{page}.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("name", runningbn.__all__)
def test_public_names_are_in_the_reference(name):
    assert re.search(rf"^\.\. auto(class|function):: runningbn\.{name}\b", text("reference"), re.MULTILINE)


@pytest.mark.parametrize("script", sorted(path.name for path in (DOCS / "examples").glob("*.py")))
def test_examples_are_shown(script):
    assert f"{{literalinclude}} examples/{script}\n" in text("examples")


ROOMS = {path.stem for path in (readme.ROOT / "runningbn").iterdir() if path.suffix == ".py" or path.is_dir()}


@pytest.mark.parametrize("room", sorted(ROOMS - {"__init__", "__pycache__"}))
def test_contributing_names_every_room(room):
    assert f"`{room}`" in CONTRIBUTING


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"\b(?:tests|docs|benchmarks|runningbn)/[\w./*]+", CONTRIBUTING)))
)
def test_contributing_names_files_that_are_there(path):
    assert path == "docs/_build" or list(readme.ROOT.glob(path.rstrip("./")))


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    for package in ("sphinx", "myst_nb", "furo", "latex2mathml"):
        pytest.importorskip(package)
    options = ["-W", "--keep-going", "-q", "-d", tmp_path / "doctrees"]
    command = [sys.executable, "-m", "sphinx", *options, DOCS, tmp_path / "site"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    pages = {path.relative_to(site).with_suffix("").as_posix(): path for path in site.rglob("*.html")}
    built = {name: path.read_text(encoding="utf-8") for name, path in pages.items()}
    sources = [*DOCS.glob("*.md"), *DOCS.glob("tutorials/*.ipynb")]
    assert {path.relative_to(DOCS).with_suffix("").as_posix() for path in sources} <= built.keys()
    for page in ("numerics", "reference"):  # formulas in Markdown and in docstrings
        formulas = re.findall("<math.*?</math>", built[page], re.DOTALL)
        assert formulas
        assert not any("\\" in formula for formula in formulas)  # every LaTeX command was converted
    loaded = re.compile(r"""<(?:script|img)[^>]* src="https?:|<link[^>]*stylesheet[^>]* href="https?:""")
    assert not any(loaded.search(html) for html in built.values())  # the pages show without a network


@pytest.mark.slow
def test_mismatch_is_what_the_page_says(tmp_path):
    figure, numbers = tmp_path / "mismatch.png", tmp_path / "mismatch.json"
    options = ["--quick", "--output", figure, "--json", numbers]
    command = [sys.executable, DOCS / "examples" / "mismatch.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert figure.stat().st_size > 0
    last = {
        (situation, layer): {name: values[-1] for name, values in curves.items()}
        for situation, by_layer in json.loads(numbers.read_text(encoding="utf-8")).items()
        for layer, curves in by_layer.items()
    }
    noisy, alike = last["batches of 2", "BatchNorm"], last["batches of 4 of one class", "BatchNorm"]
    assert noisy["evaluation"] < noisy["training"]
    assert alike["evaluation"] > alike["training"]
    ours = last["batches of 2", "RunningBatchNorm"]
    assert abs(ours["evaluation"] - ours["training"]) < (noisy["training"] - noisy["evaluation"]) / 2
    for (situation, layer), losses in last.items():
        if layer == "RunningBatchNorm":
            assert losses["evaluation"] < last[situation, "BatchNorm"]["evaluation"]
