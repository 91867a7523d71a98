"""How much a new batch weighs: the rules behind the `momentum` argument of every layer.

As in ``nn.BatchNorm``, momentum is the weight a of the new batch (not of the past, as in optimizers)::

    state = (1 - a) * state + g * batch

A float is a constant a, ``None`` the cumulative average a = 1/t, and a rule computes a from the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Union

import torch
from torch import Tensor


@dataclass(frozen=True)
class Horizon:
    """The past decays per sample, over a horizon that grows while training settles.

    a = 1 − exp(−N/h) with h = clamp(fraction · samples seen so far, start, samples), N samples in the batch.

    32 batches of 1 forget as much as 1 batch of 32, and each batch weighs exactly a, whatever its size. Early in
    training the weights move fast and the horizon is short; it is `samples` long from samples/fraction samples on, and
    at once for statistics taken over from elsewhere.

    Args:
        samples: longest horizon h, in samples.
        start: shortest horizon, in samples; 0 < start ≤ samples.
        fraction: horizon as a fraction of the samples seen; > 0.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> Horizon()
        Horizon(samples=128, start=8, fraction=0.1)
        >>> Horizon().weight(32, samples=torch.tensor([10_000.0]), steps=torch.tensor([0.0]))
        tensor([0.2212])
    """

    samples: float = 128
    start: float = 8
    fraction: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.start <= self.samples < math.inf:
            raise ValueError(
                f"Horizon: expected 0 < start <= samples < inf, got start={self.start}, samples={self.samples}"
            )
        if not 0 < self.fraction < math.inf:
            raise ValueError(f"Horizon: expected 0 < fraction < inf, got fraction={self.fraction}")

    def weight(self, batch: int | Tensor, samples: Tensor, steps: Tensor) -> Tensor:
        """a, (C,), of a batch of `batch` samples after `samples` samples, (C,); `steps` is not used."""
        horizon = (self.fraction * samples).clamp(self.start, self.samples)
        return -torch.expm1(-batch / horizon)


@dataclass(frozen=True)
class SquareRoot:
    """The rule of fastai's RunningBatchNorm: a = 1 − (1 − momentum)/√(N − 1), N samples in the batch.

    At N ≤ 2, a = momentum (the original divides by zero at N = 1). At N = 32 it is already 0.84: nearly BatchNorm.

    Args:
        momentum: weight of a batch of 2, in [0, 1].

    Raises:
        ValueError: if momentum is outside [0, 1].

    Source: fastai course 2019, part 2, lesson 10, notebook ``07_batchnorm``.

    Example:
        >>> SquareRoot(0.1).weight(5, samples=torch.zeros(1), steps=torch.zeros(1))
        tensor([0.5500])
    """

    momentum: float = 0.1

    def __post_init__(self) -> None:
        _check_unit_interval(self.momentum, "SquareRoot: expected momentum in [0, 1]")

    def weight(self, batch: int | Tensor, samples: Tensor, steps: Tensor) -> Tensor:
        """a, (C,), of a batch of `batch` samples; `samples` and `steps` lend only their shape."""
        # Tensor arithmetic, not math.sqrt: a batch size that torch.compile traces as a symbol must not be branched on.
        others = (torch.zeros_like(samples) + (batch - 1)).clamp(min=1)
        return 1 - (1 - self.momentum) * others.rsqrt()


Rule = Union[Horizon, SquareRoot]
Momentum = Union[float, None, Rule]
CONSTANT, CUMULATIVE, HORIZON, SQUARE_ROOT = range(4)  # in the kernels, too


def check_momentum(momentum: Momentum) -> None:
    """Accept a rule, ``None`` or a float in [0, 1].

    Raises:
        TypeError: for anything else.
        ValueError: for a float outside [0, 1].
    """
    if momentum is None or isinstance(momentum, (Horizon, SquareRoot)):
        return
    if isinstance(momentum, bool) or not isinstance(momentum, (float, int)):
        raise TypeError(f"momentum: expected a float, None, Horizon or SquareRoot, got {momentum!r}")
    _check_unit_interval(momentum, "momentum: expected a weight in [0, 1]")


def batch_weight(momentum: Momentum, batch: int | Tensor, samples: Tensor, steps: Tensor) -> Tensor:
    """The weight a of a new batch under any kind of momentum, (C,).

    Args:
        momentum: a float (a constant), None (a = 1/t) or a rule.
        batch: N, samples in the batch.
        samples: (C,), samples seen before it.
        steps: (C,), batches absorbed before it.
    """
    if momentum is None:
        return 1 / (steps + 1)
    if isinstance(momentum, (Horizon, SquareRoot)):
        return momentum.weight(batch, samples, steps)
    return torch.full_like(samples, momentum)


def weighs_whole_batches(momentum: Momentum) -> bool:
    """Whether each batch weighs a as a whole, rather than every element in it alike."""
    return isinstance(momentum, Horizon)


def has_code(momentum: Momentum) -> bool:
    """Whether `encoded` can say it: a rule that somebody has derived from one of ours may mean something else."""
    return type(momentum) in (float, int, type(None), Horizon, SquareRoot)


def encoded(momentum: Momentum) -> tuple[int, float, float, float]:
    """A momentum as kernels take it: which rule, and up to three arguments of it.

    Padded by ones: their bits are as wide an integer as those of other arguments, which Triton compiles for.
    """
    if momentum is None:
        return CUMULATIVE, 1.0, 1.0, 1.0
    if isinstance(momentum, Horizon):
        return HORIZON, float(momentum.samples), float(momentum.start), float(momentum.fraction)
    if isinstance(momentum, SquareRoot):
        return SQUARE_ROOT, float(momentum.momentum), 1.0, 1.0
    return CONSTANT, float(momentum), 1.0, 1.0


def _check_unit_interval(value: float, message: str) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{message}, got {value}")
