"""What a user installs: the sdist, the wheel built from it, and a wheel built where there is no C compiler."""

from __future__ import annotations

import email
import email.message
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import runningbn

ROOT = Path(__file__).parents[1]
SOURCES = (
    "cpu.c", "cpu.h", "cpu_dtypes.h", "cpu_gradient.h", "cpu_loops.h", "cpu_sixteen_bits.h", "cpu_state.h",
    "cpu_threads.h", "layout.h", "operators.c", "step.c", "step_plans.h", "step_tensors.h", "step_written.h",
)  # fmt: skip
GENERATED = ("*.so", "*.egg-info", "__pycache__", ".*", "build", "dist")
RELEASE = {"SOURCE_DATE_EPOCH": "1700000000"}
NO_COMPILER = {"CC": "/bin/false", "LDSHARED": "/bin/false"}

# Trains, and says where it came from, what serves and why C does not: kernels, and what prepares their steps.
STEP = """
import torch, runningbn
from runningbn import RunningBatchNorm
from runningbn.kernels import BACKENDS, backend_for, cpu_step
x = torch.randn(4, 3, 5, 5, requires_grad=True)
layer = RunningBatchNorm(3)
layer(x).square().sum().backward()
assert x.grad.isfinite().all() and layer.weight.grad.isfinite().all()
print(runningbn.__file__)
print(backend_for(x.detach(), torch.float32).__name__)
print(BACKENDS["cpu"].unavailable())
print(cpu_step.unavailable())
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="the compiler is switched off as it is on Unix"),
]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The standard output of a command that must succeed, with no package found by the environment alone."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "RUNNINGBN"))}
    done = subprocess.run(command, cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def build(what: tuple[str, ...], source: Path, out: Path, **environment: str) -> list[Path]:
    """Build from a folder by the build backend that is installed here: no network is needed."""
    run(sys.executable, "-m", "build", "--no-isolation", *what, "--outdir", out, source, cwd=source, **environment)
    return sorted(out.iterdir())


def install(wheel: Path, target: Path) -> Path:
    """Unpack a wheel as pip does; what it depends on is there already."""
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=target.parent)
    return target


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The repository without what earlier builds left in it."""
    pytest.importorskip("build")
    tree = tmp_path_factory.mktemp("source") / "tree"
    return shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*GENERATED))


@pytest.fixture(scope="module")
def sdist_and_wheel(tree, tmp_path_factory) -> tuple[Path, Path]:
    """An sdist of the tree, and the wheel built from that sdist alone."""
    wheel, sdist = build((), tree, tmp_path_factory.mktemp("dist"), **RELEASE)
    return sdist, wheel


@pytest.fixture(scope="module")
def sdist(sdist_and_wheel) -> Path:
    return sdist_and_wheel[0]


@pytest.fixture(scope="module")
def wheel(sdist_and_wheel) -> Path:
    return sdist_and_wheel[1]


@pytest.fixture(scope="module")
def wheel_without_c(tree, tmp_path_factory) -> Path:
    """What comes out where every call of the compiler fails."""
    (wheel,) = build(("--wheel",), tree, tmp_path_factory.mktemp("dist-without-c"), **NO_COMPILER)
    return wheel


@pytest.fixture(scope="module")
def wheel_without_headers(tree, tmp_path_factory) -> Path:
    """What comes out where the compiler finds no headers of Python."""
    folder = tmp_path_factory.mktemp("compiler")
    # The last -O counts: what is fast takes three times as long to compile, and the other wheels have it.
    compiler = folder / "cc"
    compiler.write_text('#!/bin/sh\ncase "$*" in *step.c*) exit 1;; esac\nexec cc "$@" -O1\n')
    compiler.chmod(0o755)
    # What a build leaves in its tree, the next one there takes.
    copy = shutil.copytree(tree, folder / "tree", ignore=shutil.ignore_patterns(*GENERATED))
    (wheel,) = build(("--wheel",), copy, tmp_path_factory.mktemp("dist-without-headers"), CC=str(compiler))
    return wheel


def names(archive: Path) -> set[str]:
    """The files in a wheel, or in an sdist below its folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            return set(file.namelist())
    with tarfile.open(archive) as file:
        return {member.name.partition("/")[2] for member in file if member.isfile()}


def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as file:
        return email.message_from_bytes(file.read(f"runningbn-{runningbn.__version__}.dist-info/METADATA"))


def modules() -> set[str]:
    """Every module of the package, and the mark of its types."""
    return {str(path.relative_to(ROOT)) for path in (ROOT / "runningbn").rglob("*.py")} | {"runningbn/py.typed"}


def test_sdist_has_all_that_a_build_needs(sdist):
    needed = {f"runningbn/kernels/csrc/{name}" for name in SOURCES} | {"pyproject.toml", "README.md", "LICENSE"}
    assert names(sdist) >= needed | modules()


def test_sdist_has_no_part_of_the_tests_and_nothing_built(sdist):
    # Half of the tests, which is what setuptools picks by itself, would not run.
    unwanted = ("tests/", "benchmarks/", "docs/", ".ci/")
    assert [name for name in names(sdist) if name.startswith(unwanted) or name.endswith(".so")] == []


def test_wheel_has_the_package_and_nothing_else(wheel):
    inside = names(wheel)
    assert inside >= modules() | {f"runningbn/kernels/{name}.abi3.so" for name in ("_cpu", "_step")}
    assert {name.partition("/")[0] for name in inside} == {"runningbn", f"runningbn-{runningbn.__version__}.dist-info"}


def test_a_build_somewhere_else_at_another_time_has_the_same_bytes(tree, sdist_and_wheel, tmp_path):
    other = shutil.copytree(tree, tmp_path / "another" / "place", ignore=shutil.ignore_patterns(*GENERATED))
    for path in other.rglob("*"):
        path.chmod(path.stat().st_mode & 0o700)
        os.utime(path, (1, 1e9))
    for first, second in zip(sdist_and_wheel, reversed(build((), other, tmp_path / "dist", **RELEASE))):
        assert (first.name, hashlib.sha256(first.read_bytes()).hexdigest()) == (
            second.name, hashlib.sha256(second.read_bytes()).hexdigest(),
        )  # fmt: skip


def test_wheel_is_for_every_python_from_the_oldest(wheel):
    name, version, python, abi, platform = wheel.stem.split("-")
    assert (name, version, python, abi) == ("runningbn", runningbn.__version__, "cp310", "abi3")
    assert platform != "any"


def test_metadata_say_what_the_package_is(wheel):
    told = metadata(wheel)
    assert (told["Name"], told["Version"]) == ("runningbn", runningbn.__version__)
    assert (told["Requires-Python"], told["License-Expression"]) == (">=3.10", "MIT")
    required = {text for text in told.get_all("Requires-Dist") if "extra ==" not in text}
    assert required == {"torch>=2.4", "einops>=0.8"}
    urls = dict(text.split(", ") for text in told.get_all("Project-URL"))
    assert urls.keys() == {"Homepage", "Documentation", "Changelog", "Issues"}
    assert {"cli", "demo", "lightning", "plot", "progress"} <= set(told.get_all("Provides-Extra"))
    assert f"runningbn-{runningbn.__version__}.dist-info/licenses/LICENSE" in names(wheel)


def test_installed_wheel_trains_by_its_c_kernels(wheel, tmp_path):
    from runningbn.kernels import cpu, cpu_step

    target = install(wheel, tmp_path / "site")
    file, serving, reason, of_steps = run(sys.executable, "-c", STEP, cwd=tmp_path, PYTHONPATH=str(target)).splitlines()
    assert Path(file).is_relative_to(target)
    assert of_steps == str(cpu_step.unavailable())
    # On a torch without what they need, they say so as they do in the tree.
    assert (serving, reason) == (
        ("runningbn.kernels.cpu", "None")
        if cpu.unavailable() is None
        else ("runningbn.kernels.aten", cpu.unavailable())
    )


def test_without_headers_of_python_the_kernels_are_there_and_python_prepares_their_steps(
    wheel_without_headers, tmp_path
):
    inside = {name for name in names(wheel_without_headers) if name.endswith(".so")}
    assert inside == {"runningbn/kernels/_cpu.abi3.so"}
    target = install(wheel_without_headers, tmp_path / "site")
    _, serving, reason, of_steps = run(sys.executable, "-c", STEP, cwd=tmp_path, PYTHONPATH=str(target)).splitlines()
    if reason == "None":
        assert serving == "runningbn.kernels.cpu"
        assert "headers of Python" in of_steps


def test_without_a_compiler_the_wheel_has_python_only(wheel_without_c):
    inside = names(wheel_without_c)
    assert inside >= modules()
    assert not any(name.endswith((".so", ".o")) for name in inside)


def test_without_a_compiler_torch_serves_and_the_command_line_says_why(wheel_without_c, tmp_path):
    target = install(wheel_without_c, tmp_path / "site")
    file, serving, reason, of_steps = run(sys.executable, "-c", STEP, cwd=tmp_path, PYTHONPATH=str(target)).splitlines()
    assert Path(file).is_relative_to(target)
    assert (serving, of_steps) == ("runningbn.kernels.aten", reason)
    assert "C compiler" in reason
    told = run(sys.executable, "-m", "runningbn", "backends", cwd=tmp_path, PYTHONPATH=str(target))
    (row,) = [line for line in told.splitlines() if line.startswith("cpu ")]
    assert row.endswith(f"no: {reason}")
