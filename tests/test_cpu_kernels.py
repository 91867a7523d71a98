"""The C backend: its updates against those in torch, its steps against float64, and what its memory may look like."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cases import RAGGED, RULES, assert_near, channels_last, each_dtype, each_pair, names_of, noise, statistics_dtype
from steps import assert_identical, buffers_of, training_step
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from runningbn import Horizon, PreciseBatchNorm1d, PreciseBatchNorm2d, RunningBatchNorm, kernels
from runningbn.kernels import cpu, use_backend
from runningbn.kernels.contract import GradientSums
from runningbn.kernels.cpu_library import _TORCH_LIBRARY, library
from runningbn.layers.buffers import SETTLED
from runningbn.momentum import Momentum, rule_of
from runningbn.ops import step as functional
from runningbn.ops.law import Law
from runningbn.ops.spec import Coefficients, Mode, StepSpec
from runningbn.ops.state import Batch, GradientState, LayerState, NoiseState, State, Sums, moments
from runningbn.ops.update import update, update_gradient

if cpu.unavailable() is not None:
    pytest.skip(f"the C backend cannot be used here: {cpu.unavailable()}", allow_module_level=True)

EPS, LAW = 1e-5, Law(max_lag=0.05)
MODES = {"running gradient": Mode.RUNNING, "exact gradient": Mode.EXACT, "precise": Mode.BATCH}
# For a thread of its own a share of 2**15 elements is needed, so the large ones are what threads cut.
ROWS = ((1, 5), (7, 1), (2, 1), (33, 37), (64, 65), (401, 260), (40_001, 3), (1_100, 65), (3_000, 37))
PLANES = (
    (1, 5, 1), (5, 37, 2), (4, 65, 7, 7), (9, 1, 4, 4), (1, 1, 300, 400), (13, 2, 60, 60), (1, 4, 20_001),
    (1, 37, 56, 56), (2, 3, 56, 56), (2, 2, 300, 400), (2, 2048, 7, 7),
)  # fmt: skip
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {"planes": lambda x: x, "rows": channels_last}
THREADS = (1, 2, 3)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDE = names_of(torch.float32, torch.float64)
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[bool]:
    """The C library held to an instruction set; whether this machine has it."""
    loaded, usual = library().handle, library().instruction_set
    torch_library = Path(torch.__file__).parent / "lib" / _TORCH_LIBRARY.get(sys.platform, "libtorch_cpu.so")
    parallel_for = ctypes.CDLL(str(torch_library)).torch_parallel_for
    try:
        yield loaded.runningbn_initialize(parallel_for, name.encode()) == name.encode()
    finally:
        assert loaded.runningbn_initialize(parallel_for, usual.encode()) == usual.encode()


def data(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal with mean 1 and std 2, the same for every dtype up to rounding."""
    return (noise(shape, seed, torch.float64) * 2 + 1).to(dtype)


def empty_state(channels: int, dtype: torch.dtype) -> State:
    state = RunningBatchNorm(channels, dtype=dtype)._state()
    return State(*(buffer.clone() for buffer in state))


def seeded_state(channels: int, dtype: torch.dtype) -> State:
    layer = RunningBatchNorm(channels, dtype=dtype)
    layer.running_mean, layer.running_var = torch.linspace(-1, 2, channels), torch.linspace(0.5, 3, channels)
    state = State(*(buffer.clone() for buffer in layer._state()))
    assert state.count.eq(1).all()
    assert state.count_sqrs.eq(0).all()
    assert state.samples.eq(SETTLED).all()
    return state


def gradient_state(channels: int, dtype: torch.dtype) -> GradientState:
    return GradientState(*torch.zeros(3, channels, dtype=dtype).unbind())


def noise_state(channels: int, dtype: torch.dtype) -> NoiseState:
    return NoiseState(*torch.zeros(3, channels, dtype=dtype).unbind())


def quiet_state(channels: int, dtype: torch.dtype) -> NoiseState:
    """After many batches with little noise, with which the limits to the lag are near; in every other channel so many
    that the window of R is full.
    """
    measured = torch.linspace(0, 0.01, channels, dtype=dtype)
    steps = torch.where(torch.arange(channels) % 2 == 0, 40, 2 * LAW.window).to(dtype)
    return NoiseState(measured, steps, torch.linspace(0.8, 1.2, channels, dtype=dtype))


def converted(state: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    return [t.clone() if t.dtype == torch.int64 else t.to(dtype, copy=True) for t in state]


def assert_same_state(actual: State, expected: State, roundings: float) -> None:
    """The same statistics, whatever their pivots."""
    (mean, var), (expected_mean, expected_var) = moments(Sums(*actual[:4])), moments(Sums(*expected[:4]))
    spread = expected_mean.abs().max() + expected_var.max().sqrt()
    assert_near(mean, expected_mean, roundings, spread)
    # About another pivot, what cancels is of the order of the squared distance of the means.
    assert_near(var, expected_var, roundings, spread.square())
    for name in ("count", "count_sqrs", "debias", "samples", "steps", "last_keep", "last_gain"):
        assert_near(getattr(actual, name), getattr(expected, name), roundings)
    assert_near(actual.running_mean, expected.running_mean, roundings, spread)
    # Without many elements, Bessel's correction multiplies what roundings were there.
    assert_near(actual.running_var, expected.running_var, roundings, spread.square() + expected.running_var.max())
    assert torch.equal(actual.num_batches_tracked, expected.num_batches_tracked)


def assert_same_noise(actual: NoiseState, expected: NoiseState, roundings: float, scale: Tensor | float) -> None:
    """R up to roundings of means that are about `scale` standard deviations."""
    assert_near(actual.noise, expected.noise, roundings, scale)
    assert torch.equal(actual.noise_steps.double(), expected.noise_steps.double())
    assert_near(actual.last_mean, expected.last_mean, roundings, expected.last_mean.abs().max() + 1)


# ------------------------------------------------------------------------------------------------- the update by itself


UPDATES = {
    "precise": (Mode.BATCH, LAW),
    "exact": (Mode.EXACT, LAW),
    "running without a limit": (Mode.RUNNING, LAW._replace(max_lag=float("inf"))),
    "running": (Mode.RUNNING, LAW),
}


def update_by(kind: str, state: State, measured: NoiseState, batch: Batch) -> tuple[Tensor, Coefficients]:
    mode, law = UPDATES[kind]
    return update(LayerState(state, measured if mode is Mode.RUNNING else None), batch, StepSpec(mode, EPS, 0.1, law))


def weighed(momentum: Momentum, sums: Sums, samples: int | Tensor, size: int, state: State, **others: bool) -> Batch:
    """A batch as a step of this momentum has it."""
    rule = rule_of(momentum)
    weight = rule.weight(size, state.samples, state.steps)
    return Batch(sums, samples, weight, others.get("whole", rule.whole_batches))


each_update = pytest.mark.parametrize("kind", UPDATES)


@each_pair(
    whole_batches=names_of(False, True),
    kind=names_of(*UPDATES),
    start={"empty": empty_state, "seeded": seeded_state},
    dtype=WIDE,
    momentum=RULES,
)
def test_the_update_is_that_of_torch(momentum, dtype, start, kind, whole_batches):
    channels = 6
    states = {name: (start(channels, dtype), quiet_state(channels, dtype)) for name in ("cpu", "aten")}
    for step, size in enumerate(RAGGED):
        x = data((size, channels, 7), dtype, step) * 3**step  # so that variances lag
        x[:, 0] *= 1e-3  # and one is below its floor, until means differ
        x += step
        batch = kernels.batch_sums(x, dtype).sums
        found = {}
        for name, (state, noise_) in states.items():
            samples = size if step % 2 else torch.tensor(size, dtype=dtype)  # as of one process, as of a pool
            entering = weighed(momentum, batch, samples, size, state, whole=whole_batches)
            with use_backend(name):
                found[name] = update_by(kind, state, noise_, entering)
        # The torch side rounds some ten times a batch, and each leaves its trace until it decays.
        roundings = 16 * (step + 1)
        (state, measured), (expected_state, expected_noise) = states["cpu"], states["aten"]
        assert_same_state(state, expected_state, roundings)
        assert_same_noise(measured, expected_noise, roundings, 4)
        scale = max(t.abs().max().item() for t in moments(Sums(*expected_state[:4]))) + moments(batch)[1].max().item()
        (var, coefficients), (expected_var, expected_coefficients) = found["cpu"], found["aten"]
        assert_near(var, expected_var, roundings, scale)
        assert_near(coefficients.mean, expected_coefficients.mean, roundings, scale)
        for field in Coefficients._fields[2:]:
            part, expected = getattr(coefficients, field), getattr(expected_coefficients, field)
            if field not in UPDATES[kind][0].coefficients:
                assert part is expected is None
            elif field == "trust":  # by its derivative, how far roundings of R count
                assert_near(part, expected, roundings * LAW.trust_noise, 4)
            else:
                assert_near(part, expected, roundings, scale if field in ("offset", "batch_std") else None)


@each_pair(poison=names_of(float("nan"), float("inf"), "far"), kind=names_of(*UPDATES), dtype=WIDE, momentum=RULES)
def test_what_is_not_finite_leaves_a_channel_bit_for_bit_as_it_was(momentum, dtype, kind, poison):
    state, measured = seeded_state(4, dtype), noise_state(4, dtype)
    batch = kernels.batch_sums(data((8, 4, 3), dtype), dtype).sums
    with use_backend("cpu"):
        update_by(kind, state, measured, weighed(momentum, batch, 8, 8, state))
        before = State(*(t.clone() for t in state))
        noise_before = NoiseState(*(t.clone() for t in measured))
        bad = Sums(*(t.clone() for t in batch))
        if poison == "far":
            bad.shift[2] = torch.finfo(dtype).max ** 0.5
        else:
            bad.sqrs[2] = poison
        var, found = update_by(kind, state, measured, weighed(momentum, bad, 8, 8, state))
    for name, old, new in zip(State._fields, before, state):
        if name not in ("num_batches_tracked", "last_keep", "last_gain"):
            assert old[2] == new[2], name
    assert (state.last_keep[2], state.last_gain[2]) == (1, 0)
    assert state.num_batches_tracked == before.num_batches_tracked + 1
    assert (state.steps - before.steps).tolist() == [1, 1, 0, 1]
    if kind != "precise":
        assert found.mean[2] == before.running_mean[2]
        assert var[2] == before.running_var[2]
        # The coefficients of its backward; a batch in which another channel is bad is compared with as any other.
        assert all(part[2] == 0 for part in found[2:] if part is not None)
    for old, new in zip(noise_before, measured):
        assert old[2] == new[2]
    measurements = [0, 0, 0, 0] if kind in ("precise", "exact") else [1, 1, 0, 1]
    assert (measured.noise_steps - noise_before.noise_steps).tolist() == measurements


@each_dtype(torch.float32, torch.float64)
def test_a_batch_without_samples_is_not_counted(dtype):
    state, measured = seeded_state(3, dtype), quiet_state(3, dtype)
    before = [t.clone() for t in (*state, *measured)]
    with use_backend("cpu"):
        zero = torch.zeros(3, dtype=dtype)
        nothing = Batch(Sums(zero, zero, zero, zero), torch.tensor(0.0, dtype=dtype), zero, True)
        update_by("running", state, measured, nothing)
    for name, old, new in zip((*State._fields, *NoiseState._fields), before, (*state, *measured)):
        if name not in ("steps", "last_keep"):
            assert torch.equal(old, new), name


@each_dtype(torch.float32, torch.float64)
def test_the_gradient_update_is_that_of_torch(dtype):
    """With a channel that is not finite now and then, one that the forward ignores, a constant one and plain ones."""
    channels = 6
    states = {name: gradient_state(channels, dtype) for name in ("cpu", "aten")}
    bound = torch.zeros(channels, dtype=torch.bool)
    for step, n in enumerate(RAGGED):
        # Ever smaller, so that what is remembered outgrows what comes.
        sums = [data((channels,), dtype, 10 * i + step) * n / 4**step for i in (1, 2)]
        rstd, trust = torch.linspace(0.5, 2, channels, dtype=dtype), torch.full((channels,), 0.3, dtype=dtype)
        trust[4] = 0 if step else 0.3
        offset, batch_std = data((channels,), dtype, 30 + step), data((channels,), dtype, 40 + step).abs() + 0.1
        batch_std[5] = 0
        sums[step % 2][2] = [float("nan"), float("inf"), 1.0][step % 3]
        before = [part.clone() for part in states["cpu"]]
        number = n if step % 2 else torch.full((channels,), float(n), dtype=dtype)
        coefficients = Coefficients(rstd, rstd, trust=trust, offset=offset, batch_std=batch_std)
        found = {}
        for name, state in states.items():
            with use_backend(name):
                found[name] = update_gradient(state, GradientSums(*sums), coefficients, number)
        ignored = ([2] if step % 3 < 2 else []) + ([4] if step else [])
        for old, new in zip(before, states["cpu"]):
            assert torch.equal(old[ignored], new[ignored])
        assert all(part[ignored].eq(0).all() for part in found["cpu"])
        # Some roundings a batch on the side of torch, one here; those of a quotient, and of means that cancel in it.
        scale = max(float(s.nan_to_num(0, 0, 0).abs().max()) for s in (*states["aten"], *sums)) + 1e-3
        for part, expected in zip(states["cpu"], states["aten"]):
            assert_near(part, expected, 8 * (step + 1), max(scale, 1))
        for part, expected in zip(found["cpu"], found["aten"]):
            assert_near(part, expected, 64 * (step + 1), scale)
        means = states["cpu"].sum_dy / states["cpu"].count_dy.clamp_min(1e-30)
        bound |= (found["cpu"][0].abs() < 0.99 * means.abs()) & (trust > 0)
    assert bound[[0, 1, 3, 5]].all()


@each_dtype(torch.float32, torch.float64)
@pytest.mark.parametrize("momentum", [*RULES.values(), 1, 0])
def test_the_weight_of_a_batch_is_that_of_the_rule(momentum, dtype):
    state, weights = empty_state(2, dtype), []
    for step, size in enumerate((*RAGGED, 1_000, 3, 3)):
        rule = rule_of(momentum)
        expected = rule.weight(size, state.samples.double(), state.steps.double())
        x = data((size, 2), dtype, step)
        cpu.training_forward(x, None, None, cpu.prepare(state), StepSpec(Mode.EXACT, EPS, momentum, Law()), True)
        # 1 − a is rounded once where it is stored, and again in the subtraction here.
        assert_near(1 - state.last_keep, expected, 2, scale=1)
        weights.append(expected[0].item())
        if not rule.whole_batches:
            assert_near(state.last_gain, expected, 1, scale=1)
    assert state.steps.eq(len([weight for weight in weights if weight > 0])).all()


# --------------------------------------------------------------------------------------------------------- whole steps


class Outcome(NamedTuple):
    y: Tensor
    dx: Tensor
    dweight: Tensor
    dbias: Tensor
    state: State
    noise: NoiseState
    gradient: GradientState


def affine(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight, bias = noise((2, channels), 77, torch.float64).abs().add(0.5).to(dtype).unbind()
    return weight, bias


def started(channels: int, dtype: torch.dtype) -> tuple[State, NoiseState, GradientState]:
    """Buffers that are not as they were made; in some channels limits to the lag and to what is subtracted bind."""
    state, gradient = empty_state(channels, torch.float64), gradient_state(channels, torch.float64)
    with use_backend("aten"):
        sums = kernels.batch_sums(data((5, channels, 4), torch.float64, 3), torch.float64).sums
        measured, weight = noise_state(channels, torch.float64), torch.full((channels,), 0.4).double()
        _, coefficients = update_by("running", state, measured, Batch(sums, 5, weight, False))
        update_gradient(gradient, GradientSums(*data((2, channels), torch.float64, 4) * 5), coefficients, 20)
    # Rounded to float32, whatever the dtype: all start from the same.
    parts = ((State, state), (NoiseState, quiet_state(channels, torch.float64)), (GradientState, gradient))
    state, measured, gradient = (of(*converted(converted(part, torch.float32), dtype)) for of, part in parts)
    return state, measured, gradient


def train(
    backend: str, mode: str, x: Tensor, dy: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Outcome:
    """One step, forward and backward, from buffers that are always the same."""
    state, measured, gradient = started(x.shape[1], dtype)
    x = x.detach().requires_grad_()
    weight, bias = (None if t is None else t.detach().to(dtype).requires_grad_() for t in (weight, bias))
    with use_backend(backend):
        spec = StepSpec(MODES[mode], EPS, Horizon(), LAW)
        buffers = LayerState(state, measured, gradient) if mode == "running gradient" else LayerState(state)
        y = functional.training_step(x, weight, bias, spec, buffers)
        wanted = [t for t in (x, weight, bias) if t is not None]
        found = iter(torch.autograd.grad(y, wanted, dy))
        none = torch.zeros(x.shape[1], dtype=dtype)
        dx, dweight, dbias = (none if t is None else next(found) for t in (x, weight, bias))
    return Outcome(y.detach(), dx, dweight, dbias, state, measured, gradient)


def reference(mode: str, x: Tensor, dy: Tensor, weight: Tensor | None, bias: Tensor | None) -> Outcome:
    return train("aten", mode, x.double().contiguous(), dy.double().contiguous(), weight, bias, torch.float64)


def assert_step_near(
    mode: str, actual: Outcome, x: Tensor, dy: Tensor, weight: Tensor | None, expected: Outcome
) -> None:
    """Equal up to one rounding of what comes out and some of the statistics, of which sums in float64 lose √n more."""
    columns, g = x.double().transpose(0, 1).flatten(1), dy.double().abs().transpose(0, 1).flatten(1)
    if mode == "precise":
        mean, var = columns.mean(1), columns.var(1, correction=0)
    else:
        mean, var = expected.state.running_mean, expected.state.running_var
    rstd = (var + EPS).rsqrt()
    # The largest z and what a rounding of its mean, or of the x that went into that, counts for.
    z = ((columns - mean[:, None]).abs() * rstd[:, None]).max().item() + 4 * rstd.max().item()
    scale = 1.0 if weight is None else weight.abs().max().item()
    n = columns.shape[1]
    sums = n**0.5 if x.dtype == torch.float64 else 1
    roundings = 1 + (16 + sums) * torch.finfo(actual.state.shift.dtype).eps / torch.finfo(x.dtype).eps
    assert actual.y.dtype == actual.dx.dtype == x.dtype
    assert_near(actual.y, expected.y, roundings, scale * z + 2)
    assert_near(actual.dx, expected.dx, roundings, scale * rstd.max() * g.max() * (2 + z * z))
    total = g.sum(1).max().item() + 1
    assert_near(actual.dbias, expected.dbias, 4 * sums, total)
    assert_near(actual.dweight, expected.dweight, 4 * sums, total * z)
    assert_same_state(actual.state, expected.state, 16 * sums)
    assert_same_noise(actual.noise, expected.noise, 16 * sums, z)
    for mine, theirs in zip(actual.gradient, expected.gradient):
        assert_near(mine, theirs, 8 * sums * LAW.trust_noise, (total / n + 1) * z)


def shapes_and_layouts() -> Iterator[tuple[str, tuple[tuple[int, ...], str]]]:
    for shape in ROWS:
        yield "x".join(map(str, shape)), (shape, "planes")
    for shape in PLANES:
        for layout in LAYOUTS:
            yield "x".join(map(str, shape)) + f"-{layout}", (shape, layout)


ARRAYS = dict(shapes_and_layouts())


@each_pair(mode=names_of(*MODES), dtype=names_of(*DTYPES), threads=names_of(*THREADS), array=ARRAYS)
def test_a_training_step(mode, dtype, threads, array):
    """With every instruction set: the same code in other widths, and other tails."""
    shape, layout = array
    x, dy = LAYOUTS[layout](data(shape, dtype)), LAYOUTS[layout](data(shape, dtype, 1))
    weight, bias = affine(shape[1], statistics_dtype(dtype))
    expected = reference(mode, x, dy, weight, bias)
    torch.set_num_threads(threads)
    for name in INSTRUCTION_SETS:
        with instruction_set(name) as exists:
            if exists:
                actual = train("cpu", mode, x, dy, weight, bias, statistics_dtype(dtype))
                assert actual.y.stride() == actual.dx.stride() == x.stride()
                assert_step_near(mode, actual, x, dy, weight, expected)


@each_pair(
    given=names_of("neither", "weight", "bias"),
    shape=names_of((33, 37), (3, 5, 7, 7), (3_000, 37)),
    dtype=names_of(*DTYPES),
    mode=names_of(*MODES),
)
def test_weight_and_bias_may_be_absent(mode, dtype, shape, given):
    x, dy = data(shape, dtype), data(shape, dtype, 1)
    weight, bias = affine(shape[1], statistics_dtype(dtype))
    weight, bias = weight if given == "weight" else None, bias if given == "bias" else None
    actual = train("cpu", mode, x, dy, weight, bias, statistics_dtype(dtype))
    assert_step_near(mode, actual, x, dy, weight, reference(mode, x, dy, weight, bias))


@each_pair(
    shape=names_of((33, 37), (3, 5, 7, 7), (2, 2, 300, 400), (3_000, 37)),
    dtype=names_of(*DTYPES),
    mode=names_of(*MODES),
)
def test_a_forward_without_an_update_repeats_the_last_and_touches_no_buffer(mode, dtype, shape):
    x, (weight, bias) = data(shape, dtype), affine(shape[1], statistics_dtype(dtype))
    state, measured, _ = started(shape[1], statistics_dtype(dtype))
    buffers = (*state, *measured) if mode == "running gradient" else tuple(state)
    torch.set_num_threads(2)
    arguments = x, weight, bias, cpu.prepare(buffers), StepSpec(MODES[mode], EPS, Horizon(), LAW)
    first = cpu.training_forward(*arguments, True)
    before = [t.clone() for t in buffers]
    second = cpu.training_forward(*arguments, False)
    assert_identical(dict(enumerate(second)), dict(enumerate(first)))
    assert_identical(dict(enumerate(buffers)), dict(enumerate(before)))


@each_update
@each_dtype(torch.float32, torch.float64)
def test_an_update_in_a_recomputation_repeats_the_last_and_touches_no_buffer(dtype, kind):
    """By sums that came from elsewhere, as a recomputation of a pooled batch does."""
    state, measured, _ = started(6, dtype)
    mode, law = UPDATES[kind]
    sums = kernels.batch_sums(data((7, 6, 5), dtype), dtype).sums
    batch = Batch(sums, 7, torch.full((6,), 0.3, dtype=dtype), True)
    arguments = mode, LayerState(state, measured if mode is Mode.RUNNING else None), batch, law
    first = cpu.update(*arguments, True)
    before = [t.clone() for t in (*state, *measured)]
    second = cpu.update(*arguments, False)
    assert_identical(dict(enumerate(second)), dict(enumerate(first)))
    assert_identical(dict(enumerate((*state, *measured))), dict(enumerate(before)))


def bits(outcome: Outcome) -> dict[str, Tensor]:
    parts = outcome._asdict()
    states = [parts.pop(name)._asdict() for name in ("state", "noise", "gradient")]
    return {**states[0], **states[1], **states[2], **parts}


@each_pair(
    threads=names_of(*THREADS), shape=names_of((40_001, 3), (2, 2, 300, 400), (2, 2048, 7, 7)), dtype=names_of(*DTYPES)
)
def test_a_step_is_the_same_bit_for_bit_whatever_else_the_machine_does(dtype, shape, threads):
    wide = statistics_dtype(dtype)
    x, dy, (weight, bias) = data(shape, dtype), data(shape, dtype, 1), affine(shape[1], wide)
    torch.set_num_threads(threads)
    first = bits(train("cpu", "running gradient", x, dy, weight, bias, wide))
    enough = threading.Event()

    def compete() -> None:
        matrix = torch.ones(150, 150)
        while not enough.is_set():
            matrix = matrix @ matrix * 0

    others = [threading.Thread(target=compete) for _ in range(2)]
    for other in others:
        other.start()
    try:
        for _ in range(5):
            assert_identical(bits(train("cpu", "running gradient", x, dy, weight, bias, wide)), first)
    finally:
        enough.set()
        for other in others:
            other.join()


@each_pair(dtype=names_of(*DTYPES), array=ARRAYS)
def test_the_sweeps_leave_nothing_unwritten(dtype, array):
    """As unwritten memory is NaN; what a training step leaves is compared with the reference."""
    shape, layout = array
    x, dy = LAYOUTS[layout](data(shape, dtype)), LAYOUTS[layout](data(shape, dtype, 1))
    weight, bias = affine(shape[1], statistics_dtype(dtype))
    torch.set_num_threads(3)
    state, measured, _ = started(shape[1], statistics_dtype(dtype))
    batch = cpu.batch_sums(x, statistics_dtype(dtype)).sums
    mean, var = moments(batch)
    rstd = (var + EPS).rsqrt()
    sums = cpu.gradient_sums(dy, x, mean, rstd)
    results = (
        *batch,
        cpu.normalize(x, mean, var, weight, bias, EPS),
        *cpu.batch_norm(x, weight, bias, EPS, statistics_dtype(dtype)),
        *sums,
        cpu.input_gradient(dy, x, mean, rstd, weight, *(s / x[:, 0].numel() for s in sums)),
        *cpu.batch_norm_gradients(dy, x, mean, rstd, weight),
        *(
            vector
            for mode in Mode
            for vector in cpu.update(
                mode,
                LayerState(state, measured if mode is Mode.RUNNING else None),
                Batch(batch, 3, torch.full_like(mean, 0.5), True),
                LAW,
                True,
            )
        ),
    )
    assert all(part.isfinite().all() for part in results)


# --------------------------------------------------------------------------------------- how the data may lie in memory


def displaced(x: Tensor) -> Tensor:
    """Aligned to an element and no more."""
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    assert shifted.data_ptr() % 8 == x.element_size() % 8
    return shifted


def displaced_rows(x: Tensor) -> Tensor:
    return displaced(x.movedim(1, -1)).movedim(-1, 1)


def odd_strides(x: Tensor) -> Tensor:
    """Where a size is 1, its stride says nothing."""
    strides = [stride if size > 1 else 12_345 for size, stride in zip(x.shape, x.stride())]
    return x.as_strided(x.shape, strides)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    **LAYOUTS,
    "displaced": displaced,
    "displaced rows": displaced_rows,
    "odd strides": odd_strides,
    "odd strides of rows": lambda x: odd_strides(LAYOUTS["rows"](x)),
    "every other": lambda x: torch.stack([x, x * 0], -1).flatten(-2)[..., ::2],
    "channels of more": lambda x: torch.cat([x * 0, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "channels of more rows": lambda x: LAYOUTS["rows"](torch.cat([x, x], 1))[:, : x.shape[1]],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
}


def assert_views_do_not_matter(of_x: str, of_dy: str, shape: tuple[int, ...]) -> None:
    weight, bias = affine(shape[1], torch.float32)
    for dtype in DTYPES:
        x, dy = data(shape, dtype), data(shape, dtype, 1)
        step = train("cpu", "running gradient", VIEWS[of_x](x), VIEWS[of_dy](dy), weight, bias, statistics_dtype(dtype))
        assert_step_near("running gradient", step, x, dy, weight, reference("running gradient", x, dy, weight, bias))


@pytest.mark.parametrize(
    "shape", [(6, 5), (1, 5), (6, 1), (6, 5, 3), (1, 5, 3, 1), (6, 5, 1, 1), (6, 1, 3, 7), (6, 5, 3, 2, 4)]
)
@pytest.mark.parametrize("view", VIEWS)
def test_results_do_not_depend_on_strides_and_offsets(view, shape):
    assert_views_do_not_matter(view, view, shape)


@pytest.mark.parametrize("of_dy", VIEWS)
@pytest.mark.parametrize("of_x", VIEWS)
def test_x_and_its_gradient_may_lie_differently(of_x, of_dy):
    assert_views_do_not_matter(of_x, of_dy, (6, 5, 3, 7))


@pytest.mark.parametrize("expanded", ["samples", "positions", "one value"])
@each_dtype(*DTYPES)
def test_inputs_and_gradients_may_be_expanded(dtype, expanded):
    shape, (weight, bias) = (6, 5, 3, 7), affine(5, torch.float32)
    part = {"samples": (1, 5, 3, 7), "positions": (6, 5, 1, 1), "one value": (1, 1, 1, 1)}[expanded]
    x, dy, whole = data(part, dtype), data(part, dtype, 1), data(shape, dtype, 2)
    for x_, dy_ in ((x.expand(shape), whole), (whole, dy.expand(shape)), (x.expand(shape), dy.expand(shape))):
        step = train("cpu", "running gradient", x_, dy_, weight, bias, statistics_dtype(dtype))
        assert_step_near(
            "running gradient", step, x_, dy_, weight, reference("running gradient", x_, dy_, weight, bias)
        )


@pytest.mark.parametrize(
    ("shape", "memory_format"), [((6, 5, 3, 7), torch.channels_last), ((6, 5, 3, 2, 4), torch.channels_last_3d)]
)
@each_dtype(*DTYPES)
def test_channels_last_stays_channels_last(dtype, shape, memory_format):
    x, dy = data(shape, dtype).to(memory_format=memory_format), data(shape, dtype, 1)
    weight, bias = affine(5, torch.float32)
    step = train("cpu", "running gradient", x, dy, weight, bias, statistics_dtype(dtype))
    assert step.y.is_contiguous(memory_format=memory_format)
    assert step.dx.is_contiguous(memory_format=memory_format)
    assert_step_near("running gradient", step, x, dy, weight, reference("running gradient", x, dy, weight, bias))


# ------------------------------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("outlier", [False, True])
@pytest.mark.parametrize("ratio", [1e4, 1e6])
@pytest.mark.parametrize("shape", [(400, 6), (16, 6, 24, 24), (40_001, 3), (2, 2, 300, 400)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_variance_does_not_suffer_from_the_mean_nor_from_the_first_element(layout, shape, ratio, outlier):
    x = noise(shape, 0) + ratio
    if outlier:
        x[0].view(shape[1], -1)[:, 0] += 1e4
    x = LAYOUTS[layout](x)
    expected = x.double().transpose(0, 1).flatten(1).var(1, correction=0)
    torch.set_num_threads(2)
    y, _, var = cpu.batch_norm(x, None, None, EPS, torch.float32)
    for found in (moments(cpu.batch_sums(x, torch.float32).sums)[1], var):
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    # What of the mean does not fit a float32, up to 0.03 here, goes into y all the same.
    exact = torch.nn.functional.batch_norm(x.double(), None, None, training=True, eps=EPS)
    assert_near(y, exact, 8)
    for running in (False, True):
        state = empty_state(shape[1], torch.float32)
        spec = StepSpec(Mode.EXACT if running else Mode.BATCH, EPS, 1.0, Law())
        cpu.training_forward(x, None, None, cpu.prepare(state), spec, True)
        n = x.numel() / shape[1]
        unbiased = state.running_var.double() * (1 if running else (n - 1) / n)
        torch.testing.assert_close(unbiased, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(9_000, 4), (16, 4, 24, 24), (2, 4, 60, 60)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_variance_of_float64_does_not_suffer_from_a_pivot_that_is_an_outlier(layout, shape):
    """Squares about such a pivot are 1e12, and their roundings more than 1e-14 of the variance."""
    x = noise(shape, 0, torch.float64)
    flat, n = x.view(*shape[:2], -1), len(x) // 2
    # What a pivot may be the median of, in either layout.
    for sample, position in ((0, 0), (n, 0), (n, flat.shape[2] // 2), (-1, -1)):
        flat[sample, :, position] += 1e6
    x = LAYOUTS[layout](x)
    expected = x.transpose(0, 1).flatten(1).var(1, correction=0)
    for threads in THREADS:
        torch.set_num_threads(threads)
        found = cpu.batch_norm(x, None, None, EPS, torch.float64)[2]
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("first", [0.0, 300.0])
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("shape", [(16, 4, 24, 24), (2, 2, 300, 400), (40_000, 4)])
@pytest.mark.parametrize("layout", LAYOUTS)
@each_dtype(torch.bfloat16, torch.float16)
def test_the_variance_of_16_bits_is_as_good_as_that_of_float32(dtype, layout, shape, mean, first):
    """Also where the first element of a channel is an outlier, about which short sums in float32 would lose digits."""
    x = noise(shape, 0) + mean
    x[0].view(shape[1], -1)[:, 0] += first
    x = LAYOUTS[layout](x.to(dtype))
    expected = x.double().transpose(0, 1).flatten(1).var(1, correction=0)
    found = moments(cpu.batch_sums(x, torch.float32).sums)[1]
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(64, 4), (2, 4, 8, 4)])
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_bfloat16_is_rounded_as_torch_rounds_it(name, shape):
    """Halfway between two numbers to the even one, and what is beyond the largest to infinity; NaN stays."""
    x = (1 + torch.arange(256) / 128).view(shape).bfloat16()
    x.view(-1)[::7] = torch.finfo(torch.bfloat16).max
    x.view(-1)[::50] = torch.nan
    zero, one = torch.zeros(4), torch.ones(4)
    for weight, bias in ((one, one / 512), (one, one / 256), (-one, one / 256), (one * (1 + 2**-9), zero)):
        exact = x.float() * weight.view(-1, *[1] * (x.dim() - 2)) + bias.view(-1, *[1] * (x.dim() - 2))
        with instruction_set(name) as exists:
            y = cpu.normalize(x, zero, one, weight, bias, 0.0)
        if exists:
            torch.testing.assert_close(y, exact.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(2**16 // 4, 4), (1, 4, 2**16 // 4)])
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_float16_is_rounded_as_torch_rounds_it(name, shape):
    """Every float16, at and beside the middle between two, small enough to be subnormal or too large to be finite."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).view(shape)
    zero, one = torch.zeros(4), torch.ones(4)
    for weight in (1.0, 1 + 2**-11, 1 + 2**-11 + 2**-22, 1 + 2**-11 - 2**-22, 2**-14, 1.5 * 2**-10, 2.0, -3.0):
        exact = x.float() * weight
        with instruction_set(name) as exists:
            y = cpu.normalize(x, zero, one, one * weight, None, 0.0)
        if exists:
            torch.testing.assert_close(y, exact.half(), rtol=0, atol=0, equal_nan=True)


@each_pair(
    shape=names_of((40, 5), (4, 5, 6, 7), (9_000, 5), (4, 5, 60, 70)),
    poison=names_of(float("nan"), float("inf"), -float("inf"), 1e30),
    place=names_of("first", "last"),
    dtype=names_of(torch.float32, torch.bfloat16, torch.float16),
)
def test_a_channel_that_is_not_finite_keeps_its_state_and_leaves_the_others_alone(dtype, place, poison, shape):
    torch.set_num_threads(2)
    layers = []
    for poisoned in (False, True):
        layer = RunningBatchNorm(5)
        training_step(layer, data(shape, dtype, 1))
        before = buffers_of(layer)
        x = data(shape, dtype)
        if poisoned:
            x[(0, 3) if place == "first" else (-1, 3)] = poison
        with use_backend("cpu"):
            step = training_step(layer, x)
        layers.append((buffers_of(layer), step))
    (clean, clean_step), (dirty, dirty_step) = layers
    for name, buffer in dirty.items():
        if buffer.dim():
            others = [0, 1, 2, 4]
            assert torch.equal(buffer[others], clean[name][others]), name
            if name not in ("last_keep", "last_gain"):
                assert buffer[3] == before[name][3], name
            assert buffer[3].isfinite(), name
    for name in ("y", "dx"):
        assert torch.equal(dirty_step[name][:, others], clean_step[name][:, others]), name


# ------------------------------------------------------------------------------------- buffers, tensors and their kinds


def assert_trains_as_in_torch(make: Callable[[], RunningBatchNorm], step: Callable[[RunningBatchNorm], Tensor]) -> None:
    """The same output and the same buffers; `step` is done twice."""
    found = {}
    for name in ("cpu", "aten"):
        torch.manual_seed(0)
        with use_backend(name):
            layer = make()
            y = step(layer), step(layer)
        found[name] = {"first": y[0].detach(), "second": y[1].detach(), **buffers_of(layer)}
    for name, expected in found["aten"].items():
        # Pivots may differ, by less than the spread of what they are about.
        if name not in ("shift", "sums", "sqrs"):
            torch.testing.assert_close(
                found["cpu"][name], expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_buffers_may_have_gaps():
    given = {}

    def step(layer: RunningBatchNorm) -> Tensor:
        buffers = {
            name: torch.stack([buffer, buffer], -1)[..., 0] if buffer.dim() else buffer.clone()
            for name, buffer in layer.named_buffers()
        }
        assert not buffers["sums"].is_contiguous()
        beside = {name: buffer._base[..., 1].clone() for name, buffer in buffers.items() if buffer.dim()}
        y = torch.func.functional_call(layer, buffers, (noise((8, 4, 3), 0),))
        for name, values in beside.items():
            assert torch.equal(buffers[name]._base[..., 1], values), name
        given[kernels._forced] = {name: buffer.clone() for name, buffer in buffers.items()}
        return y

    assert_trains_as_in_torch(lambda: RunningBatchNorm(4), step)
    torch.testing.assert_close(given["cpu"]["running_var"], given["aten"]["running_var"], rtol=1e-5, atol=0)


HALVES = {
    "all": State._fields + NoiseState._fields + GradientState._fields,
    "state": State._fields,
    "noise": NoiseState._fields,
    "first": ("shift",),
    "last": ("last_gain",),
    "one of the gradient": ("count_dy",),
}


@pytest.mark.parametrize("masked", [False, True], ids=["whole steps", "masked"])
@pytest.mark.parametrize("names", HALVES.values(), ids=HALVES.keys())
def test_buffers_that_became_narrow_are_refused_or_taken_as_torch_takes_them(names, masked):
    def step(layer: RunningBatchNorm) -> Tensor | None:
        x = noise((8, 4, 3), 0)
        training_step(layer, x)
        for name in names:
            buffer = getattr(layer, name)
            if buffer.is_floating_point():
                # NaN behind the numbers shows who writes there.
                memory = torch.full((64,), float("nan"), dtype=torch.float16)
                buffer.data = memory[: buffer.numel()].copy_(buffer)
        refused = False
        try:
            mask = torch.ones(8, 3, dtype=torch.bool) if masked else None
            y = layer(x.requires_grad_(), mask)
            y.backward(noise(y.shape, 1))
        except RuntimeError as error:
            refused = any(part in str(error) for part in ("dtype", "type Float", "cannot take", "type c10::Half"))
            if not refused:
                raise
        for name in names:
            buffer = getattr(layer, name)
            if buffer.is_floating_point():
                behind = torch.empty(0, dtype=torch.float16).set_(buffer.untyped_storage())[buffer.numel() :]
                assert behind.isnan().all(), name
                buffer.data = buffer.data.float()
        return None if refused else y.detach()

    found = {}
    for name in ("cpu", "aten"):
        layer = RunningBatchNorm(4)
        with use_backend(name):
            found[name] = step(layer), buffers_of(layer)
    (y, buffers), (expected_y, expected) = found["cpu"], found["aten"]
    if y is not None and expected_y is not None:
        torch.testing.assert_close(y, expected_y, rtol=1e-2, atol=1e-2)
        for name in names:
            if name not in ("shift", "sums", "sqrs"):
                torch.testing.assert_close(buffers[name], expected[name], rtol=1e-2, atol=1e-2)


def test_a_negated_view_is_the_negative():
    x = noise((8, 3, 4), 0)
    found, expected = (kernels.batch_sums(t, torch.float32).sums for t in (torch._neg_view(x), -x))
    torch.testing.assert_close(moments(found), moments(expected), rtol=1e-5, atol=1e-5)


def test_zeros_that_have_no_memory_are_zeros():
    batch = kernels.batch_sums(torch._efficientzerotensor((8, 3, 4)), torch.float32).sums
    assert all(part.eq(0).all() for part in moments(batch))


def test_a_layer_may_move_to_shared_memory():
    def step(layer: RunningBatchNorm) -> Tensor:
        y = layer(noise((8, 4, 3), 0))
        layer.share_memory()
        return y

    assert_trains_as_in_torch(lambda: RunningBatchNorm(4), step)


def test_layers_may_follow_each_other_in_the_same_memory():
    for seed in range(8):
        for channels in (4, 3):

            def step(layer: RunningBatchNorm, channels=channels, seed=seed) -> Tensor:
                x = noise((8, channels, 3), seed)
                y = layer(x.requires_grad_())
                y.sum().backward()
                return y

            assert_trains_as_in_torch(lambda channels=channels: RunningBatchNorm(channels), step)
        gc.collect(1)  # of young objects: the layers that were just made


def test_a_rule_of_ones_own_is_honoured():
    class Half(Horizon):
        def weight(self, batch, samples, steps):
            return torch.full_like(samples, 0.5)

    layer = RunningBatchNorm(3, momentum=Half())
    with use_backend("cpu"):
        for _ in range(3):
            layer(noise((4, 3), 0))
    assert layer.last_keep.eq(0.5).all()
    assert layer.debias.eq(1 - 0.5**3).all()


def test_fake_tensors_are_left_to_torch():
    with FakeTensorMode():
        layer = RunningBatchNorm(3)
        y = layer(torch.randn(4, 3, requires_grad=True))
        y.sum().backward()
    assert y.shape == (4, 3)


def test_a_dispatch_mode_sees_the_operations_of_torch():
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            seen.append(str(function))
            return function(*arguments, **(named or {}))

    seen: list[str] = []
    x, layers = noise((8, 3, 4), 0), [RunningBatchNorm(3), RunningBatchNorm(3)]
    expected = layers[0](x)
    with Seen():
        y = layers[1](x)
    assert any("native_batch_norm" in name for name in seen)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_precise_layers_take_one_sample_of_several_positions():
    for layer, shape in ((PreciseBatchNorm1d(3), (1, 3, 2)), (PreciseBatchNorm2d(3), (1, 3, 2, 1))):
        with use_backend("cpu"):
            step = training_step(layer, noise(shape, 0))
        expected = torch.nn.functional.batch_norm(noise(shape, 0), None, None, training=True)
        torch.testing.assert_close(step["y"], expected, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- sanitizers


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(sanitizer, tmp_path):
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc")
    flags = [
        f"-fsanitize={sanitizer}",
        "-fno-sanitize-recover=all",
        "-std=gnu11",
        "-fopenmp-simd",
        "-O1",
        "-g",
        "-pthread",
    ]
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }")
    compiled = subprocess.run([compiler, *flags, str(probe), "-o", str(tmp_path / "probe")], capture_output=True)
    if compiled.returncode or subprocess.run([str(tmp_path / "probe")], capture_output=True).returncode:
        pytest.skip(f"gcc has no sanitizer {sanitizer} that runs here")
    sources = [Path(cpu.__file__).parent / "csrc" / "cpu.c", Path(__file__).parent / "cpu_harness.c"]
    program = tmp_path / "harness"
    include = f"-I{sources[0].parent}"
    subprocess.run([compiler, *flags, include, *map(str, sources), "-lm", "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4_000:]
