"""The shape of the package: what may import what, and what every public name owes its reader."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import runningbn

PACKAGE = Path(runningbn.__file__).parent

# Each room may use those before it. `statistics` is the vocabulary of the kernels, which return sums.
ORDER = [
    "derived_tensors",
    "statistics",
    "momentum",
    "law",
    "kernels",
    "update",
    "distributed",
    "gradients",
    "autograd",
    "masks",
    "functional",
    "buffers",
    "state_dicts",
    "layer",
    "running",
    "precise",
    "converted",
    "convertible",
    "accumulate",
    "flags",
    "subclasses",
    "takeover",
    "observer",
    "observe",
    "batches",
    "weights",
    "convert",
    "ranks",
    "kept",
    "selection",
    "nested",
    "text",
    "summary",
    "merge",
    "report",
    "checkpoints",
    "passes",
    "settle",
    "recalibrate",
    "diagnosis",
    "integrations",
    "demo_experiment",
    "demo",
    "__main__",
]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The rooms of the package that a file imports, anywhere in it; public names are in the rooms they come from."""
    found = set()
    package_of_file = ["runningbn", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package_of_file[: len(package_of_file) - node.level + 1] if node.level else []
            parts = [*base, *(node.module or "").split(".")] if node.module else base
            modules = [[*parts, alias.name] for alias in node.names] if len(parts) == 1 else [parts]
        elif isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        else:
            continue
        found |= {home(parts[1]) for parts in modules if parts[0] == "runningbn" and len(parts) > 1}
    return found


def home(name: str) -> str:
    """The room that a name in ``runningbn.`` stands for."""
    return getattr(runningbn, name).__module__.split(".")[1] if name in runningbn.__all__ else name


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    allowed = ORDER[: ORDER.index(room(path)) + 1]
    assert imported_rooms(path) <= set(allowed)


def test_every_file_has_its_place_in_the_order():
    assert {room(path) for path in FILES} == set(ORDER)


@pytest.mark.parametrize("heavy", ["matplotlib", "rich", "sklearn", "triton", "tqdm", "hypothesis", "lightning"])
def test_import_stays_light(heavy):
    # What torch itself brings along is not ours to count.
    code = f"import sys, torch; had = {heavy!r} in sys.modules; import runningbn; print(had, {heavy!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = done.stdout.split()
    assert before == after


@pytest.mark.parametrize("name", runningbn.__all__)
def test_public_names_are_documented_with_an_example(name):
    document = inspect.getdoc(getattr(runningbn, name)) or ""
    for section in ("Example:", "Raises:"):
        assert section in document, f"{name} has no section {section}"
