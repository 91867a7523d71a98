"""What the Triton kernels do for each channel: `ops.update` and `momentum` as device functions.

Shapes: everything is (BC,), the channels of a program, its `own`, see `Channels`. W is the dtype of the arithmetic;
what is stored is rounded to that of the buffers.

A `law.Law` and a `momentum.RuleCode` come in bits, see `from_bits`.
"""

# mypy: ignore-errors
# Triton compiles these functions from their source; their arguments are pointers, numbers and tiles, and have no types.

from typing import NamedTuple

import triton
import triton.language as tl

from ..momentum import RULES
from .triton_vectors import at_least, from_bits, load_wide, not_negative, rounded

# Rules for the weight of a batch, see momentum.py.
CONSTANT = tl.constexpr(RULES.index("CONSTANT"))
CUMULATIVE = tl.constexpr(RULES.index("CUMULATIVE"))
HORIZON = tl.constexpr(RULES.index("HORIZON"))
SQUARE_ROOT = tl.constexpr(RULES.index("SQUARE_ROOT"))

# torch.finfo(...).tiny, eps and max of float32 and float64. A tile of constants is float32 unless it cannot be, which
# all of these then are exactly.
_TINY32, _EPS32, _MAX32 = (tl.constexpr(2.0**-126), tl.constexpr(2.0**-23), tl.constexpr((2 - 2.0**-23) * 2.0**127))
_TINY64, _EPS64, _MAX64 = (tl.constexpr(2.0**-1022), tl.constexpr(2.0**-52), tl.constexpr((2 - 2.0**-52) * 2.0**1023))


class BatchMoments(NamedTuple):
    """A batch, per channel.

    Attributes:
        mean: float64.
        squares: Σ(x − mean)², in W.
        n: number of elements, in W.
        samples: N, in W.
    """

    mean: tl.tensor
    squares: tl.tensor
    n: tl.tensor
    samples: tl.tensor


@triton.jit
def affine(mean, rstd, weight, bias, own, W: tl.constexpr):
    """(x − mean)·slope + base, with what rounding takes from the mean in the base: it may have more digits than W."""
    slope = rstd
    if weight is not None:
        slope *= load_wide(weight, own, W)
    base = (mean.to(W).to(mean.dtype) - mean).to(W) * slope
    if bias is not None:
        base += load_wide(bias, own, W)
    return mean.to(W), slope, base


@triton.jit
def batch_weight(rule, batch, state, own, W: tl.constexpr):
    """a, (BC,), in W, see momentum.py; `batch` is the number of samples."""
    first = from_bits(rule.first, W)
    samples = load_wide(state.samples, own, W)
    if rule.rule == CUMULATIVE:
        result = 1 / (load_wide(state.steps, own, W) + 1)
    elif rule.rule == SQUARE_ROOT:
        result = samples * 0 + (1 - (1 - first) / tl.sqrt(at_least(batch - 1, 1)))
    elif rule.rule == HORIZON:
        # samples, start, fraction
        horizon = at_least(from_bits(rule.third, W) * samples, from_bits(rule.second, W))
        result = -_expm1(-batch / tl.where(horizon > first, first, horizon), W)
    else:
        result = samples * 0 + first
    return result


@triton.jit
def _expm1(u, W: tl.constexpr):
    """exp(u) − 1, u ≤ 0, to the last bits also near 0, where the difference has none."""
    e = tl.exp(u)
    if W == tl.float64:  # noqa: SIM300
        # Kahan's (e − 1)·u / ln(e), which takes a logarithm that is right near 1.
        inside = (e != 1) & (e > 0)
        quotient = (e - 1) * (u / tl.log(tl.where(inside, e, 2)))
        result = tl.where(inside, quotient, tl.where(e == 1, u, -1))
    else:
        # The series to the tenth power: its rest is below 2⁻²⁶ of it where |u| ≤ 1.
        series = 1 + u / 10
        for i in tl.static_range(8):
            series = 1 + u / (9 - i) * series
        result = tl.where(u > -1, u * series, e - 1)
    return result


@triton.jit
def enter(batch, a, state, law, own, WHOLE_BATCHES: tl.constexpr, BY_STATE: tl.constexpr, W: tl.constexpr):
    """`update._enter` and what sets the running statistics, of a `BatchMoments` with weight a.

    Returns:
        What `recalled` would find in the buffers.
    """
    dtype = state.shift.dtype.element_ty
    TINY: tl.constexpr = _TINY64 if dtype == tl.float64 else _TINY32
    EPS: tl.constexpr = _EPS64 if dtype == tl.float64 else _EPS32
    MAX: tl.constexpr = _MAX64 if dtype == tl.float64 else _MAX32
    floor, few = from_bits(law.variance_floor, W), from_bits(law.warmup_samples, W)
    mean, squares, n = batch.mean, batch.squares, batch.n
    shift, count = load_wide(state.shift, own, W), load_wide(state.count, own, W)
    count_sqrs, debias = load_wide(state.count_sqrs, own, W), load_wide(state.debias, own, W)
    samples = load_wide(state.samples, own, W)

    # Nothing may enter that is not finite, nor so far away that its square is not.
    distance = (mean - shift.to(mean.dtype)).to(W)
    finite = squares + n * distance * distance <= MAX
    a = tl.where(finite, a, 0)
    enters = own.exists & (a != 0)
    distance, squares = tl.where(finite, distance, 0), tl.where(finite, squares, 0)
    keep = 1 - a
    # Elements per unit of weight: those of the batch where none were counted yet.
    unit = at_least(count, TINY) / at_least(debias, TINY)
    new_unit = tl.where(count_sqrs == 0, n, unit)
    kept = keep * (new_unit / unit)
    gain = a
    if WHOLE_BATCHES:
        gain = a * new_unit / tl.where(n > 0, n, 1)

    # Both about the mean of their pivots.
    total = kept * count + gain * n
    pivot = rounded(shift + distance * (gain * n / at_least(total, TINY)), dtype, W)
    d = pivot - shift
    e = d - distance
    sums = load_wide(state.sums, own, W)
    moved = sums - count * d
    sqrs = kept * (load_wide(state.sqrs, own, W) - d * (sums + moved)) + gain * (squares + n * e * e)
    sqrs = rounded(sqrs, dtype, W)
    sums = rounded(kept * moved - gain * n * e, dtype, W)
    count_sqrs = rounded(kept * kept * count_sqrs + gain * gain * n, dtype, W)
    count = tl.where(enters, rounded(total, dtype, W), count)
    samples = tl.where(enters, rounded(samples + batch.samples, dtype, W), samples)
    steps = load_wide(state.steps, own, W) + 1
    gain = tl.where(enters, gain, 0)

    divisor = at_least(count, TINY)
    offset = sums / divisor
    of_state = not_negative(sqrs / divisor - offset * offset)
    if BY_STATE:
        of_state = tl.where((of_state < floor) & (samples < few), floor, of_state)
    else:
        # Bessel's correction for weighted elements, see state.unbiased.
        of_state /= at_least(1 - count_sqrs / at_least(divisor * divisor, TINY), EPS)
    mean = tl.where(enters, rounded(pivot + offset, dtype, W), load_wide(state.running_mean, own, W))
    var = tl.where(enters, rounded(of_state, dtype, W), load_wide(state.running_var, own, W))

    # Several threads may hold the values of one channel, and one of them stores: not before all have loaded.
    tl.debug_barrier()
    # Channels that ignore the batch keep their bits.
    tl.store(state.shift + own.c, pivot.to(dtype), mask=enters)
    tl.store(state.sums + own.c, sums.to(dtype), mask=enters)
    tl.store(state.sqrs + own.c, sqrs.to(dtype), mask=enters)
    tl.store(state.count + own.c, count.to(dtype), mask=enters)
    tl.store(state.count_sqrs + own.c, count_sqrs.to(dtype), mask=enters)
    tl.store(state.debias + own.c, (a + keep * debias).to(dtype), mask=enters)
    tl.store(state.running_mean + own.c, mean.to(dtype), mask=enters)
    tl.store(state.running_var + own.c, var.to(dtype), mask=enters)
    tl.store(state.samples + own.c, samples.to(dtype), mask=enters)
    tl.store(state.steps + own.c, steps.to(dtype), mask=enters)
    tl.store(state.last_keep + own.c, keep.to(dtype), mask=own.exists)
    tl.store(state.last_gain + own.c, gain.to(dtype), mask=own.exists)
    return mean, var, rounded(keep, dtype, W), rounded(gain, dtype, W), count, samples


@triton.jit
def recalled(state, own, W: tl.constexpr):
    """running_mean, running_var, last_keep, last_gain, count and samples, (BC,), in W."""
    mean, var = load_wide(state.running_mean, own, W), load_wide(state.running_var, own, W)
    keep, gain = load_wide(state.last_keep, own, W), load_wide(state.last_gain, own, W)
    return mean, var, keep, gain, load_wide(state.count, own, W), load_wide(state.samples, own, W)


@triton.jit
def exact_coefficients(of_state, law, dtype: tl.constexpr, W: tl.constexpr):
    """mean, var, kappa_mean, kappa_var as in `spec.Coefficients`, in W; `of_state` as `recalled`."""
    TINY: tl.constexpr = _TINY64 if dtype == tl.float64 else _TINY32
    mean, var, _, gain, count, samples = of_state
    floor, few = from_bits(law.variance_floor, W), from_bits(law.warmup_samples, W)
    kappa = gain / at_least(count, TINY)
    floored = (var <= rounded(floor, dtype, W)) & (samples < few)
    return mean, var, kappa, tl.where(floored, 0, kappa)


@triton.jit
def running_coefficients(
    of_state, batch, noise, law, own, dtype: tl.constexpr, UPDATES: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """mean, var, trust, offset, batch_std as in `spec.Coefficients`, in W; see `law`."""
    TINY: tl.constexpr = _TINY64 if dtype == tl.float64 else _TINY32
    max_lag, lag_noise = from_bits(law.max_lag, W), from_bits(law.lag_noise, W)
    trust_noise, window = from_bits(law.trust_noise, W), from_bits(law.window, W)
    mean, var, keep, gain, _, _ = of_state
    batch_mean, squares, n, batch_samples = batch.mean.to(W), batch.squares, batch.n, batch.samples
    ignored = gain == 0
    batch_var = squares / tl.where(n > 0, n, 1)
    measured = load_wide(noise.noise, own, W)
    if UPDATES:
        steps = load_wide(noise.noise_steps, own, W)
        difference = batch_mean - load_wide(noise.last_mean, own, W)
        observed = 0.5 * difference * difference / at_least(tl.where(batch_var > var, batch_var, var), TINY)
        observed = tl.where((steps == 0) | (observed > 1), 1, observed) * batch_samples
        new = measured + (observed - measured) / tl.where(steps + 1 > window, window, steps + 1)
        measured = tl.where(ignored, measured, rounded(new, dtype, W))
        tl.debug_barrier()  # as in `enter`
        tl.store(noise.noise + own.c, measured.to(dtype), mask=own.exists & ~ignored)
        tl.store(noise.noise_steps + own.c, (steps + 1).to(dtype), mask=own.exists & ~ignored)
        tl.store(noise.last_mean + own.c, batch_mean.to(dtype), mask=own.exists & ~ignored)

    measured = measured / tl.where(batch_samples > 0, batch_samples, 1)
    measured = tl.where(measured > 1, 1, measured)
    trust = at_least(1 / (1 + trust_noise * measured), 1 - keep)
    d = max_lag * (1 + lag_noise * measured)
    limited = (d < float("inf")) & ~ignored
    least = batch_var / ((1 + d) * (1 + d))
    var = tl.where(limited & (least > var), least, var)
    reach = d * tl.sqrt(var)
    lowest, highest = batch_mean - reach, batch_mean + reach
    nearest = tl.where(mean < lowest, lowest, tl.where(mean > highest, highest, mean))
    mean = tl.where(limited, nearest, mean)
    # What is not finite may not reach a backward that it has no part in.
    # The offset is from the mean as it is stored, which z is made with.
    offset = tl.where(ignored, 0, batch_mean - rounded(mean, dtype, W))
    std = tl.where(ignored, 0, tl.sqrt(batch_var))
    return mean, var, tl.where(ignored, 0, trust), offset, std


@triton.jit
def update_gradient(
    gradient, sum_dy, sum_dy_xhat, n, rstd, trust, offset, batch_std, own, W: tl.constexpr
):  # fmt: skip
    """`update.update_gradient`: G0 and G1, (BC,), in W, times the factor of `law.bounded`."""
    dtype = gradient.sum_dy.dtype.element_ty
    TINY: tl.constexpr = _TINY64 if dtype == tl.float64 else _TINY32
    MAX: tl.constexpr = _MAX64 if dtype == tl.float64 else _MAX32
    EPS: tl.constexpr = _EPS64 if dtype == tl.float64 else _EPS32
    finite = (tl.abs(sum_dy) <= MAX) & (tl.abs(sum_dy_xhat) <= MAX)
    p0, p1 = sum_dy / n, sum_dy_xhat / n
    first, second = load_wide(gradient.sum_dy, own, W), load_wide(gradient.sum_dy_xhat, own, W)
    count, keep = load_wide(gradient.count_dy, own, W), 1 - trust
    first = tl.where(finite, rounded(keep * first + trust * p0, dtype, W), first)
    second = tl.where(finite, rounded(keep * second + trust * p1, dtype, W), second)
    count = tl.where(finite, rounded(keep * count + trust, dtype, W), count)
    tl.debug_barrier()  # as in `enter`
    tl.store(gradient.sum_dy + own.c, first.to(dtype), mask=own.exists & finite)
    tl.store(gradient.sum_dy_xhat + own.c, second.to(dtype), mask=own.exists & finite)
    tl.store(gradient.count_dy + own.c, count.to(dtype), mask=own.exists & finite)
    count = at_least(count, TINY)
    m0, m1 = first / count, second / count

    offset, spread = offset * rstd, batch_std * rstd
    # In this order: the interpreter of Triton 3.8 makes no tensor of a constant times a tensor.
    varies = spread * spread > offset * EPS * offset
    along = tl.where(varies, (p1 - offset * p0) / at_least(spread, TINY), 0)
    constant, slope = m0 + offset * m1, spread * m1
    of_batch, of_memory = _hypot(p0, along), _hypot(constant, slope)
    scale = tl.where(of_memory <= of_batch, 1, of_batch / at_least(of_memory, TINY))
    # A batch that is not finite is no reason to subtract anything. What the forward has ignored is normalised by
    # constants, and no gradient flows through those.
    scale = tl.where(finite & (of_batch <= MAX) & (trust != 0), scale, 0)
    return m0 * scale, m1 * scale


@triton.jit
def _hypot(a, b):
    """√(a² + b²), (BC,), without overflow or underflow of the squares."""
    larger = tl.maximum(tl.abs(a), tl.abs(b), propagate_nan=tl.PropagateNan.ALL)
    divisor = tl.where(larger > 0, larger, 1)
    a, b = a / divisor, b / divisor
    return larger * tl.sqrt(a * a + b * b)
