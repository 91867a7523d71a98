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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from runningbn import Horizon, SquareRoot
from runningbn.kernels import aten, triton
from runningbn.kernels import use_backend as use
from runningbn.momentum import Momentum, batch_weight, weighs_whole_batches
from runningbn.statistics import GradientState, State, Sums, moments
from runningbn.update import absorb_gradient, absorb_precise, absorb_running

# The interpreter computes with numpy, which warns of what is meant to overflow.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
INSTALLED = importlib.util.find_spec("triton") is not None
RUNS = INSTALLED and (INTERPRETED or DEVICE == "cuda")
runs_kernels = pytest.mark.skipif(not RUNS, reason="runs in the interpreter, see test_in_the_interpreter")
needs_triton = pytest.mark.skipif(not INSTALLED, reason="triton is not installed")

EPS, MAX_LAG = 1e-5, 0.05
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
    """With NaN, which would spread from whatever is read before it is written; and counters are left at zero."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
    assert all(int(counter.count_nonzero()) == 0 for counter in triton._counters.values())


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_state(channels: int, dtype: torch.dtype = torch.float32) -> State:
    vectors = [torch.zeros(channels, dtype=dtype, device=DEVICE) for _ in State._fields]
    vectors[State._fields.index("running_var")].fill_(1)
    vectors[State._fields.index("num_batches_tracked")] = torch.zeros((), dtype=torch.int64, device=DEVICE)
    return State(*vectors)


def empty_gradient(channels: int, dtype: torch.dtype = torch.float32) -> GradientState:
    return GradientState(*[torch.zeros(channels, dtype=dtype, device=DEVICE) for _ in range(3)])


def doubled(state: Any) -> Any:
    return type(state)(*[t.double().clone() if t.is_floating_point() else t.clone() for t in state])


def copied(state: Any) -> Any:
    return type(state)(*[t.clone() for t in state])


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)


def batch(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Channels that differ in mean and spread."""
    spread = [1, -1, *[1] * (len(shape) - 2)]
    channels = shape[1]
    x = randn(*shape, seed=seed) * (0.5 + randn(channels, seed=seed + 100).abs()).view(spread)
    return (x + randn(channels, seed=seed + 200).view(spread)).to(dtype)


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


class Reference(NamedTuple):
    y: Tensor
    dx: Tensor
    sum_dy: Tensor
    sum_dy_xhat: Tensor


def reference_step(
    x: Tensor, dy: Tensor, weight: Tensor | None, bias: Tensor | None, state: State, momentum: Momentum,
    running: bool, gradient: GradientState | None,
) -> Reference:  # fmt: skip
    """Forward and backward in float64; updates the states, which are float64."""
    x, dy = x.double(), dy.double()
    weight, bias = (None if t is None else t.double() for t in (weight, bias))
    with use("aten"), torch.no_grad():
        sums, _ = aten.batch_sums(x, torch.float64)
        a = batch_weight(momentum, len(x), state.samples, state.steps)
        absorb = partial(absorb_running, max_lag=MAX_LAG) if running else absorb_precise
        fixed = absorb(state, sums, a, len(x), weighs_whole_batches(momentum))
        rstd = (fixed.var + EPS).rsqrt()
        y = aten.normalize(x, fixed.mean, fixed.var, weight, bias, EPS)
        sum_dy, sum_dy_xhat = aten.gradient_sums(dy, x, fixed.mean, rstd)
        n = x.numel() // x.shape[1]
        if gradient is not None:
            m0, m1 = absorb_gradient(gradient, sum_dy, sum_dy_xhat, fixed.keep, fixed.gain, n)
        else:
            kappa_mean, kappa_var = (1 / n, 1 / n) if fixed.kappa_mean is None else (fixed.kappa_mean, fixed.kappa_var)
            m0, m1 = kappa_mean * sum_dy, kappa_var * sum_dy_xhat
        return Reference(y, aten.input_gradient(dy, x, fixed.mean, rstd, weight, m0, m1), sum_dy, sum_dy_xhat)


def step(
    x: Tensor, dy: Tensor, weight: Tensor | None, bias: Tensor | None, state: State, momentum: Momentum,
    running: bool, gradient: GradientState | None,
) -> Reference:  # fmt: skip
    y, fixed = triton.training_forward(x, weight, bias, EPS, state, momentum, running, True, MAX_LAG)
    assert fixed.shape == (6 if running else 2, x.shape[1])
    dx, sum_dy, sum_dy_xhat = triton.training_backward(dy, x, weight, fixed, gradient, True)
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


def cases() -> Iterator[Any]:
    """Every shape and layout in float32 and in another dtype, each in another mode, in turn."""
    layouts = [(name, False) for name in SHAPES] + [(name, True) for name in IN_CHANNELS_LAST]
    for i, (shape, last) in enumerate(layouts):
        for j, dtype in enumerate(("float32", ["bfloat16", "float64", "float16"][i % 3])):
            mode = list(MODES)[(i + i // 3 + j) % 3]
            yield pytest.param(shape, last, dtype, mode, id=f"{shape}{', last' * last}-{dtype}-{mode}")


@runs_kernels
@pytest.mark.parametrize(("shape", "last", "dtype", "mode"), list(cases()))
def test_a_step(shape: str, last: bool, dtype: str, mode: str) -> None:
    (running, by_gradient), of_x = MODES[mode], DTYPES[dtype]
    kind, channels = statistics_dtype(of_x), SHAPES[shape][1]
    # Each combination of parameters is somewhere in the table; weights in 16 bits, too.
    which = (list(SHAPES).index(shape) + list(DTYPES).index(dtype)) % 4
    of_weight = of_x if which % 2 else kind
    weight = (1 + 0.3 * randn(channels, seed=1)).to(of_weight) if which != 2 else None
    bias = randn(channels, seed=2).to(of_weight) if which < 2 else None
    state, gradient = empty_state(channels, kind), empty_gradient(channels, kind) if by_gradient else None
    of_reference = doubled(state), None if gradient is None else doubled(gradient)
    x, dy = batch(SHAPES[shape], 3, of_x), batch(SHAPES[shape], 4, of_x)
    if last:
        x, dy = channels_last(x), channels_last(dy)
    found = step(x, dy, weight, bias, state, 0.3, running, gradient)
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
    if gradient is not None:
        for actual, wanted in zip(gradient, of_reference[1]):
            torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-5 * n**0.5 * roundings / 32)


@runs_kernels
@pytest.mark.parametrize("rule", RULES)
def test_steps_in_a_row(rule: str) -> None:
    which = list(RULES).index(rule)
    running, kind = which % 2 == 0, [torch.float32, torch.float64][which // 2 % 2]
    state, gradient = empty_state(3, kind), empty_gradient(3, kind)
    of_reference = doubled(state), doubled(gradient)
    # Past the 20 samples below which the variance has a floor; at first it is at that, and at last it lags.
    for seed, (samples, scale) in enumerate(zip((5, 1, 14, 3), (0.05, 0.05, 1.0, 8.0))):
        x, dy = batch((samples, 3, 16), seed, kind) * scale, batch((samples, 3, 16), seed + 10, kind)
        arguments = RULES[rule], running
        found = step(x, dy, None, None, state, *arguments, gradient if running else None)
        expected = reference_step(x, dy, None, None, of_reference[0], *arguments, of_reference[1] if running else None)
        assert_same_state(state, of_reference[0], 32)
        for actual, wanted in zip(found, expected):
            assert_close(actual, wanted, 256)
    for actual, wanted in zip(gradient, of_reference[1]):
        assert_close(actual, wanted, 256)
    assert rule == "zero" or state.samples.eq(23).all()


@runs_kernels
def test_buffers_that_it_can_update() -> None:
    state = empty_state(3)
    assert triton.prepared(state) is state
    assert triton.prepared(state._replace(sums=state.sums.double())) is None
    assert triton.prepared(state._replace(sums=state.sums.to("meta"))) is None
    assert triton.prepared(state._replace(sums=torch.zeros(6, device=DEVICE)[::2])) is None


@runs_kernels
@pytest.mark.parametrize(
    ("value", "running", "last"),
    [(float("nan"), True, False), (float("inf"), True, True), (1e30, True, False), (float("nan"), False, True)],
)
def test_a_channel_that_is_not_finite_keeps_its_state(value: float, running: bool, last: bool) -> None:
    state, gradient = empty_state(3), empty_gradient(3)
    x = batch((4, 3, 5, 5), 1)
    step(x, batch((4, 3, 5, 5), 2), None, None, state, Horizon(), running, gradient if running else None)
    before, gradient_before = copied(state), copied(gradient)
    clean, bad = batch((4, 3, 5, 5), 3), batch((4, 3, 5, 5), 3)
    bad[2, 1, 3, 3] = value
    if last:
        clean, bad = channels_last(clean), channels_last(bad)
    dy = batch((4, 3, 5, 5), 4)
    alone, gradient_alone = copied(state), copied(gradient)
    found = step(bad, dy, None, None, state, Horizon(), running, gradient if running else None)
    expected = step(clean, dy, None, None, alone, Horizon(), running, gradient_alone if running else None)
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
    for kept, others, old in zip(gradient, gradient_alone, gradient_before):
        assert kept[1] == old[1] or value == 1e30  # which is finite, and so is what it does to the sums
        assert torch.equal(kept[[0, 2]], others[[0, 2]])
    for actual, wanted in zip(found[:2], expected[:2]):
        assert torch.equal(actual[:, [0, 2]], wanted[:, [0, 2]])
    if running:
        # All but the bad element is normalised by the statistics of before.
        mean, var = before.running_mean[1], before.running_var[1]
        good = torch.isfinite(found.y[:, 1]) & (bad[:, 1] != value)
        assert good.sum() == 99
        torch.testing.assert_close(found.y[:, 1][good], ((bad[:, 1] - mean) * (var + EPS).rsqrt())[good])


@runs_kernels
def test_a_gradient_that_overflows_leaves_its_running_sums() -> None:
    state, gradient = empty_state(3), empty_gradient(3)
    x, dy = batch((4, 3, 5), 1), batch((4, 3, 5), 2)
    step(x, dy, None, None, state, 0.5, True, gradient)
    before = copied(gradient)
    dy[0, 2, 0] = float("inf")
    found = step(x, dy, None, None, state, 0.5, True, gradient)
    for old, new in zip(before, gradient):
        assert old[2] == new[2]
        assert (old[:2] != new[:2]).all()
    assert found.dx[0, 2, 0] == float("inf")
    assert torch.isfinite(found.dx[1:]).all()
    assert found.sum_dy[2] == float("inf")


@runs_kernels
def test_kappa_is_zero_for_an_exact_gradient_of_what_was_not_absorbed() -> None:
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
@pytest.mark.parametrize("running", [True, False], ids=["running", "precise"])
def test_a_recomputation_absorbs_nothing(running: bool) -> None:
    state = empty_state(5)
    weight, bias = randn(5, seed=5).float(), randn(5, seed=6).float()
    x = batch((6, 5, 7), 1)
    triton.training_forward(batch((6, 5, 7), 2), weight, bias, EPS, state, Horizon(), running, True, MAX_LAG)
    y, fixed = triton.training_forward(x, weight, bias, EPS, state, Horizon(), running, True, MAX_LAG)
    before = copied(state)
    again, fixed_again = triton.training_forward(x, weight, bias, EPS, state, Horizon(), running, False, MAX_LAG)
    assert all(torch.equal(a, b) for a, b in zip(state, before))
    assert torch.equal(y, again)
    torch.testing.assert_close(fixed, fixed_again, rtol=1e-6, atol=0)


@runs_kernels
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
        assert 4097 % triton._plan_for(x.float()).tile["BS"] == 1
    if order == "outliers first":
        x[0, :, :2] += 300
    x = (x + 1e4).float()
    x = channels_last(x) if last else x.contiguous()
    state, exact = empty_state(2), empty_state(2, torch.float64)
    y, _ = triton.training_forward(x, None, None, EPS, state, 1.0, False, True, MAX_LAG)
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
    _, fixed = triton.training_forward(x, None, None, EPS, empty_state(5), 0.5, True, True, MAX_LAG)
    gradients = empty_gradient(5), empty_gradient(5)
    found = triton.training_backward(dy, x, None, fixed, gradients[0], False)
    expected = triton.training_backward(dy, x, None, fixed, gradients[1], True)
    assert found[0] is None
    for actual, wanted in zip((*found[1:], *gradients[0]), (*expected[1:], *gradients[1])):
        assert torch.equal(actual, wanted)


@runs_kernels
@pytest.mark.parametrize("max_lag", [MAX_LAG, math.inf, None], ids=["running", "running without a limit", "precise"])
@pytest.mark.parametrize("whole", [True, False])
def test_absorbing_sums_from_elsewhere(max_lag: float | None, whole: bool) -> None:
    channels = 150  # more than one program
    state = empty_state(channels)
    expected_state = doubled(state)
    absorb = absorb_precise if max_lag is None else partial(absorb_running, max_lag=max_lag)
    for seed in range(3):
        # Every batch farther away and wider, so that means and variances lag in some channels.
        sums, _ = aten.batch_sums(batch((6, channels, 5), seed).double() * 3**seed + 2 * seed, torch.float64)
        if seed == 2:
            sums.sqrs[7] = float("inf")
        a = torch.linspace(0, 1, channels, device=DEVICE)
        a_double = a.double()
        sums = sums._replace(count=sums.count[:1].expand(channels))
        samples = torch.tensor(6.0, device=DEVICE) if seed else 6
        limit = math.inf if max_lag is None else max_lag
        found = triton.absorb(state, Sums(*(t.float() for t in sums)), a, samples, whole, max_lag is not None, limit)
        with use("aten"):
            expected = absorb(expected_state, sums, a_double, samples, whole)
        wanted = [t for t in expected if t is not None]
        assert len(found) == len(wanted)
        for i, (one, other) in enumerate(zip(found, wanted)):
            good = torch.isfinite(other)
            assert torch.equal(torch.isfinite(one), good), i
            assert_close(one[good], other[good], 64)
        assert_same_state(state, expected_state, 64)
    assert len({t.data_ptr() for t in found}) == len(found)


@runs_kernels
def test_ranks_that_are_all_empty_absorb_nothing() -> None:
    state = empty_state(3)
    triton.training_forward(batch((4, 3, 5), 1), None, None, EPS, state, Horizon(), True, True, MAX_LAG)
    before = copied(state)
    nothing = Sums(*[torch.zeros(3, device=DEVICE) for _ in range(4)])
    samples = torch.zeros((), device=DEVICE)
    triton.absorb(state, nothing, batch_weight(Horizon(), samples, state.samples, state.steps), samples, True, True)
    for name in ("shift", "sums", "sqrs", "count", "samples", "running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(state, name), getattr(before, name)), name


@runs_kernels
@pytest.mark.parametrize("pooled", [False, True])
def test_absorbing_gradient_sums_from_elsewhere(pooled: bool) -> None:
    state = empty_gradient(5)
    expected_state = doubled(state)
    for seed in range(2):
        vectors = [randn(5, seed=seed + 10 * i).float() for i in range(2)]
        vectors += [randn(5, seed=seed + 10 * i).float().abs() for i in range(2, 4)]
        if seed:
            vectors[0][2] = float("nan")
        n = torch.tensor([20.0], device=DEVICE).expand(5) if pooled else 20
        found = triton.absorb_gradient(state, *vectors, n)
        with use("aten"):
            expected = absorb_gradient(expected_state, *[t.double() for t in vectors], n)
        for one, other in zip((*found, *state), (*expected, *expected_state)):
            assert_close(one, other, 64)


@runs_kernels
def test_a_second_run_gives_the_same_bits() -> None:
    x, dy = batch((3, 3, 60, 50), 1), batch((3, 3, 60, 50), 2)
    runs = []
    for _ in range(2):
        state, gradient = empty_state(3), empty_gradient(3)
        runs.append([*step(x, dy, None, None, state, 0.5, True, gradient), *state, *gradient])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@runs_kernels
def test_autograd_can_tell_that_buffers_were_written() -> None:
    state, gradient = empty_state(3), empty_gradient(3)
    versions = [t._version for t in (*state, *gradient)]
    x = batch((3, 3, 4), 1)
    step(x, x, None, None, state, 0.5, True, gradient)
    assert all(t._version > old for t, old in zip((*state, *gradient), versions))


@runs_kernels
def test_what_it_serves() -> None:
    x = torch.zeros(2, 3, device=DEVICE)
    assert triton.unavailable() is None
    assert triton.version().startswith("Triton ")
    for dtype in DTYPES.values():
        assert triton.serves(x.to(dtype), statistics_dtype(dtype))
    assert not triton.serves(x, torch.float64)
    assert not triton.serves(x.double(), torch.float32)
    assert not triton.serves(x.int(), torch.float32)
    assert not triton.serves(x[:0], torch.float32)
    assert not triton.serves(x.to("meta"), torch.float32)
    assert triton.serves(x[0], torch.float32)  # a vector of the state


SIZES = [1, 2, 3, 8, 17, 64, 100, 1000, 2**20]
PLAN_CHANNELS, PLAN_INNER = [2, 3, 16, 37, 64, 1000, 4096], [2, 9, 16, 49, 196, 784, 3136, 12544, 2**21]


def plans(outer: int) -> Iterator[tuple[triton._Plan, bool]]:
    for channels in PLAN_CHANNELS:
        for double in (False, True):
            yield triton._plan(True, outer, channels, 1, double, 132), double
            for inner in PLAN_INNER:
                yield triton._plan(False, outer, channels, inner, double, 132), double
    yield triton._plan(False, 1, 3, 2**30 + 1, False, 132), False


@pytest.mark.parametrize("outer", SIZES)
def test_plans_cover_the_input_with_tiles_that_fit(outer: int) -> None:
    for plan, double in plans(outer):
        n, channels, inner = plan.sizes
        of_n, of_c, of_s = (plan.tile[name] for name in ("BN", "BC", "BS"))
        assert of_n * of_c * of_s <= (2048 if double else 4096)
        assert plan.tile["num_warps"] in (1, 2, 4, 8)
        assert all(size & (size - 1) == 0 for size in (of_n, of_c, of_s, plan.at_once))
        tiles = -(-n // of_n) * -(-inner // of_s)
        assert plan.blocks * of_c >= channels
        for splits, of_split in (plan.summing, plan.mapping):
            assert (splits - 1) * of_split < tiles <= splits * of_split
            assert of_split <= 64
        # Offsets within a tile are 32 bits wide.
        assert (of_n - 1) * channels * inner + (of_c - 1) * inner + of_s < 2**31


def test_few_shapes_are_compiled_while_samples_vary() -> None:
    for channels, inner in [(64, 196), (64, 3136), (3, 50176), (2048, 49), (16, 4)]:
        compiled = {
            (*plan.tile.values(), plan.at_once)
            for n in range(1, 300)
            if (plan := triton._plan(False, n, channels, inner, False, 132))
        }
        assert len(compiled) <= 4, (channels, inner, compiled)


def run_alone(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *command], env={**os.environ, "PYTHONPATH": path, **environment}, cwd=root, timeout=600,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, runningbn.kernels.triton as t; t.serves; sys.exit('triton' in sys.modules)"
    found = run_alone("-c", f"import torch; assert 'triton' not in __import__('sys').modules; {code}")
    assert found.returncode == 0, found.stderr


def test_without_triton_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert triton.unavailable() == "triton is not installed"
    assert triton.version() == "not installed"


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="there is something to run it on")
def test_without_a_gpu_there_is_a_reason() -> None:
    assert triton.unavailable() in ("torch found no CUDA device", "triton is not installed")
    assert not triton.serves(torch.zeros(2, 3), torch.float32)


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(RUNS, reason="every other test here does it")
def test_in_the_interpreter() -> None:
    found = run_alone("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, TRITON_INTERPRET="1")
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-2000:]
    assert "passed" in found.stdout


class _NoDevice:
    """What Triton asks a driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


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
    from triton.runtime import driver

    found: list[tuple[str, Any]] = []
    monkeypatch.setattr(triton, "_kernels", lambda: _CompiledOnly(found))
    monkeypatch.setattr(triton, "_multiprocessors", lambda index: 132)
    monkeypatch.setattr(driver, "_active", _NoDevice())
    try:
        for x, running in (
            (torch.zeros(32, 64, 14, 14, dtype=torch.bfloat16), True),
            (channels_last(torch.zeros(32, 64, 14, 14)), False),
        ):
            state = empty_state(x.shape[1], statistics_dtype(x.dtype))
            _, fixed = triton.training_forward(x, state.shift, None, EPS, state, Horizon(), running, True, MAX_LAG)
            gradient = GradientState(*state[:3]) if running else None
            triton.training_backward(x, x, None, fixed, gradient, True)
        triton.training_forward(x, state.shift, None, EPS, state, Horizon(), True, False, MAX_LAG)
        for samples in (3, torch.zeros(())):
            triton.absorb(state, Sums(*state[:4]), state.shift, samples, True, running)
        triton.absorb_gradient(GradientState(*state[:3]), *state[:4], 3)
    finally:
        triton._counters.clear()
    assert {name for name, _ in found} == {
        "batch_statistics", "affine_map", "gradient_statistics", "input_gradient",
        "absorb_sums", "absorb_gradient_sums",
    }  # fmt: skip
    # Whole vectors are read where the sizes allow for it: 4 of bfloat16 in planes of 196, 4 of float32 in rows.
    sweeps = [compiled.asm["ptx"] for name, compiled in found if name in ("affine_map", "input_gradient")]
    assert all("ld.global.v2.b32" in text for text in sweeps[:2])
    assert all("ld.global.v4.b32" in text for text in sweeps[2:4])
    # What the last program reads is ordered after what the others have written.
    assert all("atom.global.gpu.acq_rel" in c.asm["ptx"] for name, c in found if name.endswith("_statistics"))
