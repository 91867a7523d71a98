"""The Triton kernels of a backward, whole training steps. See `triton_kernels` for the shapes and the names."""

# mypy: ignore-errors
# Triton compiles these functions from their source; their arguments are pointers, numbers and tiles, and have no types.

import triton
import triton.language as tl

from .triton_state import update_gradient
from .triton_tiles import (
    SIZES,
    divisible,
    from_the_end,
    from_the_start,
    is_last,
    load_shared,
    number_of_tiles,
    per_channel,
    tile_at,
)
from .triton_vectors import channels_of, load_wide, store_rows


@triton.jit(do_not_specialize=SIZES)
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
    block, split = from_the_start(channels, BC)
    own = channels_of(block, channels, BC)
    mean = tl.load(packed + own.c, mask=own.exists, other=0)[None, :, None]
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
            per_channel(first), per_channel(second), n, weight, packed, sums, gradient, own, BY_STATE
        )
        if dx is not None:
            scale, slope, constant = scale[None, :, None], slope[None, :, None], constant[None, :, None]
            for tile in range(begin, end):
                base, local, mask = tile_at(tile, block, outer, channels, inner, ROWS, BN, BC, BS)
                at = base + local
                _map_gradient(dy + at, x + at, dx + at, mean, scale, slope, constant, mask)
    else:
        partial = scratch + split.to(tl.int64) * channels + own.c
        step = splits.to(tl.int64) * channels
        tl.store(partial, per_channel(first), mask=own.exists)
        tl.store(partial + step, per_channel(second), mask=own.exists)
        if is_last(counter + block, splits):
            sum_dy = tl.zeros([BP, BC], dtype)
            sum_dy_x = tl.zeros([BP, BC], dtype)
            for start in range(0, splits, BP):
                p = (start + tl.arange(0, BP))[:, None]
                known = (p < splits) & own.exists[None, :]
                row = scratch + p.to(tl.int64) * channels + own.c[None, :]
                sum_dy += load_shared(row, known, dtype)
                sum_dy_x += load_shared(row + step, known, dtype)
            rows = _gradient_entered(
                tl.sum(sum_dy, 0), tl.sum(sum_dy_x, 0), n, weight, packed, sums, gradient, own, BY_STATE
            )
            store_rows(scratch + 2 * step, rows, own)


@triton.jit
def _gradient_entered(sum_dy, sum_dy_x, n, weight, packed, sums, gradient, own, BY_STATE: tl.constexpr):
    """Let Σdy and Σdy·(x − mean) enter the state, and store Σdy and Σdy·z.

    Returns scale, slope and base of `input_gradient`.
    """
    W: tl.constexpr = packed.dtype.element_ty
    rstd = load_wide(packed + own.total, own, W)
    sum_dy_xhat = sum_dy_x * rstd
    tl.store(sums + own.c, sum_dy, mask=own.exists)
    tl.store(sums + own.total + own.c, sum_dy_xhat, mask=own.exists)
    if gradient is not None:
        trust, offset = load_wide(packed + 2 * own.total, own, W), load_wide(packed + 3 * own.total, own, W)
        std = load_wide(packed + 4 * own.total, own, W)
        m0, m1 = update_gradient(gradient, sum_dy, sum_dy_xhat, n, rstd, trust, offset, std, own, W)
    elif BY_STATE:
        kappa_mean = load_wide(packed + 2 * own.total, own, W)
        kappa_var = load_wide(packed + 3 * own.total, own, W)
        # A channel that was not finite has sums that are not either, and its κ is 0.
        m0 = tl.where(kappa_mean == 0, 0, kappa_mean * sum_dy)
        m1 = tl.where(kappa_var == 0, 0, kappa_var * sum_dy_xhat)
    else:
        m0, m1 = sum_dy / n, sum_dy_xhat / n
    scale = rstd
    if weight is not None:
        scale *= load_wide(weight, own, W)
    return scale, -scale * rstd * m1, -scale * m0


@triton.jit(do_not_specialize=[*SIZES, "splits_of_sums"])
def input_gradient(
    dy, x, dx, scratch, packed, outer, channels, inner, splits, tiles, splits_of_sums,
    ROWS: tl.constexpr, DIVISOR: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """dx = weight·rstd·(dy − m0 − z·m1), by the last rows of `scratch`, from the end as `affine_map` does.

    It is scale·dy + (x − mean)·slope + base with scale = weight·rstd, slope = −scale·rstd·m1, base = −scale·m0.
    """
    channels, inner = divisible(channels, inner, ROWS, DIVISOR)
    block, split = from_the_end(channels, splits, BC)
    own = channels_of(block, channels, BC)
    row = scratch + 2 * splits_of_sums.to(tl.int64) * channels + own.c
    mean = tl.load(packed + own.c, mask=own.exists, other=0)[None, :, None]
    scale = tl.load(row, mask=own.exists, other=0)[None, :, None]
    slope = tl.load(row + channels, mask=own.exists, other=0)[None, :, None]
    constant = tl.load(row + 2 * channels, mask=own.exists, other=0)[None, :, None]
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
