"""How the elements of an input are shared out among the programs of a launch. See `triton_kernels` for the names."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .triton_devices import Device
from .triton_launch import Launches

# Threads of a program, and elements of a tile for each: whole vectors of every dtype, and sums that stay in registers.
_THREADS, _PER_THREAD = 256, 16
# Memory is read in vectors where sizes are multiples of this; otherwise each element needs an address of its own, and
# half as many are held. So are float64.
_ALIGNED = 4
# Channels of a tile of rows: whole lines of memory, and blocks enough for few partial sums of each.
_CHANNELS_OF_ROWS = 32
# Where each program has all elements of its channels: the channels of rows, one sector of memory, and of planes, the
# elements of a tile at least. Few blocks of channels leave multiprocessors idle, so that is for few tiles: as many as
# take about as long as a second launch, for each block that a multiprocessor has.
_SECTOR, _SMALLEST_TILE, _TILES_AT_ONCE = 8, 1024, 4
# Programs for each multiprocessor: as many as it holds at once where their sums have to be merged, some rounds of them
# where there is nothing to merge.
_SUMMING, _MAPPING = 4, 16
# Tiles in a split, at most: it bounds what the pivot of a split can cost, see `batch_statistics`.
_LARGEST_SPLIT = 64
# Partial sums that are merged at once, of all channels in a block.
_MERGED_AT_ONCE, _FEW_SPLITS = 1024, 16
# Offsets in a tile are 32 bits wide, and so is every size.
LARGEST_SIZE, MOST_CHANNELS = 2**31 - 2**13, 2**20


class Share(NamedTuple):
    """How the tiles of a block of channels are shared out: the number of splits, and of tiles in each but the last."""

    splits: int
    tiles: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """How the elements of an input are shared out.

    Attributes:
        sizes: outer, channels, inner.
        summing, mapping: of the two launches; one split is summed and mapped in one launch.
        tile: what the shape of a tile is, and the number of threads.
        merged_at_once: how many partial sums of a channel are merged at once, BP.
        blocks: blocks of channels.
        launches: those of this plan that are prepared.
    """

    sizes: tuple[int, int, int]
    summing: Share
    mapping: Share
    tile: dict[str, Any]
    merged_at_once: int
    blocks: int
    launches: Launches = field(default_factory=dict)


def plan(rows: bool, outer: int, channels: int, inner: int, double: bool, device: Device) -> Plan:
    """Tiles of much the same size and of few shapes: each makes Triton compile the kernels once more."""
    divisor = math.gcd(channels if rows else inner, 16)
    per_thread = _PER_THREAD // 2 if double or divisor < _ALIGNED else _PER_THREAD
    tile = _THREADS * per_thread
    at_once = _tile_at_once(rows, outer, channels, inner, tile)
    most = min(_TILES_AT_ONCE * max(at_once.blocks(channels) // device.multiprocessors, 1), _LARGEST_SPLIT)
    is_at_once = at_once.tiles(outer, inner) <= most
    shape = at_once if is_at_once else _tile_of_splits(rows, outer, channels, inner, tile)
    blocks, tiles = shape.blocks(channels), shape.tiles(outer, inner)

    def shared_out(programs: int) -> Share:
        of_split = min(ceil(tiles, max(programs * device.multiprocessors // blocks, 1)), _LARGEST_SPLIT)
        return Share(ceil(tiles, of_split), of_split)

    summing, mapping = Share(1, tiles) if is_at_once else shared_out(_SUMMING), shared_out(_MAPPING)
    few = summing.splits <= _FEW_SPLITS
    return Plan(
        sizes=(outer, channels, inner),
        summing=summing,
        mapping=mapping,
        tile={
            "ROWS": rows, "DIVISOR": divisor, "BN": shape.outer, "BC": shape.channels, "BS": shape.inner,
            "num_warps": max(1, shape.outer * shape.channels * shape.inner // per_thread // 32),
        },
        merged_at_once=_FEW_SPLITS if few else max(_MERGED_AT_ONCE // shape.channels, _FEW_SPLITS),
        blocks=blocks,
    )  # fmt: skip


class _Tile(NamedTuple):
    """The shape of a tile, BN × BC × BS."""

    outer: int
    channels: int
    inner: int

    def blocks(self, channels: int) -> int:
        return ceil(channels, self.channels)

    def tiles(self, outer: int, inner: int) -> int:
        return ceil(outer, self.outer) * ceil(inner, self.inner)


def _tile_at_once(rows: bool, outer: int, channels: int, inner: int, tile: int) -> _Tile:
    """For programs that have all elements of their channels: few channels each."""
    of_inner, of_outer = _along_a_plane(inner, tile), _power_of_four(outer)
    of_channel = of_inner * min(of_outer, tile // of_inner)
    most = _SECTOR if rows else min(max(_SMALLEST_TILE // of_channel, 1), _THREADS)
    of_channels = min(_power_of_two(channels), most)
    of_outer = min(of_outer, tile // (of_channels * of_inner))
    return _Tile(_within(of_outer, channels * inner), of_channels, of_inner)


def _tile_of_splits(rows: bool, outer: int, channels: int, inner: int, tile: int) -> _Tile:
    """For elements that several programs share: whole lines of memory, and several channels of small planes."""
    of_inner = _along_a_plane(inner, tile)
    # What there is per channel is done by one program: no more than one channel for each of its threads.
    of_channels = min(_power_of_two(channels), tile // of_inner, _CHANNELS_OF_ROWS if rows else _THREADS)
    if of_channels * inner > LARGEST_SIZE:
        of_channels = 1
    of_outer = _within(tile // (of_channels * of_inner), channels * inner)
    # Few samples get a smaller tile rather than an empty one; not of every size, as samples vary.
    return _Tile(of_outer // 16 if outer <= of_outer // 16 else of_outer, of_channels, of_inner)


def _along_a_plane(inner: int, tile: int) -> int:
    """The length of a tile along a plane that leaves the least of the last tile empty; long ones first. 1 for rows."""
    length = min((tile, tile // 2, tile // 4), key=lambda length: ceil(inner, length) * length)
    return min(length, _power_of_two(inner))


def _within(of_outer: int, of_sample: int) -> int:
    """1 for samples so large that the offsets in several of them do not fit into their 32 bits."""
    return 1 if of_sample * of_outer > LARGEST_SIZE else of_outer


def ceil(size: int, of: int) -> int:
    """How many parts of that size it takes."""
    return -(-size // of)


def _power_of_two(size: int) -> int:
    """The least power of two that is not below a size."""
    return 1 << (size - 1).bit_length()


def _power_of_four(size: int) -> int:
    """The least power of four that is not below: samples vary, and not each number of them may have its own tile."""
    return 1 << (-(-(size - 1).bit_length() // 2) * 2)
