"""How the elements of an input are shared out among the programs of a launch. See `triton_kernels` for the names."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from .triton_devices import Device
from .triton_launch import Launches

# Threads of a program, and elements of a tile for each: whole vectors of every dtype, and sums that stay in registers.
_THREADS, _PER_THREAD = 256, 16
# Memory is read in vectors where sizes are multiples of this; otherwise each element needs an address of its own, and
# half as many are held. So are float64.
_ALIGNED = 4
# Channels of a tile of rows: whole sectors of memory, and blocks enough for few partial sums of each.
_CHANNELS_OF_ROWS = 32
# Programs for each multiprocessor: as many as it holds at once where their sums have to be merged, some rounds of them
# where there is nothing to merge.
_SUMMING, _MAPPING = 4, 16
# Tiles in a split, at most: it bounds what the pivot of a split can cost, see `batch_statistics`.
_LARGEST_SPLIT = 64
# Partial sums that are merged at once, of all channels in a block.
_MERGED_AT_ONCE, _FEW_SPLITS = 1024, 16
# Offsets in a tile are 32 bits wide, and so is every size.
LARGEST_SIZE, MOST_CHANNELS = 2**31 - 2**13, 2**20


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """How the elements of an input are shared out.

    Attributes:
        sizes: outer, channels, inner.
        summing, mapping: (splits, tiles of each) of the two launches.
        tile: what the shape of a tile is, and the number of threads.
        at_once: BP.
        wide: WIDE.
        blocks: blocks of channels.
        launches: those of this plan that are prepared.
    """

    sizes: tuple[int, int, int]
    summing: tuple[int, int]
    mapping: tuple[int, int]
    tile: dict[str, Any]
    at_once: int
    wide: bool
    blocks: int
    launches: Launches = field(default_factory=dict)


def plan(rows: bool, outer: int, channels: int, inner: int, double: bool, device: Device) -> Plan:
    """Tiles of much the same size and of few shapes: each makes Triton compile the kernels once more."""
    divisor = math.gcd(channels if rows else inner, 16)
    per_thread = _PER_THREAD // 2 if double or divisor < _ALIGNED else _PER_THREAD
    tile, wide = _THREADS * per_thread, _power_of_two(channels)
    if rows:
        of_channels, of_inner = min(wide, _CHANNELS_OF_ROWS), 1
    else:
        # The length along a plane that leaves the least of the last tile empty; long ones first.
        lengths = [tile, tile // 2, tile // 4]
        of_inner = min(lengths, key=lambda length: ceil(inner, length) * length)
        of_inner = min(of_inner, _power_of_two(inner))
        # What there is per channel is done by one program: no more than one channel for each of its threads.
        of_channels = min(wide, tile // of_inner, _THREADS)
        if of_channels * inner > LARGEST_SIZE:
            of_channels = 1
    of_outer = tile // (of_channels * of_inner)
    if not rows and channels * inner * of_outer > LARGEST_SIZE:
        of_outer = 1
    # Few samples get a smaller tile rather than an empty one; not of every size, as samples vary.
    if outer <= of_outer // 16:
        of_outer //= 16
    blocks, tiles = ceil(channels, of_channels), ceil(outer, of_outer) * ceil(inner, of_inner)

    def shared_out(programs: int) -> tuple[int, int]:
        of_split = min(ceil(tiles, max(programs * device.multiprocessors // blocks, 1)), _LARGEST_SPLIT)
        return ceil(tiles, of_split), of_split

    shape = {
        "ROWS": rows, "DIVISOR": divisor, "BN": of_outer, "BC": of_channels, "BS": of_inner,
        "num_warps": max(1, of_outer * of_channels * of_inner // per_thread // 32),
    }  # fmt: skip
    summing, mapping = shared_out(_SUMMING), shared_out(_MAPPING)
    at_once = _FEW_SPLITS if summing[0] <= _FEW_SPLITS else max(_MERGED_AT_ONCE // of_channels, _FEW_SPLITS)
    return Plan(
        sizes=(outer, channels, inner),
        summing=summing,
        mapping=mapping,
        tile=shape,
        at_once=at_once,
        wide=double or not device.slow_float64,
        blocks=blocks,
    )


def ceil(size: int, of: int) -> int:
    """How many parts of that size it takes."""
    return -(-size // of)


def _power_of_two(size: int) -> int:
    """The least that is not below."""
    return 1 << (size - 1).bit_length()
