"""The tutorials run, what they claim holds, and the outputs stored in them are of their code.

They run in this process: what the cells assert fails the test, and warnings are errors.
"""

from __future__ import annotations

import json
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOKS = sorted((DOCS / "tutorials").glob("*.ipynb"))
NUMBER = re.compile(r"[-+]?\b\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?%?")
# Of any system, with a folder and a name in it; "old/new" and "mean/std" are no paths.
PATH = re.compile(r"(?:^|[\s\"'(=])(?:~/|[A-Za-z]:\\|/)[\w.-]+[/\\][\w.-]+")
TIME = re.compile(r"\b\d\d:\d\d\b|\b\d+(?:\.\d+)? ?(?:ms|µs|s|sec|seconds|minutes|min)\b")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


def stored_text(cell):
    """What the cell printed when the notebook was executed."""
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def without_numbers(text):
    """The numbers, and so the widths of columns, depend on the machine; the words do not."""
    return " ".join(NUMBER.sub("#", text).split())


def test_the_tutorials_are_in_the_navigation():
    page = (DOCS / "tutorials.md").read_text(encoding="utf-8")
    toctree = re.search(r"```{toctree}\n:hidden:\n\n(.*?)\n```", page, re.DOTALL)[1].splitlines()
    assert len(NOTEBOOKS) == 6
    assert sorted(toctree) == [f"tutorials/{path.stem}" for path in NOTEBOOKS]
    for path in NOTEBOOKS:
        assert f"](tutorials/{path.name})" in page


@each_notebook
def test_it_is_stored_as_one_whole_run(path):
    notebook = read(path)
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any("execution" in cell["metadata"] for cell in notebook["cells"])  # times
    assert "version" not in notebook["metadata"]["language_info"]
    for cell in cells:
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "display_data")
            assert output.get("name", "stdout") == "stdout"  # no warnings, no logs
    text = "\n".join(map(stored_text, cells))
    assert text
    assert not PATH.search(text)
    assert not TIME.search(text)


@each_notebook
def test_its_claims_are_checked(path):
    assert "assert " in "".join(map(source, code_cells(read(path))))


def test_paths_and_times_would_be_found():
    assert all(PATH.search(text) for text in ("/home/me/x.pt", "File '/tmp/a1/x'", r"C:\Users\me", "~/code/x.py"))
    assert not any(PATH.search(text) for text in ("mean moved/std", "var B/A", "running_mean / sqrt(running_var)"))
    assert all(TIME.search(text) for text in ("took 3.1 s", "12 ms per step", "at 12:30", "100it 35.2it/s 00:12"))
    assert not TIME.search("4 steps, 20 runs, 0.35 std, 3 samples, 5 seeds")


def links(text):
    return re.findall(r"\]\(([^)]+)\)", text)


def headings(page):
    """The anchors of a Markdown page that both GitHub and Sphinx make: of headings of the first two levels."""
    lines = re.findall(r"^#{1,2} (.*)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


@each_notebook
def test_links_lead_somewhere(path):
    text = "\n".join(source(cell) for cell in read(path)["cells"] if cell["cell_type"] == "markdown")
    assert links(text)
    for link in links(text):
        page, _, anchor = link.partition("#")
        target = (path.parent / page).read_text(encoding="utf-8")
        assert not anchor or anchor in headings(target), link


@pytest.mark.slow
@each_notebook
def test_it_runs_and_prints_what_is_stored(path):
    pytest.importorskip("sklearn")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    namespace = {"__name__": "__main__"}
    with torch.random.fork_rng():
        for number, cell in enumerate(code_cells(read(path)), 1):
            printed = StringIO()
            with redirect_stdout(printed):
                exec(compile(source(cell), f"{path.name}, code cell {number}", "exec"), namespace)
            assert without_numbers(printed.getvalue()) == without_numbers(stored_text(cell))
    pyplot.close("all")
