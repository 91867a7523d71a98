"""What was tried on the way to the defaults of RunningBatchNorm, trained in the first cells of the grid only.

Shapes: C channels, n elements per channel.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from runningbn import Horizon, RunningBatchNorm, SquareRoot, functional, kernels
from runningbn.momentum import batch_weight, weighs_whole_batches
from runningbn.statistics import moments
from runningbn.update import absorb_running, trusted

from .contenders import CONTENDERS, Contender, running_layer


class ExperimentalRunningBatchNorm(RunningBatchNorm):
    """RunningBatchNorm with another backward, and with a limit to what it makes of a batch.

    - The backward sums weigh a batch by max(a, n/(n + prior)), a being its weight in the forward. The layer itself has
      a prior of 64; an infinite one leaves a, which makes plain running averages of the sums, as those of the forward.
    - `max_lag` limits the mean alone: it is at most max_lag·(n + 64)/n running std from that of the batch.
    - In training it normalises by max(var, variance of the batch / r_max²): no batch comes out with more than r_max
      times the std it should have, however stale the statistics are. Where that binds, the running sums stand for the
      dependence of the variance on the batch.
    """

    def __init__(self, channels: int, prior: float = 64, r_max: float = math.inf, **options: Any) -> None:
        super().__init__(channels, **options)
        self.prior, self.r_max = prior, r_max

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (N, C, *); in training, absorb it first."""
        if not self.training:
            return super().forward(input)
        with torch.no_grad():
            batch, centred = kernels.batch_sums(input, self.shift.dtype)
            scratch = None if centred is None else (batch.shift, centred)
            state, samples = self._state(), len(input)
            weight = batch_weight(self.momentum, samples, state.samples, state.steps)
            whole_batches = weighs_whole_batches(self.momentum)
            fixed = absorb_running(state, batch, weight, samples, whole_batches)
            batch_mean, batch_var = moments(batch)
            reach = self.max_lag / trusted(batch.count) * fixed.var.sqrt()
            mean = torch.clamp(fixed.mean, batch_mean - reach, batch_mean + reach)
            var = torch.maximum(fixed.var, batch_var / self.r_max**2)
            trust = torch.maximum(weight, batch.count / (batch.count + self.prior))
            fixed = fixed._replace(mean=mean, var=var, keep=1 - trust, gain=trust / batch.count)
        step = functional.Step(fixed, scratch)
        return functional.normalize_running(input, self.weight, self.bias, step, self.eps, self._gradient_state())


_plain_sums = partial(running_layer, ExperimentalRunningBatchNorm, prior=math.inf, max_lag=math.inf)
_exact = partial(running_layer, gradient="exact")

EXPERIMENTS = {
    contender.name: contender
    for contender in (
        Contender("exact, Horizon(fraction=0.05)", _exact(momentum=Horizon(fraction=0.05))),
        Contender("exact, 0.1", _exact(momentum=0.1)),
        Contender("plain sums, SquareRoot(0.1)", _plain_sums(momentum=SquareRoot(0.1)), twin="plain sums, 0.1"),
        Contender("plain sums, 0.1", _plain_sums(momentum=0.1)),
        Contender("plain sums, Horizon(fraction=0.05)", _plain_sums(momentum=Horizon(fraction=0.05))),
        Contender(
            "plain sums, Horizon(fraction=0.05), r_max 1.5", _plain_sums(r_max=1.5, momentum=Horizon(fraction=0.05))
        ),
        Contender("plain sums", _plain_sums()),
        Contender("no limit, Horizon(fraction=0.05)", running_layer(max_lag=math.inf, momentum=Horizon(fraction=0.05))),
        Contender("no limit", running_layer(max_lag=math.inf)),
        Contender("limit to the mean", running_layer(ExperimentalRunningBatchNorm)),
    )
}
ALL_LAYERS = CONTENDERS | EXPERIMENTS
