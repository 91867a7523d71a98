"""Vectors over the channels of a program, as the Triton kernels load, compare and store them.

Shapes: everything is (BC,). W is the dtype of the arithmetic.
"""

# mypy: ignore-errors
# Triton compiles these functions from their source; their arguments are pointers, numbers and tiles, and have no types.

from typing import NamedTuple

import triton
import triton.language as tl


class Channels(NamedTuple):
    """The channels of a program.

    Attributes:
        block: the number of this block of channels.
        c: (BC,), their numbers.
        exists: (BC,), whether there are such channels.
        total: how many there are in all.
    """

    block: tl.tensor
    c: tl.tensor
    exists: tl.tensor
    total: tl.tensor


@triton.jit
def channels_of(block, channels, BC: tl.constexpr):
    """The `Channels` of a block."""
    c = block * BC + tl.arange(0, BC)
    return Channels(block, c, c < channels, channels)


@triton.jit
def from_bits(bits, W: tl.constexpr):
    """The float64 of these bits, in W: numbers come as integers, for Triton passes others as float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(W)


@triton.jit
def load_wide(vector, own, W: tl.constexpr):
    """What a vector has for these channels, in W."""
    return tl.load(vector + own.c, mask=own.exists, other=0).to(W)


@triton.jit
def at_least(value, bound):
    """The larger of the two; NaN stays."""
    return tl.where(value < bound, bound, value)


@triton.jit
def not_negative(value):
    """Rounding may leave a tiny negative difference for a constant channel."""
    return at_least(value, 0)


@triton.jit
def rounded(value, dtype: tl.constexpr, W: tl.constexpr):
    """As it will be read again from a buffer of that dtype."""
    return value.to(dtype).to(W)


@triton.jit
def store_rows(matrix, rows, own):
    """Vectors to the first rows of a matrix with all channels as columns."""
    for i in tl.static_range(len(rows)):
        tl.store(matrix + i * own.total + own.c, rows[i].to(matrix.dtype.element_ty), mask=own.exists)
