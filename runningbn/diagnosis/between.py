"""The variance of a layer's input between batches, and the design effect: analysis of variance over samples.

One-way random effects over the means of samples. Shapes: k batches of m_i samples, N = Σm_i; C channels. For sample j
of batch i and each channel, the mean over positions is x_ij = μ + b_i + e_ij, where b has the variance B and e has W.
From the mean squares between and within batches,

    W = MSW,    B = (MSB − MSW)/m₀,    m₀ = (N − Σm_i²/N)/(k − 1)

are unbiased for any distribution; for independent samples the mean of B is 0, so B may be negative. Both are divided by
the layer's variance (var + eps, over all elements) and averaged over channels. Then

    correlation = B/(B + W),    design effect = 1 + (Σm_i²/N − 1)·correlation

and the effective sample size of N samples is N/design effect: the number of independent samples whose mean has the same
standard error. The standard error of the design effect is estimated by the jackknife over batches.

Source: Kish, "Survey Sampling" (1965), section 5.4; Searle, Casella and McCulloch, "Variance Components" (1992), 3.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class BetweenBatches:
    """The correlation of the samples within a batch, in one layer. NaN if the data do not determine a value.

    Attributes:
        batches, samples: k and N, without batches that were not finite.
        share: B, the variance between batches as a fraction of the variance of all elements.
        correlation: of two samples of a batch; NaN if no batch has two.
        design_effect: number of samples divided by the effective sample size; 1 for independent samples and for batches
            of one, below 1 if the batches differ less than batches of independent samples.
        design_effect_error: its standard error; NaN for fewer than 3 batches.
    """

    batches: int
    samples: int
    share: float
    correlation: float
    design_effect: float
    design_effect_error: float

    @property
    def samples_per_batch(self) -> float:
        """N/k."""
        return self.samples / self.batches if self.batches else float("nan")

    @property
    def effective_samples(self) -> float:
        """The effective sample size, N/design_effect."""
        return _quotient(self.samples, self.design_effect)

    @property
    def effective_batch(self) -> float:
        """The effective sample size of a batch."""
        return _quotient(self.samples_per_batch, self.design_effect)


class Group(NamedTuple):
    """The sample means of one batch: their number, their mean, and the sum of squares about it, (C,), float64."""

    samples: int
    mean: Tensor
    squares: Tensor


def group(means: Tensor) -> Group:
    """The `Group` of a batch, from the means of its samples, (m, C)."""
    mean = means.mean(0)
    return Group(len(means), mean, (means - mean).square().sum(0))


def between_batches(groups: Sequence[Group], scale: Tensor) -> BetweenBatches:
    """The analysis of variance.

    Args:
        groups: one per batch; those that are not finite are left out.
        scale: (C,), the variance of all elements, float64.
    """
    groups = [one for one in groups if bool((one.mean + one.squares).isfinite().all())]
    sizes = torch.tensor([one.samples for one in groups], dtype=torch.float64, device=scale.device)
    nan = float("nan")
    if len(groups) < 2:
        effect = 1.0 if len(groups) == 1 and groups[0].samples == 1 else nan
        return BetweenBatches(len(groups), int(sizes.sum()), nan, nan, effect, nan)
    means = torch.stack([one.mean for one in groups])
    squares = torch.stack([one.squares for one in groups])
    # Relative to a pivot, since differences of squares are computed from these sums.
    sums = _Sums.of(sizes, means - means.mean(0), squares)
    if bool((sizes == 1).all()):
        return BetweenBatches(len(groups), len(groups), nan, nan, 1.0, 0.0)
    share, correlation, effect = (float(part) for part in _components(sums.all(), scale))
    error = nan
    if len(groups) > 2:
        _, _, effects = _components(sums.leave_one_out(), scale)
        k = len(groups)
        error = float(((effects - effects.mean()).square().sum() * (k - 1) / k).sqrt())
    return BetweenBatches(len(groups), int(sizes.sum()), share, correlation, effect, error)


class _Sums(NamedTuple):
    """Sums over batches, or the terms of each batch: k is (…, 1), the others (…, 1) or (…, C)."""

    k: Tensor
    m: Tensor
    m_squared: Tensor
    mean: Tensor  # Σ m·mean
    mean_squared: Tensor  # Σ m·mean²
    within: Tensor

    @classmethod
    def of(cls, sizes: Tensor, means: Tensor, squares: Tensor) -> _Sums:
        m = sizes[:, None]
        return cls(torch.ones_like(m), m, m * m, m * means, m * means * means, squares)

    def all(self) -> _Sums:
        """Over all batches."""
        return _Sums(*(part.sum(0, keepdim=True) for part in self))

    def leave_one_out(self) -> _Sums:
        """For each batch, the sums over all other batches."""
        return _Sums(*(part.sum(0, keepdim=True) - part for part in self))


def _components(sums: _Sums, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Share, correlation and design effect, for each row of the sums; NaN if no batch has two samples."""
    total = sums.m
    between = (sums.mean_squared - sums.mean * sums.mean / total).clamp_min(0) / (sums.k - 1)
    within = sums.within / (total - sums.k)
    m0 = (total - sums.m_squared / total) / (sums.k - 1)
    share, rest = ((part / scale).mean(1) for part in ((between - within) / m0, within))
    correlation = share / (share + rest)
    weighted_size = (sums.m_squared / total).squeeze(1)
    return share, correlation, 1 + (weighted_size - 1) * correlation


def _quotient(number: float, by: float) -> float:
    return number / by if by > 0 else float("inf") if by <= 0 else float("nan")
