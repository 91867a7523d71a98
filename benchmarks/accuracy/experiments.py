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
from runningbn.update import LAG_ELEMENTS, PRIOR_ELEMENTS, absorb_running

from .contenders import CONTENDERS, Contender, running_layer


class ExperimentalRunningBatchNorm(RunningBatchNorm):
    """RunningBatchNorm with another backward, and with a limit to what it makes of a batch.

    - The backward sums weigh a batch by max(a, n/(n + prior)), a being its weight in the forward. The layer itself has
      a prior of 64, or without a limit to the lag an infinite one, which leaves a.
    - In training the mean is at most d = max_lag·(1 + lag_elements/n) std from that of the batch.
    - In training it normalises by max(var, variance of the batch / r²), r being r_max or, where that is None, 1 + d as
      in the layer itself: no batch comes out with more than r times the std it should have, however stale the
      statistics are. Where that binds, the running sums stand for the dependence of the variance on the batch.
    """

    def __init__(
        self, channels: int, prior: float = PRIOR_ELEMENTS, lag_elements: float = LAG_ELEMENTS,
        r_max: float | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(channels, **options)
        self.prior, self.lag_elements, self.r_max = prior, lag_elements, r_max

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
            lag = self.max_lag * (1 + self.lag_elements / batch.count)
            r = 1 + lag if self.r_max is None else torch.full_like(lag, self.r_max)
            var = torch.maximum(fixed.var, batch_var / r.square())
            reach = lag * var.sqrt()
            mean = torch.clamp(fixed.mean, batch_mean - reach, batch_mean + reach)
            trust = torch.maximum(weight, batch.count / (batch.count + self.prior))
            fixed = fixed._replace(mean=mean, var=var, keep=1 - trust, gain=trust / batch.count)
        step = functional.Step(fixed, scratch)
        return functional.normalize_running(input, self.weight, self.bias, step, self.eps, self._gradient_state())


PLAIN_SUMS = "plain sums"
_plain_sums = partial(running_layer, max_lag=math.inf)
_trusting = partial(running_layer, ExperimentalRunningBatchNorm)
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
            "plain sums, Horizon(fraction=0.05), r_max 1.5",
            _trusting(prior=math.inf, max_lag=math.inf, r_max=1.5, momentum=Horizon(fraction=0.05)),
        ),
        Contender(PLAIN_SUMS, _plain_sums()),
        Contender("no limit, Horizon(fraction=0.05)", _trusting(max_lag=math.inf, momentum=Horizon(fraction=0.05))),
        Contender("no limit", _trusting(max_lag=math.inf)),
        Contender("limit to the mean", _trusting(max_lag=0.25, lag_elements=64, r_max=math.inf)),
        Contender("limit of 0.25·(1 + 64/n)", _trusting(max_lag=0.25, lag_elements=64)),
    )
}
ALL_LAYERS = CONTENDERS | EXPERIMENTS
