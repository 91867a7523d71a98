"""The linear state of a normalisation layer: weighted sums about a pivot, the buffers that hold them, pure functions.

Shapes: C channels; every tensor here is (C,) and float32 or float64. Per channel, over all elements x seen so far,
each with its weight w::

    count = sum(w)        sums = sum(w * (x - shift))        sqrs = sum(w * (x - shift)**2)

They are linear in the data, so batches, ranks and domains combine by weighted addition. `shift` is a pivot near the
mean: the variance is a difference of `sqrs` and `sums` terms, and about a far pivot float32 has no digits left for it.

Source: shifted data algorithm and pairwise merge of Chan, Golub and LeVeque, "Algorithms for computing the sample
variance", The American Statistician 37 (1983).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sums(NamedTuple):
    """Weighted sums about a pivot, the sufficient statistics of mean and variance.

    Attributes:
        shift: (C,), the pivot.
        sums: (C,), sum of w·(x − shift).
        sqrs: (C,), sum of w·(x − shift)².
        count: (C,) or (), sum of w; for one unweighted batch the number of elements per channel.

    Example:
        The elements 1, 2 and 6 about the pivot 0:

        >>> import torch
        >>> moments(Sums(*(torch.tensor([value]) for value in (0.0, 9.0, 41.0, 3.0))))
        (tensor([3.]), tensor([4.6667]))
    """

    shift: Tensor
    sums: Tensor
    sqrs: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which is of no use here


class State(NamedTuple):
    """The statistics of a layer: its buffers, updated in place.

    Attributes:
        shift, sums, sqrs, count: the linear state, see `Sums`.
        count_sqrs: sum of w², for the effective count; 0 in a state that was taken over from elsewhere.
        debias: sum of the batch weights a, decayed alike: 0 in an empty state, then towards 1.
        samples: samples seen.
        steps: batches that have entered, the t of a = 1/t.
        running_mean, running_var: what evaluation normalises by.
        num_batches_tracked: (), int64, training forwards.
        last_keep, last_gain: 1 − a and the gain of the last batch, for the recomputation of its forward.
    """

    shift: Tensor
    sums: Tensor
    sqrs: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which is of no use here
    count_sqrs: Tensor
    debias: Tensor
    samples: Tensor
    steps: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    last_keep: Tensor
    last_gain: Tensor

    @property
    def linear(self) -> Sums:
        """The linear state, as pure functions take it."""
        return Sums(self.shift, self.sums, self.sqrs, self.count)


class NoiseState(NamedTuple):
    """How noisy batch means are, measured in forward, with ``gradient="running"``; buffers too. See `law`.

    Attributes:
        noise: N·R, R being the variance of batch means in units of the variance, and N the samples of a batch.
        noise_steps: the batches that R was measured from.
        last_mean: the mean of the last of them.
    """

    noise: Tensor
    noise_steps: Tensor
    last_mean: Tensor


class GradientState(NamedTuple):
    """The running sums of the backward pass, with ``gradient="running"``; buffers too, updated in backward only.

    Attributes:
        sum_dy: weighted sum of the means of dy over batches.
        sum_dy_xhat: weighted sum of those of dy·z, z = (x − mean)·rstd.
        count_dy: sum of the weights; G0 and G1 are the quotients.
    """

    sum_dy: Tensor
    sum_dy_xhat: Tensor
    count_dy: Tensor


# The names of `LayerState.forward_buffers` with ``gradient="running"``.
FORWARD_BUFFERS = (*State._fields, *NoiseState._fields)


class LayerState(NamedTuple):
    """All that a training step of a layer reads and writes; the last two only with ``gradient="running"``."""

    statistics: State
    noise: NoiseState | None = None
    gradient: GradientState | None = None

    @property
    def forward_buffers(self) -> tuple[Tensor, ...]:
        """What a forward updates."""
        return self.statistics if self.noise is None else (*self.statistics, *self.noise)


class Batch(NamedTuple):
    """A batch, reduced to what enters the state.

    Attributes:
        sums: the sums of its elements, over all ranks.
        samples: N, its samples; a tensor, (), where it was pooled over ranks or masked, and 0 where it is empty.
        weight: (C,), its weight a.
        whole: whether the batch as a whole weighs a (gain = a·(count/debias)/n), or each of its elements (gain = a).
    """

    sums: Sums
    samples: int | Tensor
    weight: Tensor
    whole: bool


def moments(state: Sums) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, each (C,): mean = shift + sums/count, var = sqrs/count − (sums/count)² ≥ 0.

    A channel that holds nothing (count = 0) has its pivot as mean and no variance.
    """
    count = nonzero(state.count)
    offset = state.sums / count
    # Rounding may leave a tiny negative difference for a constant channel.
    var = torch.addcmul(state.sqrs / count, offset, offset, value=-1).clamp_min(0)
    return state.shift + offset, var


def move_pivot(state: Sums, shift: Tensor) -> Sums:
    """The same statistics about another pivot; exact algebra, with d = shift − state.shift.

    sums − count·d, and sqrs − d·(2·sums − count·d).
    """
    d = shift - state.shift
    sums = torch.addcmul(state.sums, state.count, d, value=-1)
    return Sums(shift, sums, torch.addcmul(state.sqrs, d, state.sums + sums, value=-1), state.count)


def common_pivot(old: Sums, new: Sums, keep: Tensor, gain: Tensor) -> Tensor:
    """The pivot about which keep·old + gain·new loses the fewest digits, (C,): near the mean of that combination.

    Both states are about pivots near their own means, so it is the weighted mean of the pivots. With the two D apart
    and weights 1 − p and p, moving both here leaves rounding errors of the order of p·(1 − p)·D², which is no more
    than the variance between the two means itself. The pivot of either state alone would leave D², however small the
    weight of the other.
    """
    weight = gain * new.count
    portion = weight / nonzero(torch.addcmul(weight, keep, old.count))
    return torch.lerp(old.shift, new.shift, portion)


def combine(old: Sums, new: Sums, keep: Tensor, gain: Tensor) -> Sums:
    """keep·old + gain·new about their common mean; a lerp where keep = 1 − gain, a merge where both are 1.

    Args:
        old, new: the states; an empty one (count = 0) contributes nothing.
        keep, gain: (C,) weights, each ≥ 0. With keep = 1 and gain = 0, `old` is returned bit for bit.
    """
    pivot = common_pivot(old, new, keep, gain)
    old, new = move_pivot(old, pivot), move_pivot(new, pivot)
    return Sums(pivot, *(torch.addcmul(keep * a, gain, b) for a, b in zip(old[1:], new[1:])))


def without_empty(batch: Sums) -> Sums:
    """The same, but where nothing was counted, which only the device knows, sums that are not finite: not to enter."""
    return batch._replace(sqrs=batch.sqrs.masked_fill(batch.count == 0, torch.inf), count=batch.count.clamp_min(1))


def nonzero(count: Tensor) -> Tensor:
    """A count to divide by. Where it is 0 so is the dividend, and the quotient then too."""
    return count.clamp_min(torch.finfo(count.dtype).tiny)


def unbiased(var: Tensor, count: Tensor, count_sqrs: Tensor) -> Tensor:
    """Variance with Bessel's correction for weighted elements, (C,): var / (1 − Σw²/(Σw)²).

    1/(Σw²/(Σw)²) is the effective number of elements (Kish 1965); with equal weights it is n and the factor the
    familiar n/(n − 1). A state taken over from elsewhere has Σw² = 0: it counts as a population and is not corrected.
    """
    # torch refuses a single element, which has no variance to correct; here that stays finite.
    uncorrected = (1 - count_sqrs / nonzero(count.square())).clamp_min(torch.finfo(var.dtype).eps)
    return var / uncorrected
