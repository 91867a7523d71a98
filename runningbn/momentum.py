"""How much a new batch weighs: the rules behind the `momentum` argument of every layer.

As in ``nn.BatchNorm``, momentum is the weight a of the new batch (not of the past, as in optimizers)::

    state = (1 - a) * state + g * batch

A float is a constant a, ``None`` the cumulative average a = 1/t, and a rule computes a from the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Union

import torch
from torch import Tensor

# The codes of the rules in the kernels; `GIVEN` stands for a weight per channel, which the caller has computed.
RULES = ("CONSTANT", "CUMULATIVE", "HORIZON", "SQUARE_ROOT", "GIVEN")
CONSTANT, CUMULATIVE, HORIZON, SQUARE_ROOT, GIVEN = range(len(RULES))


class RuleCode(NamedTuple):
    """A rule as kernels take it: its number in `RULES`, and up to three arguments."""

    rule: int
    first: float = 1.0
    second: float = 1.0
    third: float = 1.0


class MomentumRule:
    """The weight a of a new batch as a function of its size and of what was seen before; the base class of all rules.

    To write a rule, derive a class with the method `weight`. It should be immutable, comparable, picklable and
    printable, such as a frozen dataclass. It runs on every device on plain torch operations, which are slower than the
    kernels: these implement only the rules of this library.

    Attributes:
        whole_batches: if True, a batch as a whole has the weight a, whatever its number of elements; if False, each of
            its elements has.

    Raises:
        NotImplementedError: at the first training step, by a subclass without `weight`.

    Example:
        >>> import torch
        >>> from dataclasses import dataclass
        >>> from runningbn import MomentumRule, RunningBatchNorm
        >>> @dataclass(frozen=True)
        ... class Halving(MomentumRule):
        ...     def weight(self, batch, samples, steps):
        ...         return 1 / (1 + steps).clamp(max=2)
        >>> layer = RunningBatchNorm(4, momentum=Halving())
        >>> _ = layer(torch.randn(8, 4))
        >>> layer.momentum
        Halving()
    """

    whole_batches: ClassVar[bool] = False

    def weight(self, batch: int | Tensor, samples: Tensor, steps: Tensor) -> Tensor:
        """The weight a, (C,), in [0, 1].

        Args:
            batch: N, samples in the batch; over all ranks where these are pooled, and then a tensor, ().
            samples: (C,), samples seen before it.
            steps: (C,), batches seen before it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method weight(batch, samples, steps)")

    def code(self) -> RuleCode | None:
        """The rule as kernels take it; None if they do not know it."""
        return None


@dataclass(frozen=True)
class Constant(MomentumRule):
    """The rule for a float."""

    value: float

    def weight(self, batch: int | Tensor, samples: Tensor, steps: Tensor) -> Tensor:
        """The float, (C,)."""
        return torch.full_like(samples, self.value)

    def code(self) -> RuleCode | None:
        """One argument, the float."""
        return RuleCode(CONSTANT, float(self.value)) if type(self) is Constant else None


@dataclass(frozen=True)
class Cumulative(MomentumRule):
    """The rule for None: every batch has the same weight, a = 1/t."""

    def weight(self, batch: int | Tensor, samples: Tensor, steps: Tensor) -> Tensor:
        """1/t, (C,)."""
        return 1 / (steps + 1)

    def code(self) -> RuleCode | None:
        """No argument."""
        return RuleCode(CUMULATIVE) if type(self) is Cumulative else None


@dataclass(frozen=True)
class Horizon(MomentumRule):
    """The past decays by a factor of e per h samples, where the horizon h grows during training.

    a = 1 − exp(−N/h) with h = clamp(fraction · samples seen so far, start, samples), N samples in the batch.

    The past decays by the same factor over 32 batches of 1 as over 1 batch of 32. Each batch has the weight a, whatever
    its number of elements. Early in training, when the weights change quickly, h is short. It reaches `samples` after
    samples/fraction samples; for statistics taken over from a trained model, it is `samples` from the start.

    Args:
        samples: longest horizon h, in samples.
        start: shortest horizon, in samples; 0 < start ≤ samples.
        fraction: horizon as a fraction of the samples seen; > 0.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> Horizon()
        Horizon(samples=512, start=8, fraction=0.1)
        >>> Horizon().weight(32, samples=torch.tensor([10_000.0]), steps=torch.tensor([0.0]))
        tensor([0.0606])
    """

    samples: float = 512
    start: float = 8
    fraction: float = 0.1
    whole_batches: ClassVar[bool] = True

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

    def code(self) -> RuleCode | None:
        """Three arguments; None for a subclass, which may compute something else."""
        if type(self) is not Horizon:
            return None
        return RuleCode(HORIZON, float(self.samples), float(self.start), float(self.fraction))


@dataclass(frozen=True)
class SquareRoot(MomentumRule):
    """The rule of fastai's RunningBatchNorm: a = 1 − (1 − momentum)/√(N − 1), N samples in the batch.

    At N ≤ 2, a = momentum (the original divides by zero at N = 1). By default, a = 0.84 at N = 32: almost
    BatchNorm.

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
        """a, (C,), of a batch of `batch` samples; of `samples` only the shape is used, and `steps` is not."""
        # Tensor arithmetic, not math.sqrt: a batch size that torch.compile traces as a symbol must not be branched on.
        others = (torch.zeros_like(samples) + (batch - 1)).clamp(min=1)
        return 1 - (1 - self.momentum) * others.rsqrt()

    def code(self) -> RuleCode | None:
        """One argument; None for a subclass, which may compute something else."""
        return RuleCode(SQUARE_ROOT, float(self.momentum)) if type(self) is SquareRoot else None


Momentum = Union[float, None, MomentumRule]


def check_momentum(momentum: Momentum) -> None:
    """Accept a rule, ``None`` or a float in [0, 1].

    Raises:
        TypeError: for anything else.
        ValueError: for a float outside [0, 1].
    """
    if momentum is None or isinstance(momentum, MomentumRule):
        return
    if isinstance(momentum, bool) or not isinstance(momentum, (float, int)):
        raise TypeError(
            "momentum: expected a float, None or a rule (Horizon, SquareRoot or another MomentumRule), "
            f"got {momentum!r}"
        )
    _check_unit_interval(momentum, "momentum: expected a weight in [0, 1]")


def rule_of(momentum: Momentum) -> MomentumRule:
    """The rule that a momentum stands for."""
    if isinstance(momentum, MomentumRule):
        return momentum
    return Cumulative() if momentum is None else Constant(momentum)


def _check_unit_interval(value: float, message: str) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{message}, got {value}")
