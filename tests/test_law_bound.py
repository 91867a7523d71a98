"""Nothing amplifies a gradient: ‖dx‖ ≤ 2·|weight·rstd|·‖dy‖ per channel, for any statistics and any memory."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from cases import RULES, each_dtype, each_gradient, noise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steps import buffers_of
from torch import Tensor

from runningbn import RunningBatchNorm
from runningbn.kernels import BACKENDS, use_backend
from runningbn.ops.law import Law
from runningbn.ops.state import GradientState

each_backend = pytest.mark.parametrize(
    "backend", [name for name in ("cpu", "aten") if BACKENDS[name].unavailable() is None]
)
MAX_LAGS = (0.01, 0.05, 1.0, math.inf)


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 2))


def norms(t: Tensor) -> Tensor:
    return t.double().norm(dim=(0, 2))


# ------------------------------------------------------------------------------------------------ what is subtracted


def subtracted(layer: RunningBatchNorm, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """dy − dx/rstd = s·(G0 + z·G1) of a step, and z."""
    x = x.clone().requires_grad_()
    z = layer(x)
    z.backward(dy)
    rstd = (layer.running_var + layer.eps).rsqrt()
    return dy - x.grad / per_channel(rstd, x), z.detach()


def remembering(g0: float, g1: float, **options: object) -> RunningBatchNorm:
    """A trained layer whose running means of dy and dy·z are these, and will hardly change by another batch."""
    layer = RunningBatchNorm(3, momentum=1e-6, affine=False, dtype=torch.float64, max_lag=math.inf, **options)
    for seed in range(3):
        layer(noise((4, 3, 16), seed, torch.float64))
    for name, value in zip(GradientState._fields, (g0, g1, 1.0)):
        getattr(layer, name).fill_(value)
    return layer


@each_backend
@pytest.mark.parametrize(("g0", "g1"), [(3.0, 0.0), (0.0, 5.0), (1e3, -2e3), (1e30, 1e30)])
def test_a_long_memory_is_scaled_to_the_length_of_the_projection(backend, g0, g1):
    layer, x, dy = remembering(g0, g1), noise((4, 3, 16), 9, torch.float64) * 2 + 3, noise((4, 3, 16), 8, torch.float64)
    with use_backend(backend):
        part, z = subtracted(layer, x, dy)
    for c in range(3):
        span = torch.stack([torch.ones(64, dtype=torch.float64), z[:, c].flatten()], 1)
        projection = span @ torch.linalg.lstsq(span, dy[:, c].reshape(-1, 1)).solution
        memory = layer.sum_dy[c] / layer.count_dy[c] + z[:, c] * layer.sum_dy_xhat[c] / layer.count_dy[c]
        # The direction of what is remembered, and the length of what there is.
        torch.testing.assert_close(part[:, c], memory * (projection.norm() / memory.norm()), rtol=1e-6, atol=1e-9)


@each_backend
@pytest.mark.parametrize(("g0", "g1"), [(0.0, 0.0), (1e-3, 0.0), (0.0, -1e-3), (0.01, 0.02)])
def test_a_short_memory_is_subtracted_as_it_is(backend, g0, g1):
    layer, x, dy = remembering(g0, g1), noise((4, 3, 16), 9, torch.float64), noise((4, 3, 16), 8, torch.float64) + 1
    with use_backend(backend):
        part, z = subtracted(layer, x, dy)
    means = (per_channel(total / layer.count_dy, x) for total in (layer.sum_dy, layer.sum_dy_xhat))
    mean_dy, mean_dy_xhat = means
    torch.testing.assert_close(part, mean_dy + z * mean_dy_xhat, rtol=0, atol=1e-12)


@each_backend
def test_a_memory_of_the_other_sign_doubles_a_gradient_and_no_more(backend):
    """The bound is reached: where all of dy is its projection, and the memory points the other way."""
    layer, x = remembering(-1.0, 0.0), noise((4, 3, 16), 9, torch.float64).requires_grad_()
    with use_backend(backend):
        layer(x).backward(torch.ones_like(x))
    rstd = (layer.running_var + layer.eps).rsqrt()
    # A batch has R = ¼ or so here, by which it weighs 1/17 in the memory.
    ratio = norms(x.grad) / (rstd * math.sqrt(64))
    assert ((ratio > 1.7) & (ratio <= 2)).all()


@each_backend
@each_gradient()
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30, "momentum of 0"], ids=str)
def test_where_the_statistics_are_constants_the_gradient_is_that_of_evaluation(backend, gradient, poison):
    """A batch that the forward ignores is normalised by what it has no part in. Nothing is subtracted, then."""
    with use_backend(backend):
        layer = RunningBatchNorm(3, gradient=gradient)
        for seed in range(3):
            layer(noise((4, 3, 16), seed).requires_grad_()).pow(3).sum().backward()
        before = {name: value for name, value in buffers_of(layer).items() if name in GradientState._fields}
        x, dy = noise((4, 3, 16), 9) * 10 - 50, noise((4, 3, 16), 8) + 0.5
        if poison == "momentum of 0":
            layer.momentum = 0.0
        else:
            x[0, :, 0] = poison
        x.requires_grad_()
        layer(x).backward(dy)
    expected = dy * per_channel((layer.running_var + layer.eps).rsqrt(), x)
    finite = x.detach().isfinite()
    torch.testing.assert_close(x.grad[finite], expected[finite], rtol=1e-6, atol=0)
    for name, value in before.items():
        assert torch.equal(getattr(layer, name), value), name


@each_backend
def test_where_a_gradient_is_not_finite_nothing_is_subtracted(backend):
    with use_backend(backend):
        layer = remembering(1.0, 1.0)
        x, dy = noise((4, 3, 16), 9, torch.float64).requires_grad_(), noise((4, 3, 16), 8, torch.float64)
        dy[0, 1, 0] = math.inf
        layer(x).backward(dy)
    expected = dy * per_channel((layer.running_var + layer.eps).rsqrt(), x)
    rest = dy.isfinite()[:, 1]
    torch.testing.assert_close(x.grad[:, 1][rest], expected[:, 1][rest])
    assert not x.grad[0, 1, 0].isfinite()


# ------------------------------------------------------------------------------------------------------ for any state


@dataclasses.dataclass(frozen=True)
class Channel:
    """Magnitudes by their decimal logarithms; a batch of such a channel, and what the layer believes of it.

    Attributes:
        location, spread: of the batch; None for 0.
        var: of the running statistics.
        offset: of their mean from the location, in std; None for 0.
        dy: of the gradient.
        g0, g1: of the running means of dy and dy·z, beside dy; None for 0.
        signs: of location, offset, g0, g1, weight.
        noise, count: R and count_dy before the step.
        aligned: whether dy is in proportion to x − mean.
    """

    location: float | None
    spread: float | None
    var: float
    offset: float | None
    dy: float
    g0: float | None
    g1: float | None
    signs: tuple[int, ...]
    noise: float
    count: float
    weight: float
    aligned: bool


def logarithm(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high)


SIGNS = st.sampled_from((-1, 1))
CHANNEL = st.builds(
    Channel,
    location=st.none() | logarithm(-9, 9),
    spread=st.none() | logarithm(-9, 6),
    var=logarithm(-12, 12),
    offset=st.none() | logarithm(-6, 6),
    dy=logarithm(-8, 8),
    g0=st.none() | logarithm(-6, 12),
    g1=st.none() | logarithm(-6, 12),
    signs=st.tuples(*[SIGNS] * 5),
    noise=st.floats(0, 1),
    count=st.floats(1e-6, 1),
    weight=logarithm(-3, 3),
    aligned=st.booleans(),
)


@dataclasses.dataclass(frozen=True)
class Situation:
    """A batch of a size, the channels, and the layer before: fresh, seeded, or seeded and trained for some batches."""

    samples: int
    positions: int
    channels: list[Channel]
    momentum: object
    max_lag: float
    seeded: bool
    trained: int
    seed: int


SITUATION = st.builds(
    Situation,
    samples=st.integers(1, 4),
    positions=st.integers(1, 50),
    channels=st.lists(CHANNEL, min_size=1, max_size=4),
    momentum=st.sampled_from((*RULES.values(), 1e-3, 0.0)),
    max_lag=st.sampled_from(MAX_LAGS),
    seeded=st.booleans(),
    trained=st.integers(0, 2),
    seed=st.integers(0, 2**16),
)


def power(exponents: list[float | None], signs: list[int] | None = None) -> Tensor:
    """10^exponent with its sign, and 0 for None; (C, 1)."""
    values = [0.0 if e is None else 10.0**e for e in exponents]
    return (torch.tensor(values, dtype=torch.float64) * torch.tensor(signs or [1] * len(values))).unsqueeze(1)


@torch.no_grad()
def set_up(s: Situation, gradient: str, dtype: torch.dtype) -> tuple[RunningBatchNorm, Tensor, Tensor]:
    """The layer, and x and dy of the batch to come."""
    c, signs = s.channels, list(zip(*[channel.signs for channel in s.channels]))
    shape = (s.samples, len(c), s.positions)
    location = power([channel.location for channel in c], signs[0])
    std = power([channel.var / 2 for channel in c])
    mean = location - power([channel.offset for channel in c], signs[1]) * std
    layer = RunningBatchNorm(len(c), momentum=s.momentum, gradient=gradient, max_lag=s.max_lag, dtype=dtype)
    if s.seeded:
        layer.num_batches_tracked.fill_(9)
        layer.running_mean, layer.running_var = mean.flatten(), std.square().flatten()
    for i in range(s.trained):
        layer((noise(shape, s.seed + 3 + i, torch.float64) * std + mean).to(dtype))
    layer.weight.copy_(power([channel.weight for channel in c], signs[4]).flatten())
    layer.noise.copy_(torch.tensor([channel.noise for channel in c]))
    layer.noise_steps.fill_(Law().window)
    layer.last_mean.copy_(mean.flatten())
    layer.count_dy.copy_(torch.tensor([channel.count for channel in c]))
    size = power([channel.dy for channel in c])
    for name, exponents, of in (("sum_dy", [e.g0 for e in c], signs[2]), ("sum_dy_xhat", [e.g1 for e in c], signs[3])):
        getattr(layer, name).copy_((size * power(exponents, of)).flatten() * layer.count_dy)
    centred = noise(shape, s.seed, torch.float64)
    x = location + centred * power([channel.spread for channel in c])
    aligned = torch.tensor([channel.aligned for channel in c]).unsqueeze(1)
    dy = torch.where(aligned, centred, noise(shape, s.seed + 1, torch.float64) + 0.5) * size
    return layer, x.to(dtype), dy.to(dtype)


@dataclasses.dataclass(frozen=True)
class Step:
    """One step in float64, per channel: the statistics that were used and what rounding leaves of them.

    Attributes:
        ratio: ‖dx‖ / (|weight·rstd|·‖dy‖).
        mean, rstd: what x was normalised by; `running_mean` and `running_var` within the limits of the law.
        offset, spread: mean and std of z over the batch.
        rounding: of z: that of the mean, in units of the std. Several roundings go into it, so 4 are allowed for.
    """

    ratio: Tensor
    mean: Tensor
    rstd: Tensor
    offset: Tensor
    spread: Tensor
    rounding: Tensor


def step_of(layer: RunningBatchNorm, x: Tensor, dy: Tensor) -> Step:
    x = x.requires_grad_()
    layer(x).backward(dy)
    wide = x.detach().double()
    batch_mean, batch_std = wide.mean((0, 2)), wide.std((0, 2), correction=0)
    mean, var = layer.running_mean.double(), layer.running_var.double()
    if layer.gradient == "running" and layer.max_lag < math.inf:
        d = layer.max_lag * (1 + Law().lag_noise * (layer.noise.double() / len(x)).clamp(max=1))
        limited_var = torch.maximum(var, (batch_std / (1 + d)).square())
        limited_mean = mean.clamp(batch_mean - d * limited_var.sqrt(), batch_mean + d * limited_var.sqrt())
        ignored = layer.last_gain == 0
        mean, var = torch.where(ignored, mean, limited_mean), torch.where(ignored, var, limited_var)
    rstd = (var + layer.eps).rsqrt()
    ratio = norms(x.grad) / (layer.weight.detach().double().abs() * rstd * norms(dy))
    largest = torch.maximum(mean.abs(), wide.abs().amax((0, 2)))
    rounding = 4 * torch.finfo(x.dtype).eps * (1 + largest * rstd)
    return Step(ratio, mean, rstd, (batch_mean - mean) * rstd, batch_std * rstd, rounding)


def excess(layer: RunningBatchNorm, step: Step, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """By how much rounding may lengthen dy's projection and what is subtracted, both in units of ‖dy‖.

    The law knows z by its mean and std over the batch. An error `rounding` in the mean of z is one of rounding/spread
    in the component of dy along z, and one of rounding·|G1| in the length of G0 + z·G1, whose terms may cancel, too.
    """
    eps, rms_dy = torch.finfo(x.dtype).eps, norms(dy) / math.sqrt(dy.numel() / dy.shape[1])
    # Where z hardly varies beside its mean, √eps of the digits are left when the law ceases to look along it.
    of_projection = 4 * eps**0.5 + torch.where(step.spread > 0, step.rounding / step.spread, 0)
    count = layer.count_dy.double().clamp_min(1e-300)
    g0, g1 = layer.sum_dy.double() / count, layer.sum_dy_xhat.double() / count
    memory = torch.hypot(g0 + step.offset * g1, step.spread * g1)
    error = step.rounding * g1.abs() + 4 * eps * (g0.abs() + (step.offset * g1).abs())
    # s·error, with s = 1 at most, and s·(memory − error) no longer than the projection.
    scale = (1 + of_projection) * rms_dy / (memory - error).clamp_min(1e-300)
    return of_projection, scale.clamp_max(1) * error / rms_dy


@each_backend
@each_dtype(torch.float32, torch.float64)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(situation=SITUATION)
def test_no_step_with_running_gradients_makes_a_gradient_more_than_twice_as_long(backend, dtype, situation):
    with use_backend(backend):
        layer, x, dy = set_up(situation, "running", dtype)
        step = step_of(layer, x, dy)
    of_projection, of_memory = excess(layer, step, x.detach(), dy)
    assert step.ratio.isfinite().all()
    assert (step.ratio <= 2 + of_projection + of_memory).all(), (step, of_projection, of_memory)


@pytest.mark.slow
@each_backend
@each_dtype(torch.float32, torch.float64)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(situation=SITUATION)
def test_no_step_with_exact_gradients_makes_a_gradient_longer(backend, dtype, situation):
    """The bound is 1. With p the share of the batch in the statistics, ζ and q the means of z and z² over the batch:

    dx = weight·rstd·(dy − K·dy), K = κ·(1·1ᵀ + z·zᵀ), κ = p/n, has the eigenvalues of p·[[1, ζ], [ζ, q]], and those are
    between 0 and 1 if (1 − p)·(1 − p·q) ≥ p²·ζ². So it is: the variance holds the batch, p·q of its 1 (less with eps),
    and an old mean that is p/(1 − p)·ζ from the new one, (1 − p)·(p·ζ/(1 − p))². At the floor, K = κ·1·1ᵀ.
    """
    with use_backend(backend):
        layer, x, dy = set_up(situation, "exact", dtype)
        step = step_of(layer, x, dy)
    # p·z² is at most 1 in the mean, so an error δ in z is one of 2·δ + δ² in K.
    assert (step.ratio <= (1 + step.rounding) ** 2 + 16 * torch.finfo(dtype).eps).all(), step
