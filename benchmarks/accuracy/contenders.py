"""The contenders: a layer each, and what is done to the trained model.

Shapes: N batch, C channels, n elements per channel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runningbn import Horizon, PreciseBatchNorm1d, PreciseBatchNorm2d, RunningBatchNorm, SquareRoot, functional, kernels
from runningbn.momentum import batch_weight, weighs_whole_batches
from runningbn.statistics import Sums, moments
from runningbn.update import Coefficients, absorb_running

from .networks import Norm, Site


class BatchRenorm(nn.Module):
    """Batch Renormalization, from the paper.

    In training, with mean μ_B and σ_B = √(eps + biased variance) of the batch and the moving μ and σ before it,

        y = (x − μ_B)/σ_B · r + d,    r = clip(σ_B/σ, 1/r_max, r_max),    d = clip((μ_B − μ)/σ, −d_max, d_max)
        μ ← μ + a·(μ_B − μ),    σ ← σ + a·(σ_B − σ)

    with r and d constants to autograd; then the affine map. Evaluation is y = (x − μ)/σ. r_max = 1 and d_max = 0 is
    BatchNorm. In the paper a = 0.01 and training takes some 130 000 steps. For 5000 of them r_max is 1 and d_max 0;
    then r_max grows to 3 at step 40 000, and d_max to 5 at step 25 000. Here these are the same fractions of the run,
    and a is 0.01 or, where the run is short, 20/steps, at most torch's 0.1.

    Source: Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models", 2017.
    """

    PAPER_STEPS = 130_000

    def __init__(self, channels: int, steps: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.steps, self.eps = steps, eps
        self.momentum = min(max(0.01, 20 / steps), 0.1)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.step = 0

    def limits(self) -> tuple[float, float]:
        """r_max and d_max of the step to come."""
        step = self.step / self.steps * self.PAPER_STEPS

        def ramp(start: float, end: float, last: float) -> float:
            return start + (end - start) * min(max((step - 5000) / (last - 5000), 0), 1)

        return ramp(1, 3, 40_000), ramp(0, 5, 25_000)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *) in and out."""
        mean, std = self.mean, self.std
        if self.training:
            dims = [d for d in range(x.dim()) if d != 1]
            var, mean = torch.var_mean(x, dims, correction=0)
            std = (var + self.eps).sqrt()
            r, d = self.corrections(mean.detach(), std.detach())
            self.mean.lerp_(mean.detach(), self.momentum)
            self.std.lerp_(std.detach(), self.momentum)
            self.step += 1
            return _affine(x, mean, std, self.weight * r, self.weight * d + self.bias)
        return _affine(x, mean, std, self.weight, self.bias)

    def corrections(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """r and d of a batch."""
        r_max, d_max = self.limits()
        return (std / self.std).clamp(1 / r_max, r_max), ((mean - self.mean) / self.std).clamp(-d_max, d_max)


def _affine(x: Tensor, mean: Tensor, std: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean, std, weight, bias = (t.view(-1, *[1] * (x.dim() - 2)) for t in (mean, std, weight, bias))
    return (x - mean) / std * weight + bias


class _Experiment(RunningBatchNorm):
    """RunningBatchNorm whose training step is changed between its statistics and its normalisation, by `changed`."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (N, C, *); in training, absorb it first."""
        if not self.training:
            return super().forward(input)
        with torch.no_grad():
            batch, centred = kernels.batch_sums(input, self.shift.dtype)
            scratch = None if centred is None else (batch.shift, centred)
            state, samples = self._state(), len(input)
            weight = batch_weight(self.momentum, samples, state.samples, state.steps)
            fixed = absorb_running(state, batch, weight, samples, weighs_whole_batches(self.momentum))
            step = functional.Step(self.changed(fixed, batch), scratch)
        return functional.normalize_running(input, self.weight, self.bias, step, self.eps, self._gradient_state())

    def changed(self, fixed: Coefficients, batch: Sums) -> Coefficients:
        """What to go on with instead of `fixed`."""
        raise NotImplementedError


class LimitedRunningBatchNorm(_Experiment):
    """RunningBatchNorm that in training normalises by max(var, variance of the batch / r_max²).

    No batch comes out with more than r_max times the std it should have, however stale the statistics are. The state,
    and with it evaluation, is that of RunningBatchNorm. So is the gradient, with z of this forward: where the limit
    binds, the running sums stand for the dependence of the variance on the batch.
    """

    def __init__(self, channels: int, r_max: float = 1.5, **options: Any) -> None:
        super().__init__(channels, **options)
        self.r_max = r_max

    def changed(self, fixed: Coefficients, batch: Sums) -> Coefficients:
        """With the variance that is not too small for this batch."""
        return fixed._replace(var=torch.maximum(fixed.var, moments(batch)[1] / self.r_max**2))


class ShrinkingRunningBatchNorm(_Experiment):
    """RunningBatchNorm whose backward sums trust a batch of n elements per channel by n/(n + prior), if that is more.

    The forward is unchanged. In backward, G0 = ρ·(mean dy of the batch) + (1 − ρ)·G0 of before, G1 likewise, with
    ρ = max(a, n/(n + prior)). ρ = 1 would be the projection of BatchNorm: the gradient has no part along a change of
    the mean or the std of this batch. ρ = a is RunningBatchNorm's.
    """

    def __init__(self, channels: int, prior: float, **options: Any) -> None:
        super().__init__(channels, **options)
        self.prior = prior

    def changed(self, fixed: Coefficients, batch: Sums) -> Coefficients:
        """With the weights that the backward pass is to have."""
        trust = torch.maximum(1 - fixed.keep, batch.count / (batch.count + self.prior))
        return fixed._replace(keep=1 - trust, gain=trust)


TWIN_BATCH = 2  # up to here the weight of SquareRoot(0.1) is 0.1


@dataclass(frozen=True)
class Contender:
    """A way to normalise. `norm` makes the layer for a run of so many steps.

    `recalibrated` names a second contender: the same trained model after `update_bn_stats`. `twin` names one that is
    the same layer on batches of up to `TWIN_BATCH`, where it need not be trained again.
    """

    name: str
    norm: Callable[[int], Norm]
    recalibrated: str | None = None
    twin: str | None = None

    def names(self, batch: int) -> tuple[str, ...]:
        """Under what the results of a run with such batches go."""
        twin = self.twin if batch <= TWIN_BATCH else None
        return tuple(name for name in (self.name, self.recalibrated, twin) if name is not None)


def _whatever_the_steps(norm: Norm) -> Callable[[int], Norm]:
    return lambda steps: norm


def _batch_norm(site: Site) -> nn.Module:
    return {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}[site.dimensions](site.models * site.channels)


def _group_norm(site: Site) -> nn.Module:
    """Four channels to a group, but eight groups at most."""
    return nn.GroupNorm(site.models * min(8, site.channels // 4), site.models * site.channels)


def _batch_renorm(steps: int) -> Norm:
    return lambda site: BatchRenorm(site.models * site.channels, steps)


def _precise(site: Site) -> nn.Module:
    return {1: PreciseBatchNorm1d, 2: PreciseBatchNorm2d}[site.dimensions](site.models * site.channels)


def _running(**options: Any) -> Callable[[int], Norm]:
    return _whatever_the_steps(lambda site: RunningBatchNorm(site.models * site.channels, **options))


def _limited(**options: Any) -> Callable[[int], Norm]:
    return _whatever_the_steps(lambda site: LimitedRunningBatchNorm(site.models * site.channels, **options))


def _shrinking(**options: Any) -> Callable[[int], Norm]:
    return _whatever_the_steps(lambda site: ShrinkingRunningBatchNorm(site.models * site.channels, **options))


BATCH_NORM, RECALIBRATED, OURS = "BatchNorm", "BatchNorm, update_bn_stats", "running, Horizon()"

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(BATCH_NORM, _whatever_the_steps(_batch_norm), RECALIBRATED),
        Contender("GroupNorm", _whatever_the_steps(_group_norm)),
        Contender("Batch Renormalization", _batch_renorm),
        Contender("PreciseBatchNorm", _whatever_the_steps(_precise)),
        Contender(OURS, _running()),
        Contender("running, Horizon(fraction=0.1)", _running(momentum=Horizon(fraction=0.1))),
        Contender("running, SquareRoot(0.1)", _running(momentum=SquareRoot(0.1)), twin="running, 0.1"),
        Contender("running, 0.1", _running(momentum=0.1)),
        Contender("exact, Horizon()", _running(gradient="exact", momentum=Horizon())),
        Contender("exact, SquareRoot(0.1)", _running(gradient="exact", momentum=SquareRoot(0.1)), twin="exact, 0.1"),
        Contender("exact, 0.1", _running(gradient="exact", momentum=0.1)),
        Contender("running, Horizon(), r_max 1.5", _limited(r_max=1.5)),
        Contender("running, Horizon(), prior 64", _shrinking(prior=64)),
    )
}
