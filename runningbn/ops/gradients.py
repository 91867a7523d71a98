"""What a backward pass returns: the gradients of x, weight and bias from that of y, by the kernels and the update.

Shapes: N batch, C channels, any trailing dimensions; n = elements per channel. Per-channel vectors are (C,) in the
dtype of the statistics (float32 or float64).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from .. import kernels
from ..kernels.contract import Gradients, GradientSums
from ..kernels.layout import spread
from .compat import is_batchedtensor, is_legacy_batchedtensor
from .pooling import RankGroup, pool_gradients
from .spec import Coefficients
from .state import GradientState
from .update import update_gradient

RUNNING_TWICE = (
    "RunningBatchNorm(gradient='running') cannot be differentiated twice: its backward uses running averages, "
    "which no function has as its derivative. Use gradient='exact' for a double backward."
)
POOLED_TWICE = (
    "a layer with sync=True cannot be differentiated twice while it pools over several processes. "
    "Use sync=False for a double backward."
)
_AT_ONCE = (
    "several gradients at once, as by torch.autograd.grad(..., is_grads_batched=True) or jacobian(..., "
    "vectorize=True), cannot go through {}. Take them one after the other, or call eval() on the layer before its "
    "forward"
)


def exact_gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, coefficients: Coefficients, needs_dx: bool,
    ranks: RankGroup | None = None,
) -> Gradients:  # fmt: skip
    """dx, Σdy and Σdy·z, those of this rank; κ = None is 1/n."""
    mean, rstd = coefficients.mean, coefficients.rstd
    kappa_mean, kappa_var = coefficients.kappa_mean, coefficients.kappa_var
    if needs_dx and (kappa_mean is None or kappa_var is None):
        return kernels.batch_norm_gradients(dy, x, mean, rstd, weight)
    if ranks is not None:
        _refuse_several(dy, "a layer with sync=True")
    sums = pooled = _gradient_sums(dy, x, mean, rstd)
    if ranks is not None:
        # Also where this rank needs no dx: another one may, and waits.
        pooled = pool_gradients(sums, ranks)
    dx = None
    if kappa_mean is not None and kappa_var is not None and needs_dx:
        m0, m1 = _times(kappa_mean, pooled.sum_dy), _times(kappa_var, pooled.sum_dy_xhat)
        dx = _input_gradient(dy, x, mean, rstd, weight, m0, m1)
    return Gradients(dx, *sums)


def running_gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, coefficients: Coefficients, state: GradientState, needs_dx: bool,
    *, ranks: RankGroup | None = None, n: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """dx, from the running means of the sums, and this rank's Σdy and Σdy·z, which enter `state`."""
    _refuse_several(dy, "RunningBatchNorm(gradient='running'), whose backward updates running averages")
    mean, rstd = coefficients.mean, coefficients.rstd
    sums = pooled = _gradient_sums(dy, x, mean, rstd)
    if ranks is not None:
        pooled = pool_gradients(sums, ranks._replace(written=state.count_dy))
    count = x.numel() // x.shape[1] if n is None else n
    m0, m1 = update_gradient(state, pooled, coefficients, count)
    dx = _input_gradient(dy, x, mean, rstd, weight, m0, m1) if needs_dx else None
    return Gradients(dx, *sums)


def _refuse_several(dy: Tensor, layer: str) -> None:
    """Raise a RuntimeError for a dy that stands for several gradients, before it meets buffers or other ranks."""
    if not torch.compiler.is_compiling() and (is_legacy_batchedtensor(dy) or is_batchedtensor(dy)):
        raise RuntimeError(_AT_ONCE.format(layer))


def _gradient_sums(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> GradientSums:
    """`kernels.gradient_sums`, but also for the empty input of a rank among others; so is the next."""
    if x.numel() > 0:
        return kernels.gradient_sums(dy, x, mean, rstd)
    return GradientSums(torch.zeros_like(mean), torch.zeros_like(mean))


def _input_gradient(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, m0: Tensor, m1: Tensor
) -> Tensor:
    if x.numel() > 0:
        return kernels.input_gradient(dy, x, mean, rstd, weight, m0, m1)
    return torch.empty_like(x)


def differentiable_gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, coefficients: Coefficients, needs: Sequence[bool],
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of x, weight and bias as differentiable functions of x, weight and dy, for a double backward.

    The statistics are written as their saved values plus what they change by when x does, which is zero here and now:
    from the saved values alone the second derivative would be wrong, and from x alone the state before this batch
    would be needed.
    """
    mean, rstd = coefficients.mean, coefficients.rstd
    kappa_mean, kappa_var = coefficients.kappa_mean, coefficients.kappa_var
    if kappa_mean is None or kappa_var is None:
        kappa_mean = kappa_var = torch.full_like(mean, x.shape[1] / x.numel())
    all_but_channels = [d for d in range(x.dim()) if d != 1]

    def change(total: Tensor) -> Tensor:
        return total - total.detach()

    centred = x.to(mean.dtype) - spread(mean, x)
    mean_change = _times(kappa_mean, change(centred.sum(all_but_channels)))
    # var = Σx²/n − mean²: the square of the change of the mean is zero up to its second derivative.
    var_change = _times(kappa_var, change(centred.square().sum(all_but_channels)))
    var_change = var_change - torch.where(kappa_var == 0, 0, mean_change.square())
    z = (centred - spread(mean_change, x)) * spread((rstd.pow(-2) + var_change).rsqrt(), x)
    y = (z if weight is None else z * spread(weight.to(z.dtype), x)).to(x.dtype)
    wanted = [t if needed else None for t, needed in zip((x, weight), needs)]
    inputs = [t for t in wanted if t is not None]
    found = iter(torch.autograd.grad(y, inputs, dy, create_graph=True) if inputs else ())
    dbias = None if bias_dtype is None else dy.sum(all_but_channels, dtype=mean.dtype).to(bias_dtype)
    return (*(None if t is None else next(found) for t in wanted), dbias)


def _times(kappa: Tensor, total: Tensor) -> Tensor:
    """kappa·total, and 0 where kappa is: a channel that was not finite has totals that are not either."""
    return torch.where(kappa == 0, 0, kappa * total)


def refuse_second_derivative(
    message: str, dy: Tensor, x: Tensor, gradients: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients, such that whoever differentiates them, by dy or by x, gets a RuntimeError."""
    refusing: tuple[Tensor | None, ...] = _RefuseSecondDerivative.apply(message, dy, x, *gradients)
    return refusing


class _RefuseSecondDerivative(Function):
    @staticmethod
    def forward(ctx: Any, message: str, dy: Tensor, x: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.message = message
        return tuple(None if g is None else g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *second: Tensor) -> None:
        raise RuntimeError(ctx.message)
