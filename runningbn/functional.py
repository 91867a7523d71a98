"""One training step, forward and backward: sweep the batch, absorb its sums, normalise by the outcome.

Where a backend fuses all that, a step is one call of it forward and one backward. Otherwise, as in compiled code and
where ranks have to be asked in between, it is put together from sweeps and updates.

Shapes: N batch, C channels, any trailing dimensions; n = elements per channel. Per-channel vectors are (C,) in the
dtype of the statistics (float32 or float64).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import kernels
from .autograd import Fused, NormalizeExact, NormalizeRunning
from .distributed import RankGroup, pool
from .law import Law
from .masks import blank, fill, real_sums
from .momentum import Momentum, batch_weight, weighs_whole_batches
from .statistics import GradientState, NoiseState, State, Sums, TrainingState, moments, without_empty
from .update import Coefficients, RunningCoefficients, absorb_exact, absorb_precise, absorb_running


def running(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    state: State, training: TrainingState | None, momentum: Momentum, ranks: RankGroup | None,
    mask: Tensor | None, law: Law,
) -> Tensor:  # fmt: skip
    """Absorb a batch and normalise by the running statistics, this batch included. See `update.absorb_running`.

    With `training`, the sums in backward are running averages, too: see `normalize_running`. With a `mask`, only the
    elements count that it says are real: see `masks`.
    """
    noise, gradient = (None, None) if training is None else training
    if (
        ranks is None
        and mask is None
        and (prepared := kernels.fused(x, weight, bias, (*state, *(noise or ())), momentum)) is not None
    ):
        y: Tensor = Fused.apply(x, weight, bias, eps, *prepared, gradient, momentum, True, law)
        return y
    if noise is None or gradient is None:
        return normalize(x, weight, bias, _step(absorb_exact, x, state, momentum, ranks, mask, law), eps)
    step = _step(partial(_absorb_running, noise), x, state, momentum, ranks, mask, law)
    return normalize_running(x, weight, bias, step, eps, gradient)


def _absorb_running(noise: NoiseState, state: State, *others: Any) -> RunningCoefficients:
    return absorb_running(state, noise, *others)


def precise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    state: State, momentum: Momentum, ranks: RankGroup | None, mask: Tensor | None, law: Law,
) -> Tensor:  # fmt: skip
    """Absorb a batch and normalise by its own statistics, as ``nn.BatchNorm`` does. See `update.absorb_precise`."""
    if ranks is None and mask is None and (prepared := kernels.fused(x, weight, bias, state, momentum)) is not None:
        y: Tensor = Fused.apply(x, weight, bias, eps, *prepared, None, momentum, False, law)
        return y
    return normalize(x, weight, bias, _step(absorb_precise, x, state, momentum, ranks, mask, law), eps)


class Step(NamedTuple):
    """A forward whose statistics are done.

    Attributes:
        fixed: `Coefficients` or `RunningCoefficients`: what to normalise by, and what the backward needs.
        scratch: (p, x − p) as the statistics left it, for the output to be made in, once; None where there is none.
        ranks: the ranks that the batch was pooled over, and its gradients have to be; None where it was not.
        n: elements per channel of a batch that was pooled or masked.
        witness: see `distributed.all_gather`.
        mask: which positions count, see `masks`; None for all.
    """

    fixed: Any
    scratch: tuple[Tensor, Tensor] | None = None
    ranks: RankGroup | None = None
    n: Tensor | None = None
    witness: Tensor | None = None
    mask: Tensor | None = None


@torch.no_grad()
def _step(
    absorb: Callable[[State, Sums, Tensor, int | Tensor, bool, Law], Coefficients | RunningCoefficients],
    x: Tensor, state: State, momentum: Momentum, ranks: RankGroup | None, mask: Tensor | None, law: Law,
) -> Step:  # fmt: skip
    batch, samples, scratch = _batch_sums(x, state.shift.dtype, ranks, mask, state.last_keep)
    weight = batch_weight(momentum, samples, state.samples, state.steps)
    fixed = absorb(state, batch, weight, samples, weighs_whole_batches(momentum), law)
    if ranks is None and mask is None:
        return Step(fixed, scratch)
    return Step(_with_pooled_kappa(fixed, batch), scratch, ranks, batch.count, state.last_keep, mask)


@torch.no_grad()
def batch_step(x: Tensor, dtype: torch.dtype, ranks: RankGroup | None, mask: Tensor | None) -> Step:
    """Normalise by the statistics of the batch over all ranks, in `dtype`, and keep none."""
    batch, _, scratch = _batch_sums(x, dtype, ranks, mask, None)
    fixed = _with_pooled_kappa(Coefficients(*moments(batch)), batch)
    return Step(fixed, scratch, ranks, batch.count, None, mask)


def _batch_sums(
    x: Tensor, dtype: torch.dtype, ranks: RankGroup | None, mask: Tensor | None, witness: Tensor | None
) -> tuple[Sums, int | Tensor, tuple[Tensor, Tensor] | None]:
    """Sums of the batch, pooled over the ranks where there are any, its samples, and the scratch of a `Step`."""
    samples: int | Tensor = len(x) if x.numel() > 0 else 0
    if mask is not None:
        (batch, samples), scratch = real_sums(x, mask, dtype), None
    else:
        batch, scratch = _sums_and_scratch(x, dtype)
    if ranks is not None:
        batch, samples = pool(batch, samples, ranks, witness)
    elif mask is not None:
        batch = without_empty(batch)
    return batch, samples, scratch


def _sums_and_scratch(x: Tensor, dtype: torch.dtype) -> tuple[Sums, tuple[Tensor, Tensor] | None]:
    """Sums of this rank's batch, which with other ranks to pool with may be empty; and the scratch of a `Step`."""
    if x.numel() == 0:
        return Sums(*torch.zeros((4, x.shape[1]), dtype=dtype, device=x.device).unbind()), None
    batch, centred = kernels.batch_sums(x, dtype)
    # About the pivot of this rank, which pooling leaves behind.
    return batch, None if centred is None else (batch.shift, centred)


def _with_pooled_kappa(fixed: Any, batch: Sums) -> Any:
    """κ = 1/n of a pooled or masked batch where x is normalised by its own statistics, which x does not tell."""
    if isinstance(fixed, RunningCoefficients) or fixed.kappa_mean is not None:
        return fixed
    kappa = batch.count.reciprocal()
    # A copy, as torch.compile takes no tensor twice.
    return fixed._replace(kappa_mean=kappa, kappa_var=kappa.clone())


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, step: Step, eps: float) -> Tensor:
    """y = (x − mean)·rstd·weight + bias with the exact gradient through the statistics; rstd = (var + eps)^−½.

    With dy = dL/dy and z = (x − mean)·rstd, per channel

        dbias = Σdy    dweight = Σdy·z    dx = weight·rstd·[dy − κ·(Σdy + z·Σdy·z)]

    κ = gain/count; κ = 1/n is BatchNorm. The z term drops where the variance is held at its floor. Keeps x and C-sized
    vectors for backward. Differentiable twice, but for a pooled batch, whose second derivative raises RuntimeError.

    In a batch pooled over ranks the sums in dx run over all of them: it is the gradient of the ranks' total loss.
    dweight and dbias are those of this rank.
    """
    fixed, mask = step.fixed, step.mask
    y: Tensor = NormalizeExact.apply(
        x if mask is None else fill(x, mask, fixed.mean), weight, bias, eps, step.scratch, step.ranks,
        fixed.mean, fixed.var, fixed.kappa_mean, fixed.kappa_var, step.witness,
    )  # fmt: skip
    return y if mask is None else blank(y, mask)


def normalize_running(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, step: Step, eps: float, gradient: GradientState
) -> Tensor:
    """y as in `normalize`; in backward the two sums are running averages too.

        dbias = Σdy    dweight = Σdy·z    dx = weight·rstd·[dy − s·(G0 + z·G1)]

    with G0, G1 the running means of dy and dy·z, this batch included, that `update.absorb_gradient` keeps in
    `gradient`, and s ≤ 1 of `law.bounded`; those of a pooled batch are over all ranks, but for dweight and dbias. Not
    the derivative of a function: a second derivative raises RuntimeError.

    The nearest published relative is MABN: Yan et al., "Towards Stabilizing Batch Statistics in Backward Propagation
    of Batch Normalization", ICLR 2020.
    """
    fixed, mask = step.fixed, step.mask
    y: Tensor = NormalizeRunning.apply(
        x if mask is None else fill(x, mask, fixed.mean), weight, bias, eps, step.scratch, step.ranks, step.n,
        *fixed, *gradient,
    )  # fmt: skip
    return y if mask is None else blank(y, mask)
