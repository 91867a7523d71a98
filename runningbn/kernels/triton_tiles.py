"""How the Triton kernels cut x into tiles, and how the partial sums of programs are merged.

See `triton_kernels` for the shapes and the names.
"""

# mypy: ignore-errors
# Triton compiles these functions from their source; their arguments are pointers, numbers and tiles, and have no types.

import triton
import triton.language as tl

from .triton_vectors import not_negative

# Arguments of every kernel that takes x.
SIZES = ["outer", "channels", "inner", "splits", "tiles"]


@triton.jit
def divisible(channels, inner, ROWS: tl.constexpr, DIVISOR: tl.constexpr):
    """The sizes, the one along which memory runs as a visible multiple of DIVISOR: it allows for vector loads."""
    if ROWS:
        channels = channels // DIVISOR * DIVISOR
    else:
        inner = inner // DIVISOR * DIVISOR
    return channels, inner


@triton.jit
def tile_at(
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
def number_of_tiles(outer, inner, BN: tl.constexpr, BS: tl.constexpr):
    """Of a block of channels."""
    return tl.cdiv(outer, BN) * tl.cdiv(inner, BS)


@triton.jit
def elements_before(tile, outer, inner, BN: tl.constexpr, BS: tl.constexpr):
    """Elements per channel before a tile, int64; all of them for tiles beyond the last."""
    along = tl.cdiv(inner, BS)
    n = tl.minimum(tile // along * BN, outer).to(tl.int64)
    s = tl.minimum(tile % along * BS, inner).to(tl.int64)
    return n * inner + tl.minimum(outer - n, BN) * s


@triton.jit
def elements_in(tile, outer, inner, BN: tl.constexpr, BS: tl.constexpr):
    """Elements per channel in a tile, int64."""
    return elements_before(tile + 1, outer, inner, BN, BS) - elements_before(tile, outer, inner, BN, BS)


@triton.jit
def from_the_start(channels, BC: tl.constexpr):
    """The block of channels and the split of this program."""
    blocks = tl.cdiv(channels, BC)
    return tl.program_id(0) % blocks, tl.program_id(0) // blocks


@triton.jit
def from_the_end(channels, splits, BC: tl.constexpr):
    """The block of channels and the split of this program, in reverse."""
    blocks = tl.cdiv(channels, BC)
    program = blocks * splits - 1 - tl.program_id(0)
    return program % blocks, program // blocks


@triton.jit
def per_channel(values):
    """The sums of a tile, (BN, BC, BS) to (BC,)."""
    return tl.sum(tl.sum(values, 2), 0)


@triton.jit
def is_last(counter, splits):
    """Whether all programs that count here have stored their partial sums; leaves the counter at zero."""
    # All threads of this program have stored before one of them counts. Its release hands that on, and the acquire of
    # the last program receives it. The order of arrival decides who sums up, not what comes out.
    tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    all_arrived = arrived == splits - 1
    if all_arrived:
        tl.store(counter, 0)
    tl.debug_barrier()
    return all_arrived


@triton.jit
def load_shared(pointer, mask, dtype: tl.constexpr):
    """What other programs of this launch have stored, in `dtype`: from the cache that they share with this one."""
    return tl.load(pointer, mask=mask, other=0, cache_modifier=".cg").to(dtype)


@triton.jit
def merged(
    scratch, own, outer, inner, splits, tiles, BN: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, BP: tl.constexpr
):  # fmt: skip
    """Mean, float64, and squares about it, Σ(x − mean)², from the partial sums of all splits, BP at a time, in order.

    Means are distances from the pivot of the first split, which is near the others: they have all their digits.
    """
    dtype = scratch.dtype.element_ty
    step = splits.to(tl.int64) * own.total
    pivot = load_shared(scratch + own.c, own.exists, dtype)
    n = tl.zeros([BP, BC], dtype)
    mean = tl.zeros([BP, BC], dtype)
    squares = tl.zeros([BP, BC], dtype)
    for start in range(0, splits, BP):
        p = start + tl.arange(0, BP)
        begin = elements_before(p * tiles, outer, inner, BN, BS)
        of_split = (elements_before((p + 1) * tiles, outer, inner, BN, BS) - begin).to(dtype)[:, None]
        known = (p < splits)[:, None] & own.exists[None, :]
        row = scratch + p[:, None].to(tl.int64) * own.total + own.c[None, :]
        sums = load_shared(row + step, known, dtype)
        offset = sums / tl.where(of_split > 0, of_split, 1)
        distance = tl.where(known, (load_shared(row, known, dtype) - pivot[None, :]) + offset, 0)
        about = not_negative(load_shared(row + 2 * step, known, dtype) - sums * offset)
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
