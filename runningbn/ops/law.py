"""The constants of an update with ``gradient="running"``: how much a batch counts, and how far statistics may lag.

Shapes: C channels; every tensor is (C,) in the dtype of the statistics (float32 or float64). n is the number of
elements per channel of the batch, v the running variance, b and v_b the mean and the variance of the batch.

The elements of one image, or of images of one class, are not independent. What a batch is worth is measured::

    R = mean over past batches of ½·(b − b of the batch before)²/max(v, v_b)        1/R: effective number of elements

R = 1/n for independent elements, and a slow drift of the mean cancels in the difference. It is kept per sample: N·R is
averaged, N being the samples of each batch, and R of a batch is that over its N. So it follows a batch size that
changes. Three things are settled here:

- Forward: by what a batch is normalised, its mean comes out within d and its std at most 1 + d; see `limited`.
- Backward: the weight ρ of a batch in the running means of dy and dy·z; see `trust`.
- Whatever these means are, their part in dx is no longer than that of the batch itself would be; see `bounded`.

The kernels take the constants as arguments, in the order of `Law`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .state import NoiseState, nonzero

# Settled by benchmarks/accuracy, see docs/accuracy.md.
MAX_LAG = float("inf")


class Law(NamedTuple):
    """The constants, and `max_lag`, which is the user's.

    Attributes:
        max_lag: how far statistics may lag behind a batch that has no noise, in std; infinite for no limit.
        lag_noise: d = max_lag·(1 + lag_noise·R).
        trust_noise: ρ = 1/(1 + trust_noise·R), or the weight a of the batch in the forward if that is more.
        window: R is the mean over so many batches, then an exponential average as long.
        variance_floor: the least variance used while fewer samples than the next have been seen.
        warmup_samples: see `variance_floor`; both are fastai's.
    """

    max_lag: float = MAX_LAG
    lag_noise: float = 512.0
    trust_noise: float = 64.0
    window: float = 100.0
    variance_floor: float = 0.01
    warmup_samples: float = 20.0

    @property
    def limits(self) -> bool:
        """Whether there is a limit to the lag."""
        return self.max_lag < float("inf")


def measured_noise(
    state: NoiseState, batch_mean: Tensor, variance: Tensor, samples: int | Tensor, window: float
) -> NoiseState:
    """N·R after one more batch of N samples; `variance` is max(v, v_b).

    The first batch has none to be compared with and counts as R = 1, a single effective element, which fades like any
    other observation.
    """
    difference = batch_mean - state.last_mean
    observed = (0.5 * difference * difference / nonzero(variance)).clamp_max(1)
    observed = torch.where(state.noise_steps == 0, 1, observed) * samples
    steps = state.noise_steps + 1
    return NoiseState(state.noise + (observed - state.noise) / steps.clamp_max(window), steps, batch_mean)


def noise_of_batch(noise: Tensor, samples: int | Tensor) -> Tensor:
    """R of a batch of N samples, in [0, 1], from N·R as it is kept."""
    return (noise / samples).clamp_max(1)


def limited(
    mean: Tensor, var: Tensor, batch_mean: Tensor, batch_var: Tensor, noise: Tensor, law: Law
) -> tuple[Tensor, Tensor]:
    """The nearest mean, and the nearest var from above, by which a batch comes out with |mean| ≤ d and std ≤ 1 + d.

    d = max_lag·(1 + lag_noise·R). A step of the optimizer can move the means of all channels at once by more than their
    std, and weights that have begun to diverge multiply the variance, before running averages know of it. There, and
    no farther, the batch knows better.
    """
    d = law.max_lag * (1 + law.lag_noise * noise)
    var = torch.maximum(var, batch_var / (1 + d).square())
    reach = d * var.sqrt()
    return torch.clamp(mean, batch_mean - reach, batch_mean + reach), var


def trust(weight: Tensor, noise: Tensor, law: Law) -> Tensor:
    """ρ = max(a, 1/(1 + trust_noise·R)): with n_eff = 1/R effective elements, n_eff/(n_eff + trust_noise)."""
    return torch.maximum(weight, 1 / (1 + law.trust_noise * noise))


def bounded(
    means: tuple[Tensor, Tensor], batch_means: tuple[Tensor, Tensor], offset: Tensor, spread: Tensor
) -> tuple[Tensor, Tensor]:
    """s·G0 and s·G1, s = min(1, ‖B0 + z·B1‖/‖G0 + z·G1‖), where B0 + z·B1 is the projection of dy on 1 and z.

    So ‖dy − s·(G0 + z·G1)‖ ≤ 2·‖dy‖, whatever the running means G and the statistics in z are: no stack of layers
    amplifies a gradient by what these remember. Both norms follow from sums that are there anyway: with ζ = offset and
    σ = spread, the mean and the std of z over the batch,

        ‖G0 + z·G1‖²/n = (G0 + ζ·G1)² + (σ·G1)²,    ‖B0 + z·B1‖²/n = p0² + ((p1 − ζ·p0)/σ)²

    Args:
        means: G0 and G1.
        batch_means: p0 and p1, the means of dy and dy·z over the batch.
        offset, spread: ζ and σ.
    """
    (g0, g1), (p0, p1) = means, batch_means
    # Where z hardly varies beside its mean, rounding has left nothing of the second term; leaving it out is safe.
    varies = spread > torch.finfo(spread.dtype).eps ** 0.5 * offset.abs()
    along = torch.where(varies, (p1 - offset * p0) / nonzero(spread), 0)
    of_batch = torch.hypot(p0, along)
    of_memory = torch.hypot(g0 + offset * g1, spread * g1)
    scale = torch.where(of_memory <= of_batch, 1, of_batch / nonzero(of_memory))
    # A batch that is not finite is no reason to subtract anything.
    scale = torch.where(torch.isfinite(of_batch), scale, 0)
    return scale * g0, scale * g1
