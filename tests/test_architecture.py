"""The shape of the package: what may import what, and what every public name owes its reader."""

from __future__ import annotations

import ast
import dataclasses
import importlib
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
    "ops.compat",
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


def private_names_of_torch(tree: ast.AST) -> set[str]:
    """The full names that a file takes from torch of which a part is private, through imports of any form."""
    imported, found = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias for alias in node.names if alias.name.split(".")[0] == "torch"]
            imported |= {alias.asname or "torch": alias.name if alias.asname else "torch" for alias in names}
            found |= {alias.name for alias in names}
    found |= set(imported.values())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, _, rest = ast.unparse(node).partition(".")
            if root in imported:
                found.add(f"{imported[root]}.{rest}")
    return {name for name in found if private_parts(name)}


def private_parts(name: str) -> list[str]:
    return [part for part in name.split(".") if part[:1] == "_" and part[:2] != "__"]


def is_base_class(name: str) -> bool:
    """`_BatchNorm` and its like, which torch's documentation and other libraries name, too."""
    return name.startswith("torch.nn.modules.") and all(part[1].isupper() for part in private_parts(name))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_of_torch_stand_in_one_file(path):
    private = private_names_of_torch(ast.parse(path.read_text(encoding="utf-8")))
    assert all(map(is_base_class, private)) or module_of(path) == "ops.compat", private


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch._C._x()",
        "import torch as t\nt._C._x()",
        "import torch._dynamo",
        "import torch.nn as nn\nnn._x",
        "from torch import _C",
        "from torch._C import x as y",
        "from torch.autograd import forward_ad\nforward_ad._current_level",
        "def f():\n    import torch\n    torch.cuda._lazy_init()",
    ],
)
def test_private_names_are_seen_however_they_are_imported(code):
    assert private_names_of_torch(ast.parse(code))


def test_the_top_shows_the_plan():
    assert len([path for path in PACKAGE.iterdir() if path.name != "__pycache__"]) <= 14


# What torch makes on its default device, which may be another one than that of the model.
ON_THE_DEFAULT_DEVICE = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "ones", "rand", "randn",
    "scalar_tensor", "tensor", "zeros",
}  # fmt: skip


# The demo is a program with models of its own.
@pytest.mark.parametrize(
    "path", [path for path in FILES if "demo" not in path.parts], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_tensors_are_made_on_a_device_that_is_named(path):
    unnamed = []
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(call, ast.Call) or "device" in {keyword.arg for keyword in call.keywords}:
            continue
        function = call.func
        if isinstance(function, ast.Attribute) and ast.unparse(function.value) == "torch":
            unnamed += [ast.unparse(call)] * (function.attr in ON_THE_DEFAULT_DEVICE)
    assert unnamed == []


# More than these are told apart by their names: keyword-only arguments, named tuples, dataclasses.
MOST_BY_POSITION = 7


def is_compiled_by_triton(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Its arguments are those of a kernel on a device, which has no keywords."""
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_function_takes_many_arguments_by_position(path):
    many = []
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)) and not is_compiled_by_triton(function):
            names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
            given = names[1:] if names[:1] in (["self"], ["cls"], ["ctx"]) else names
            if len(given) > MOST_BY_POSITION:
                many.append((function.name, given))
    assert many == []


# These import Triton.
OF_TRITON = tuple(
    f"kernels.triton_{part}" for part in ("backward", "forward", "kernels", "state", "tiles", "updates", "vectors")
)
FRAMEWORKS = {"lightning", "transformers", "ignite", "fastai"}


# Vectors, numbers and named tuples of them, without what is known when the kernel is compiled.
MOST_WITHIN_A_KERNEL = 9


@pytest.mark.parametrize("name", OF_TRITON)
def test_no_function_within_a_kernel_takes_many_arguments(name):
    path = PACKAGE.joinpath(*name.split(".")).with_suffix(".py")
    many = []
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef) and "triton.jit" in map(ast.unparse, function.decorator_list):
            given = [each.arg for each in function.args.args if each.annotation is None]
            if len(given) > MOST_WITHIN_A_KERNEL:
                many.append((function.name, given))
    assert many == []


def test_no_dataclass_takes_many_fields_by_position():
    # Named tuples are what is flattened for kernels and operators: their order is part of a schema.
    many, found = {}, 0
    for path in FILES:
        if module_of(path).startswith(("integrations.", "demo.", *OF_TRITON)):
            continue  # for packages that need not be there
        module = importlib.import_module(f"runningbn.{module_of(path)}")
        for cls in vars(module).values():
            if isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__module__ == module.__name__:
                parameters = inspect.signature(cls).parameters.values()
                by_position = [each.name for each in parameters if each.kind is not each.KEYWORD_ONLY]
                found += 1
                if len(by_position) > MOST_BY_POSITION:
                    many[cls.__name__] = by_position
    assert found > 30
    assert many == {}


def test_no_file_is_long():
    sources = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".c", ".h")]
    assert [path.name for path in sources if len(path.read_text(encoding="utf-8").splitlines()) > 300] == []


def test_import_stays_light():
    # What torch itself brings along is not ours to count.
    code = "import sys, torch; had = set(sys.modules); import runningbn; print(*set(sys.modules) - had)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    added = {name.partition(".")[0] for name in done.stdout.split()}
    assert "runningbn" in added
    assert not added & {"matplotlib", "rich", "sklearn", "triton", "tqdm", "hypothesis", *FRAMEWORKS}


@pytest.mark.parametrize("name", runningbn.__all__)
def test_public_names_are_documented_with_an_example(name):
    document = inspect.getdoc(getattr(runningbn, name)) or ""
    for section in ("Example:", "Raises:"):
        assert section in document, f"{name} has no section {section}"
