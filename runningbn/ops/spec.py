"""What a training step is to do, and what its forward leaves for its backward: the names that every backend shares.

Shapes: C channels; all tensors are (C,) in the dtype of the statistics (float32 or float64).
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from torch import Tensor

from ..momentum import Momentum
from .law import Law
from .state import FORWARD_BUFFERS, GradientState, State


class Mode(Enum):
    """By what a training step normalises a batch, and how the gradient flows back through the statistics.

    Attributes:
        label: in the names of operators.
        by_state: whether a batch is normalised by the running statistics, rather than its own.
        coefficients: which of the `Coefficients` there are, in the order in which fused backends pack them into the
            rows of one tensor.
        forward_buffers, backward_buffers: the names of the buffers that a forward and a backward update.
    """

    BATCH = "batch", False, ("mean", "rstd"), State._fields, ()  # exact gradient: PreciseBatchNorm
    EXACT = "exact", True, ("mean", "rstd", "kappa_mean", "kappa_var"), State._fields, ()
    # By running means of gradient sums.
    RUNNING = "running", True, ("mean", "rstd", "trust", "offset", "batch_std"), FORWARD_BUFFERS, GradientState._fields

    def __init__(
        self, label: str, by_state: bool, coefficients: tuple[str, ...], forward_buffers: tuple[str, ...],
        backward_buffers: tuple[str, ...],
    ) -> None:  # fmt: skip
        self.label, self.by_state, self.coefficients = label, by_state, coefficients
        self.forward_buffers, self.backward_buffers = forward_buffers, backward_buffers


class StepSpec(NamedTuple):
    """What a training step is to do, apart from the data and the state.

    Attributes:
        mode: see `Mode`.
        eps: added to the variance.
        momentum: the weight of a new batch.
        law: the constants of the update.
    """

    mode: Mode
    eps: float
    momentum: Momentum
    law: Law


class Coefficients(NamedTuple):
    """What a forward leaves for its backward; fresh tensors, never views of buffers.

    Attributes:
        mean, rstd: what x was normalised by; rstd = (var + eps)^−½.
        kappa_mean: for an exact gradient, the derivative of the mean by each element of x, gain/count; None is 1/n.
        kappa_var: the same factor in the variance term; 0 where the variance is held at its floor.
        trust: for running means, ρ of `law.trust`; 0 where the batch was not finite.
        offset: for running means, the mean of the batch minus `mean`.
        batch_std: for running means, the standard deviation of the batch.
    """

    mean: Tensor
    rstd: Tensor
    kappa_mean: Tensor | None = None
    kappa_var: Tensor | None = None
    trust: Tensor | None = None
    offset: Tensor | None = None
    batch_std: Tensor | None = None


def unpack(mode: Mode, rows: Tensor) -> Coefficients:
    """The coefficients in the rows of a tensor, in the order of `Mode.coefficients`."""
    return Coefficients(**dict(zip(mode.coefficients, rows.unbind())))
