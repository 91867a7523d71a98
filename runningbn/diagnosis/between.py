"""How much of what a layer sees lies between batches: by how much a batch counts for fewer samples than it has.

One-way random effects over the means of samples. Shapes: k batches of m_i samples, N = Σm_i; C channels. For sample j
of batch i and each channel, the mean over positions is x_ij = μ + b_i + e_ij, where b has the variance B and e has W.
From the mean squares between and within batches,

    W = MSW,    B = (MSB − MSW)/m₀,    m₀ = (N − Σm_i²/N)/(k − 1)

are unbiased whatever the distribution; for independent samples B is 0 on average, and negative as often as positive.
They are divided by the layer's variance (var + eps, over all elements) and averaged over channels. Then

    correlation = B/(B + W),    design effect = 1 + (Σm_i²/N − 1)·correlation

and N samples know the mean as well as N/design effect independent ones. Its standard error is the jackknife's, over
batches.

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
    """How alike the samples of a batch are, in one layer. NaN where the data do not tell.

    Attributes:
        batches, samples: k and N; batches that were not finite are not among them.
        share: B, the share of the variance of all elements that lies between batches, beyond chance.
        correlation: of two samples of a batch; NaN where no batch has two.
        design_effect: by how many times more samples such batches need than independent ones; 1 for independent
            samples and for batches of one, below 1 where batches are more alike than chance makes them.
        design_effect_error: its standard error; NaN from fewer than 3 batches.
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
        """N/(design effect), the independent samples that would know the mean as well."""
        return _quotient(self.samples, self.design_effect)

    @property
    def effective_batch(self) -> float:
        """What a batch counts for, in independent samples."""
        return _quotient(self.samples_per_batch, self.design_effect)


class Group(NamedTuple):
    """The sample means of one batch: how many, their mean, and the sum of squares about it, (C,), float64."""

    samples: int
    mean: Tensor
    squares: Tensor


def group(means: Tensor) -> Group:
    """From the means of the samples of a batch, (m, C)."""
    mean = means.mean(0)
    return Group(len(means), mean, (means - mean).square().sum(0))


def between_batches(groups: Sequence[Group], scale: Tensor) -> BetweenBatches:
    """The analysis of variance.

    Args:
        groups: one for each batch; those that are not finite are left out.
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
    # About a pivot, for the sums below are differences of squares.
    sums = _Sums.of(sizes, means - means.mean(0), squares)
    if bool((sizes == 1).all()):
        return BetweenBatches(len(groups), len(groups), nan, nan, 1.0, 0.0)
    share, correlation, effect = (float(part) for part in _components(sums.all(), scale))
    error = nan
    if len(groups) > 2:
        _, _, without_one = _components(sums.without_one(), scale)
        k = len(groups)
        error = float(((without_one - without_one.mean()).square().sum() * (k - 1) / k).sqrt())
    return BetweenBatches(len(groups), int(sizes.sum()), share, correlation, effect, error)


class _Sums(NamedTuple):
    """Sums over batches, or for each batch its part of them: k is (…, 1), the rest (…, 1) or (…, C)."""

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

    def without_one(self) -> _Sums:
        """Over all batches but one, for each of them."""
        return _Sums(*(part.sum(0, keepdim=True) - part for part in self))


def _components(sums: _Sums, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Share, correlation and design effect, for each row of the sums; NaN where nothing lies within batches."""
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
