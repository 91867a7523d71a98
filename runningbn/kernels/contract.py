"""The contract of the backends: what they compute, and the types that they take and return.

Shapes: N batch, C channels, any trailing dimensions, n = elements per channel. Per-channel vectors are (C,) in the
dtype of the statistics (float32 or float64). z = (x − mean)·rstd.

Every operation is written as its equation in `aten`, in the branches for compilers (`batch_norm` is `batch_sums`,
`state.moments` and `normalize`), and the update of the state that fused backends do in between in `ops.update`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..ops.law import Law
from ..ops.spec import Coefficients, Mode, StepSpec
from ..ops.state import Batch, GradientState, LayerState, Sums


class Centred(NamedTuple):
    """x − pivot as the sums have left it, for `normalize` to go on from and to write into."""

    pivot: Tensor
    deviations: Tensor


class Reduction(NamedTuple):
    """The sums of a batch per channel; and x − pivot, where that is at hand."""

    sums: Sums
    centred: Centred | None = None


class GradientSums(NamedTuple):
    """Σdy and Σdy·z per channel."""

    sum_dy: Tensor
    sum_dy_xhat: Tensor


class Gradients(NamedTuple):
    """dx, where it is needed, Σdy and Σdy·z."""

    dx: Tensor | None
    sum_dy: Tensor
    sum_dy_xhat: Tensor


class StepKind(NamedTuple):
    """What a fused step was done by, for its backward.

    Attributes:
        plan: of the extension that has done the forward at once, see `cpu_step`; None where Python has.
        backend: whose kernels these are.
        mode: see there.
    """

    plan: Any | None
    backend: FusedBackend
    mode: Mode


class Backend(Protocol):
    """The operations on the elements of a batch; they leave the state of a layer to others. A module is one."""

    def unavailable(self) -> str | None:
        """Why the backend cannot be used on this machine; None if it can."""

    def version(self) -> str:
        """What the backend was made with."""

    def supports(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether the backend can take this input, with statistics in `dtype`."""

    def batch_sums(self, x: Tensor, dtype: torch.dtype) -> Reduction:
        """The sums of x about a pivot near the mean, in `dtype`."""

    def normalize(
        self, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
        centred: Centred | None = None,
    ) -> Tensor:  # fmt: skip
        """y = (x − mean)·(var + eps)^−½·weight + bias, in the dtype and layout of x; overwrites `centred`."""

    def batch_norm(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y, mean and biased variance of a batch with n > 1, without gradients."""

    def gradient_sums(self, dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> GradientSums:
        """Σdy and Σdy·z, in the dtype of mean."""

    def input_gradient(
        self, dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, m0: Tensor, m1: Tensor
    ) -> Tensor:
        """dx = weight·rstd·(dy − m0 − z·m1), in the dtype and layout of x."""

    def batch_norm_gradients(
        self, dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
    ) -> Gradients:
        """Both at once for m0 = Σdy/n, m1 = Σdy·z/n."""


class FusedBackend(Backend, Protocol):
    """A backend that can also do a whole training step of one process, the update of the state included.

    `prepare` returns the buffers of a layer as the backend takes them, or None if it cannot update them in place.
    Without `updates`, as in a recomputation, the state is taken as it is. The coefficients of a step are the rows of
    one tensor, (R, C), in the order of `spec.Mode`.
    """

    def prepare(self, buffers: tuple[Tensor, ...]) -> Any | None:
        """The buffers as the next two methods take them."""

    def training_forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, prepared: Any, spec: StepSpec, updates: bool
    ) -> tuple[Tensor, Tensor]:
        """y and the coefficients; `prepared` are the buffers of a `State`, then those of a `NoiseState` if any."""

    def training_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor | None, rows: Tensor, mode: Mode, prepared: Any | None,
        needs_dx: bool,
    ) -> Gradients:  # fmt: skip
        """The gradients; `prepared` is a `GradientState`, which is updated first, or None."""

    def update(self, mode: Mode, state: LayerState, batch: Batch, law: Law, updates: bool) -> tuple[Tensor, ...]:
        """The update alone, from sums that came from elsewhere; returns the vectors of `update.update`."""

    def update_gradient(
        self, state: GradientState, sums: GradientSums, coefficients: Coefficients, n: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """s·G0 and s·G1, see `update.update_gradient`."""
