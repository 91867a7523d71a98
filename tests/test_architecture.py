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

# Each module may import those before it. A package stands for all its modules that are not named by themselves: the
# kernels return the state's types, and the rest of a training step is made of them.
ORDER = [
    "ops.state",
    "momentum",
    "ops.law",
    "ops.spec",
    "kernels",
    "ops.derived_tensors",
    "ops.update",
    "ops.pooling",
    "ops.gradients",
    "ops.autograd",
    "ops.masks",
    "ops.step",
    "layers",
    "recalibration",
    "weights",
    "conversion",
    "inspection",
    "diagnosis",
    "integrations",
    "demo",
    "__main__",
]


def place(module: str) -> str:
    """What stands in `ORDER` for a module, by its name below the package."""
    return next(name for name in ORDER if module == name or module.startswith(f"{name}."))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path: Path) -> set[str]:
    """The modules of the package that a file imports, anywhere in it; public names are where they come from."""
    found = set()
    package_of_file = ["runningbn", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package_of_file[: len(package_of_file) - node.level + 1] if node.level else []
            parts = [*base, *(node.module.split(".") if node.module else [])]
            names = [[*parts, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        found |= {home(parts[1:]) for parts in names if parts[0] == "runningbn" and len(parts) > 1}
    return found


def home(parts: list[str]) -> str:
    """The module that a dotted name below the package stands for."""
    if parts[0] in runningbn.__all__:
        return getattr(runningbn, parts[0]).__module__.removeprefix("runningbn.")
    while parts and not (PACKAGE.joinpath(*parts).with_suffix(".py").exists() or PACKAGE.joinpath(*parts).is_dir()):
        parts = parts[:-1]
    return ".".join(parts)


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    own = module_of(path)
    if own in {name.split(".")[0] for name in ORDER if "." in name}:
        return  # a package in parts, whose __init__ says what it is
    allowed = ORDER[: ORDER.index(place(own)) + 1]
    assert {place(module) for module in imported_modules(path) if module} <= set(allowed)


def test_the_top_shows_the_plan():
    assert len([path for path in PACKAGE.iterdir() if path.name != "__pycache__"]) <= 14


def test_only_one_file_is_long():
    long = [path.name for path in PACKAGE.rglob("*.py") if len(path.read_text(encoding="utf-8").splitlines()) > 300]
    assert long == ["triton_kernels.py"]


FRAMEWORKS = ["lightning", "transformers", "ignite", "fastai"]


@pytest.mark.parametrize("heavy", ["matplotlib", "rich", "sklearn", "triton", "tqdm", "hypothesis", *FRAMEWORKS])
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
