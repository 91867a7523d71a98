"""The steps that compiled code calls, in C: as in eager mode bit for bit, and safe with what they cannot take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import channels_last, noise, statistics_dtype, with_random_affine
from torch import Tensor, nn

from runningbn import Horizon, MomentumRule, PreciseBatchNorm2d, RunningBatchNorm, SquareRoot
from runningbn.kernels import cpu, cpu_operators, use_backend
from runningbn.kernels.cpu_library import OPERATORS
from runningbn.momentum import rule_of
from runningbn.ops.spec import Mode
from runningbn.ops.state import FORWARD_BUFFERS, GradientState, State

if not cpu_operators.are_registered():
    pytest.skip("there is no C library, or this torch has no C interface for operators", allow_module_level=True)

MODES = pytest.mark.parametrize("mode", Mode, ids=lambda mode: mode.label)
SHAPES = [(5, 4), (6, 1, 3), (2, 5, 3, 4), (1, 3, 2, 2, 2), (2, 16, 70, 70)]
LAYOUTS = {"contiguous": torch.Tensor.contiguous, "channels_last": channels_last}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def layer_of(mode: Mode, channels: int, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """One that has seen something."""
    if mode is Mode.BATCH:
        layer: Any = PreciseBatchNorm2d(channels, **options)
    else:
        layer = RunningBatchNorm(channels, gradient="running" if mode is Mode.RUNNING else "exact", **options)
    layer = with_random_affine(layer).to(dtype)
    for seed in range(3):
        layer(noise((6, channels, 2, 1), seed, dtype))
    return layer


def buffers(layer: Any, names: tuple[str, ...]) -> tuple[Tensor, ...]:
    return tuple(getattr(layer, name).clone() for name in names)


def constants(layer: Any) -> tuple[float, ...]:
    spec = layer._spec()
    rule = rule_of(spec.momentum)
    return cpu_operators.constants_of(spec.eps, spec.law, rule.code(), rule.whole_batches)


def assert_same(one: Any, other: Any) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def run_forward(mode: Mode, layer: Any, x: Tensor, updates: bool = True) -> tuple[Tensor, tuple[Tensor, ...]]:
    """By the operator and by the kernel of eager mode: coefficients and buffers are the same, and are returned."""
    by_operator, eager = (buffers(layer, mode.forward_buffers) for _ in range(2))
    rows = cpu_operators.forward(mode, x, by_operator, constants(layer))
    prepared = cpu.prepare(eager)
    assert prepared is not None
    _, expected = cpu.training_forward(x, layer.weight, layer.bias, prepared, layer._spec(), updates)
    assert_same([rows, *by_operator], [expected, *eager])
    return rows, by_operator


def run_backward(mode: Mode, layer: Any, dy: Tensor, x: Tensor, rows: Tensor, needs_dx: bool) -> tuple[Tensor, ...]:
    """Likewise."""
    by_operator, eager = (buffers(layer, mode.backward_buffers) for _ in range(2))
    found = cpu_operators.backward(mode, dy, x, layer.weight, rows, by_operator, needs_dx)
    prepared = cpu.prepare(eager) if eager else None
    expected = cpu.training_backward(dy, x, layer.weight, rows, mode, prepared, needs_dx)
    assert_same(found[1:], expected[1:])
    assert_same(by_operator, eager)
    if expected.dx is None:
        assert found[0].shape == (0,)
    else:
        assert_same(found[:1], [expected.dx])
    assert mode is not Mode.RUNNING or not torch.equal(by_operator[0], layer.sum_dy)
    return found


def test_each_mode_has_two_functions_in_c():
    assert set(OPERATORS) == {f"{direction}_{mode.label}" for direction in ("forward", "backward") for mode in Mode}


@MODES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_is_that_of_eager_mode_bit_for_bit(mode, shape, layout, dtype):
    x, dy = (layout(noise(shape, seed, dtype)) for seed in (4, 5))
    layer = layer_of(mode, shape[1], statistics_dtype(dtype))
    rows, after = run_forward(mode, layer, x)
    assert not torch.equal(after[1], layer.sums)
    for needs_dx in (True, False):
        run_backward(mode, layer, dy, x, rows, needs_dx)


STRIDES = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": channels_last,
    "sliced": lambda t: torch.cat((t, t), 1)[:, : t.shape[1]],
    "transposed": lambda t: t.mT.contiguous().mT,
    "expanded": lambda t: t[:1].expand_as(t),
}


@MODES
@pytest.mark.parametrize("for_dy", STRIDES.values(), ids=STRIDES)
@pytest.mark.parametrize("for_x", STRIDES.values(), ids=STRIDES)
def test_inputs_and_gradients_of_any_layout(mode, for_x, for_dy):
    """Results are in the layout of x if that is dense as the kernels take it, as the compiler is told."""
    x, dy = for_x(noise((3, 4, 5, 6), 4)), for_dy(noise((3, 4, 5, 6), 5))
    dense = x if for_x in LAYOUTS.values() else x.contiguous()
    layer = layer_of(mode, 4)
    state, expected_state = (buffers(layer, mode.forward_buffers) for _ in range(2))
    rows = cpu_operators.forward(mode, x, state, constants(layer))
    expected_rows = cpu_operators.forward(mode, dense, expected_state, constants(layer))
    assert_same((rows, *state), (expected_rows, *expected_state))
    state, expected_state = (buffers(layer, mode.backward_buffers) for _ in range(2))
    found = cpu_operators.backward(mode, dy, x, layer.weight, rows, state, True)
    traced = cpu_operators._traced_backward(dy, x, layer.weight, rows, True)
    assert traced[0].stride() == found[0].stride()
    dy = torch.empty_like(dense).copy_(dy)
    expected = cpu_operators.backward(mode, dy, dense, layer.weight, rows, expected_state, True)
    assert_same((*found, *state), (*expected, *expected_state))


@pytest.mark.parametrize("momentum", [0.1, 1.0, None, Horizon(8, 2, 0.5), SquareRoot(0.2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"eps": 0.1}, {"affine": False}, {"bias": False}], ids=str)
def test_of_any_rule_and_parameters(momentum, options):
    x, dy = (noise((3, 4, 2, 2), seed) for seed in (4, 5))
    for mode in Mode:
        layer = layer_of(mode, 4, momentum=momentum, **options)
        rows, _ = run_forward(mode, layer, x)
        run_backward(mode, layer, dy, x, rows, True)
    run_forward(Mode.RUNNING, layer_of(Mode.RUNNING, 4, momentum=momentum, max_lag=0.01, **options), x)


@MODES
def test_a_batch_that_is_not_finite_is_ignored(mode):
    x = noise((6, 4, 2), 4)
    x[2, 1, 0], x[3, 2, 1] = torch.nan, torch.inf
    layer = layer_of(mode, 4)
    _, after = run_forward(mode, layer, x)
    assert torch.isfinite(torch.stack(after[:3])).all()
    assert torch.equal(after[1][1:3], layer.sums[1:3])


@MODES
def test_a_forward_within_a_backward_changes_nothing(mode):
    """As in a recomputation under activation checkpointing."""
    layer, x, seen = layer_of(mode, 4), noise((6, 4, 2), 4), []

    class Inside(torch.autograd.Function):
        @staticmethod
        def forward(ctx, one):
            return one.clone()

        @staticmethod
        def backward(ctx, dy):
            seen.append(run_forward(mode, layer, x, updates=False))
            return dy

    Inside.apply(torch.ones(1, requires_grad=True)).backward()
    ((_, after),) = seen
    assert_same(after, buffers(layer, mode.forward_buffers))


@MODES
def test_they_are_sound_operators(mode):
    layer, x = layer_of(mode, 3), noise((6, 3, 2), 4)
    forward = getattr(torch.ops.runningbn, f"forward_{mode.label}").default
    given = x, *buffers(layer, mode.forward_buffers), *constants(layer)
    tests = "test_schema", "test_faketensor"
    torch.library.opcheck(forward, given, test_utils=tests)
    rows = forward(*given)
    backward = getattr(torch.ops.runningbn, f"backward_{mode.label}").default
    of_gradient = buffers(layer, mode.backward_buffers)
    for needs_dx in (True, False):
        torch.library.opcheck(
            backward, (noise(x.shape, 5), x, layer.weight.detach(), rows, *of_gradient, needs_dx), test_utils=tests
        )


WRONG = {
    "size": torch.zeros(5),
    "dtype": torch.zeros(4, dtype=torch.float64),
    "strides": torch.zeros(8)[::2],
    "integers": torch.zeros(4, dtype=torch.int64),
    "dimensions": torch.zeros(4, 1),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("place", [1, 2, 10, 14])  # shift, sums, running_var, noise
def test_vectors_that_do_not_fit_are_an_error_that_changes_nothing(wrong, place):
    layer, x = layer_of(Mode.RUNNING, 4), noise((6, 4, 2), 4)
    state = buffers(layer, FORWARD_BUFFERS)
    given = [x, *state, *constants(layer)]
    given[place] = wrong
    before = [buffer.clone() for buffer in state]
    with pytest.raises(RuntimeError, match="contiguous vectors over the channels"):
        torch.ops.runningbn.forward_running(*given)
    assert_same(state, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:0], "not empty"),
        (lambda x: x.reshape(-1), "not empty"),
        (lambda x: x.long(), "expected an input of float32"),
        (lambda x: x.double(), "contiguous vectors"),
        (lambda x: x.repeat(1, 2, 1), "contiguous vectors"),
    ],
    ids=["empty", "one dimension", "integers", "double", "channels"],
)
def test_an_input_that_does_not_fit_is_an_error(change, message):
    layer = layer_of(Mode.BATCH, 4)
    state = buffers(layer, State._fields)
    with pytest.raises(RuntimeError, match=message):
        cpu_operators.forward(Mode.BATCH, change(noise((6, 4, 2), 4)), state, constants(layer))
    assert_same(state, buffers(layer, State._fields))


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_weight_that_does_not_fit_is_an_error(wrong):
    layer, x = layer_of(Mode.BATCH, 4), noise((6, 4, 2), 4)
    rows, _ = run_forward(Mode.BATCH, layer, x)
    with pytest.raises(RuntimeError, match="contiguous vectors over the channels"):
        cpu_operators.backward(Mode.BATCH, x, x, wrong, rows, (), True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda dy, rows: (dy.double(), rows), "shape and dtype of the input"),
        (lambda dy, rows: (dy[:1], rows), "shape and dtype of the input"),
        (lambda dy, rows: (dy, rows[:1]), "coefficients of the forward"),
        (lambda dy, rows: (dy, rows.double()), "coefficients of the forward"),
        (lambda dy, rows: (dy, rows.T.contiguous().T), "coefficients of the forward"),
    ],
    ids=["dtype", "shape", "rows", "dtype of rows", "strides of rows"],
)
def test_a_gradient_that_does_not_fit_is_an_error(change, message):
    layer, x = layer_of(Mode.RUNNING, 4), noise((6, 4, 2, 2), 4)
    rows, _ = run_forward(Mode.RUNNING, layer, x)
    dy, rows = change(noise(x.shape, 5), rows)
    state = buffers(layer, GradientState._fields)
    with pytest.raises(RuntimeError, match=message):
        cpu_operators.backward(Mode.RUNNING, dy, x, layer.weight, rows, state, True)
    assert_same(state, buffers(layer, GradientState._fields))


def test_a_counter_of_another_dtype_is_an_error():
    layer = layer_of(Mode.BATCH, 4)
    state = State(*buffers(layer, State._fields))._replace(num_batches_tracked=torch.zeros(()))
    with pytest.raises(RuntimeError, match="num_batches_tracked: expected an int64"):
        cpu_operators.forward(Mode.BATCH, noise((6, 4), 4), state, constants(layer))


# ------------------------------------------------------------------------------------------------- in compiled code


def operators_in(layer: nn.Module, x: Tensor) -> list[str]:
    """The operators of this library in the graph of a compiled step, without their namespace."""
    names: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes if "runningbn" in str(node.target))
        for module in graph.modules():
            if isinstance(module, torch.fx.GraphModule) and module is not graph:
                names.extend(str(node.target) for node in module.graph.nodes if "runningbn" in str(node.target))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(layer, fullgraph=True, backend=backend)(x)
    return [name.removeprefix("runningbn.") for name in names]


class Tenth(MomentumRule):
    """A rule of one's own."""

    def weight(self, batch: Any, samples: Tensor, steps: Tensor) -> Tensor:
        return torch.full_like(samples, 0.1)


@MODES
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_compiled_code_calls_one_operator_each_way(mode, layout):
    layer, x = layer_of(mode, 4), layout(noise((3, 4, 5, 5), 1))
    assert {name.partition(".")[0] for name in operators_in(layer, x)} == {
        f"forward_{mode.label}",
        f"backward_{mode.label}",
    }
    torch._dynamo.reset()
    before = layer.steps.clone()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x.requires_grad_()).square().sum().backward()
    assert (layer.steps == before + 1).all()


def sliced(layer: Any) -> Tensor:
    return noise((3, 4, 5, 5), 0)[:, :, 1:, 1:]


def with_strided_buffer(layer: Any) -> Tensor:
    layer._buffers["sums"] = torch.zeros(4, 2)[:, 0]
    return noise((3, 4, 5, 5), 0)


def with_own_rule(layer: Any) -> Tensor:
    layer.momentum = Tenth()
    return noise((3, 4, 5, 5), 0)


@pytest.mark.parametrize("change", [sliced, with_strided_buffer, with_own_rule], ids=lambda f: f.__name__)
def test_what_they_do_not_take_is_traced(change):
    traced, *layers = (RunningBatchNorm(4) for _ in range(3))
    x, *_ = [change(layer) for layer in (traced, *layers)]
    assert operators_in(traced, x)[0].startswith("update_running")
    torch._dynamo.reset()
    compiled = torch.compile(layers[1], fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), layers[0](x))
    # Not the sums: their pivot is free.
    for name in ("running_mean", "running_var", "count", "noise"):
        torch.testing.assert_close(getattr(layers[1], name), getattr(layers[0], name), rtol=2e-5, atol=2e-5)


def test_another_backend_that_is_forced_is_traced():
    with use_backend("aten"):
        assert operators_in(RunningBatchNorm(4), noise((3, 4), 0))[0].startswith("update_running")
    assert operators_in(RunningBatchNorm(4), noise((3, 4), 0))[0].startswith("forward_running")


def test_a_changed_momentum_is_seen():
    layer = RunningBatchNorm(4, momentum=0.5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(noise((8, 4), 0))
    layer.momentum = 1.0
    compiled(x := noise((8, 4), 1))
    torch.testing.assert_close(layer.running_mean, x.mean(0))
