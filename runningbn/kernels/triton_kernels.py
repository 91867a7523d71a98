"""The kernels behind `triton`, whose Python side says how they are launched.

Shapes: x is (N, C, S) in memory, with the sizes `outer`, `channels` and `inner`; rows, (M, C), are N = M, S = 1. It is
cut into tiles of BN × BC × BS, which are numbered within a block of BC channels, along S first. A program takes `tiles`
of them one after the other, its `split`. n = N·S elements per channel.

What is done for each channel is in `triton_state`, how x is cut and how partial sums are merged in `triton_tiles`.

Sums over x, and what there is of one value per channel, are in the dtype of the statistics, W, as in plain torch; only
the mean of a batch is in float64. Where one program has all elements of its channels, it also maps them: a step is then
one launch forward and one backward.
"""

# mypy: ignore-errors
# Triton compiles these functions from their source; their arguments are pointers, numbers and tiles, and have no types.

import triton
import triton.language as tl

from ..ops.law import Law
from .triton_state import (
    affine,
    batch_weight,
    enter,
    exact_coefficients,
    from_bits,
    load_wide,
    not_negative,
    recalled,
    running_coefficients,
    store_rows,
    update_gradient,
)
from .triton_tiles import (
    divisible,
    elements_in,
    from_the_end,
    is_last,
    load_shared,
    merged,
    number_of_tiles,
    per_channel,
    tile_at,
)

_SIZES = ["outer", "channels", "inner", "splits", "tiles"]
_LAW = list(Law._fields)
_RULE = ["batch_samples", "eps", *_LAW, "rule_a", "rule_b", "rule_c"]


@triton.jit(do_not_specialize=[*_SIZES, *_RULE])
def batch_statistics(
    x, y, scratch, counter, weight, bias, packed, state, noise,
    outer, channels, inner, splits, tiles, batch_samples, eps: tl.int64,
    max_lag: tl.int64, lag_noise: tl.int64, trust_noise: tl.int64, window: tl.int64,
    variance_floor: tl.int64, warmup_samples: tl.int64, rule_a: tl.int64, rule_b: tl.int64, rule_c: tl.int64,
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
        eps, max_lag to warmup_samples (see `law.Law`), rule_a, rule_b, rule_c: float64, as integers of the same bits:
            Triton passes numbers as float32.
    """
    dtype = packed.dtype.element_ty
    channels, inner = divisible(channels, inner, ROWS, DIVISOR)
    blocks = tl.cdiv(channels, BC)
    block, split = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    c = block * BC + tl.arange(0, BC)
    exists = c < channels

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
    n = (outer.to(tl.int64) * inner).to(dtype)
    if scratch is None:
        of_sums = per_channel(sums)
        offset = of_sums / n
        mean, slope, constant = _entered(
            pivot.to(tl.float64) + offset.to(tl.float64), not_negative(per_channel(sqrs) - of_sums * offset), n,
            weight, bias, packed, state, noise, channels, batch_samples, eps, max_lag, lag_noise, trust_noise, window,
            variance_floor, warmup_samples, rule_a, rule_b, rule_c, block, c, exists,
            RULE, WHOLE_BATCHES, BY_STATE, UPDATES,
        )  # fmt: skip
        mean, slope, constant = mean[None, :, None], slope[None, :, None], constant[None, :, None]
        for tile in range(first, last):
            base, local, mask = tile_at(tile, block, outer, channels, inner, ROWS, BN, BC, BS)
            _map(x + base + local, y + base + local, mean, slope, constant, mask)
    else:
        partial = scratch + split.to(tl.int64) * channels + c
        step = splits.to(tl.int64) * channels
        tl.store(partial, pivot, mask=exists)
        tl.store(partial + step, per_channel(sums), mask=exists)
        tl.store(partial + 2 * step, per_channel(sqrs), mask=exists)
        if is_last(counter + block, splits):
            mean, squares = merged(scratch, c, exists, outer, channels, inner, splits, tiles, BN, BC, BS, BP)
            rows = _entered(
                mean, squares, n, weight, bias, packed, state, noise, channels, batch_samples, eps, max_lag, lag_noise,
                trust_noise, window, variance_floor, warmup_samples, rule_a, rule_b, rule_c, block, c, exists,
                RULE, WHOLE_BATCHES, BY_STATE, UPDATES,
            )  # fmt: skip
            store_rows(scratch + 3 * step, 0, rows, channels, c, exists)


@triton.jit
def _entered(
    mean, squares, n, weight, bias, packed, state, noise, channels, batch_samples, eps, max_lag, lag_noise, trust_noise,
    window, variance_floor, warmup_samples, rule_a, rule_b, rule_c, block, c, exists,
    RULE: tl.constexpr, WHOLE_BATCHES: tl.constexpr, BY_STATE: tl.constexpr, UPDATES: tl.constexpr,
):  # fmt: skip
    """Let a batch enter the state and store the coefficients; mean, slope and base of `affine_map`.

    Args: as in `batch_statistics`, and of the batch its mean, float64, Σ(x − mean)², and number of elements.
    """
    W: tl.constexpr = packed.dtype.element_ty
    batch_n = batch_samples.to(W)
    floor, few = from_bits(variance_floor, W), from_bits(warmup_samples, W)
    if UPDATES:
        a = batch_weight(RULE, rule_a, rule_b, rule_c, batch_n, state, c, exists, W)
        of_state = enter(mean, squares, n, a, batch_n, state, floor, few, c, exists, WHOLE_BATCHES, BY_STATE, W)
        if block == 0:
            tl.store(state.num_batches_tracked, tl.load(state.num_batches_tracked) + 1)
    elif BY_STATE:
        of_state = recalled(state, c, exists, W)
    if BY_STATE:
        if noise is None:
            coefficients = exact_coefficients(of_state, floor, few, W, W)
        else:
            coefficients = running_coefficients(
                of_state, mean.to(W), squares, n, batch_n, noise, from_bits(max_lag, W),
                from_bits(lag_noise, W), from_bits(trust_noise, W), from_bits(window, W), c, exists, W, UPDATES, W,
            )  # fmt: skip
        mean, var = coefficients[0], coefficients[1]
        store_rows(packed, 2, coefficients, channels, c, exists)
    else:
        var = squares / n
    rstd = 1 / tl.sqrt(var + from_bits(eps, W))
    tl.store(packed + c, mean.to(W), mask=exists)
    tl.store(packed + channels + c, rstd.to(W), mask=exists)
    return affine(mean, rstd, weight, bias, c, exists, W)


@triton.jit(do_not_specialize=[*_SIZES, "splits_of_sums"])
def affine_map(
    x, y, scratch, outer, channels, inner, splits, tiles, splits_of_sums,
    ROWS: tl.constexpr, DIVISOR: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """y = (x − mean)·slope + base by the last rows of `scratch`; the end of x first, which the sums have read last."""
    channels, inner = divisible(channels, inner, ROWS, DIVISOR)
    block, split = from_the_end(channels, splits, BC)
    c = block * BC + tl.arange(0, BC)
    exists = c < channels
    row = scratch + 3 * splits_of_sums.to(tl.int64) * channels + c
    mean = tl.load(row, mask=exists, other=0)[None, :, None]
    slope = tl.load(row + channels, mask=exists, other=0)[None, :, None]
    constant = tl.load(row + 2 * channels, mask=exists, other=0)[None, :, None]
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, number_of_tiles(outer, inner, BN, BS))):
        base, local, mask = tile_at(tile, block, outer, channels, inner, ROWS, BN, BC, BS)
        _map(x + base + local, y + base + local, mean, slope, constant, mask)


@triton.jit
def _map(x, y, mean, slope, constant, mask):
    """y = (x − mean)·slope + constant, of a tile."""
    values = tl.load(x, mask=mask, other=0).to(mean.dtype)
    tl.store(y, ((values - mean) * slope + constant).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def gradient_statistics(
    dy, x, dx, scratch, counter, weight, packed, sums, gradient,
    outer, channels, inner, splits, tiles,
    BY_STATE: tl.constexpr, ROWS: tl.constexpr, DIVISOR: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Sum dy and dy·z; the last program of each block of channels lets the sums enter the state, for `input_gradient`.

    Args:
        dy, x: (N, C, S).
        dx: (N, C, S), written where there is one split; None elsewhere, and where it is not needed.
        scratch: (2·splits + 3, C): partial sums, then the rows of `input_gradient`, both written here. None where there
            is one split.
        counter: (blocks of channels,), int32, zero before and after; likewise.
        weight: (C,) or None.
        packed: the coefficients, (R, C), that the forward left.
        sums: (2, C), written: Σdy and Σdy·z.
        gradient: the buffers of a `GradientState`, updated, or None for the exact gradient.
    """
    dtype = packed.dtype.element_ty
    channels, inner = divisible(channels, inner, ROWS, DIVISOR)
    blocks = tl.cdiv(channels, BC)
    block, split = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    c = block * BC + tl.arange(0, BC)
    exists = c < channels
    mean = tl.load(packed + c, mask=exists, other=0)[None, :, None]
    first = tl.zeros([BN, BC, BS], dtype)
    second = tl.zeros([BN, BC, BS], dtype)
    begin, end = split * tiles, tl.minimum((split + 1) * tiles, number_of_tiles(outer, inner, BN, BS))
    for tile in range(begin, end):
        base, local, mask = tile_at(tile, block, outer, channels, inner, ROWS, BN, BC, BS)
        slope = tl.load(dy + base + local, mask=mask, other=0).to(dtype)
        values = tl.load(x + base + local, mask=mask, other=0).to(dtype)
        first += slope
        second += tl.where(mask, slope * (values - mean), 0)
    n = (outer.to(tl.int64) * inner).to(dtype)
    if scratch is None:
        scale, slope, constant = _gradient_entered(
            per_channel(first), per_channel(second), n, weight, packed, sums, gradient, channels, c, exists, BY_STATE
        )
        if dx is not None:
            scale, slope, constant = scale[None, :, None], slope[None, :, None], constant[None, :, None]
            for tile in range(begin, end):
                base, local, mask = tile_at(tile, block, outer, channels, inner, ROWS, BN, BC, BS)
                at = base + local
                _map_gradient(dy + at, x + at, dx + at, mean, scale, slope, constant, mask)
    else:
        partial = scratch + split.to(tl.int64) * channels + c
        step = splits.to(tl.int64) * channels
        tl.store(partial, per_channel(first), mask=exists)
        tl.store(partial + step, per_channel(second), mask=exists)
        if is_last(counter + block, splits):
            sum_dy = tl.zeros([BP, BC], dtype)
            sum_dy_x = tl.zeros([BP, BC], dtype)
            for start in range(0, splits, BP):
                p = (start + tl.arange(0, BP))[:, None]
                known = (p < splits) & exists[None, :]
                row = scratch + p.to(tl.int64) * channels + c[None, :]
                sum_dy += load_shared(row, known, dtype)
                sum_dy_x += load_shared(row + step, known, dtype)
            rows = _gradient_entered(
                tl.sum(sum_dy, 0), tl.sum(sum_dy_x, 0), n, weight, packed, sums, gradient, channels, c, exists, BY_STATE
            )
            store_rows(scratch + 2 * step, 0, rows, channels, c, exists)


@triton.jit
def _gradient_entered(
    sum_dy, sum_dy_x, n, weight, packed, sums, gradient, channels, c, exists, BY_STATE: tl.constexpr
):  # fmt: skip
    """Let Σdy and Σdy·(x − mean) enter the state, and store Σdy and Σdy·z.

    Returns scale, slope and base of `input_gradient`.
    """
    W: tl.constexpr = packed.dtype.element_ty
    rstd = load_wide(packed + channels, c, exists, W)
    sum_dy_xhat = sum_dy_x * rstd
    tl.store(sums + c, sum_dy, mask=exists)
    tl.store(sums + channels + c, sum_dy_xhat, mask=exists)
    if gradient is not None:
        trust, offset = load_wide(packed + 2 * channels, c, exists, W), load_wide(packed + 3 * channels, c, exists, W)
        std = load_wide(packed + 4 * channels, c, exists, W)
        m0, m1 = update_gradient(gradient, sum_dy, sum_dy_xhat, rstd, trust, offset, std, n, c, exists, W)
    elif BY_STATE:
        kappa_mean = load_wide(packed + 2 * channels, c, exists, W)
        kappa_var = load_wide(packed + 3 * channels, c, exists, W)
        # A channel that was not finite has sums that are not either, and its κ is 0.
        m0 = tl.where(kappa_mean == 0, 0, kappa_mean * sum_dy)
        m1 = tl.where(kappa_var == 0, 0, kappa_var * sum_dy_xhat)
    else:
        m0, m1 = sum_dy / n, sum_dy_xhat / n
    scale = rstd
    if weight is not None:
        scale *= load_wide(weight, c, exists, W)
    return scale, -scale * rstd * m1, -scale * m0


@triton.jit(do_not_specialize=[*_SIZES, "splits_of_sums"])
def input_gradient(
    dy, x, dx, scratch, packed, outer, channels, inner, splits, tiles, splits_of_sums,
    ROWS: tl.constexpr, DIVISOR: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """dx = weight·rstd·(dy − m0 − z·m1), by the last rows of `scratch`, from the end as `affine_map` does.

    It is scale·dy + (x − mean)·slope + base with scale = weight·rstd, slope = −scale·rstd·m1, base = −scale·m0.
    """
    channels, inner = divisible(channels, inner, ROWS, DIVISOR)
    block, split = from_the_end(channels, splits, BC)
    c = block * BC + tl.arange(0, BC)
    exists = c < channels
    row = scratch + 2 * splits_of_sums.to(tl.int64) * channels + c
    mean = tl.load(packed + c, mask=exists, other=0)[None, :, None]
    scale = tl.load(row, mask=exists, other=0)[None, :, None]
    slope = tl.load(row + channels, mask=exists, other=0)[None, :, None]
    constant = tl.load(row + 2 * channels, mask=exists, other=0)[None, :, None]
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, number_of_tiles(outer, inner, BN, BS))):
        base, local, mask = tile_at(tile, block, outer, channels, inner, ROWS, BN, BC, BS)
        at = base + local
        _map_gradient(dy + at, x + at, dx + at, mean, scale, slope, constant, mask)


@triton.jit
def _map_gradient(dy, x, dx, mean, scale, slope, constant, mask):
    """dx = scale·dy + (x − mean)·slope + constant, of a tile."""
    of_y = tl.load(dy, mask=mask, other=0).to(mean.dtype)
    values = tl.load(x, mask=mask, other=0).to(mean.dtype)
    of_x = scale * of_y + ((values - mean) * slope + constant)
    tl.store(dx, of_x.to(dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["channels", "batch_samples", *_LAW])
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
        max_lag to warmup_samples: float64, as integers of the same bits.
    """
    W: tl.constexpr = tl.float64
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    exists = c < channels
    floor, few = from_bits(variance_floor, W), from_bits(warmup_samples, W)
    samples = (tl.load(batch_samples) if batch_samples.dtype.is_ptr() else batch_samples).to(tl.float64)
    n = load_wide(batch.count, c, exists, W)
    sums = load_wide(batch.sums, c, exists, W)
    offset = sums / tl.where(n > 0, n, 1)
    mean = load_wide(batch.shift, c, exists, W) + offset
    squares = not_negative(load_wide(batch.sqrs, c, exists, W) - sums * offset)
    if UPDATES:
        a = load_wide(given_weight, c, exists, W)
        of_state = enter(mean, squares, n, a, samples, state, floor, few, c, exists, WHOLE_BATCHES, BY_STATE, W)
        if tl.program_id(0) == 0:
            tracked = tl.load(state.num_batches_tracked)
            tl.store(state.num_batches_tracked, tracked + (samples > 0).to(tracked.dtype))
    elif BY_STATE:
        of_state = recalled(state, c, exists, W)
    dtype = state.shift.dtype.element_ty
    if noise is not None:
        results = running_coefficients(
            of_state, mean, squares, n, samples, noise, from_bits(max_lag, W), from_bits(lag_noise, W),
            from_bits(trust_noise, W), from_bits(window, W), c, exists, dtype, UPDATES, W,
        )  # fmt: skip
    elif BY_STATE:
        results = exact_coefficients(of_state, floor, few, dtype, W)
    else:
        results = (mean, squares / tl.where(n > 0, n, 1))
    for i in tl.static_range(len(out)):
        tl.store(out[i] + c, results[i].to(out[i].dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["channels"])
def update_gradient_by_sums(
    gradient, sum_dy, sum_dy_xhat, rstd, trust, offset, batch_std, count, m0, m1, channels, BC: tl.constexpr
):  # fmt: skip
    """Let the sums of a backward pass enter the state, all (C,); write G0 and G1 to `m0` and `m1`."""
    W: tl.constexpr = tl.float64
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    exists = c < channels
    first, second = load_wide(sum_dy, c, exists, W), load_wide(sum_dy_xhat, c, exists, W)
    rstd, trust = load_wide(rstd, c, exists, W), load_wide(trust, c, exists, W)
    offset, std = load_wide(offset, c, exists, W), load_wide(batch_std, c, exists, W)
    n = load_wide(count, c, exists, W)
    first, second = update_gradient(gradient, first, second, rstd, trust, offset, std, n, c, exists, W)
    tl.store(m0 + c, first.to(m0.dtype.element_ty), mask=exists)
    tl.store(m1 + c, second.to(m1.dtype.element_ty), mask=exists)
