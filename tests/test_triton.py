"""The GPU kernels: on a GPU where there is one, otherwise on the CPU in Triton's interpreter.

The interpreter is chosen by an environment variable when triton is imported. So without a GPU the tests of what the
kernels compute run in a process of their own, which `test_in_the_interpreter` starts;
``TRITON_INTERPRET=1 pytest tests/test_triton.py`` runs them one by one.

The reference is the composition of sweeps and updates in plain torch, in float64.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases import channels_last, each_pair, names_of, statistics_dtype
from law_steps import SCENARIOS, Scenario, assert_trains_as_the_reference, step_of
from steps import assert_identical, buffers_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu.no_device import no_device
from runningbn import Horizon, SquareRoot
from runningbn.kernels import aten, triton, triton_devices, triton_launch, triton_plan
from runningbn.kernels import use_backend as use
from runningbn.kernels.contract import GradientSums
from runningbn.momentum import Momentum, rule_of
from runningbn.ops.law import Law
from runningbn.ops.spec import Coefficients, Mode, StepSpec, unpack
from runningbn.ops.state import Batch, GradientState, LayerState, NoiseState, State, Sums, moments
from runningbn.ops.update import update, update_gradient

# The interpreter computes with numpy, which warns of what is meant to overflow.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
INSTALLED = importlib.util.find_spec("triton") is not None
RUNS = INSTALLED and (INTERPRETED or DEVICE == "cuda")
runs_kernels = pytest.mark.skipif(not RUNS, reason="runs in the interpreter, see test_in_the_interpreter")
needs_triton = pytest.mark.skipif(not INSTALLED, reason="triton is not installed")

EPS, LAW = 1e-5, Law(max_lag=0.05)
FREE = LAW._replace(max_lag=math.inf)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
RULES: dict[str, Momentum] = {
    "horizon": Horizon(samples=8, start=2, fraction=0.5),
    "square root": SquareRoot(0.1),
    "constant": 0.1,
    "one": 1.0,
    "zero": 0.0,
    "cumulative": None,
}
SHAPES = {
    "planes": (3, 37, 7, 7),
    "small planes": (9, 3, 4),
    "large planes": (3, 3, 60, 50),  # with several tiles in a plane, and several planes in a split
    "volumes": (2, 6, 4, 3, 4),
    "one sample": (1, 4, 6, 6),
    "one channel": (5, 1, 4, 4),
    "one channel, flat": (9, 1),
    "rows": (33, 6),
    "many rows": (300, 40),  # with several splits, and two blocks of channels
    "one row": (1, 6),
    "one position": (9, 6, 1, 1),
}
IN_CHANNELS_LAST = ("planes", "volumes", "large planes")
MODES = {"precise": (False, False), "running, exact": (True, False), "running": (True, True)}


@pytest.fixture(autouse=True)
def _empty_memory_is_poisoned() -> Iterator[None]:
    """On a GPU, too; and counters are left at zero."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
    assert all(int(counter.count_nonzero()) == 0 for counter in triton_launch.counters.values())


def empty_state(channels: int, dtype: torch.dtype = torch.float32) -> State:
    vectors = [torch.zeros(channels, dtype=dtype, device=DEVICE) for _ in State._fields]
    vectors[State._fields.index("running_var")].fill_(1)
    vectors[State._fields.index("num_batches_tracked")] = torch.zeros((), dtype=torch.int64, device=DEVICE)
    return State(*vectors)


class TrainingState(NamedTuple):
    """What a step has with running gradients."""

    noise: NoiseState
    gradient: GradientState


def mode_of(running: bool, training: TrainingState | None) -> Mode:
    return Mode.RUNNING if training is not None else Mode.EXACT if running else Mode.BATCH


def empty_noise(channels: int, dtype: torch.dtype = torch.float32) -> NoiseState:
    return NoiseState(*[torch.zeros(channels, dtype=dtype, device=DEVICE) for _ in range(3)])


def empty_gradient(channels: int, dtype: torch.dtype = torch.float32) -> GradientState:
    return GradientState(*[torch.zeros(channels, dtype=dtype, device=DEVICE) for _ in range(3)])


def empty_training(channels: int, dtype: torch.dtype = torch.float32) -> TrainingState:
    return TrainingState(empty_noise(channels, dtype), empty_gradient(channels, dtype))


def doubled(state: Any) -> Any:
    return type(state)(*[_double(part) if isinstance(part, Tensor) else doubled(part) for part in state])


def _double(t: Tensor) -> Tensor:
    return t.double().clone() if t.is_floating_point() else t.clone()


def copied(state: Any) -> Any:
    return type(state)(*[part.clone() if isinstance(part, Tensor) else copied(part) for part in state])


def prepared(state: State, training: TrainingState | None) -> tuple[Tensor, ...]:
    return (*state, *training.noise) if training is not None else tuple(state)


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)


def batch(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Channels that differ in mean and spread."""
    spread = [1, -1, *[1] * (len(shape) - 2)]
    channels = shape[1]
    x = randn(*shape, seed=seed) * (0.5 + randn(channels, seed=seed + 100).abs()).view(spread)
    return (x + randn(channels, seed=seed + 200).view(spread)).to(dtype)


class Reference(NamedTuple):
    y: Tensor
    dx: Tensor
    sum_dy: Tensor
    sum_dy_xhat: Tensor


def reference_step(
    x: Tensor, dy: Tensor, weight: Tensor | None, bias: Tensor | None, state: State, momentum: Momentum,
    running: bool, training: TrainingState | None,
) -> Reference:  # fmt: skip
    """Forward and backward in float64; updates the states, which are float64."""
    x, dy = x.double(), dy.double()
    weight, bias = (None if t is None else t.double() for t in (weight, bias))
    with use("aten"), torch.no_grad():
        rule = rule_of(momentum)
        weighed = Batch(
            aten.batch_sums(x, torch.float64).sums, len(x), rule.weight(len(x), state.samples, state.steps),
            rule.whole_batches,
        )  # fmt: skip
        spec = StepSpec(mode_of(running, training), EPS, momentum, LAW)
        var, fixed = update(LayerState(state, None if training is None else training.noise), weighed, spec)
        y = aten.normalize(x, fixed.mean, var, weight, bias, EPS)
        sum_dy, sum_dy_xhat = sums = aten.gradient_sums(dy, x, fixed.mean, fixed.rstd)
        n = x.numel() // x.shape[1]
        if training is not None:
            m0, m1 = update_gradient(training.gradient, sums, fixed, n)
        else:
            kappa_mean, kappa_var = (1 / n, 1 / n) if fixed.kappa_mean is None else (fixed.kappa_mean, fixed.kappa_var)
            m0, m1 = kappa_mean * sum_dy, kappa_var * sum_dy_xhat
        return Reference(y, aten.input_gradient(dy, x, fixed.mean, fixed.rstd, weight, m0, m1), sum_dy, sum_dy_xhat)


def step(
    x: Tensor, dy: Tensor, weight: Tensor | None, bias: Tensor | None, state: State, momentum: Momentum,
    running: bool, training: TrainingState | None,
) -> Reference:  # fmt: skip
    buffers = prepared(state, training)
    mode = mode_of(running, training)
    y, fixed = triton.training_forward(x, weight, bias, buffers, StepSpec(mode, EPS, momentum, LAW), True)
    assert fixed.shape == (5 if training is not None else 4 if running else 2, x.shape[1])
    gradient = None if training is None else training.gradient
    dx, sum_dy, sum_dy_xhat = triton.training_backward(dy, x, weight, fixed, mode, gradient, True)
    assert dx is not None
    return Reference(y, dx, sum_dy, sum_dy_xhat)


def assert_close(actual: Tensor, expected: Tensor, roundings: float, dtype: torch.dtype | None = None) -> None:
    """Up to so many roundings in the dtype, of what is about as large as the largest."""
    eps = torch.finfo(dtype or actual.dtype).eps
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual.double(), expected, rtol=roundings * eps, atol=roundings * eps * max(scale, 1e-3))


def assert_same_state(actual: State, expected: State, roundings: float = 8) -> None:
    """The same statistics, about whatever pivot."""
    named = {**expected._asdict(), **dict(zip(("mean", "var"), moments(Sums(*expected[:4]))))}
    mine = {**actual._asdict(), **dict(zip(("mean", "var"), moments(Sums(*actual[:4]))))}
    for name in ("mean", "var", *State._fields[3:]):
        if name == "num_batches_tracked":
            assert mine[name] == named[name]
            continue
        eps = roundings * torch.finfo(mine[name].dtype).eps
        found, scale = mine[name].double(), float(named["var"].max())
        torch.testing.assert_close(found, named[name], rtol=eps, atol=eps * scale, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_training(actual: TrainingState, expected: TrainingState, roundings: float) -> None:
    """R and the running sums, up to roundings of numbers of order 1, which R multiplies by up to `trust_noise`."""
    of_noise, of_gradient = (zip(part._fields, part, wanted) for part, wanted in zip(actual, expected))
    for parts, factor in ((of_noise, 1.0), (of_gradient, LAW.trust_noise)):
        for name, found, wanted in parts:
            atol = factor * roundings * torch.finfo(found.dtype).eps * max(1.0, float(wanted.abs().max()))
            torch.testing.assert_close(found.double(), wanted, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def cases() -> Iterator[Any]:
    """Every shape and layout in float32 and in another dtype, each in another mode, in turn."""
    layouts = [(name, False) for name in SHAPES] + [(name, True) for name in IN_CHANNELS_LAST]
    for i, (shape, last) in enumerate(layouts):
        for j, dtype in enumerate(("float32", ["bfloat16", "float64", "float16"][i % 3])):
            mode = list(MODES)[(i + i // 3 + j) % 3]
            yield pytest.param(shape, last, dtype, mode, id=f"{shape}{', last' * last}-{dtype}-{mode}")


@pytest.fixture(params=[False, True], ids=["", "in splits"])
def _in_splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As planned, and as planned where programs share the elements of a channel, however few these are."""
    if request.param:
        monkeypatch.setattr(triton_plan, "_TILES_AT_ONCE", 0)
    triton._plan_of.cache_clear()
    yield
    triton._plan_of.cache_clear()


@runs_kernels
@pytest.mark.usefixtures("_in_splits")
@pytest.mark.parametrize(("shape", "last", "dtype", "mode"), list(cases()))
def test_a_step(shape: str, last: bool, dtype: str, mode: str) -> None:
    (running, by_gradient), of_x = MODES[mode], DTYPES[dtype]
    kind, channels = statistics_dtype(of_x), SHAPES[shape][1]
    # Each combination of parameters is somewhere in the table; weights in 16 bits, too.
    which = (list(SHAPES).index(shape) + list(DTYPES).index(dtype)) % 4
    of_weight = of_x if which % 2 else kind
    weight = (1 + 0.3 * randn(channels, seed=1)).to(of_weight) if which != 2 else None
    bias = randn(channels, seed=2).to(of_weight) if which < 2 else None
    state, training = empty_state(channels, kind), empty_training(channels, kind) if by_gradient else None
    if training is not None:
        # As after many batches, so that limits are near in some channels; and with much that is remembered in others.
        training.noise.noise_steps.fill_(40)
        training.gradient.sum_dy.copy_(randn(channels, seed=8)), training.gradient.count_dy.fill_(0.5)
    of_reference = doubled(state), None if training is None else doubled(training)
    x, dy = batch(SHAPES[shape], 3, of_x), batch(SHAPES[shape], 4, of_x)
    if last:
        x, dy = channels_last(x), channels_last(dy)
    found = step(x, dy, weight, bias, state, 0.3, running, training)
    expected = reference_step(x, dy, weight, bias, of_reference[0], 0.3, running, of_reference[1])
    assert (found.y.dtype, found.y.stride()) == (x.dtype, x.stride())
    assert (found.dx.dtype, found.dx.stride()) == (x.dtype, x.stride())
    assert found.sum_dy.dtype == kind
    assert_same_state(state, of_reference[0])
    n = x.numel() // channels
    # z is as exact as (x − mean)·rstd, and rstd may be 300 where a single element has no variance.
    roundings = 32 if n > 1 else 4096
    for name in Reference._fields:
        actual, wanted = getattr(found, name), getattr(expected, name)
        # Sums of n may cancel; a result in 16 bits is rounded once more.
        scale = float(wanted.abs().max()) + (n**0.5 if name.startswith("sum") else 1)
        eps = torch.finfo(kind).eps * roundings + (torch.finfo(actual.dtype).eps if actual.dtype != kind else 0)
        torch.testing.assert_close(
            actual.double(), wanted, rtol=eps, atol=eps * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
    if training is not None:
        assert_same_training(training, of_reference[1], roundings)


@runs_kernels
@pytest.mark.usefixtures("_in_splits")
@pytest.mark.parametrize("rule", RULES)
def test_steps_in_a_row(rule: str) -> None:
    which = list(RULES).index(rule)
    running, kind = which % 2 == 0, [torch.float32, torch.float64][which // 2 % 2]
    state, training = empty_state(3, kind), empty_training(3, kind)
    of_reference = doubled(state), doubled(training)
    # Past the 20 samples below which the variance has a floor; at first it is at that, and at last it lags.
    for seed, (samples, scale) in enumerate(zip((5, 1, 14, 3), (0.05, 0.05, 1.0, 8.0))):
        x, dy = batch((samples, 3, 16), seed, kind) * scale, batch((samples, 3, 16), seed + 10, kind)
        arguments = RULES[rule], running
        found = step(x, dy, None, None, state, *arguments, training if running else None)
        expected = reference_step(x, dy, None, None, of_reference[0], *arguments, of_reference[1] if running else None)
        assert_same_state(state, of_reference[0], 32)
        for actual, wanted in zip(found, expected):
            assert_close(actual, wanted, 256)
    assert_same_training(training, of_reference[1], 32)
    assert rule == "zero" or state.samples.eq(23).all()


@runs_kernels
def test_buffers_that_it_can_update() -> None:
    state = empty_state(3)
    assert triton.prepare(state) is state
    assert triton.prepare(state._replace(sums=state.sums.double())) is None
    assert triton.prepare(state._replace(sums=state.sums.to("meta"))) is None
    assert triton.prepare(state._replace(sums=torch.zeros(6, device=DEVICE)[::2])) is None
    noise = empty_noise(3)
    assert triton.prepare((*state, *noise)) == (*state, *noise)
    assert triton.prepare((*state, *noise._replace(last_mean=noise.last_mean.half()))) is None


@runs_kernels
@pytest.mark.parametrize(
    ("value", "running", "last"),
    [(float("nan"), True, False), (float("inf"), True, True), (1e30, True, False), (float("nan"), False, True)],
)
def test_a_channel_that_is_not_finite_keeps_its_state(value: float, running: bool, last: bool) -> None:
    state, training = empty_state(3), empty_training(3)
    x = batch((4, 3, 5, 5), 1)
    step(x, batch((4, 3, 5, 5), 2), None, None, state, Horizon(), running, training if running else None)
    before, training_before = copied(state), copied(training)
    clean, bad = batch((4, 3, 5, 5), 3), batch((4, 3, 5, 5), 3)
    bad[2, 1, 3, 3] = value
    if last:
        clean, bad = channels_last(clean), channels_last(bad)
    dy = batch((4, 3, 5, 5), 4)
    alone, training_alone = copied(state), copied(training)
    found = step(bad, dy, None, None, state, Horizon(), running, training if running else None)
    expected = step(clean, dy, None, None, alone, Horizon(), running, training_alone if running else None)
    for name in State._fields:
        if name == "num_batches_tracked":
            assert state.num_batches_tracked == 2
            continue
        kept, others = getattr(state, name), getattr(alone, name)
        if name == "last_keep":
            assert kept[1] == 1
        elif name == "last_gain":
            assert kept[1] == 0
        else:
            assert kept[1] == getattr(before, name)[1], name
        assert torch.equal(kept[[0, 2]], others[[0, 2]]), name
    for part, part_alone, part_before in zip(training, training_alone, training_before):
        for kept, others, old in zip(part, part_alone, part_before):
            assert kept[1] == old[1]
            assert torch.equal(kept[[0, 2]], others[[0, 2]])
    for actual, wanted in zip(found[:2], expected[:2]):
        assert torch.equal(actual[:, [0, 2]], wanted[:, [0, 2]])
    if running:
        # All but the bad element is normalised by the statistics of before.
        mean, var = before.running_mean[1], before.running_var[1]
        good = torch.isfinite(found.y[:, 1]) & (bad[:, 1] != value)
        assert good.sum() == 99
        torch.testing.assert_close(found.y[:, 1][good], ((bad[:, 1] - mean) * (var + EPS).rsqrt())[good])
        # And those are constants to its gradient.
        torch.testing.assert_close(found.dx[:, 1][good], (dy[:, 1] * (var + EPS).rsqrt())[good])


@runs_kernels
def test_a_gradient_that_overflows_leaves_its_running_sums() -> None:
    state, training = empty_state(3), empty_training(3)
    x, dy = batch((4, 3, 5), 1), batch((4, 3, 5), 2)
    step(x, dy, None, None, state, 0.5, True, training)
    before = copied(training.gradient)
    dy[0, 2, 0] = float("inf")
    found = step(x, dy, None, None, state, 0.5, True, training)
    for old, new in zip(before, training.gradient):
        assert old[2] == new[2]
        assert (old[:2] != new[:2]).all()
    assert found.dx[0, 2, 0] == float("inf")
    assert torch.isfinite(found.dx[1:]).all()
    assert found.sum_dy[2] == float("inf")


@runs_kernels
def test_kappa_is_zero_for_an_exact_gradient_of_what_did_not_enter() -> None:
    state = empty_state(2)
    x, dy = batch((4, 2, 5), 1), batch((4, 2, 5), 2)
    step(x, dy, None, None, state, 0.5, True, None)
    x[1, 1, 1] = float("nan")
    found = step(x, dy, None, None, state, 0.5, True, None)
    finite = torch.ones(20, dtype=torch.bool, device=DEVICE)
    finite[6] = False
    slope = (state.running_var[1] + EPS).rsqrt()
    torch.testing.assert_close(found.dx[:, 1].flatten()[finite], (dy[:, 1] * slope).flatten()[finite])


@runs_kernels
@pytest.mark.parametrize("mode", MODES)
def test_a_recomputation_updates_nothing(mode: str) -> None:
    running, by_gradient = MODES[mode]
    state = prepared(empty_state(5), empty_training(5) if by_gradient else None)
    weight, bias = randn(5, seed=5).float(), randn(5, seed=6).float()
    x = batch((6, 5, 7), 1)
    spec = StepSpec(mode_of(running, empty_training(5) if by_gradient else None), EPS, Horizon(), LAW)
    triton.training_forward(batch((6, 5, 7), 2), weight, bias, state, spec, True)
    y, fixed = triton.training_forward(x, weight, bias, state, spec, True)
    before = [t.clone() for t in state]
    again, fixed_again = triton.training_forward(x, weight, bias, state, spec, False)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
    assert torch.equal(y, again)
    torch.testing.assert_close(fixed, fixed_again, rtol=1e-6, atol=0)


@runs_kernels
@pytest.mark.usefixtures("_in_splits")
@pytest.mark.parametrize(
    ("last", "order"),
    [
        (False, "sorted"), (False, "outliers first"), (False, "outliers at the end of long planes"),
        (True, "as drawn"), (True, "outliers first"),
    ],
)  # fmt: skip
def test_far_means_in_float32(last: bool, order: str) -> None:
    """mean/std = 1e4, where a float32 has three digits left for the deviations: they are summed as they are."""
    x = randn(6, 2, 60, 60, seed=7)
    if order == "sorted":
        x = x.transpose(0, 1).flatten(1).sort(1).values.view(2, 6, 60, 60).transpose(0, 1)
    if order == "outliers at the end of long planes":
        # One element is left over, which is then a tile, and the first one of some splits.
        x = randn(6, 2, 1, 4097, seed=7)
        x[..., -1] += 300
        assert 4097 % triton._plan_of(x.shape, False, torch.float32, x.get_device()).tile["BS"] == 1
    if order == "outliers first":
        x[0, :, :2] += 300
    x = (x + 1e4).float()
    x = channels_last(x) if last else x.contiguous()
    state, exact = empty_state(2), empty_state(2, torch.float64)
    y, _ = triton.training_forward(x, None, None, state, StepSpec(Mode.BATCH, EPS, 1.0, Law()), True)
    mean, var = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3))
    torch.testing.assert_close(state.running_var.double(), var, rtol=1e-6, atol=0)
    torch.testing.assert_close(state.running_mean.double(), mean, rtol=1e-7, atol=0)
    reference = reference_step(x, x, None, None, exact, 1.0, False, None)
    # The mean does not fit a float32 to better than 5e-4 std: the rest of it goes into y all the same.
    torch.testing.assert_close(y.double(), reference.y, rtol=1e-5, atol=1e-5)


@runs_kernels
@pytest.mark.parametrize("kind", ["dy last", "x last", "x sliced", "dy expanded", "x transposed", "a parameter"])
def test_layouts_that_differ(kind: str) -> None:
    x, dy = batch((4, 5, 6, 7), 1), batch((4, 5, 6, 7), 2)
    if kind == "dy last":
        dy = channels_last(dy)
    elif kind == "x last":
        x = channels_last(x)
    elif kind == "x sliced":
        x = torch.cat([x, x], 3)[..., 3:10]
    elif kind == "dy expanded":
        dy = torch.ones((), device=DEVICE).expand(x.shape)
    elif kind == "x transposed":
        x = x.transpose(0, 3).contiguous().transpose(0, 3)
    else:
        x = torch.nn.Parameter(x)
    state = empty_state(5)
    expected_state = doubled(state)
    found = step(x, dy, None, None, state, 0.5, True, None)
    expected = reference_step(x.detach(), dy, None, None, expected_state, 0.5, True, None)
    assert not found.y.requires_grad
    for actual, wanted in zip(found, expected):
        # Relative to what cancels where dy is constant: 1, and the √n of a sum.
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-5)
    assert_same_state(state, expected_state)


@runs_kernels
def test_without_dx_the_rest_is_the_same() -> None:
    x, dy = batch((4, 5, 6), 1), batch((4, 5, 6), 2)
    buffers = prepared(empty_state(5), empty_training(5))
    _, fixed = triton.training_forward(x, None, None, buffers, StepSpec(Mode.RUNNING, EPS, 0.5, LAW), True)
    gradients = empty_gradient(5), empty_gradient(5)
    found = triton.training_backward(dy, x, None, fixed, Mode.RUNNING, gradients[0], False)
    expected = triton.training_backward(dy, x, None, fixed, Mode.RUNNING, gradients[1], True)
    assert found[0] is None
    for actual, wanted in zip((*found[1:], *gradients[0]), (*expected[1:], *gradients[1])):
        assert torch.equal(actual, wanted)


@runs_kernels
@pytest.mark.parametrize("kind", ["running", "running without a limit", "exact", "batch"])
@pytest.mark.parametrize("whole", [True, False])
def test_an_update_by_sums_from_elsewhere(kind: str, whole: bool) -> None:
    channels = 150  # more than one program
    state, noise = empty_state(channels), None
    law, by_noise = FREE if kind == "running without a limit" else LAW, kind.startswith("running")
    if by_noise:
        noise = empty_noise(channels)
        # As of a new layer, and after many batches, with which limits are near; in some the window of R is full.
        noise.noise_steps.copy_(torch.arange(channels) % 3 * (0.8 * LAW.window))
    expected_state, expected_noise = doubled(state), None if noise is None else doubled(noise)
    mode = Mode[kind.split()[0].upper()]
    for seed in range(3):
        # Every batch farther away and wider, so that means and variances lag in some channels.
        sums = aten.batch_sums(batch((6, channels, 5), seed).double() * 3**seed + 2 * seed, torch.float64).sums
        if seed == 2:
            sums.sqrs[7] = float("inf")
        a = torch.linspace(0, 1, channels, device=DEVICE)
        a_double = a.double()
        sums = sums._replace(count=sums.count[:1].expand(channels))
        samples = torch.tensor(6.0, device=DEVICE) if seed else 6
        entering = Batch(Sums(*(t.float() for t in sums)), samples, a, whole)
        arguments = mode, LayerState(state, noise), entering, law
        found = triton.update(*arguments, True)
        exact = LayerState(expected_state, expected_noise), Batch(sums, samples, a_double, whole)
        with use("aten"):
            var, coefficients = update(*exact, StepSpec(mode, EPS, 0.5, law))
        wanted = [t for t in coefficients if t is not None]
        wanted[1] = var
        assert len(found) == len(wanted)
        for i, (one, other) in enumerate(zip(found, wanted)):
            good = torch.isfinite(other)
            assert torch.equal(torch.isfinite(one), good), i
            if mode.coefficients[i] == "offset":  # of means that may be equal
                torch.testing.assert_close(one[good].double(), other[good], rtol=0, atol=1e-5)
            else:
                assert_close(one[good], other[good], 64)
        assert_same_state(state, expected_state, 64)
        if noise is not None:
            assert_same_training(
                TrainingState(noise, empty_gradient(1)), (expected_noise, doubled(empty_gradient(1))), 64
            )
        before = [t.clone() for t in (*state, *(noise or ()))]
        for one, other in zip(triton.update(*arguments, False), found):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=0, equal_nan=True)
        assert all(torch.equal(a, b) for a, b in zip((*state, *(noise or ())), before))
    assert len({t.data_ptr() for t in found}) == len(found)


@runs_kernels
def test_ranks_that_are_all_empty_update_nothing() -> None:
    state, training = empty_state(3), empty_training(3)
    buffers, x = prepared(state, training), batch((4, 3, 5), 1)
    triton.training_forward(x, None, None, buffers, StepSpec(Mode.RUNNING, EPS, Horizon(), LAW), True)
    before, noise_before = copied(state), copied(training.noise)
    nothing = Sums(*[torch.zeros(3, device=DEVICE) for _ in range(4)])
    samples = torch.zeros((), device=DEVICE)
    weight = Horizon().weight(samples, state.samples, state.steps)
    entering = Batch(nothing, samples, weight, True)
    triton.update(Mode.RUNNING, LayerState(state, training.noise), entering, LAW, True)
    assert all(torch.equal(new, old) for new, old in zip(training.noise, noise_before))
    for name in ("shift", "sums", "sqrs", "count", "samples", "running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(state, name), getattr(before, name)), name


@runs_kernels
@pytest.mark.parametrize("pooled", [False, True])
def test_an_update_by_gradient_sums_from_elsewhere(pooled: bool) -> None:
    state = empty_gradient(5)
    expected_state = doubled(state)
    for seed in range(3):
        # Ever smaller, so that what is remembered outgrows what comes.
        sums = [randn(5, seed=seed + 10 * i).float() / 10**seed for i in (0, 1)]
        rstd, trust, offset, std = (randn(5, seed=seed + 10 * i).float() for i in (2, 3, 4, 5))
        rstd, trust, std = rstd.abs() + 0.1, trust.abs().clamp(0.05, 1), std.abs() + 0.1
        # One that is not finite, one that the forward has ignored, one whose elements are all alike.
        if seed:
            sums[seed - 1][2] = float("nan")
            trust[3] = 0
        std[4] = 0
        before = copied(state)
        n = torch.tensor([20.0], device=DEVICE).expand(5) if pooled else 20
        coefficients = Coefficients(rstd, rstd, trust=trust, offset=offset, batch_std=std)
        found = triton.update_gradient(state, GradientSums(*sums), coefficients, n)
        doubles = Coefficients(*(None if t is None else t.double() for t in coefficients))
        with use("aten"):
            expected = update_gradient(expected_state, GradientSums(*(t.double() for t in sums)), doubles, n)
        for one, other in zip((*found, *state), (*expected, *expected_state)):
            assert_close(one, other, 64)
        if seed:
            assert all(torch.equal(new[2:4], old[2:4]) for new, old in zip(state, before))
            assert all(part[2:4].eq(0).all() for part in found)
    means = state.sum_dy / state.count_dy
    assert (found[0].abs() < 0.9 * means.abs()).any()


@runs_kernels
@pytest.mark.usefixtures("_in_splits")
def test_a_second_run_gives_the_same_bits() -> None:
    x, dy = batch((3, 3, 60, 50), 1), batch((3, 3, 60, 50), 2)
    runs = []
    for _ in range(2):
        state, training = empty_state(3), empty_training(3)
        found = step(x, dy, None, None, state, 0.5, True, training)
        runs.append([*found, *state, *training.noise, *training.gradient])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@runs_kernels
@pytest.mark.usefixtures("_in_splits")
@pytest.mark.parametrize("_in_splits", [True], indirect=True)
@pytest.mark.parametrize("last", [False, True])
def test_partial_sums_are_merged_to_the_last_digits(last: bool) -> None:
    """Of many splits, of which the first has another mean than the rest, in x and in dy."""
    x, dy = batch((40, 3, 24, 24), 1), batch((40, 3, 24, 24), 2)
    x[:2] += 20
    dy[:2] -= 20
    if last:
        x, dy = channels_last(x), channels_last(dy)
    assert triton._plan_of(x.shape, last, x.dtype, x.get_device()).summing.splits > 1
    state = empty_state(3)
    expected_state = doubled(state)
    found = step(x, dy, None, None, state, 1.0, True, None)
    expected = reference_step(x, dy, None, None, expected_state, 1.0, True, None)
    # About the mean of the first tile of a split, up to log2(64) bits cancel.
    eps = 64 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(state.running_var.double(), expected_state.running_var, rtol=eps, atol=0)
    for one, other in zip(found, expected):
        assert_close(one, other, 256)  # 1/std is off by as much, and z is up to 5


@runs_kernels
def test_autograd_can_tell_that_buffers_were_written() -> None:
    state, training = empty_state(3), empty_training(3)
    buffers = (*state, *training.noise, *training.gradient)
    versions = [t._version for t in buffers]
    x = batch((3, 3, 4), 1)
    step(x, x, None, None, state, 0.5, True, training)
    assert all(t._version > old for t, old in zip(buffers, versions))


@runs_kernels
@each_pair(
    scenario=SCENARIOS, masked={"whole steps": False, "masked": True}, dtype=names_of(torch.float32, torch.float64)
)
def test_layers_train_as_the_reference(dtype: torch.dtype, masked: bool, scenario: Scenario) -> None:
    """Noise, limits and what is bounded: see law_steps."""
    assert_trains_as_the_reference(scenario, "triton", dtype, masked, DEVICE)


@runs_kernels
@pytest.mark.usefixtures("_in_splits")
@pytest.mark.parametrize("_in_splits", [True], indirect=True)
@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS.keys())
def test_layers_train_as_the_reference_in_splits(scenario: Scenario) -> None:
    assert_trains_as_the_reference(scenario, "triton", torch.float32, False, DEVICE)


@runs_kernels
@pytest.mark.parametrize("samples", [1, 3, 100, 128, 129, 5000])
def test_the_weight_of_a_batch(samples: int) -> None:
    """a = 1 − exp(−N/h) for N/h from 1/128 to 40, on either side of where the series ends."""
    rule = Horizon(samples=128, start=128, fraction=1)
    state = empty_state(1)
    triton.training_forward(batch((samples, 1), 1), None, None, state, StepSpec(Mode.EXACT, EPS, rule, LAW), True)
    torch.testing.assert_close(state.debias.item(), -math.expm1(-samples / 128), rtol=4e-7, atol=0)


@runs_kernels
@pytest.mark.parametrize("masked", [False, True], ids=["whole steps", "masked"])
@pytest.mark.parametrize("name", ["lagging", "shrinking, lagging", "not finite, near"])
def test_a_layer_under_checkpointing_trains_as_the_plain_one(name: str, masked: bool) -> None:
    plain, checkpointed = (SCENARIOS[name].layer(torch.float32, DEVICE) for _ in range(2))

    class Repeated(torch.nn.Module):
        weight, bias = checkpointed.weight, checkpointed.bias

        def forward(self, *inputs: Tensor) -> Tensor:
            y: Tensor = checkpoint(checkpointed, *inputs, use_reentrant=False)
            return y

    wrapped = Repeated()
    with use("triton"):
        for x, dy in SCENARIOS[name].batches():
            x, dy = x.float().to(DEVICE), dy.float().to(DEVICE)
            checkpointed.zero_grad()
            found, expected = step_of(wrapped, x, dy, masked), step_of(plain, x, dy, masked)
            for part, value in expected.items():
                # A kernel without the update is compiled for itself, and may round in other places.
                torch.testing.assert_close(found[part], value, rtol=1e-5, atol=1e-5, equal_nan=True)
            forward = {name: b for name, b in buffers_of(plain).items() if name not in GradientState._fields}
            assert_identical({name: buffers_of(checkpointed)[name] for name in forward}, forward)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(4, 3, 5), (300, 40)], ids=str)  # in a tile, and in the sum over several splits
def test_sums_that_overflow_are_no_part_of_the_memory_and_nothing_is_subtracted(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    channels = shape[1]
    state, training = empty_state(channels, dtype), empty_training(channels, dtype)
    x, dy = batch(shape, 1, dtype), batch(shape, 2, dtype)
    largest_mean = torch.finfo(dtype).max / (x.numel() // channels)
    dy[:, 2] = largest_mean / 8  # whose sum does not overflow, and which one would see
    step(x, dy, None, None, state, 0.5, True, training)
    before = copied(training.gradient)
    dy[:, 2] = 1.1 * largest_mean
    buffers = prepared(state, training)
    _, fixed = triton.training_forward(x, None, None, buffers, StepSpec(Mode.RUNNING, EPS, 0.5, LAW), True)
    dx, sum_dy, _ = triton.training_backward(dy, x, None, fixed, Mode.RUNNING, training.gradient, True)
    assert sum_dy[2] == float("inf")
    for old, new in zip(before, training.gradient):
        assert old[2] == new[2]
        assert (old[:2] != new[:2]).all()
    torch.testing.assert_close(dx[:, 2], dy[:, 2] * fixed[1, 2])


@runs_kernels
def test_what_it_serves() -> None:
    x = torch.zeros(2, 3, device=DEVICE)
    assert triton.unavailable() is None
    assert triton.version().startswith("Triton ")
    for dtype in DTYPES.values():
        assert triton.supports(x.to(dtype), statistics_dtype(dtype))
    assert not triton.supports(x, torch.float64)
    assert not triton.supports(x.double(), torch.float32)
    assert not triton.supports(x.int(), torch.float32)
    assert not triton.supports(x[:0], torch.float32)
    assert not triton.supports(x.to("meta"), torch.float32)
    assert triton.supports(x[0], torch.float32)  # a vector of the state
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="a tensor has no memory"):
        triton.supports(x, torch.float32)


def run_alone(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *command], env={**os.environ, "PYTHONPATH": path, **environment}, cwd=root, timeout=600,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, runningbn.kernels.triton as t; t.supports; sys.exit('triton' in sys.modules)"
    found = run_alone("-c", f"import torch; assert 'triton' not in __import__('sys').modules; {code}")
    assert found.returncode == 0, found.stderr


def test_without_triton_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert triton.unavailable() == "triton is not installed"
    assert triton.version() == "not installed"


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="there is something to run it on")
def test_without_a_gpu_there_is_a_reason() -> None:
    assert triton.unavailable() in ("torch found no CUDA device", "triton is not installed")
    assert not triton.supports(torch.zeros(2, 3), torch.float32)


# All together are all tests but those that need no kernel. In parts, so that no worker has all of it.
IN_SHORT, OF_LAYERS = "test_a_step and small", "train_as"
THE_REST = (OF_LAYERS, f"not ({OF_LAYERS}) and not ({IN_SHORT}) and not importing")


@needs_triton
@pytest.mark.parametrize("part", [IN_SHORT, *(pytest.param(part, marks=pytest.mark.slow) for part in THE_REST)])
@pytest.mark.skipif(RUNS, reason="every other test here does it")
def test_in_the_interpreter(part: str) -> None:
    found = run_alone("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", part, __file__, TRITON_INTERPRET="1")
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-2000:]
    assert "passed" in found.stdout


class _CompiledOnly:
    """Kernels that are compiled, for the very arguments of a launch, rather than launched."""

    def __init__(self, found: list[tuple[str, Any]]) -> None:
        self.found = found

    def __getattr__(self, name: str) -> Any:
        from runningbn.kernels import triton_kernels

        return _CompiledKernel(getattr(triton_kernels, name), self.found)


class _CompiledKernel:
    def __init__(self, kernel: Any, found: list[tuple[str, Any]]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_it(*arguments: Any, **options: Any) -> None:
            compiled = self.kernel.warmup(*arguments, grid=grid, **options)
            self.found.append((self.kernel.__name__, compiled))

        return compile_it


def has_assembler() -> bool:
    spec = importlib.util.find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "ptxas").exists()


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(RUNS, reason="without a GPU and without the interpreter, which takes the place of the compiler")
def test_all_kernels_compile_for_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_assembler():
        pytest.skip("triton comes without ptxas here")
    found: list[tuple[str, Any]] = []
    monkeypatch.setattr(triton, "_kernels", lambda: _CompiledOnly(found))
    with no_device():
        for x, running in (
            (torch.zeros(512, 64, 14, 14, dtype=torch.bfloat16), True),
            (channels_last(torch.zeros(512, 64, 14, 14)), False),
        ):
            state = empty_state(x.shape[1], statistics_dtype(x.dtype))
            training = empty_training(x.shape[1], statistics_dtype(x.dtype)) if running else None
            buffers = prepared(state, training)
            mode = mode_of(running, training)
            spec = StepSpec(mode, EPS, Horizon(), LAW)
            _, fixed = triton.training_forward(x, state.shift, None, buffers, spec, True)
            triton.training_backward(x, x, None, fixed, mode, training and training.gradient, True)
        x = torch.zeros(8, 64, 14, 14)
        for dtype in (torch.float32, torch.float64):
            x, state, training = x.to(dtype), empty_state(64, dtype), empty_training(64, dtype)
            for mode in Mode:
                layer = LayerState(state, *(training if mode is Mode.RUNNING else ()))
                arguments = x, state.shift, None, layer.forward_buffers, StepSpec(mode, EPS, Horizon(), LAW)
                for updates in (True, False):
                    _, fixed = triton.training_forward(*arguments, updates)
                triton.training_backward(x, x, None, fixed, mode, layer.gradient, True)
                for samples in (3, torch.zeros(())):
                    entering = Batch(Sums(*state[:4]), samples, state.shift, True)
                    for updates in (True, False):
                        triton.update(mode, layer, entering, LAW, updates)
            triton.update_gradient(training.gradient, GradientSums(*state[:2]), unpack(Mode.RUNNING, fixed), 3)
    assert {name for name, _ in found} == {
        "batch_statistics", "affine_map", "gradient_statistics", "input_gradient",
        "update_by_sums", "update_gradient_by_sums",
    }  # fmt: skip
    # Whole vectors are read where the sizes allow for it: 4 of bfloat16 in planes of 196, 4 of float32 in rows.
    sweeps = [compiled.asm["ptx"] for name, compiled in found if name in ("affine_map", "input_gradient")]
    assert all("ld.global.v2.b32" in text for text in sweeps[:2])
    assert all("ld.global.v4.b32" in text for text in sweeps[2:4])
    # What `unsuitable` asks of a device is enough.
    assert max(compiled.metadata.shared for _, compiled in found) <= triton_devices.SHARED_MEMORY
    # What the last program reads is ordered after what the others have written.
    sums = [compiled.asm["ptx"] for name, compiled in found if name.endswith("_statistics")]
    assert all("atom.global.gpu.acq_rel" in text for text in sums[:4])
    # A program that has all elements of its channels waits for no other.
    assert not any("atom.global" in text for text in sums[4:])
