"""The Triton kernels of a forward, whole training steps. See `triton_kernels` for the shapes and the names."""

# mypy: ignore-errors
# Triton compiles these functions from their source; their arguments are pointers, numbers and tiles, and have no types.

import triton
import triton.language as tl

from ..momentum import RuleCode
from ..ops.law import Law
from .triton_state import BatchMoments, affine, batch_weight, enter, exact_coefficients, recalled, running_coefficients
from .triton_tiles import (
    SIZES,
    divisible,
    elements_in,
    from_the_end,
    from_the_start,
    is_last,
    merged,
    number_of_tiles,
    per_channel,
    tile_at,
)
from .triton_vectors import channels_of, from_bits, not_negative, store_rows

_NUMBERS = ["batch_samples", "eps", *Law._fields, "rule_first", "rule_second", "rule_third"]


@triton.jit(do_not_specialize=[*SIZES, *_NUMBERS])
def batch_statistics(
    x, y, scratch, counter, weight, bias, packed, state, noise,
    outer, channels, inner, splits, tiles, batch_samples, eps: tl.int64,
    max_lag: tl.int64, lag_noise: tl.int64, trust_noise: tl.int64, window: tl.int64,
    variance_floor: tl.int64, warmup_samples: tl.int64,
    rule_first: tl.int64, rule_second: tl.int64, rule_third: tl.int64,
    RULE: tl.constexpr, WHOLE_BATCHES: tl.constexpr, BY_STATE: tl.constexpr, UPDATES: tl.constexpr,
    ROWS: tl.constexpr, DIVISOR: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Sum a batch; the last program of each block of channels lets it enter the state and says what to normalise by.

    Args:
        x: (N, C, S).
        y: (N, C, S), written where there is one split; None elsewhere, and `affine_map` writes it.
        scratch: (3·splits + 3, C): partial sums, then mean, slope and base of `affine_map`, both written here. None
            where there is one split.
        counter: (blocks of channels,), int32, zero before and after; likewise.
        weight, bias: (C,) or None.
        packed: the coefficients, (R, C), written; see `spec.Mode`.
        state: the buffers of a `State`, updated where UPDATES, and taken as they are elsewhere.
        noise: those of a `NoiseState`, likewise; None for the exact gradient.
        eps, max_lag to warmup_samples (the `law.Law`), rule_first to rule_third: in bits, see `from_bits`. They are no
            tuples, as what is in a tuple has a type that depends on its value, and is compiled for its alignment.
    """
    dtype = packed.dtype.element_ty
    channels, inner = divisible(channels, inner, ROWS, DIVISOR)
    block, split = from_the_start(channels, BC)
    own = channels_of(block, channels, BC)
    law = Law(max_lag, lag_noise, trust_noise, window, variance_floor, warmup_samples)
    rule = RuleCode(RULE, rule_first, rule_second, rule_third)

    # About the mean of the first tile, or of the second where the first is the short end of a plane. A tile is about
    # 1/k of a split of k tiles, so however the elements are ordered, its mean is off by no more than about √k of their
    # standard deviations, and log2(k) bits cancel.
    first = split * tiles
    last = tl.minimum(first + tiles, number_of_tiles(outer, inner, BN, BS))
    of_first, of_second = elements_in(first, outer, inner, BN, BS), elements_in(first + 1, outer, inner, BN, BS)
    second_is_longer = (first + 1 < last) & (of_second > of_first)
    chosen, elements = first + second_is_longer.to(tl.int32), tl.where(second_is_longer, of_second, of_first)
    base, local, mask = tile_at(chosen, block, outer, channels, inner, ROWS, BN, BC, BS)
    pivot = per_channel(tl.load(x + base + local, mask=mask, other=0).to(dtype)) / elements.to(dtype)
    sums = tl.zeros([BN, BC, BS], dtype)
    sqrs = tl.zeros([BN, BC, BS], dtype)
    for tile in range(first, last):
        base, local, mask = tile_at(tile, block, outer, channels, inner, ROWS, BN, BC, BS)
        values = tl.load(x + base + local, mask=mask, other=0).to(dtype)
        deviation = tl.where(mask, values - pivot[None, :, None], 0)
        sums += deviation
        sqrs += deviation * deviation
    n, samples = (outer.to(tl.int64) * inner).to(dtype), batch_samples.to(dtype)
    if scratch is None:
        of_sums = per_channel(sums)
        offset = of_sums / n
        batch = BatchMoments(
            pivot.to(tl.float64) + offset.to(tl.float64), not_negative(per_channel(sqrs) - of_sums * offset), n, samples
        )
        mean, rstd = _entered(
            batch, packed, state, noise, rule, law, eps, own, WHOLE_BATCHES=WHOLE_BATCHES, BY_STATE=BY_STATE,
            UPDATES=UPDATES,
        )  # fmt: skip
        mean, slope, constant = affine(mean, rstd, weight, bias, own, dtype)
        mean, slope, constant = mean[None, :, None], slope[None, :, None], constant[None, :, None]
        for tile in range(first, last):
            base, local, mask = tile_at(tile, block, outer, channels, inner, ROWS, BN, BC, BS)
            _map(x + base + local, y + base + local, mean, slope, constant, mask)
    else:
        partial = scratch + split.to(tl.int64) * channels + own.c
        step = splits.to(tl.int64) * channels
        tl.store(partial, pivot, mask=own.exists)
        tl.store(partial + step, per_channel(sums), mask=own.exists)
        tl.store(partial + 2 * step, per_channel(sqrs), mask=own.exists)
        if is_last(counter + block, splits):
            mean, squares = merged(scratch, own, outer, inner, splits, tiles, BN, BC, BS, BP)
            mean, rstd = _entered(
                BatchMoments(mean, squares, n, samples), packed, state, noise, rule, law, eps, own,
                WHOLE_BATCHES=WHOLE_BATCHES, BY_STATE=BY_STATE, UPDATES=UPDATES,
            )  # fmt: skip
            rows = affine(mean, rstd, weight, bias, own, dtype)
            store_rows(scratch + 3 * step, rows, own)


@triton.jit
def _entered(
    batch, packed, state, noise, rule, law, eps, own,
    WHOLE_BATCHES: tl.constexpr, BY_STATE: tl.constexpr, UPDATES: tl.constexpr,
):  # fmt: skip
    """Let a `BatchMoments` enter the state, and store the coefficients; returns mean, float64 or in W, and rstd."""
    W: tl.constexpr = packed.dtype.element_ty
    mean = batch.mean
    if UPDATES:
        a = batch_weight(rule, batch.samples, state, own, W)
        of_state = enter(batch, a, state, law, own, WHOLE_BATCHES, BY_STATE, W)
        if own.block == 0:
            tl.store(state.num_batches_tracked, tl.load(state.num_batches_tracked) + 1)
    elif BY_STATE:
        of_state = recalled(state, own, W)
    if BY_STATE:
        if noise is None:
            mean, var, kappa_mean, kappa_var = exact_coefficients(of_state, law, W, W)
            store_rows(packed + 2 * own.total, (kappa_mean, kappa_var), own)
        else:
            mean, var, trust, offset, std = running_coefficients(of_state, batch, noise, law, own, W, UPDATES, W)
            store_rows(packed + 2 * own.total, (trust, offset, std), own)
    else:
        var = batch.squares / batch.n
    rstd = 1 / tl.sqrt(var + from_bits(eps, W))
    store_rows(packed, (mean, rstd), own)
    return mean, rstd


@triton.jit(do_not_specialize=[*SIZES, "splits_of_sums"])
def affine_map(
    x, y, scratch, outer, channels, inner, splits, tiles, splits_of_sums,
    ROWS: tl.constexpr, DIVISOR: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """y = (x − mean)·slope + base by the last rows of `scratch`; the end of x first, which the sums have read last."""
    channels, inner = divisible(channels, inner, ROWS, DIVISOR)
    block, split = from_the_end(channels, splits, BC)
    own = channels_of(block, channels, BC)
    row = scratch + 3 * splits_of_sums.to(tl.int64) * channels + own.c
    mean = tl.load(row, mask=own.exists, other=0)[None, :, None]
    slope = tl.load(row + channels, mask=own.exists, other=0)[None, :, None]
    constant = tl.load(row + 2 * channels, mask=own.exists, other=0)[None, :, None]
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, number_of_tiles(outer, inner, BN, BS))):
        base, local, mask = tile_at(tile, block, outer, channels, inner, ROWS, BN, BC, BS)
        _map(x + base + local, y + base + local, mean, slope, constant, mask)


@triton.jit
def _map(x, y, mean, slope, constant, mask):
    """y = (x − mean)·slope + constant, of a tile."""
    values = tl.load(x, mask=mask, other=0).to(mean.dtype)
    tl.store(y, ((values - mean) * slope + constant).to(y.dtype.element_ty), mask=mask)
