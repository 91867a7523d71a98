"""The Triton kernels of an update by sums that came from elsewhere. Shapes: everything is (C,)."""

# mypy: ignore-errors
# Triton compiles these functions from their source; their arguments are pointers, numbers and tiles, and have no types.

import triton
import triton.language as tl

from ..ops.law import Law
from .triton_state import BatchMoments, enter, exact_coefficients, recalled, running_coefficients, update_gradient
from .triton_vectors import channels_of, load_wide, not_negative


@triton.jit(do_not_specialize=["channels", "batch_samples", *Law._fields])
def update_by_sums(
    batch, given_weight, state, noise, out, batch_samples, channels,
    max_lag: tl.int64, lag_noise: tl.int64, trust_noise: tl.int64, window: tl.int64,
    variance_floor: tl.int64, warmup_samples: tl.int64,
    WHOLE_BATCHES: tl.constexpr, BY_STATE: tl.constexpr, UPDATES: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Let sums that came from elsewhere enter the state.

    Args:
        batch: the vectors of `Sums`.
        given_weight: (C,), a.
        state: the buffers of a `State`, updated where UPDATES, and taken as they are elsewhere.
        noise: those of a `NoiseState`, likewise, or None.
        out: 2 vectors, written, or where BY_STATE 4, or 5 with `noise`: those of the `update` that this is.
        batch_samples: N, or a pointer to it.
        max_lag to warmup_samples: the `law.Law`, in bits, see `from_bits`.
    """
    W: tl.constexpr = tl.float64
    own = channels_of(tl.program_id(0), channels, BC)
    law = Law(max_lag, lag_noise, trust_noise, window, variance_floor, warmup_samples)
    samples = (tl.load(batch_samples) if batch_samples.dtype.is_ptr() else batch_samples).to(tl.float64)
    n = load_wide(batch.count, own, W)
    sums = load_wide(batch.sums, own, W)
    offset = sums / tl.where(n > 0, n, 1)
    mean = load_wide(batch.shift, own, W) + offset
    squares = not_negative(load_wide(batch.sqrs, own, W) - sums * offset)
    entering = BatchMoments(mean, squares, n, samples)
    if UPDATES:
        a = load_wide(given_weight, own, W)
        of_state = enter(entering, a, state, law, own, WHOLE_BATCHES, BY_STATE, W)
        if own.block == 0:
            tracked = tl.load(state.num_batches_tracked)
            tl.store(state.num_batches_tracked, tracked + (samples > 0).to(tracked.dtype))
    elif BY_STATE:
        of_state = recalled(state, own, W)
    dtype = state.shift.dtype.element_ty
    if noise is not None:
        results = running_coefficients(of_state, entering, noise, law, own, dtype, UPDATES, W)
    elif BY_STATE:
        results = exact_coefficients(of_state, law, dtype, W)
    else:
        results = (mean, squares / tl.where(n > 0, n, 1))
    for i in tl.static_range(len(out)):
        tl.store(out[i] + own.c, results[i].to(out[i].dtype.element_ty), mask=own.exists)


@triton.jit(do_not_specialize=["channels"])
def update_gradient_by_sums(
    gradient, sums, rstd, trust, offset, batch_std, count, out, channels, BC: tl.constexpr
):  # fmt: skip
    """Let the `GradientSums` of a backward pass enter the state; write s·G0 and s·G1 to the two vectors of `out`."""
    W: tl.constexpr = tl.float64
    own = channels_of(tl.program_id(0), channels, BC)
    sum_dy, sum_dy_xhat = load_wide(sums.sum_dy, own, W), load_wide(sums.sum_dy_xhat, own, W)
    rstd, trust = load_wide(rstd, own, W), load_wide(trust, own, W)
    offset, batch_std = load_wide(offset, own, W), load_wide(batch_std, own, W)
    n = load_wide(count, own, W)
    means = update_gradient(gradient, sum_dy, sum_dy_xhat, n, rstd, trust, offset, batch_std, own, W)
    for i in tl.static_range(len(out)):
        tl.store(out[i] + own.c, means[i].to(out[i].dtype.element_ty), mask=own.exists)
