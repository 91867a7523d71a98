"""The updates that compiled code calls, in C: as in Python bit for bit, and safe with what they cannot take."""

from __future__ import annotations

import pytest
import torch
from cases import noise
from torch import nn

from runningbn import PreciseBatchNorm2d, RunningBatchNorm
from runningbn.kernels import cpu, cpu_operators
from runningbn.kernels.cpu_library import OPERATORS
from runningbn.ops import update
from runningbn.ops.law import Law
from runningbn.ops.state import GradientState, NoiseState, State

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

UPDATES = ["update_batch", "update_exact", "update_running"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.fixture(autouse=True)
def registered():
    if not cpu_operators.register():
        pytest.skip("this torch has no C interface for operators")


def test_each_update_has_a_function_in_c():
    assert set(OPERATORS) == set(update._UPDATES)


def of_update(name, dtype=torch.float32, channels=5, samples=10):
    """The arguments: the state of a layer that has seen something, and the sums of a batch."""
    layer = RunningBatchNorm(channels).to(dtype)
    for seed in range(3 if channels else 0):
        layer(noise((6, channels), seed).to(dtype))
    fields = (*State._fields, *NoiseState._fields) if name == "update_running" else State._fields
    state = [getattr(layer, field).clone() for field in fields]
    count = torch.full((channels,), 10.0)
    batch = [noise((channels,), 4), noise((channels,), 5), 30 + noise((channels,), 6).square(), count]
    vectors = [vector.to(dtype) for vector in (*batch, torch.full((channels,), 0.3))]
    return [*state, *vectors, samples, True, *Law(max_lag=0.25)]


def of_gradient(dtype=torch.float32, channels=5, samples=10):
    """Those of the update of the gradient."""
    state = [noise((channels,), seed).to(dtype) for seed in range(len(GradientState._fields))]
    batch = [noise((channels,), 10 + seed).to(dtype) for seed in range(2)]
    others = [torch.full((channels,), value, dtype=dtype) for value in (1.5, 0.3, 0.1, 0.8)]
    return [*state, *batch, *others, samples]


def arguments_of(name, **options):
    return of_gradient(**options) if name == "update_gradient" else of_update(name, **options)


def copied(arguments):
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def run_both(name, arguments):
    """By C and by Python: the results and the arguments afterwards are the same; returns those of C."""
    in_c, in_python = copied(arguments), copied(arguments)
    results = getattr(torch.ops.runningbn, name)(*in_c)
    assert_same(results, getattr(torch.ops.runningbn, f"{name}_in_python")(*in_python))
    assert_same(in_c, in_python)
    return results, in_c


@pytest.mark.parametrize("name", [*UPDATES, "update_gradient"])
@pytest.mark.parametrize("channels", [1, 5, 130])
@DTYPES
def test_an_update_is_that_of_python_bit_for_bit(name, dtype, channels):
    arguments = arguments_of(name, dtype=dtype, channels=channels)
    _, after = run_both(name, arguments)
    assert not torch.equal(after[1], arguments[1])


@pytest.mark.parametrize("name", UPDATES)
def test_a_batch_that_is_not_finite_is_ignored(name):
    arguments = of_update(name)
    sqrs = arguments[len(State._fields) + (3 if name == "update_running" else 0) + 2]
    sqrs[2], sqrs[3] = torch.nan, torch.inf
    _, after = run_both(name, arguments)
    assert torch.isfinite(torch.stack(after[:3])).all()


@pytest.mark.parametrize("name", UPDATES)
def test_a_forward_within_a_backward_changes_nothing(name):
    """As in a recomputation under activation checkpointing."""
    arguments, seen = of_update(name), []

    class Inside(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            seen.append(run_both(name, arguments))
            return dy

    Inside.apply(torch.ones(1, requires_grad=True)).backward()
    ((_, after),) = seen
    assert_same(after, arguments)


@pytest.mark.parametrize("name", [*UPDATES, "update_gradient"])
def test_no_channels(name):
    results, _ = run_both(name, arguments_of(name, channels=0))
    assert all(result.shape == (0,) for result in results)


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(4), torch.zeros(5, dtype=torch.float64), torch.zeros(10)[::2], torch.zeros(5, dtype=torch.int64)],
    ids=["size", "dtype", "strides", "integers"],
)
@pytest.mark.parametrize("place", [1, 14, 17])
def test_what_the_kernel_cannot_take_is_an_error_that_changes_nothing(wrong, place):
    arguments = of_update("update_batch")
    arguments[place] = wrong
    given = [a if a is wrong else b for a, b in zip(arguments, copied(arguments), strict=True)]
    with pytest.raises(RuntimeError, match="contiguous vectors over the channels"):
        torch.ops.runningbn.update_batch(*given)
    assert_same(given, arguments)


def test_half_precision_is_an_error():
    with pytest.raises(RuntimeError, match="float32 or float64"):
        torch.ops.runningbn.update_gradient(*of_gradient(dtype=torch.bfloat16))


def test_supported_are_contiguous_vectors_of_one_dtype_and_counters():
    vector, counter = torch.zeros(3), torch.zeros((), dtype=torch.int64)
    assert cpu_operators.supports([vector, vector, counter])
    for other in (torch.zeros(4), vector.double(), torch.zeros(6)[::2], torch.zeros(1, 3)):
        assert not cpu_operators.supports([vector, other])
    assert not cpu_operators.supports([vector.half(), vector.half()])
    assert not cpu_operators.supports([vector, torch.zeros(())])


@pytest.mark.parametrize(
    "make", [lambda: RunningBatchNorm(4), lambda: PreciseBatchNorm2d(4)], ids=["running", "precise"]
)
def test_compiled_code_calls_no_python(make, monkeypatch):
    """Neither forward nor backward; and it says so where there is a gradient to be taken by running means."""

    def refuse(buffers):
        raise AssertionError("an operator in Python was called")

    layer: nn.Module = make()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = noise((3, 4, 5, 5), 1).requires_grad_()
    compiled(x).square().sum().backward()
    monkeypatch.setattr(update.kernels, "updating", refuse)
    before = layer.steps.clone()
    compiled(x).square().sum().backward()
    assert (layer.steps == before + 1).all()
    with pytest.raises(AssertionError, match="in Python was called"):
        torch.ops.runningbn.update_batch_in_python(*of_update("update_batch"))


def test_buffers_that_the_kernel_cannot_take_are_updated_in_python():
    """Statistics that are not contiguous, in compiled code as in eager mode."""
    layers = [RunningBatchNorm(4), RunningBatchNorm(4)]
    for layer in layers:
        layer.sums = torch.zeros(4, 2)[:, 0]
    compiled = torch.compile(layers[1], fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x = noise((3, 4, 5, 5), seed)
        torch.testing.assert_close(compiled(x), layers[0](x))
    torch.testing.assert_close(layers[1].running_var, layers[0].running_var)
