"""The contenders: for each its layer, and what is done to the trained model.

Shapes: N batch, C channels, n elements per channel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from runningbn import PreciseBatchNorm1d, PreciseBatchNorm2d, RunningBatchNorm, SquareRoot

from .conversions import as_it_is, freeze, to_running, to_running_centred
from .networks import Norm, Site, with_relu
from .rivals import center_weights_of, evonorm, frn, mabn, online_norm, standardize_weights


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


@dataclass(frozen=True)
class Contender:
    """A way to normalise. `norm` makes the layer for a run of so many steps.

    `recalibrated` names a second contender: the same trained model after `update_bn_stats`.

    `prepare` changes a stack of these layers before it is trained. `convert` makes a pretrained stack of
    nn.BatchNorm2d one of this contender, in place; where it is None, that cannot be. With `recalibrated_first` the
    pretrained stack is given the statistics of the new data before. `warmup` is the part of the steps in which the rate
    rises. `statistics` says that the training mode has statistics of batches, so that evaluation can differ from it.
    """

    name: str
    norm: Callable[[int], Norm]
    recalibrated: str | None = None
    prepare: Callable[[nn.Module], None] | None = None
    convert: Callable[[nn.Module], None] | None = None
    recalibrated_first: bool = False
    warmup: float = 0.0
    statistics: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Under what the results of a run go."""
        return (self.name,) if self.recalibrated is None else (self.name, self.recalibrated)


def _layer(make: Callable[[Site], nn.Module]) -> Callable[[int], Norm]:
    """A layer that does not depend on the number of steps, with a ReLU after it where the site is activated."""
    return lambda steps: lambda site: with_relu(make(site), site)


def _batch_norm(site: Site) -> nn.Module:
    return {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}[site.dimensions](site.models * site.channels)


def _group_norm(site: Site) -> nn.Module:
    """Four channels to a group, but eight groups at most."""
    return nn.GroupNorm(site.models * min(8, site.channels // 4), site.models * site.channels)


def _batch_renorm(steps: int) -> Norm:
    return lambda site: with_relu(BatchRenorm(site.models * site.channels, steps), site)


def _precise(site: Site) -> nn.Module:
    return {1: PreciseBatchNorm1d, 2: PreciseBatchNorm2d}[site.dimensions](site.models * site.channels)


def running_layer(cls: type[RunningBatchNorm] = RunningBatchNorm, **options: Any) -> Callable[[int], Norm]:
    """RunningBatchNorm, or what was tried in its place, with these options."""
    return _layer(lambda site: cls(site.models * site.channels, **options))


BATCH_NORM, RECALIBRATED = "BatchNorm", "BatchNorm, update_bn_stats"
OURS, OURS_CENTERED = "running, Horizon()", "running, centred weights"

_BATCH_NORM = Contender(BATCH_NORM, _layer(_batch_norm), RECALIBRATED, convert=as_it_is, statistics=True)
_OURS = Contender(OURS, running_layer(), convert=to_running(), statistics=True)
_OURS_CENTERED = replace(
    _OURS, name=OURS_CENTERED, prepare=partial(center_weights_of, depthwise=False), convert=to_running_centred
)
_EXACT: dict[str, Any] = {"gradient": "exact", "momentum": SquareRoot(0.1)}

CONTENDERS = {
    contender.name: contender
    for contender in (
        _BATCH_NORM,
        Contender("GroupNorm", _layer(_group_norm)),
        Contender("Batch Renormalization", _batch_renorm, statistics=True),
        Contender("PreciseBatchNorm", _layer(_precise), statistics=True),
        _OURS,
        _OURS_CENTERED,
        Contender(
            "exact, SquareRoot(0.1)", running_layer(**_EXACT), convert=to_running(**_EXACT),
            statistics=True,
        ),
    )
}  # fmt: skip


def _after(weights: str, prepare: Callable[[nn.Module], None]) -> Contender:
    """nn.BatchNorm after convolutions whose weights are transformed."""
    name = f"{BATCH_NORM}, {weights} weights"
    return Contender(name, _layer(_batch_norm), f"{name}, update_bn_stats", prepare=prepare, statistics=True)


# On real images, from scratch.
REAL_CONTENDERS = {
    contender.name: contender
    for contender in (
        _OURS,
        _OURS_CENTERED,
        _BATCH_NORM,
        Contender("MABN", mabn, prepare=center_weights_of, statistics=True),
        Contender("GroupNorm, standardised weights", _layer(_group_norm), prepare=standardize_weights),
        _after("standardised", standardize_weights),
        _after("centred", center_weights_of),
        CONTENDERS["exact, SquareRoot(0.1)"],
        CONTENDERS["GroupNorm"],
        CONTENDERS["Batch Renormalization"],
        Contender("FRN + TLU", frn, warmup=0.05),
        Contender("EvoNorm-S0", evonorm),
        Contender("Online Normalization", online_norm, statistics=True),
    )
}

# Where there are depthwise convolutions.
DEPTHWISE = {
    contender.name: contender
    for contender in (
        *REAL_CONTENDERS.values(),
        replace(_OURS_CENTERED, name=f"{OURS_CENTERED}, depthwise too", prepare=center_weights_of, convert=None),
    )
}

# Where a pretrained net is trained on: those that can take it over, and what makes sense there only.
_FROZEN = Contender(f"{BATCH_NORM}, frozen", _layer(_batch_norm), convert=freeze)
_FIRST = [
    replace(contender, name=f"recalibrated first, {contender.name}", recalibrated=None, recalibrated_first=True)
    for contender in (_BATCH_NORM, _FROZEN, _OURS, _OURS_CENTERED)
]
FINE_TUNED = {
    contender.name: contender
    for contender in (*REAL_CONTENDERS.values(), _FROZEN, *_FIRST)
    if contender.convert is not None
}  # fmt: skip
