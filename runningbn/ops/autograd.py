"""The autograd functions of a training step: what each forward saves, and which gradients its backward asks for.

There are three. `FusedStep` is one call of a backend forward and one backward, the update of the state included, in
eager mode. `CompiledStep` is that in compiled code on the CPU. `Normalize` takes statistics that are done: it can be
traced by compilers, and ranks can be asked for their sums before.

Shapes: N batch, C channels, any trailing dimensions. Per-channel vectors are (C,) in the dtype of the statistics
(float32 or float64).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function

from .. import kernels
from ..kernels import cpu_operators, cpu_step
from ..kernels.contract import Centred, Gradients, StepKind
from ..kernels.layout import cast
from .gradients import (
    POOLED_TWICE,
    RUNNING_TWICE,
    differentiable_gradients,
    exact_gradients,
    refuse_second_derivative,
    running_gradients,
)
from .pooling import RankGroup
from .spec import Coefficients, Mode, unpack
from .state import GradientState


class FusedOutput(NamedTuple):
    """What a backend has made of a batch.

    Attributes:
        y: the output.
        rows: the coefficients, see `spec.Mode`.
        kind: what has done it.
        gradient: the buffers of the `GradientState` for a backward by running means; none otherwise.
    """

    y: Tensor
    rows: Tensor
    kind: StepKind
    gradient: tuple[Tensor, ...]


class FusedStep(Function):
    """y and its gradients by a backend that updates the state meanwhile; see `step` for what they are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, output: FusedOutput) -> Tensor:
        """y, which the backend has computed already, as it has updated the state."""
        # Not saved for backward: the buffers of `gradient` are meant to change between forward and backward.
        y, rows, ctx.kind, ctx.gradient = output
        ctx.save_for_backward(x, weight, rows)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, weight and bias; None for the rest."""
        x, weight, rows = ctx.saved_tensors
        if not torch.is_grad_enabled():
            found = _gradients_at_once(ctx, dy, x, weight, rows) or _fused_gradients(ctx, dy, x, weight, rows)
        elif torch.compiler.is_compiling():
            with torch.no_grad():
                found = _fused_gradients(ctx, dy, x, weight, rows)
        elif not ctx.gradient:
            coefficients = unpack(ctx.kind.mode, rows)
            found = differentiable_gradients(dy, x, weight, coefficients, ctx.needs_input_grad, ctx.bias_dtype)
        else:
            with torch.no_grad():
                found = _fused_gradients(ctx, dy, x, weight, rows)
            found = refuse_second_derivative(RUNNING_TWICE, dy, x, found)
        return (*found, None)


def _gradients_at_once(
    ctx: Any, dy: Tensor, x: Tensor, weight: Tensor | None, rows: Tensor
) -> tuple[Tensor | None, ...] | None:
    """The gradients where nothing is out of the ordinary; None, with nothing changed, elsewhere."""
    if ctx.kind.plan is None or not kernels.is_ordinary():
        return None
    found: tuple[Tensor | None, ...] | None = cpu_step.extension().backward(
        ctx.kind, ctx.gradient, dy, x, weight, rows, ctx.needs_input_grad
    )
    return found


def _fused_gradients(ctx: Any, dy: Tensor, x: Tensor, weight: Tensor | None, rows: Tensor) -> tuple[Tensor | None, ...]:
    needs_dx, (_, backend, mode) = ctx.needs_input_grad[0], ctx.kind
    state = GradientState(*ctx.gradient) if ctx.gradient else None
    supported, prepared = kernels.fused_backward(backend, dy, x, rows, state)
    if supported:
        gradients = backend.training_backward(dy, x, weight, rows, mode, prepared, needs_dx)
    # What the backend cannot take, as in a compiled backward of an eager forward.
    elif state is None:
        gradients = exact_gradients(dy, x, weight, unpack(mode, rows), needs_dx)
    else:
        gradients = running_gradients(dy, x, weight, unpack(mode, rows), state, needs_dx)
    return _affine_gradients(ctx, weight, gradients)


class CompiledStep(Function):
    """y, and its gradients, by operators that update the state, see `cpu_operators`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mode: Mode, constants: tuple[float, ...],
        *buffers: Tensor,
    ) -> Tensor:  # fmt: skip
        """y. `buffers` are those of a forward, then of a backward by running means."""
        of_forward = len(mode.forward_buffers)
        rows = cpu_operators.forward(mode, x, buffers[:of_forward], constants)
        mean, rstd = rows[0], rows[1]  # of every mode
        ctx.save_for_backward(x, weight, rows)
        # Not saved for backward: these buffers are meant to change between forward and backward.
        ctx.gradient, ctx.others = buffers[of_forward:], len(buffers) + 2
        ctx.mode, ctx.bias_dtype = mode, None if bias is None else bias.dtype
        return kernels.aten.affine(x, mean, rstd, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, weight and bias; None for the rest."""
        x, weight, rows = ctx.saved_tensors
        dy, needs_dx = cast(dy, x.dtype), ctx.needs_input_grad[0]
        dx, sum_dy, sum_dy_xhat = cpu_operators.backward(ctx.mode, dy, x, weight, rows, ctx.gradient, needs_dx)
        gradients = Gradients(dx if needs_dx else None, sum_dy, sum_dy_xhat)
        return (*_affine_gradients(ctx, weight, gradients), *[None] * ctx.others)


class Pooling(NamedTuple):
    """What a forward outside of a fused step knows beside its coefficients.

    Attributes:
        ranks: the ranks that the batch was pooled over, and its gradients have to be; None where it was not.
        centred: x minus a pivot as the statistics have left it, for the output to be made in; None where there is none.
    """

    ranks: RankGroup | None = None
    centred: Centred | None = None


class Normalize(Function):
    """y = (x − mean)·rstd·weight + bias by statistics that are done, and the gradients that go with the coefficients.

    Compilers follow tensors only where they are arguments by themselves, hence the flat lists of them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, pooling: Pooling,
        n: Tensor | None, var: Tensor, *tensors: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """y.

        Args:
            ctx: of autograd.
            x, weight, bias, eps: as in the layer.
            pooling: see there.
            n: elements per channel of a batch that was pooled or masked.
            var: what `rstd` among the coefficients was made of.
            tensors: the `Coefficients`, then the `GradientState` for a backward by running means.
        """
        coefficients = Coefficients(*tensors[: len(Coefficients._fields)])  # type: ignore[arg-type]
        gradient = tensors[len(Coefficients._fields) :]
        ctx.save_for_backward(x, weight, n, *coefficients)
        ctx.bias_dtype = None if bias is None else bias.dtype
        # Not saved for backward: these buffers are meant to change between forward and backward.
        ctx.ranks, ctx.gradient = pooling.ranks, GradientState(*gradient) if gradient else None  # type: ignore[arg-type]
        if x.numel() == 0:  # of a rank among others
            return torch.empty_like(x)
        return kernels.normalize(x, coefficients.mean, var, weight, bias, eps, pooling.centred)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, weight and bias; None for the rest."""
        x, weight, n, *vectors = ctx.saved_tensors
        coefficients, ranks, state = Coefficients(*vectors), ctx.ranks, ctx.gradient
        others = [None] * (4 + len(vectors) + (0 if state is None else len(state)))
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if twice and ranks is None and state is None:
            found = differentiable_gradients(dy, x, weight, coefficients, ctx.needs_input_grad, ctx.bias_dtype)
            return (*found, *others)
        needs_dx = ctx.needs_input_grad[0]
        with torch.no_grad():
            if state is None:
                gradients = exact_gradients(dy, x, weight, coefficients, needs_dx, ranks)
            else:
                gradients = running_gradients(dy, x, weight, coefficients, state, needs_dx, ranks=ranks, n=n)
            found = _affine_gradients(ctx, weight, gradients)
        if twice:
            found = refuse_second_derivative(POOLED_TWICE if state is None else RUNNING_TWICE, dy, x, found)
        return (*found, *others)


def _affine_gradients(ctx: Any, weight: Tensor | None, gradients: Gradients) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight and bias, in the dtypes of these."""
    dx, sum_dy, sum_dy_xhat = gradients
    dweight = None if weight is None else cast(sum_dy_xhat, weight.dtype)
    return dx, dweight, None if ctx.bias_dtype is None else cast(sum_dy, ctx.bias_dtype)
