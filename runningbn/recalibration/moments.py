"""Combine the moments of batches into moments of all data, with standard errors, in float64.

Shapes: F channels, those of all layers in one vector; B batches. The input is the mean, variance and number n of
elements of each channel, per batch; the reductions over the data are done by the kernels. So float64 costs little here.

A batch contributes three terms t = (t0, t1, t2) per channel. Their sums T = Σt give the statistics. The sums of their
products G = Σ t·tᵀ give the standard errors, from the variance between batches (the ratio estimator of survey sampling:
Cochran, "Sampling Techniques", 3rd ed., section 2.11). T and G are sums, so those of several ranks are added.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.state import nonzero


class Estimator(ABC):
    """Computes statistics from batches. All arguments and results are (F,) or stacks of such vectors."""

    @abstractmethod
    def terms(self, mean: Tensor, var: Tensor, n: Tensor) -> Tensor:
        """t, (3, F), of a batch with n elements, its mean about the pivot and its biased variance; 0 where n is 0."""

    @abstractmethod
    def move(self, d: Tensor) -> Tensor:
        """The matrices M, (3, 3, F), that transform t about a pivot into t about that pivot + d."""

    @abstractmethod
    def moments(self, totals: Tensor) -> tuple[Tensor, Tensor]:
        """Mean about the pivot, and variance."""

    @abstractmethod
    def influence(self, totals: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives a of mean and variance with respect to T, each (3, F): a·t is the influence of a batch."""


class Population(Estimator):
    """All data as one sample: t = (n, Σ(x − p), Σ(x − p)²), mean = T1/T0, var = T2/T0 − mean², biased.

    Source: Wu and Johnson, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576, appendix.
    """

    def terms(self, mean: Tensor, var: Tensor, n: Tensor) -> Tensor:
        """n, n·mean, n·(var + mean²)."""
        return torch.stack((n, n * mean, n * torch.addcmul(var, mean, mean)))

    def move(self, d: Tensor) -> Tensor:
        """Σ(x − p − d)² = t2 − 2d·t1 + d²·t0."""
        one, zero = torch.ones_like(d), torch.zeros_like(d)
        return _matrix((one, zero, zero), (-d, one, zero), (d * d, -2 * d, one))

    def moments(self, totals: Tensor) -> tuple[Tensor, Tensor]:
        """T1/T0 and T2/T0 − (T1/T0)²."""
        mean, square = totals[1:] / nonzero(totals[0])
        return mean, (square - mean * mean).clamp_min(0)

    def influence(self, totals: Tensor) -> tuple[Tensor, Tensor]:
        """For the mean (−mean, 1, 0)/T0; for the variance (mean² − var, −2·mean, 1)/T0."""
        mean, var = self.moments(totals)
        one, zero = torch.ones_like(mean), torch.zeros_like(mean)
        by_mean = torch.stack((-mean, one, zero))
        by_var = torch.stack((mean * mean - var, -2 * mean, one))
        return by_mean / nonzero(totals[0]), by_var / nonzero(totals[0])


class MeanOfBatches(Estimator):
    """Batches with equal weight: t = (1, mean, unbiased var), the averages of batch means and unbiased batch variances.

    It omits the variance between batches. Batches with one element per channel have no variance and are left out.

    Source: Ioffe and Szegedy, "Batch Normalization", ICML 2015, section 3.1.
    """

    def terms(self, mean: Tensor, var: Tensor, n: Tensor) -> Tensor:
        """1, mean, n/(n − 1)·var."""
        counts = (n > 1).to(n.dtype)
        return torch.stack((counts, counts * mean, counts * var * n / (n - 1).clamp_min(1)))

    def move(self, d: Tensor) -> Tensor:
        """Only the mean is relative to the pivot."""
        one, zero = torch.ones_like(d), torch.zeros_like(d)
        return _matrix((one, zero, zero), (-d, one, zero), (zero, zero, one))

    def moments(self, totals: Tensor) -> tuple[Tensor, Tensor]:
        """T1/T0 and T2/T0."""
        mean, var = totals[1:] / nonzero(totals[0])
        return mean, var

    def influence(self, totals: Tensor) -> tuple[Tensor, Tensor]:
        """For the mean (−mean, 1, 0)/T0; for the variance (−var, 0, 1)/T0."""
        mean, var = self.moments(totals)
        one, zero = torch.ones_like(mean), torch.zeros_like(mean)
        by_mean, by_var = torch.stack((-mean, one, zero)), torch.stack((-var, zero, one))
        return by_mean / nonzero(totals[0]), by_var / nonzero(totals[0])


@dataclass
class Call:
    """The moments of the input of one call of a layer.

    Attributes:
        layer: the index of the layer.
        mean, var: (C,), of its input; var is biased.
        n: elements per channel of the input.
        samples: N of the input.
    """

    layer: int
    mean: Tensor
    var: Tensor
    n: int
    samples: int


class Estimate(NamedTuple):
    """Statistics of every channel, each (F,), float64.

    Attributes:
        mean, var: var is biased for `Population`, Bessel-corrected for `MeanOfBatches`.
        mean_error, var_error: their standard errors, from the variance between batches; NaN for a single batch.
        batches, elements, samples: the amount of data used; all 0 where the layer was not used.
    """

    mean: Tensor
    var: Tensor
    mean_error: Tensor
    var_error: Tensor
    batches: Tensor
    elements: Tensor
    samples: Tensor


class Accumulator:
    """Adds up batches for all channels of some layers.

    Args:
        channels: C of each layer; the vectors of all layers are concatenated, F = ΣC.
        estimator: computes the statistics.
        device: of the sums.
    """

    def __init__(self, channels: list[int], estimator: Estimator, device: torch.device) -> None:
        self.channels, self.estimator = channels, estimator
        # There is no float64 on Apple's GPUs.
        self.device = torch.device("cpu") if device.type == "mps" else device
        width = sum(channels)
        self.pivot = self._zeros(width)
        self.totals = self._zeros(3, width)
        self.products = self._zeros(3, 3, width)
        self.counts = self._zeros(3, width)  # batches, elements, samples
        self.not_finite = self._zeros(width)  # by channel, the number of calls whose moments were not finite
        self.dropped = self._zeros(1)
        self._repeats = torch.tensor(channels, device=self.device)
        self._absent = [
            Call(number, torch.zeros(c, device=self.device), torch.zeros(c, device=self.device), 0, 0)
            for number, c in enumerate(channels)
        ]

    @property
    def elements(self) -> Tensor:
        """The number of elements of each channel, (F,)."""
        return self.counts[1]

    def add(self, calls: list[Call]) -> Tensor:
        """Add a batch: all calls made in its forward. If any moment is not finite, all of the batch is dropped.

        Does not synchronise with the device.

        Returns:
            A bool tensor of shape (): whether the batch was finite.
        """
        rounds = self._rounds(calls)
        finite_by_round = [torch.isfinite(mean + var) for mean, var, _, _ in rounds]
        finite = torch.stack([part.all() for part in finite_by_round]).all()
        dropped, keep = ~finite, finite.to(torch.float64)
        terms, elements, samples = torch.zeros_like(self.totals), *self._zeros(2, len(self.pivot))
        for (mean, var, n, n_samples), finite_here in zip(rounds, finite_by_round):
            self.not_finite += finite_here.logical_not()
            mean, var, n = mean.masked_fill(dropped, 0), var.masked_fill(dropped, 0), n * keep
            # The first mean of a channel is its pivot; later means differ little from it, relative to float64 rounding.
            self.pivot = torch.where(self.elements + elements == 0, mean, self.pivot)
            terms += self.estimator.terms(mean - self.pivot, var, n)
            elements += n
            samples += n_samples * keep
        self.totals += terms
        self.products.addcmul_(terms[:, None], terms)
        self.counts += torch.stack((elements > 0, elements, samples))
        self.dropped += 1 - keep
        return finite

    def _rounds(self, calls: list[Call]) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """(mean, var, n, samples), each (F,), of the first call of every layer, of the second, and so on."""
        rounds = [list(self._absent)]
        seen = [0] * len(self.channels)
        for call in calls:
            if seen[call.layer] == len(rounds):
                rounds.append(list(self._absent))
            rounds[seen[call.layer]][call.layer] = call
            seen[call.layer] += 1
        return [self._flat(row) for row in rounds]

    def _flat(self, row: list[Call]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, var = (self._side_by_side(parts) for parts in ([c.mean for c in row], [c.var for c in row]))
        # One small transfer, then repeated on the device.
        sizes = torch.tensor([(call.n, call.samples) for call in row], dtype=torch.float64, device="cpu")
        sizes = sizes.to(self.device, non_blocking=True)
        n, samples = (sizes[:, i].repeat_interleave(self._repeats, output_size=sum(self.channels)) for i in (0, 1))
        return mean, var, n, samples

    def _side_by_side(self, parts: list[Tensor]) -> Tensor:
        """The parts concatenated in float64; converted in one operation if they share device and dtype."""
        alike = len({(part.device, part.dtype) for part in parts}) == 1
        wide = torch.cat(parts if alike else [part.to(self.device, torch.float64) for part in parts])
        return wide.to(self.device, torch.float64)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def pack(self) -> Tensor:
        """All sums in one vector, to be exchanged between ranks."""
        parts = (self.pivot, self.totals, self.products, self.counts, self.not_finite, self.dropped)
        return torch.cat([part.reshape(-1) for part in parts])

    def merged(self, packs: Tensor) -> Accumulator:
        """The accumulator of all data, from the packs of all ranks, (ranks, ·), in order of rank."""
        ranks = [self._unpacked(pack) for pack in packs.to(self.device)]
        new = Accumulator(self.channels, self.estimator, self.device)
        weight = sum((rank.totals[0] for rank in ranks), torch.zeros_like(self.pivot))
        for rank in ranks:
            new.pivot += rank.pivot * torch.where(weight > 0, rank.totals[0] / nonzero(weight), 1 / len(ranks))
        for rank in ranks:
            move = self.estimator.move(new.pivot - rank.pivot)
            new.totals += torch.einsum("ijf,jf->if", move, rank.totals)
            new.products += torch.einsum("ijf,jkf,lkf->ilf", move, rank.products, move)
            new.counts += rank.counts
            new.not_finite += rank.not_finite
            new.dropped += rank.dropped
        return new

    def _unpacked(self, pack: Tensor) -> Accumulator:
        new = Accumulator(self.channels, self.estimator, self.device)
        f = sum(self.channels)
        new.pivot, totals, products, counts, new.not_finite, new.dropped = pack.split([f, 3 * f, 9 * f, 3 * f, f, 1])
        new.totals, new.products, new.counts = totals.view(3, f), products.view(3, 3, f), counts.view(3, f)
        return new

    def estimate(self) -> Estimate:
        """The statistics of everything added so far."""
        mean, var = self.estimator.moments(self.totals)
        batches = self.counts[0]
        # Bessel's correction for the number of batches.
        correction = torch.where(batches > 1, batches / (batches - 1).clamp_min(1), torch.nan)
        mean_error, var_error = (
            # aᵀ·G·a, for which einsum takes several times as long.
            (((self.products * a).sum(1) * a).sum(0).clamp_min(0) * correction).sqrt()
            for a in self.estimator.influence(self.totals)
        )
        return Estimate(self.pivot + mean, var, mean_error, var_error, *self.counts)

    def split(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Split a vector over all channels, or a stack of such vectors, by layer."""
        parts: tuple[Tensor, ...] = vector.split(self.channels, dim=-1)
        return parts


def _matrix(*rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return torch.stack([torch.stack(row) for row in rows])
