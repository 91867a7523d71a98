"""One training step, forward and backward: sweep the batch, absorb its sums, normalise by the outcome.

Shapes: N batch, C channels, any trailing dimensions; n = elements per channel. Per-channel vectors are (C,) in the
dtype of the statistics (float32 or float64).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx

from . import kernels
from .momentum import Momentum, batch_weight, weighs_whole_batches
from .statistics import Sums
from .update import Coefficients, GradientState, State, absorb_gradient, absorb_precise, absorb_running


class Step(NamedTuple):
    """A forward whose statistics are done.

    Attributes:
        fixed: what to normalise by.
        scratch: (p, x − p) as the statistics left it, for the output to be made in, once; None where there is none.
    """

    fixed: Coefficients
    scratch: tuple[Tensor, Tensor] | None = None


def running_step(x: Tensor, state: State, momentum: Momentum) -> Step:
    """Absorb a batch and normalise by the running statistics, this batch included. See `update.absorb_running`."""
    return _step(absorb_running, x, state, momentum)


def precise_step(x: Tensor, state: State, momentum: Momentum) -> Step:
    """Absorb a batch and normalise by its own statistics, as ``nn.BatchNorm`` does. See `update.absorb_precise`."""
    return _step(absorb_precise, x, state, momentum)


@torch.no_grad()
def _step(
    absorb: Callable[[State, Sums, Tensor, int, bool], Coefficients], x: Tensor, state: State, momentum: Momentum
) -> Step:
    batch, centred = kernels.batch_sums(x, state.shift.dtype)
    weight = batch_weight(momentum, len(x), state.samples, state.steps)
    fixed = absorb(state, batch, weight, len(x), weighs_whole_batches(momentum))
    return Step(fixed, None if centred is None else (batch.shift, centred))


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, step: Step, eps: float) -> Tensor:
    """y = (x − mean)·rstd·weight + bias with the exact gradient through the statistics; rstd = (var + eps)^−½.

    With dy = dL/dy and z = (x − mean)·rstd, per channel

        dbias = Σdy    dweight = Σdy·z    dx = weight·rstd·[dy − κ·(Σdy + z·Σdy·z)]

    κ = gain/count; κ = 1/n is BatchNorm. The z term drops where the variance is held at its floor. Keeps x and C-sized
    vectors for backward. Differentiable twice.
    """
    fixed, scratch = step
    y: Tensor = _NormalizeExact.apply(
        x, weight, bias, eps, scratch, fixed.mean, fixed.var, fixed.kappa_mean, fixed.kappa_var
    )
    return y


def normalize_running(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, step: Step, eps: float, gradient: GradientState
) -> Tensor:
    """y as in `normalize`; in backward the two sums are running averages too.

        dbias = Σdy    dweight = Σdy·z    dx = weight·rstd·[dy − G0 − z·G1]

    with G0, G1 the running means of dy and dy·z, this batch included, that `update.absorb_gradient` keeps in `gradient`
    with this forward's keep and gain. Not the derivative of a function: a second derivative raises RuntimeError.

    The nearest published relative is MABN: Yan et al., "Towards Stabilizing Batch Statistics in Backward Propagation
    of Batch Normalization", ICLR 2020.
    """
    fixed, scratch = step
    y: Tensor = _NormalizeRunning.apply(
        x, weight, bias, eps, scratch, fixed.mean, fixed.var, fixed.keep, fixed.gain, *gradient
    )
    return y


class _NormalizeExact(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
        scratch: tuple[Tensor, Tensor] | None,
        mean: Tensor, var: Tensor, kappa_mean: Tensor | None, kappa_var: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), kappa_mean, kappa_var)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return kernels.normalize(x, mean, var, weight, bias, eps, *(scratch or ()))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, rstd, kappa_mean, kappa_var = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return (*_differentiable_gradients(ctx, dy), *[None] * 6)
        dx = None
        if kappa_mean is None and ctx.needs_input_grad[0]:
            dx, sum_dy, sum_dy_xhat = kernels.batch_norm_gradients(dy, x, mean, rstd, weight)
        else:
            sum_dy, sum_dy_xhat = kernels.gradient_sums(dy, x, mean, rstd)
        if dx is None and ctx.needs_input_grad[0]:
            m0, m1 = _times(kappa_mean, sum_dy), _times(kappa_var, sum_dy_xhat)
            dx = kernels.input_gradient(dy, x, mean, rstd, weight, m0, m1)
        dweight = None if weight is None else sum_dy_xhat.to(weight.dtype)
        dbias = None if ctx.bias_dtype is None else sum_dy.to(ctx.bias_dtype)
        return (dx, dweight, dbias, *[None] * 6)


class _NormalizeRunning(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
        scratch: tuple[Tensor, Tensor] | None, mean: Tensor, var: Tensor, keep: Tensor, gain: Tensor, *gradient: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), keep, gain)
        ctx.bias_dtype = None if bias is None else bias.dtype
        # Not saved for backward: these buffers are meant to change between forward and backward.
        ctx.gradient = GradientState(*gradient)
        return kernels.normalize(x, mean, var, weight, bias, eps, *(scratch or ()))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, rstd, keep, gain = ctx.saved_tensors
        with torch.no_grad():
            sum_dy, sum_dy_xhat = kernels.gradient_sums(dy, x, mean, rstd)
            n = x.numel() // x.shape[1]
            mean_dy, mean_dy_xhat = absorb_gradient(ctx.gradient, sum_dy, sum_dy_xhat, keep, gain, n)
            dx = None
            if ctx.needs_input_grad[0]:
                dx = kernels.input_gradient(dy, x, mean, rstd, weight, mean_dy, mean_dy_xhat)
            dweight = None if weight is None else sum_dy_xhat.to(weight.dtype)
            dbias = None if ctx.bias_dtype is None else sum_dy.to(ctx.bias_dtype)
            gradients = (dx, dweight, dbias)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            gradients = _RefuseSecondDerivative.apply(dy, *gradients)
        return (*gradients, *[None] * 9)


def _differentiable_gradients(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    """The gradients of x, weight and bias as differentiable functions of x, weight and dy, for a double backward.

    The statistics are written as their saved values plus what they change by when x does, which is zero here and now:
    from the saved values alone the second derivative would be wrong, and from x alone the state before this batch
    would be needed.
    """
    x, weight, mean, rstd, kappa_mean, kappa_var = ctx.saved_tensors
    if kappa_mean is None:
        kappa_mean = kappa_var = torch.full_like(mean, x.shape[1] / x.numel())
    all_but_channels = [d for d in range(x.dim()) if d != 1]

    def spread(vector: Tensor) -> Tensor:
        return vector.view(-1, *[1] * (x.dim() - 2))

    def change(total: Tensor) -> Tensor:
        return total - total.detach()

    centred = x.to(mean.dtype) - spread(mean)
    mean_change = _times(kappa_mean, change(centred.sum(all_but_channels)))
    # var = Σx²/n − mean²: the square of the change of the mean is zero up to its second derivative.
    var_change = _times(kappa_var, change(centred.square().sum(all_but_channels)))
    var_change = var_change - torch.where(kappa_var == 0, 0, mean_change.square())
    z = (centred - spread(mean_change)) * spread((rstd.pow(-2) + var_change).rsqrt())
    y = (z if weight is None else z * spread(weight.to(z.dtype))).to(x.dtype)
    wanted = [t if needed else None for t, needed in zip((x, weight), ctx.needs_input_grad)]
    inputs = [t for t in wanted if t is not None]
    found = iter(torch.autograd.grad(y, inputs, dy, create_graph=True) if inputs else ())
    dbias = None if ctx.bias_dtype is None else dy.sum(all_but_channels, dtype=mean.dtype).to(ctx.bias_dtype)
    return [*(None if t is None else next(found) for t in wanted), dbias]


def _times(kappa: Tensor, total: Tensor) -> Tensor:
    """kappa·total, and 0 where kappa is: a channel that was not finite has totals that are not either."""
    return torch.where(kappa == 0, 0, kappa * total)


class _RefuseSecondDerivative(Function):
    """Passes gradients on, and explains itself to whoever differentiates them."""

    @staticmethod
    def forward(ctx: FunctionCtx, dy: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if g is None else g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: FunctionCtx, *second: Tensor) -> None:  # type: ignore[override]
        raise RuntimeError(
            "RunningBatchNorm(gradient='running') cannot be differentiated twice: its backward uses running averages, "
            "which no function has as its derivative. Use gradient='exact' for a double backward."
        )
