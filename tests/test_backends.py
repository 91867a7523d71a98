"""Which backend takes what: by itself, by `use_backend` and by the environment; and what it says when it cannot."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from cases import LAYERS, each
from steps import buffers_of, training_step
from torch import Tensor

from runningbn import RunningBatchNorm, kernels
from runningbn.__main__ import main
from runningbn.kernels import BACKENDS, aten, backend_for, cpu, cpu_library, use_backend
from runningbn.kernels.cpu_library import library

CHOICES = f"expected one of {', '.join(map(repr, BACKENDS))}, got 'fast'"
needs_c = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"the C backend: {cpu.unavailable()}")


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_forced", None)


@pytest.fixture
def looked_for_anew() -> Iterator[None]:
    """The library is looked for in this test, and again after it."""
    library.cache_clear()
    yield
    library.cache_clear()


def plain() -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "RUNNINGBN_BACKEND"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env={**inherited, **environment}, capture_output=True, text=True
    )


# ----------------------------------------------------------------------------------------------------------- the choice


@needs_c
@each(LAYERS)
def test_backends_train_alike(case):
    """Also where the first channel of a batch is not finite."""
    batches = case.batches((5, 2, 8, 9))
    batches[2][1, 0] = torch.inf
    found = {}
    for name in ("cpu", "aten"):
        layer = case.layer()
        with use_backend(name):
            steps = [training_step(layer, x) for x in batches]
        found[name] = {f"{i} {part}": value for i, step in enumerate(steps) for part, value in step.items()}
        # Pivots may differ; what they are about is in the running moments.
        found[name] |= {n: b for n, b in buffers_of(layer).items() if n not in ("shift", "sums", "sqrs")}
    for name, expected in found["aten"].items():
        # Some tens of roundings of float32, of numbers of order 1 to 10, and in sums over a batch of hundreds.
        close = {"rtol": 1e-5, "atol": 1e-5 * max(1.0, expected.nan_to_num(0, 0, 0).abs().max().item())}
        torch.testing.assert_close(
            found["cpu"][name], expected, **close, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


@needs_c
def test_the_fastest_that_can_takes_an_input():
    assert backend_for(plain(), torch.float32) is cpu
    assert backend_for(plain().bfloat16(), torch.float32) is cpu
    assert backend_for(plain().half(), torch.float32) is cpu
    assert backend_for(plain().double(), torch.float64) is cpu


@pytest.mark.parametrize(
    ("x", "dtype"),
    [
        (torch.ones(4, 3), torch.float64),
        (torch.ones(4, 3, dtype=torch.float64), torch.float32),
        (torch.ones(4, 3, device="meta"), torch.float32),
        (torch.ones(4, 3).as_subclass(type("Mine", (Tensor,), {})), torch.float32),
    ],
    ids=["wide statistics", "narrow statistics", "meta", "subclass"],
)
def test_what_c_cannot_take_goes_to_torch(x, dtype):
    assert backend_for(x, dtype) is aten
    if cpu.unavailable() is None:
        expected = rf"'cpu' is forced and cannot take {type(x).__name__} of {x.dtype} on {x.device}"
        with use_backend("cpu"), pytest.raises(RuntimeError, match=expected):
            backend_for(x, dtype)


@needs_c
def test_a_layer_says_what_a_forced_backend_cannot_take():
    with use_backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu' is forced and cannot take .* on meta"):
        RunningBatchNorm(3, device="meta")(plain().to("meta"))


def test_without_the_library_torch_takes_all(monkeypatch, looked_for_anew):
    monkeypatch.setattr(cpu_library, "EXTENSION_SUFFIXES", [".missing"])
    assert backend_for(plain(), torch.float32) is aten
    assert RunningBatchNorm(3)(plain()).isfinite().all()


# --------------------------------------------------------------------------------------------------------- use_backend


def test_an_unknown_name_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=f"use_backend: {CHOICES}"), use_backend("fast"):
        pass
    assert kernels._forced is None


def test_a_backend_that_cannot_serve_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(cpu, "unavailable", lambda: "it rains")
    with pytest.raises(RuntimeError, match="use_backend: 'cpu' cannot be used here: it rains"), use_backend("cpu"):
        pass
    assert kernels._forced is None


@needs_c
def test_blocks_nest():
    with use_backend("aten"):
        with use_backend("cpu"):
            assert backend_for(plain(), torch.float32) is cpu
        assert backend_for(plain(), torch.float32) is aten
    assert kernels._forced is None


def test_an_error_leaves_the_choice_as_it_was():
    with pytest.raises(KeyError), use_backend("aten"):
        raise KeyError
    assert kernels._forced is None
    with use_backend("aten"):
        with pytest.raises(ValueError, match="expected one of"), use_backend("fast"):
            pass
        assert kernels._forced == "aten"


# ------------------------------------------------------------------------------------------------------ the environment


@pytest.mark.parametrize("name", ["aten", pytest.param("cpu", marks=needs_c)])
def test_the_environment_names_a_backend(name):
    code = (
        "import torch; from runningbn.kernels import backend_for; print(backend_for(torch.ones(4, 3), torch.float32))"
    )
    done = run(code, RUNNINGBN_BACKEND=name)
    assert done.returncode == 0, done.stderr
    assert f"runningbn.kernels.{name}" in done.stdout


def test_the_environment_is_told_the_choices():
    done = run("import runningbn", RUNNINGBN_BACKEND="fast")
    assert done.returncode != 0
    assert f"ValueError: RUNNINGBN_BACKEND: {CHOICES}" in done.stderr


# --------------------------------------------------------------------------------------------------- the library itself


def test_import_does_not_load_the_library():
    code = (
        "import runningbn; from runningbn.kernels.cpu_library import library; from pathlib import Path;"
        "maps = Path('/proc/self/maps');"
        "print(library.cache_info().currsize, '/_cpu.' in (maps.read_text() if maps.exists() else ''))"
    )
    done = run(code)
    assert done.stdout.split() == ["0", "False"], done.stderr


@pytest.mark.usefixtures("looked_for_anew")
class TestReasons:
    def test_a_library_that_was_not_built(self, monkeypatch):
        monkeypatch.setattr(cpu_library, "EXTENSION_SUFFIXES", [".missing"])
        assert "C compiler" in cpu.unavailable()
        assert cpu.version() == ""
        with pytest.raises(RuntimeError, match=r"'cpu' cannot be used here: .* C compiler"), use_backend("cpu"):
            pass

    def test_a_clone_beside_an_installed_copy(self, monkeypatch, tmp_path):
        """As where `python -m runningbn backends` is run in a clone: its own copy is imported, which was not built."""
        for place, built in (("clone", False), ("site-packages", True)):
            kernels_folder = tmp_path / place / "runningbn" / "kernels"
            kernels_folder.mkdir(parents=True)
            if built:
                (kernels_folder / "_cpu.abi3.so").touch()
        monkeypatch.setattr(cpu_library, "EXTENSION_SUFFIXES", [".abi3.so"])
        monkeypatch.setattr(
            cpu_library, "__file__", str(tmp_path / "clone" / "runningbn" / "kernels" / "cpu_library.py")
        )
        monkeypatch.chdir(tmp_path / "clone")
        monkeypatch.setattr(sys, "path", ["", str(tmp_path / "clone"), str(tmp_path / "site-packages")])
        reason = cpu.unavailable()
        assert f"of this copy, {tmp_path / 'clone' / 'runningbn'}, was not built" in reason
        assert f"that of {tmp_path / 'site-packages' / 'runningbn'} was" in reason
        assert "another folder" in reason

    @pytest.mark.parametrize("tree", [True, False], ids=["source tree", "installed"])
    @pytest.mark.parametrize("compiler", ["/usr/bin/gcc", None])
    def test_a_copy_without_another_says_whether_there_is_a_compiler(self, monkeypatch, tmp_path, tree, compiler):
        kernels_folder = tmp_path / "runningbn" / "kernels"
        kernels_folder.mkdir(parents=True)
        if tree:
            (tmp_path / "pyproject.toml").touch()
        monkeypatch.setattr(cpu_library, "__file__", str(kernels_folder / "cpu_library.py"))
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        monkeypatch.setattr("shutil.which", lambda name: compiler)
        reason = cpu.unavailable()
        assert "C compiler; " in reason
        assert reason.count("pip install -e .") == tree
        assert ("/usr/bin/gcc" in reason) == (compiler is not None)
        assert ("none is found here" in reason) == (compiler is None)
        assert ("install runningbn again" in reason) == (compiler is not None and not tree)

    @needs_c
    @pytest.mark.parametrize(
        "change", [("P:sums P:sqrs", "P:sqrs P:sums"), ("HORIZON", "HORIZONS"), ("R:eps", "P:eps")]
    )
    def test_a_library_from_other_sources(self, monkeypatch, change):
        assert change[0] in cpu_library.INTERFACE
        monkeypatch.setattr(cpu_library, "INTERFACE", cpu_library.INTERFACE.replace(*change))
        assert "install runningbn again" in cpu.unavailable()

    @needs_c
    def test_a_library_that_does_not_tell_its_interface(self, monkeypatch):
        loaded = ctypes.CDLL
        monkeypatch.setattr(
            cpu_library.ctypes, "CDLL", lambda path: SimpleNamespace() if "/_cpu." in path else loaded(path)
        )
        assert "install runningbn again" in cpu.unavailable()

    @needs_c
    def test_a_file_that_is_no_library(self, monkeypatch, tmp_path):
        (tmp_path / "_cpu.broken").write_text("not a library")
        monkeypatch.setattr(cpu_library, "EXTENSION_SUFFIXES", [".broken"])
        monkeypatch.setattr(cpu_library, "__file__", str(tmp_path / "cpu_library.py"))
        assert "_cpu.broken cannot be loaded" in cpu.unavailable()

    @needs_c
    def test_a_torch_without_its_loop(self, monkeypatch):
        monkeypatch.setattr(cpu_library.ctypes, "CDLL", lambda path: SimpleNamespace())
        assert f"torch {torch.__version__} has no torch_parallel_for" in cpu.unavailable()

    @needs_c
    def test_a_torch_whose_library_is_elsewhere(self, monkeypatch):
        monkeypatch.setattr(cpu_library, "_TORCH_LIBRARY", {sys.platform: "libmissing.so"})
        assert "has no torch_parallel_for" in cpu.unavailable()


@needs_c
def test_the_version_is_an_instruction_set():
    assert cpu.version() in ("baseline", "avx2", "avx512")


@pytest.mark.slow
@needs_c
@pytest.mark.parametrize(("capability", "used"), [("default", "baseline"), ("avx2", "avx2")])
def test_no_more_of_the_processor_is_used_than_torch_is_allowed(capability, used):
    code = "from runningbn.kernels import cpu; print(cpu.version())"
    if used != "baseline" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this machine has no AVX2")
    assert run(code, ATEN_CPU_CAPABILITY=capability).stdout.strip() == used


def test_the_command_line_says_which_serve_and_why_others_do_not(capsys, monkeypatch):
    monkeypatch.setattr(cpu, "unavailable", lambda: "there is no compiler")
    assert main(["backends"]) == 0
    lines = capsys.readouterr().out.splitlines()
    by_name = {line.split()[0]: line for line in lines[1 : 1 + len(BACKENDS)]}
    assert list(by_name) == list(BACKENDS)
    assert by_name["cpu"].endswith("no: there is no compiler")
    assert by_name["aten"].endswith("yes")


def test_the_command_line_says_what_is_forced(capsys):
    with use_backend("aten"):
        main(["backends"])
    assert "'aten'" in capsys.readouterr().out
