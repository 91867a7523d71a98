"""The contenders: a layer each, and what is done to the trained model.

Shapes: N batch, C channels, n elements per channel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runningbn import PreciseBatchNorm1d, PreciseBatchNorm2d, RunningBatchNorm, SquareRoot

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


def running_layer(cls: type[RunningBatchNorm] = RunningBatchNorm, **options: Any) -> Callable[[int], Norm]:
    """RunningBatchNorm, or what was tried in its place, with these options."""
    return _whatever_the_steps(lambda site: cls(site.models * site.channels, **options))


BATCH_NORM, RECALIBRATED, OURS = "BatchNorm", "BatchNorm, update_bn_stats", "running, Horizon()"

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(BATCH_NORM, _whatever_the_steps(_batch_norm), RECALIBRATED),
        Contender("GroupNorm", _whatever_the_steps(_group_norm)),
        Contender("Batch Renormalization", _batch_renorm),
        Contender("PreciseBatchNorm", _whatever_the_steps(_precise)),
        Contender(OURS, running_layer()),
        Contender("running, SquareRoot(0.1)", running_layer(momentum=SquareRoot(0.1))),
        Contender(
            "exact, SquareRoot(0.1)", running_layer(gradient="exact", momentum=SquareRoot(0.1)), twin="exact, 0.1"
        ),
    )
}
