"""The extension for steps on the CPU as a part of a program: what it keeps, what it frees, and when there is none."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import noise
from step_extension import counted
from steps import assert_identical, buffers_of, training_step
from torch import Tensor, nn

from runningbn import Horizon, MomentumRule, PreciseBatchNorm2d, RunningBatchNorm
from runningbn.__main__ import main
from runningbn.kernels import cpu, cpu_library, cpu_step
from runningbn.momentum import Constant

X = (2, 4, 3, 3)
needs_extension = pytest.mark.skipif(cpu_step.unavailable() is not None, reason=str(cpu_step.unavailable()))
needs_c = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


@pytest.fixture
def loaded_anew() -> Iterator[None]:
    """The extension is loaded in this test, and again after it."""
    cpu_step.extension.cache_clear()
    yield
    cpu_step.extension.cache_clear()


# ------------------------------------------------------------------------------------------------------ what it keeps


def taken(layer: nn.Module, x: Tensor) -> None:
    training_step(layer, x)


def forward_only(layer: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def without_dx(layer: nn.Module, x: Tensor) -> None:
    layer(x).backward(x)


def declined_late(layer: nn.Module, x: Tensor) -> None:
    buffer = layer._buffers.pop("last_gain")
    try:
        assert cpu_step.extension().forward(layer, x, True) is None
    finally:
        layer._buffers["last_gain"] = buffer


def declined_early(layer: nn.Module, x: Tensor) -> None:
    assert cpu_step.extension().forward(layer, x.double(), True) is None


def declined_backward(layer: nn.Module, x: Tensor) -> None:
    layer(x).sum().backward()


def ends_in_an_error(layer: nn.Module, x: Tensor) -> None:
    y = layer(x)
    with pytest.raises(ValueError, match="PyCapsule"):
        cpu_step.extension().backward(y, None, x, x, x, x, x)
    with pytest.raises(TypeError):
        cpu_step.extension().forward(layer)


@needs_extension
@pytest.mark.parametrize("make", [RunningBatchNorm, PreciseBatchNorm2d])
@pytest.mark.parametrize(
    "use",
    [taken, forward_only, without_dx, declined_late, declined_early, declined_backward, ends_in_an_error],
    ids=lambda f: f.__name__,
)
def test_nothing_is_kept_and_nothing_freed_too_often(make, use):
    gc.freeze()  # what earlier tests have left need not be looked through
    layer, x = make(4), noise(X, 0)
    held = [layer, x, layer.__dict__, layer._buffers, layer._parameters, layer.momentum, type(layer)]
    held += [*layer.parameters(), *layer.buffers()]

    def counts() -> list[int]:
        layer.zero_grad()
        gc.collect()
        tensors = sum(type(o) in (Tensor, nn.Parameter) for o in gc.get_objects())
        return [tensors, *(sys.getrefcount(o) for o in held)]

    use(layer, x)
    before = counts()
    for _ in range(50):
        use(layer, x)
    tensors, *references = counts()
    assert references == before[1:]
    assert tensors == before[0]


@needs_extension
def test_an_output_is_freed_at_once():
    gc.collect()
    gc.disable()
    try:
        with counted() as taken:
            y = RunningBatchNorm(4)(noise(X, 0))
        known = weakref.ref(y)
        del y
        assert known() is None
    finally:
        gc.enable()
    assert taken == {"forward": 1}


@needs_extension
def test_rules_of_layers_that_are_gone_are_let_go():
    layer = RunningBatchNorm(4, momentum=Horizon(samples=77))
    layer(noise(X, 0))
    known = weakref.ref(layer.momentum)
    del layer
    for i in range(40):
        RunningBatchNorm(4, momentum=Horizon(samples=100 + i))(noise(X, 0))
    gc.collect()
    assert known() is None


@needs_extension
def test_a_rule_that_fails_fails_as_in_python():
    class Failing(MomentumRule):
        def code(self) -> Any:
            raise ZeroDivisionError("of the rule")

    layer = RunningBatchNorm(4, momentum=Failing())
    before = buffers_of(layer)
    with pytest.raises(ZeroDivisionError, match="of the rule"):
        layer(noise(X, 0))
    assert_identical(buffers_of(layer), before)


@needs_extension
def test_layers_differ_though_they_agree_in_all_but_one():
    made: list[Callable[[], nn.Module]] = [
        lambda: RunningBatchNorm(4, momentum=0.1),
        lambda: RunningBatchNorm(4, momentum=0.2),
        lambda: RunningBatchNorm(4, momentum=None),
        lambda: RunningBatchNorm(4, momentum=Constant(0.3)),
        lambda: RunningBatchNorm(4, momentum=0.1, eps=0.5),
        lambda: RunningBatchNorm(4, momentum=0.1, max_lag=0.01),
        lambda: RunningBatchNorm(4, momentum=0.1, gradient="exact"),
        lambda: PreciseBatchNorm2d(4, momentum=0.1),
    ]
    layers = [make() for make in made]
    for seed in range(2):
        for layer in layers:
            training_step(layer, noise(X, seed) * 3 + seed)
    for make, layer in zip(made, layers):
        alone = make()
        for seed in range(2):
            training_step(alone, noise(X, seed) * 3 + seed)
        assert_identical(buffers_of(layer), buffers_of(alone))


@needs_extension
@pytest.mark.parametrize("make", [RunningBatchNorm, PreciseBatchNorm2d])
def test_a_layer_and_its_copies_carry_nothing_new(make):
    before = set(vars(make(4))) | ({"input_dim"} if make is RunningBatchNorm else set())
    layer = make(4)
    training_step(layer, noise(X, 0))
    assert set(vars(layer)) == before
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)
    expected = training_step(layer, noise(X, 1))
    for one in copies:
        assert set(vars(one)) == before
        with counted() as counts:
            assert_identical(training_step(one, noise(X, 1)), expected)
        assert counts == {"forward": 1, "backward": 1}
        assert_identical(buffers_of(one), buffers_of(layer))


@needs_extension
def test_threads_train_side_by_side():
    momenta = [0.1 + 0.001 * i for i in range(48)]  # more than are known at a time
    found: dict[int, dict[str, Tensor]] = {}

    def train(first: int) -> None:
        for i in range(first, len(momenta), 4):
            layer = RunningBatchNorm(64, momentum=momenta[i])
            for seed in range(3):
                training_step(layer, noise((4, 64, 8, 8), seed))
            found[i] = buffers_of(layer)

    threads = [threading.Thread(target=train, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone, found = found, {}
    train(0)
    for i, state in found.items():
        assert_identical(alone[i], state)
    assert alone.keys() == set(range(len(momenta)))


@needs_extension
def test_nothing_is_wrong_in_development_mode():
    code = """
import gc, torch
from runningbn import Horizon, PreciseBatchNorm2d, RunningBatchNorm
for make in (RunningBatchNorm, PreciseBatchNorm2d):
    for i in range(40):
        layer = make(4, momentum=Horizon(samples=100 + i) if i % 2 else 0.01 * i)
        x = torch.randn(2, 4, 3, 3, requires_grad=True)
        y = layer(x)
        y.backward(torch.randn(2, 4, 3, 3))
        layer(x).sum().backward()
gc.collect()
"""
    done = subprocess.run([sys.executable, "-X", "dev", "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# ----------------------------------------------------------------------------------------------------- without memory


@needs_extension
@pytest.mark.usefixtures("loaded_anew")
@pytest.mark.parametrize("fails", ["forward", "backward"])
def test_a_call_without_memory_is_an_error(monkeypatch, fails):
    failing = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda call: 1)
    library = cpu_library.library()
    functions = {name: getattr(library.handle, f"runningbn_{name}") for name in ("forward", "backward")}
    functions[fails] = failing
    handle = SimpleNamespace(**{f"runningbn_{name}": function for name, function in functions.items()})
    monkeypatch.setattr(cpu_step, "library", lambda: library._replace(handle=handle))
    layer, x = RunningBatchNorm(4), noise(X, 0).requires_grad_()
    if fails == "forward":
        with pytest.raises(MemoryError):
            layer(x)
        return
    y = layer(x)
    with pytest.raises(MemoryError):
        y.backward(noise(X, 1))


# ------------------------------------------------------------------------------------------------------- without it


def absent(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cpu_step, "_EXTENSION", f"{cpu_step._EXTENSION}_of_nobody")
    return "headers of Python"


def of_other_sources(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cpu_step, "INTERFACE", cpu_step.INTERFACE.replace("R:eps", "P:eps"))
    return "install runningbn again"


def an_older_torch(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cpu_step, "_EXCHANGE", "of no torch")
    return "has no C functions of DLPack"


def a_newer_dlpack(monkeypatch: pytest.MonkeyPatch) -> str:
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    monkeypatch.setattr(Tensor, "of_version_2", capsule(_VERSION_2, b"dlpack_exchange_api", None), raising=False)
    monkeypatch.setattr(cpu_step, "_EXCHANGE", "of_version_2")
    return "another version of DLPack"


_VERSION_2 = ctypes.cast((ctypes.c_uint32 * 32)(2, 0, *[1] * 30), ctypes.c_void_p)


@needs_extension
@pytest.mark.usefixtures("loaded_anew")
@pytest.mark.parametrize(
    "missing", [absent, of_other_sources, an_older_torch, a_newer_dlpack], ids=lambda f: f.__name__
)
def test_without_it_python_does_the_same(monkeypatch, capsys, missing):
    layer = RunningBatchNorm(4)
    expected = training_step(layer, noise(X, 0))
    reason = missing(monkeypatch)
    cpu_step.extension.cache_clear()
    assert reason in str(cpu_step.unavailable())
    with counted() as counts:
        assert_identical(training_step(RunningBatchNorm(4), noise(X, 0)), expected)
    assert counts == {"declined forward": 1}
    main(["backends"])
    assert reason in capsys.readouterr().out


@needs_c
def test_the_command_line_says_that_it_serves(capsys):
    main(["backends"])
    assert ("prepared in C" in capsys.readouterr().out) == (cpu_step.unavailable() is None)
