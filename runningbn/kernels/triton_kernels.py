"""The kernels behind `triton`, whose Python side says how they are launched.

Shapes: x is (N, C, S) in memory, with the sizes `outer`, `channels` and `inner`; rows, (M, C), are N = M, S = 1. It is
cut into tiles of BN × BC × BS, which are numbered within a block of BC channels, along S first. A program takes `tiles`
of them one after the other, its `split`. n = N·S elements per channel.

Sums over x, and what there is of one value per channel, are in the dtype of the statistics, W, as in plain torch; only
the mean of a batch is in float64. Where one program has all elements of its channels, it also maps them: a step is then
one launch forward and one backward.
"""

# mypy: ignore-errors
# Triton compiles these functions from their source; their arguments are pointers, numbers and tiles, and have no types.

import triton
import triton.language as tl

from ..momentum import RULES
from ..ops.law import Law

# Rules for the weight of a batch, see momentum.py.
CONSTANT = tl.constexpr(RULES.index("CONSTANT"))
CUMULATIVE = tl.constexpr(RULES.index("CUMULATIVE"))
HORIZON = tl.constexpr(RULES.index("HORIZON"))
SQUARE_ROOT = tl.constexpr(RULES.index("SQUARE_ROOT"))

# torch.finfo(...).tiny, eps and max of float32 and float64. A tile of constants is float32 unless it cannot be, which
# all of these then are exactly.
_TINY32, _EPS32, _MAX32 = (tl.constexpr(2.0**-126), tl.constexpr(2.0**-23), tl.constexpr((2 - 2.0**-23) * 2.0**127))
_TINY64, _EPS64, _MAX64 = (tl.constexpr(2.0**-1022), tl.constexpr(2.0**-52), tl.constexpr((2 - 2.0**-52) * 2.0**1023))

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
    channels, inner = _divisible(channels, inner, ROWS, DIVISOR)
    blocks = tl.cdiv(channels, BC)
    block, split = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    c = block * BC + tl.arange(0, BC)
    exists = c < channels

    # About the mean of the first tile, or of the second where the first is the short end of a plane. A tile is about
    # 1/k of a split of k tiles, so however the elements are ordered, its mean is off by no more than about √k of their
    # standard deviations, and log2(k) bits cancel.
    first = split * tiles
    last = tl.minimum(first + tiles, _number_of_tiles(outer, inner, BN, BS))
    of_first, of_second = _elements_of(first, outer, inner, BN, BS), _elements_of(first + 1, outer, inner, BN, BS)
    second_is_longer = (first + 1 < last) & (of_second > of_first)
    chosen, elements = first + second_is_longer.to(tl.int32), tl.where(second_is_longer, of_second, of_first)
    base, local, mask = _tile(chosen, block, outer, channels, inner, ROWS, BN, BC, BS)
    pivot = _per_channel(tl.load(x + base + local, mask=mask, other=0).to(dtype)) / elements.to(dtype)
    sums = tl.zeros([BN, BC, BS], dtype)
    sqrs = tl.zeros([BN, BC, BS], dtype)
    for tile in range(first, last):
        base, local, mask = _tile(tile, block, outer, channels, inner, ROWS, BN, BC, BS)
        values = tl.load(x + base + local, mask=mask, other=0).to(dtype)
        deviation = tl.where(mask, values - pivot[None, :, None], 0)
        sums += deviation
        sqrs += deviation * deviation
    if scratch is None:
        of_sums, n = _per_channel(sums), (outer.to(tl.int64) * inner).to(dtype)
        offset = of_sums / n
        mean, slope, constant = _entered(
            pivot.to(tl.float64) + offset.to(tl.float64), _not_negative(_per_channel(sqrs) - of_sums * offset), n,
            weight, bias, packed, state, noise, channels, batch_samples, eps, max_lag, lag_noise, trust_noise, window,
            variance_floor, warmup_samples, rule_a, rule_b, rule_c, block, c, exists,
            RULE, WHOLE_BATCHES, BY_STATE, UPDATES,
        )  # fmt: skip
        mean, slope, constant = mean[None, :, None], slope[None, :, None], constant[None, :, None]
        for tile in range(first, last):
            base, local, mask = _tile(tile, block, outer, channels, inner, ROWS, BN, BC, BS)
            values = tl.load(x + base + local, mask=mask, other=0).to(dtype)
            tl.store(y + base + local, ((values - mean) * slope + constant).to(y.dtype.element_ty), mask=mask)
    else:
        partial = scratch + split.to(tl.int64) * channels + c
        step = splits.to(tl.int64) * channels
        tl.store(partial, pivot, mask=exists)
        tl.store(partial + step, _per_channel(sums), mask=exists)
        tl.store(partial + 2 * step, _per_channel(sqrs), mask=exists)
        if _is_last(counter + block, splits):
            mean, squares = _merged(scratch, c, exists, outer, channels, inner, splits, tiles, BN, BC, BS, BP)
            rows = _entered(
                mean, squares, (outer.to(tl.int64) * inner).to(dtype),
                weight, bias, packed, state, noise, channels, batch_samples, eps, max_lag, lag_noise, trust_noise,
                window, variance_floor, warmup_samples, rule_a, rule_b, rule_c, block, c, exists,
                RULE, WHOLE_BATCHES, BY_STATE, UPDATES,
            )  # fmt: skip
            _store_rows(scratch + 3 * step, 0, rows, channels, c, exists)


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
    floor, few = _number(variance_floor, W), _number(warmup_samples, W)
    if UPDATES:
        a = _batch_weight(RULE, rule_a, rule_b, rule_c, batch_n, state, c, exists, W)
        of_state = _enter(mean, squares, n, a, batch_n, state, floor, few, c, exists, WHOLE_BATCHES, BY_STATE, W)
        if block == 0:
            tl.store(state.num_batches_tracked, tl.load(state.num_batches_tracked) + 1)
    elif BY_STATE:
        of_state = _recalled(state, c, exists, W)
    if BY_STATE:
        if noise is None:
            coefficients = _exact_coefficients(of_state, floor, few, W, W)
        else:
            coefficients = _running_coefficients(
                of_state, mean.to(W), squares, n, batch_n, noise, _number(max_lag, W),
                _number(lag_noise, W), _number(trust_noise, W), _number(window, W), c, exists, W, UPDATES, W,
            )  # fmt: skip
        mean, var = coefficients[0], coefficients[1]
        _store_rows(packed, 2, coefficients, channels, c, exists)
    else:
        var = squares / n
    rstd = 1 / tl.sqrt(var + _number(eps, W))
    tl.store(packed + c, mean.to(W), mask=exists)
    tl.store(packed + channels + c, rstd.to(W), mask=exists)
    return _affine(mean, rstd, weight, bias, c, exists, W)


@triton.jit(do_not_specialize=[*_SIZES, "splits_of_sums"])
def affine_map(
    x, y, scratch, outer, channels, inner, splits, tiles, splits_of_sums,
    ROWS: tl.constexpr, DIVISOR: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """y = (x − mean)·slope + base by the last rows of `scratch`; the end of x first, which the sums have read last."""
    channels, inner = _divisible(channels, inner, ROWS, DIVISOR)
    block, split = _from_the_end(channels, splits, BC)
    c = block * BC + tl.arange(0, BC)
    exists = c < channels
    row = scratch + 3 * splits_of_sums.to(tl.int64) * channels + c
    mean = tl.load(row, mask=exists, other=0)[None, :, None]
    slope = tl.load(row + channels, mask=exists, other=0)[None, :, None]
    constant = tl.load(row + 2 * channels, mask=exists, other=0)[None, :, None]
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, _number_of_tiles(outer, inner, BN, BS))):
        base, local, mask = _tile(tile, block, outer, channels, inner, ROWS, BN, BC, BS)
        values = tl.load(x + base + local, mask=mask, other=0).to(mean.dtype)
        tl.store(y + base + local, ((values - mean) * slope + constant).to(y.dtype.element_ty), mask=mask)


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
    channels, inner = _divisible(channels, inner, ROWS, DIVISOR)
    blocks = tl.cdiv(channels, BC)
    block, split = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    c = block * BC + tl.arange(0, BC)
    exists = c < channels
    mean = tl.load(packed + c, mask=exists, other=0)[None, :, None]
    first = tl.zeros([BN, BC, BS], dtype)
    second = tl.zeros([BN, BC, BS], dtype)
    begin, end = split * tiles, tl.minimum((split + 1) * tiles, _number_of_tiles(outer, inner, BN, BS))
    for tile in range(begin, end):
        base, local, mask = _tile(tile, block, outer, channels, inner, ROWS, BN, BC, BS)
        slope = tl.load(dy + base + local, mask=mask, other=0).to(dtype)
        values = tl.load(x + base + local, mask=mask, other=0).to(dtype)
        first += slope
        second += tl.where(mask, slope * (values - mean), 0)
    n = (outer.to(tl.int64) * inner).to(dtype)
    if scratch is None:
        scale, slope, constant = _gradient_entered(
            _per_channel(first), _per_channel(second), n, weight, packed, sums, gradient, channels, c, exists, BY_STATE
        )
        if dx is not None:
            scale, slope, constant = scale[None, :, None], slope[None, :, None], constant[None, :, None]
            for tile in range(begin, end):
                base, local, mask = _tile(tile, block, outer, channels, inner, ROWS, BN, BC, BS)
                of_y = tl.load(dy + base + local, mask=mask, other=0).to(dtype)
                values = tl.load(x + base + local, mask=mask, other=0).to(dtype)
                of_x = scale * of_y + ((values - mean) * slope + constant)
                tl.store(dx + base + local, of_x.to(dx.dtype.element_ty), mask=mask)
    else:
        partial = scratch + split.to(tl.int64) * channels + c
        step = splits.to(tl.int64) * channels
        tl.store(partial, _per_channel(first), mask=exists)
        tl.store(partial + step, _per_channel(second), mask=exists)
        if _is_last(counter + block, splits):
            sum_dy = tl.zeros([BP, BC], dtype)
            sum_dy_x = tl.zeros([BP, BC], dtype)
            for start in range(0, splits, BP):
                p = (start + tl.arange(0, BP))[:, None]
                known = (p < splits) & exists[None, :]
                row = scratch + p.to(tl.int64) * channels + c[None, :]
                sum_dy += _shared(row, known, dtype)
                sum_dy_x += _shared(row + step, known, dtype)
            rows = _gradient_entered(
                tl.sum(sum_dy, 0), tl.sum(sum_dy_x, 0), n, weight, packed, sums, gradient, channels, c, exists, BY_STATE
            )
            _store_rows(scratch + 2 * step, 0, rows, channels, c, exists)


@triton.jit
def _gradient_entered(
    sum_dy, sum_dy_x, n, weight, packed, sums, gradient, channels, c, exists, BY_STATE: tl.constexpr
):  # fmt: skip
    """Let Σdy and Σdy·(x − mean) enter the state, and store Σdy and Σdy·z.

    Returns scale, slope and base of `input_gradient`.
    """
    W: tl.constexpr = packed.dtype.element_ty
    rstd = _wide(packed + channels, c, exists, W)
    sum_dy_xhat = sum_dy_x * rstd
    tl.store(sums + c, sum_dy, mask=exists)
    tl.store(sums + channels + c, sum_dy_xhat, mask=exists)
    if gradient is not None:
        trust, offset = _wide(packed + 2 * channels, c, exists, W), _wide(packed + 3 * channels, c, exists, W)
        std = _wide(packed + 4 * channels, c, exists, W)
        m0, m1 = _update_gradient(gradient, sum_dy, sum_dy_xhat, rstd, trust, offset, std, n, c, exists, W)
    elif BY_STATE:
        kappa_mean = _wide(packed + 2 * channels, c, exists, W)
        kappa_var = _wide(packed + 3 * channels, c, exists, W)
        # A channel that was not finite has sums that are not either, and its κ is 0.
        m0 = tl.where(kappa_mean == 0, 0, kappa_mean * sum_dy)
        m1 = tl.where(kappa_var == 0, 0, kappa_var * sum_dy_xhat)
    else:
        m0, m1 = sum_dy / n, sum_dy_xhat / n
    scale = rstd
    if weight is not None:
        scale *= _wide(weight, c, exists, W)
    return scale, -scale * rstd * m1, -scale * m0


@triton.jit(do_not_specialize=[*_SIZES, "splits_of_sums"])
def input_gradient(
    dy, x, dx, scratch, packed, outer, channels, inner, splits, tiles, splits_of_sums,
    ROWS: tl.constexpr, DIVISOR: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """dx = weight·rstd·(dy − m0 − z·m1), by the last rows of `scratch`, from the end as `affine_map` does.

    It is scale·dy + (x − mean)·slope + base with scale = weight·rstd, slope = −scale·rstd·m1, base = −scale·m0.
    """
    channels, inner = _divisible(channels, inner, ROWS, DIVISOR)
    block, split = _from_the_end(channels, splits, BC)
    c = block * BC + tl.arange(0, BC)
    exists = c < channels
    row = scratch + 2 * splits_of_sums.to(tl.int64) * channels + c
    mean = tl.load(packed + c, mask=exists, other=0)[None, :, None]
    scale = tl.load(row, mask=exists, other=0)[None, :, None]
    slope = tl.load(row + channels, mask=exists, other=0)[None, :, None]
    constant = tl.load(row + 2 * channels, mask=exists, other=0)[None, :, None]
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, _number_of_tiles(outer, inner, BN, BS))):
        base, local, mask = _tile(tile, block, outer, channels, inner, ROWS, BN, BC, BS)
        of_y = tl.load(dy + base + local, mask=mask, other=0).to(mean.dtype)
        values = tl.load(x + base + local, mask=mask, other=0).to(mean.dtype)
        of_x = scale * of_y + ((values - mean) * slope + constant)
        tl.store(dx + base + local, of_x.to(dx.dtype.element_ty), mask=mask)


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
    floor, few = _number(variance_floor, W), _number(warmup_samples, W)
    samples = (tl.load(batch_samples) if batch_samples.dtype.is_ptr() else batch_samples).to(tl.float64)
    n = _wide(batch.count, c, exists, W)
    sums = _wide(batch.sums, c, exists, W)
    offset = sums / tl.where(n > 0, n, 1)
    mean = _wide(batch.shift, c, exists, W) + offset
    squares = _not_negative(_wide(batch.sqrs, c, exists, W) - sums * offset)
    if UPDATES:
        a = _wide(given_weight, c, exists, W)
        of_state = _enter(mean, squares, n, a, samples, state, floor, few, c, exists, WHOLE_BATCHES, BY_STATE, W)
        if tl.program_id(0) == 0:
            tracked = tl.load(state.num_batches_tracked)
            tl.store(state.num_batches_tracked, tracked + (samples > 0).to(tracked.dtype))
    elif BY_STATE:
        of_state = _recalled(state, c, exists, W)
    dtype = state.shift.dtype.element_ty
    if noise is not None:
        results = _running_coefficients(
            of_state, mean, squares, n, samples, noise, _number(max_lag, W), _number(lag_noise, W),
            _number(trust_noise, W), _number(window, W), c, exists, dtype, UPDATES, W,
        )  # fmt: skip
    elif BY_STATE:
        results = _exact_coefficients(of_state, floor, few, dtype, W)
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
    first, second = _wide(sum_dy, c, exists, W), _wide(sum_dy_xhat, c, exists, W)
    rstd, trust = _wide(rstd, c, exists, W), _wide(trust, c, exists, W)
    offset, std = _wide(offset, c, exists, W), _wide(batch_std, c, exists, W)
    n = _wide(count, c, exists, W)
    first, second = _update_gradient(gradient, first, second, rstd, trust, offset, std, n, c, exists, W)
    tl.store(m0 + c, first.to(m0.dtype.element_ty), mask=exists)
    tl.store(m1 + c, second.to(m1.dtype.element_ty), mask=exists)


# ------------------------------------------------------------------------------------------------ elements and tiles


@triton.jit
def _divisible(channels, inner, ROWS: tl.constexpr, DIVISOR: tl.constexpr):
    """The sizes, the one along which memory runs as a visible multiple of DIVISOR: it allows for vector loads."""
    if ROWS:
        channels = channels // DIVISOR * DIVISOR
    else:
        inner = inner // DIVISOR * DIVISOR
    return channels, inner


@triton.jit
def _tile(
    tile, block, outer, channels, inner,
    ROWS: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Where a tile begins, in elements, its offsets from there, (BN, BC, BS), and which of them exist."""
    n = tl.arange(0, BN)[:, None, None]
    c = tl.arange(0, BC)[None, :, None]
    s = tl.arange(0, BS)[None, None, :]
    c0 = block * BC
    if ROWS:
        n0 = tile * BN
        base, local = n0.to(tl.int64) * channels + c0, n * channels + c + s
        mask = (n0 + n < outer) & (c0 + c < channels) & (s == 0)
    else:
        along = tl.cdiv(inner, BS)
        n0, s0 = tile // along * BN, tile % along * BS
        # Where channels · inner is more than an integer holds, BN is 1.
        base, local = (n0.to(tl.int64) * channels + c0) * inner + s0, n * (channels * inner) + c * inner + s
        mask = (n0 + n < outer) & (c0 + c < channels) & (s0 + s < inner)
    return base, local, mask


@triton.jit
def _number_of_tiles(outer, inner, BN: tl.constexpr, BS: tl.constexpr):
    return tl.cdiv(outer, BN) * tl.cdiv(inner, BS)


@triton.jit
def _elements(tile, outer, inner, BN: tl.constexpr, BS: tl.constexpr):
    """Elements per channel before a tile, int64; all of them for tiles beyond the last."""
    along = tl.cdiv(inner, BS)
    n = tl.minimum(tile // along * BN, outer).to(tl.int64)
    s = tl.minimum(tile % along * BS, inner).to(tl.int64)
    return n * inner + tl.minimum(outer - n, BN) * s


@triton.jit
def _elements_of(tile, outer, inner, BN: tl.constexpr, BS: tl.constexpr):
    """Elements per channel in a tile, int64."""
    return _elements(tile + 1, outer, inner, BN, BS) - _elements(tile, outer, inner, BN, BS)


@triton.jit
def _from_the_end(channels, splits, BC: tl.constexpr):
    """The block of channels and the split of this program, in reverse."""
    blocks = tl.cdiv(channels, BC)
    program = blocks * splits - 1 - tl.program_id(0)
    return program % blocks, program // blocks


@triton.jit
def _per_channel(values):
    return tl.sum(tl.sum(values, 2), 0)


@triton.jit
def _is_last(counter, splits):
    """Whether all programs that count here have stored their partial sums; leaves the counter at zero."""
    # All threads of this program have stored before one of them counts. Its release hands that on, and the acquire of
    # the last program receives it. The order of arrival decides who sums up, not what comes out.
    tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    is_last = arrived == splits - 1
    if is_last:
        tl.store(counter, 0)
    tl.debug_barrier()
    return is_last


@triton.jit
def _shared(pointer, mask, dtype: tl.constexpr):
    """What other programs of this launch have stored, in `dtype`: from the cache that they share with this one."""
    return tl.load(pointer, mask=mask, other=0, cache_modifier=".cg").to(dtype)


@triton.jit
def _merged(
    scratch, c, exists, outer, channels, inner, splits, tiles,
    BN: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Mean, float64, and squares about it, Σ(x − mean)², from the partial sums of all splits, BP at a time, in order.

    Means are distances from the pivot of the first split, which is near the others: they have all their digits.
    """
    dtype = scratch.dtype.element_ty
    step = splits.to(tl.int64) * channels
    pivot = _shared(scratch + c, exists, dtype)
    n = tl.zeros([BP, BC], dtype)
    mean = tl.zeros([BP, BC], dtype)
    squares = tl.zeros([BP, BC], dtype)
    for start in range(0, splits, BP):
        p = start + tl.arange(0, BP)
        begin = _elements(p * tiles, outer, inner, BN, BS)
        of_split = (_elements((p + 1) * tiles, outer, inner, BN, BS) - begin).to(dtype)[:, None]
        known = (p < splits)[:, None] & exists[None, :]
        row = scratch + p[:, None].to(tl.int64) * channels + c[None, :]
        sums = _shared(row + step, known, dtype)
        offset = sums / tl.where(of_split > 0, of_split, 1)
        distance = tl.where(known, (_shared(row, known, dtype) - pivot[None, :]) + offset, 0)
        about = _not_negative(_shared(row + 2 * step, known, dtype) - sums * offset)
        n, mean, squares = _joined(n, mean, squares, tl.where(known, of_split, 0), distance, about)
    _, distance, squares = tl.reduce((n, mean, squares), 0, _joined)
    return pivot.to(tl.float64) + distance.to(tl.float64), squares


@triton.jit
def _joined(n, mean, squares, other_n, other_mean, other_squares):
    """Elements, mean and Σ(x − mean)² of two sets together, as Chan, Golub and LeVeque (1983) do: nothing cancels."""
    total = n + other_n
    share = other_n / tl.where(total > 0, total, 1)
    d = other_mean - mean
    return total, mean + d * share, squares + other_squares + d * d * (n * share)


# ------------------------------------------------------------------------------------------------ values per channel


@triton.jit
def _number(bits, W: tl.constexpr):
    """The float64 of these bits, which come as an integer, in W."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(W)


@triton.jit
def _wide(vector, c, exists, W: tl.constexpr):
    return tl.load(vector + c, mask=exists, other=0).to(W)


@triton.jit
def _at_least(value, bound):
    """The larger of the two; NaN stays."""
    return tl.where(value < bound, bound, value)


@triton.jit
def _not_negative(value):
    """Rounding may leave a tiny negative difference for a constant channel."""
    return _at_least(value, 0)


@triton.jit
def _rounded(value, dtype: tl.constexpr, W: tl.constexpr):
    """As it will be read again from a buffer of that dtype."""
    return value.to(dtype).to(W)


@triton.jit
def _store_rows(matrix, begin: tl.constexpr, rows, channels, c, exists):
    """Rows from `begin` on to the same rows of a matrix with `channels` columns."""
    for i in tl.static_range(begin, len(rows)):
        tl.store(matrix + i * channels + c, rows[i].to(matrix.dtype.element_ty), mask=exists)


@triton.jit
def _affine(mean, rstd, weight, bias, c, exists, W: tl.constexpr):
    """(x − mean)·slope + base, with what rounding takes from the mean in the base: it may have more digits than W."""
    slope = rstd
    if weight is not None:
        slope *= _wide(weight, c, exists, W)
    base = (mean.to(W).to(mean.dtype) - mean).to(W) * slope
    if bias is not None:
        base += _wide(bias, c, exists, W)
    return mean.to(W), slope, base


@triton.jit
def _batch_weight(RULE: tl.constexpr, rule_a, rule_b, rule_c, batch, state, c, exists, W: tl.constexpr):
    """a, (BC,), in W, see momentum.py; `rule_a` to `rule_c` are the arguments of the rule in bits."""
    first = _number(rule_a, W)
    samples = _wide(state.samples, c, exists, W)
    if RULE == CUMULATIVE:
        result = 1 / (_wide(state.steps, c, exists, W) + 1)
    elif RULE == SQUARE_ROOT:
        result = samples * 0 + (1 - (1 - first) / tl.sqrt(_at_least(batch - 1, 1)))
    elif RULE == HORIZON:
        # samples, start, fraction
        horizon = _at_least(_number(rule_c, W) * samples, _number(rule_b, W))
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
def _enter(
    mean, squares, n, a, batch_samples, state, floor, few, c, exists,
    WHOLE_BATCHES: tl.constexpr, BY_STATE: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """`update._enter` and what sets the running statistics, of a batch with weight a.

    Args:
        mean: of the batch, float64.
        squares, n: Σ(x − mean)² and number of elements, in W.
        floor, few: the least variance that is used below so many samples, in W.

    Returns:
        What `_recalled` would find in the buffers.
    """
    dtype = state.shift.dtype.element_ty
    TINY: tl.constexpr = _TINY64 if dtype == tl.float64 else _TINY32
    EPS: tl.constexpr = _EPS64 if dtype == tl.float64 else _EPS32
    MAX: tl.constexpr = _MAX64 if dtype == tl.float64 else _MAX32
    shift, count = _wide(state.shift, c, exists, W), _wide(state.count, c, exists, W)
    count_sqrs, debias = _wide(state.count_sqrs, c, exists, W), _wide(state.debias, c, exists, W)
    samples = _wide(state.samples, c, exists, W)

    # Nothing may enter that is not finite, nor so far away that its square is not.
    distance = (mean - shift.to(mean.dtype)).to(W)
    finite = squares + n * distance * distance <= MAX
    a = tl.where(finite, a, 0)
    enters = exists & (a != 0)
    distance, squares = tl.where(finite, distance, 0), tl.where(finite, squares, 0)
    keep = 1 - a
    # Elements per unit of weight: those of the batch where none were counted yet.
    unit = _at_least(count, TINY) / _at_least(debias, TINY)
    new_unit = tl.where(count_sqrs == 0, n, unit)
    kept = keep * (new_unit / unit)
    gain = a
    if WHOLE_BATCHES:
        gain = a * new_unit / tl.where(n > 0, n, 1)

    # Both about the mean of their pivots.
    total = kept * count + gain * n
    pivot = _rounded(shift + distance * (gain * n / _at_least(total, TINY)), dtype, W)
    d = pivot - shift
    e = d - distance
    sums = _wide(state.sums, c, exists, W)
    moved = sums - count * d
    sqrs = kept * (_wide(state.sqrs, c, exists, W) - d * (sums + moved)) + gain * (squares + n * e * e)
    sqrs = _rounded(sqrs, dtype, W)
    sums = _rounded(kept * moved - gain * n * e, dtype, W)
    count_sqrs = _rounded(kept * kept * count_sqrs + gain * gain * n, dtype, W)
    count = tl.where(enters, _rounded(total, dtype, W), count)
    samples = tl.where(enters, _rounded(samples + batch_samples, dtype, W), samples)
    steps = _wide(state.steps, c, exists, W) + 1
    gain = tl.where(enters, gain, 0)

    divisor = _at_least(count, TINY)
    offset = sums / divisor
    of_state = _not_negative(sqrs / divisor - offset * offset)
    if BY_STATE:
        of_state = tl.where((of_state < floor) & (samples < few), floor, of_state)
    else:
        # Bessel's correction for weighted elements, see state.unbiased.
        of_state /= _at_least(1 - count_sqrs / _at_least(divisor * divisor, TINY), EPS)
    mean = tl.where(enters, _rounded(pivot + offset, dtype, W), _wide(state.running_mean, c, exists, W))
    var = tl.where(enters, _rounded(of_state, dtype, W), _wide(state.running_var, c, exists, W))

    # Several threads may hold the values of one channel, and one of them stores: not before all have loaded.
    tl.debug_barrier()
    # Channels that ignore the batch keep their bits.
    tl.store(state.shift + c, pivot.to(dtype), mask=enters)
    tl.store(state.sums + c, sums.to(dtype), mask=enters)
    tl.store(state.sqrs + c, sqrs.to(dtype), mask=enters)
    tl.store(state.count + c, count.to(dtype), mask=enters)
    tl.store(state.count_sqrs + c, count_sqrs.to(dtype), mask=enters)
    tl.store(state.debias + c, (a + keep * debias).to(dtype), mask=enters)
    tl.store(state.running_mean + c, mean.to(dtype), mask=enters)
    tl.store(state.running_var + c, var.to(dtype), mask=enters)
    tl.store(state.samples + c, samples.to(dtype), mask=enters)
    tl.store(state.steps + c, steps.to(dtype), mask=enters)
    tl.store(state.last_keep + c, keep.to(dtype), mask=exists)
    tl.store(state.last_gain + c, gain.to(dtype), mask=exists)
    return mean, var, _rounded(keep, dtype, W), _rounded(gain, dtype, W), count, samples


@triton.jit
def _recalled(state, c, exists, W: tl.constexpr):
    """running_mean, running_var, last_keep, last_gain, count and samples, (BC,), in W."""
    mean, var = _wide(state.running_mean, c, exists, W), _wide(state.running_var, c, exists, W)
    keep, gain = _wide(state.last_keep, c, exists, W), _wide(state.last_gain, c, exists, W)
    return mean, var, keep, gain, _wide(state.count, c, exists, W), _wide(state.samples, c, exists, W)


@triton.jit
def _exact_coefficients(of_state, floor, few, dtype: tl.constexpr, W: tl.constexpr):
    """mean, var, kappa_mean, kappa_var as in `update.Coefficients`, in W; `of_state` as `_recalled`."""
    TINY: tl.constexpr = _TINY64 if dtype == tl.float64 else _TINY32
    mean, var, _, gain, count, samples = of_state
    kappa = gain / _at_least(count, TINY)
    floored = (var <= _rounded(floor, dtype, W)) & (samples < few)
    return mean, var, kappa, tl.where(floored, 0, kappa)


@triton.jit
def _running_coefficients(
    of_state, batch_mean, squares, n, batch_samples, noise, max_lag, lag_noise, trust_noise, window, c, exists,
    dtype: tl.constexpr, UPDATES: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """mean, var, trust, offset, batch_std as in `update.RunningCoefficients`, in W; see `law`."""
    TINY: tl.constexpr = _TINY64 if dtype == tl.float64 else _TINY32
    mean, var, keep, gain, _, _ = of_state
    ignored = gain == 0
    batch_var = squares / tl.where(n > 0, n, 1)
    measured = _wide(noise.noise, c, exists, W)
    if UPDATES:
        steps = _wide(noise.noise_steps, c, exists, W)
        difference = batch_mean - _wide(noise.last_mean, c, exists, W)
        observed = 0.5 * difference * difference / _at_least(tl.where(batch_var > var, batch_var, var), TINY)
        observed = tl.where((steps == 0) | (observed > 1), 1, observed) * batch_samples
        new = measured + (observed - measured) / tl.where(steps + 1 > window, window, steps + 1)
        measured = tl.where(ignored, measured, _rounded(new, dtype, W))
        tl.debug_barrier()  # as in `_enter`
        tl.store(noise.noise + c, measured.to(dtype), mask=exists & ~ignored)
        tl.store(noise.noise_steps + c, (steps + 1).to(dtype), mask=exists & ~ignored)
        tl.store(noise.last_mean + c, batch_mean.to(dtype), mask=exists & ~ignored)

    measured = measured / tl.where(batch_samples > 0, batch_samples, 1)
    measured = tl.where(measured > 1, 1, measured)
    trust = _at_least(1 / (1 + trust_noise * measured), 1 - keep)
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
    offset = tl.where(ignored, 0, batch_mean - _rounded(mean, dtype, W))
    std = tl.where(ignored, 0, tl.sqrt(batch_var))
    return mean, var, tl.where(ignored, 0, trust), offset, std


@triton.jit
def _update_gradient(gradient, sum_dy, sum_dy_xhat, rstd, trust, offset, batch_std, n, c, exists, W: tl.constexpr):
    """`update.update_gradient`: G0 and G1, (BC,), in W, times the factor of `law.bounded`."""
    dtype = gradient.sum_dy.dtype.element_ty
    TINY: tl.constexpr = _TINY64 if dtype == tl.float64 else _TINY32
    MAX: tl.constexpr = _MAX64 if dtype == tl.float64 else _MAX32
    EPS: tl.constexpr = _EPS64 if dtype == tl.float64 else _EPS32
    finite = (tl.abs(sum_dy) <= MAX) & (tl.abs(sum_dy_xhat) <= MAX)
    p0, p1 = sum_dy / n, sum_dy_xhat / n
    first, second = _wide(gradient.sum_dy, c, exists, W), _wide(gradient.sum_dy_xhat, c, exists, W)
    count, keep = _wide(gradient.count_dy, c, exists, W), 1 - trust
    first = tl.where(finite, _rounded(keep * first + trust * p0, dtype, W), first)
    second = tl.where(finite, _rounded(keep * second + trust * p1, dtype, W), second)
    count = tl.where(finite, _rounded(keep * count + trust, dtype, W), count)
    tl.debug_barrier()  # as in `_enter`
    tl.store(gradient.sum_dy + c, first.to(dtype), mask=exists & finite)
    tl.store(gradient.sum_dy_xhat + c, second.to(dtype), mask=exists & finite)
    tl.store(gradient.count_dy + c, count.to(dtype), mask=exists & finite)
    count = _at_least(count, TINY)
    m0, m1 = first / count, second / count

    offset, spread = offset * rstd, batch_std * rstd
    varies = spread * spread > EPS * offset * offset
    along = tl.where(varies, (p1 - offset * p0) / _at_least(spread, TINY), 0)
    constant, slope = m0 + offset * m1, spread * m1
    of_batch, of_memory = _hypot(p0, along), _hypot(constant, slope)
    scale = tl.where(of_memory <= of_batch, 1, of_batch / _at_least(of_memory, TINY))
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
