"""The autograd functions of a training step: what each forward saves, and which gradients its backward asks for.

Shapes: N batch, C channels, any trailing dimensions. Per-channel vectors are (C,) in the dtype of the statistics
(float32 or float64).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from . import kernels
from .distributed import RankGroup
from .gradients import (
    POOLED_TWICE,
    RUNNING_TWICE,
    Gradients,
    differentiable_gradients,
    exact_gradients,
    refuse_second_derivative,
    running_gradients,
)
from .law import Law
from .momentum import Momentum
from .statistics import GradientState
from .update import RunningCoefficients, is_recomputation


class Fused(Function):
    """One call of a backend forward and one backward; see `normalize` and `normalize_running` for what they compute."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
        backend: kernels.Backend, state: Any, gradient: GradientState | None, momentum: Momentum, running: bool,
        law: Law,
    ) -> Tensor:  # fmt: skip
        """y by one call of the backend, which absorbs x too, unless this repeats a forward."""
        absorbs = not is_recomputation()
        y, fixed = backend.training_forward(x, weight, bias, eps, state, momentum, running, absorbs, law)
        ctx.save_for_backward(x, weight, fixed)
        # Not saved for backward: these buffers are meant to change between forward and backward.
        ctx.backend, ctx.gradient = backend, gradient
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """The gradients of x, weight and bias; None for the rest."""
        x, weight, fixed = ctx.saved_tensors
        if not torch.is_grad_enabled():
            found = _fused_gradients(ctx, dy, x, weight, fixed)
        elif torch.compiler.is_compiling():
            with torch.no_grad():
                found = _fused_gradients(ctx, dy, x, weight, fixed)
        elif ctx.gradient is None:
            found = differentiable_gradients(
                dy, x, weight, *_moments_and_kappas(fixed), ctx.needs_input_grad, ctx.bias_dtype
            )
        else:
            with torch.no_grad():
                found = _fused_gradients(ctx, dy, x, weight, fixed)
            found = refuse_second_derivative(RUNNING_TWICE, dy, x, found)
        return (*found, *[None] * 7)


def _fused_gradients(
    ctx: Any, dy: Tensor, x: Tensor, weight: Tensor | None, fixed: Tensor
) -> tuple[Tensor | None, ...]:
    backend, gradient, needs_dx = ctx.backend, ctx.gradient, ctx.needs_input_grad[0]
    prepared = kernels.prepared(backend, dy, x, fixed, gradient)
    if prepared is None:
        gradients = _composed_gradients(dy, x, weight, fixed, gradient, needs_dx)
    else:
        gradients = backend.training_backward(dy, x, weight, fixed, prepared or None, needs_dx)
    return _affine_gradients(ctx, weight, gradients)


def _composed_gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, fixed: Tensor, gradient: GradientState | None, needs_dx: bool
) -> Gradients:
    """`training_backward` of what the backend cannot take, as in a compiled backward of an eager forward."""
    if gradient is None:
        return exact_gradients(dy, x, weight, *_moments_and_kappas(fixed), needs_dx)
    # Its variance is in rstd already.
    mean, rstd, *of_batch = fixed.unbind()
    return running_gradients(dy, x, weight, rstd, RunningCoefficients(mean, rstd, *of_batch), gradient, needs_dx)


def _moments_and_kappas(fixed: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    mean, rstd, *others = fixed.unbind()
    return (mean, rstd, others[0], others[1]) if others else (mean, rstd, None, None)


class NormalizeExact(Function):
    """y = (x − mean)·rstd·weight + bias with the exact gradient; see `functional.normalize`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
        scratch: tuple[Tensor, Tensor] | None, ranks: RankGroup | None,
        mean: Tensor, var: Tensor, kappa_mean: Tensor | None, kappa_var: Tensor | None, witness: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """y by statistics that are done."""
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), kappa_mean, kappa_var)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.ranks, ctx.witness = ranks, witness
        return _normalized(x, mean, var, weight, bias, eps, scratch)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """The gradients of x, weight and bias; None for the rest."""
        x, weight, mean, rstd, kappa_mean, kappa_var = ctx.saved_tensors
        needs_dx, ranks = ctx.needs_input_grad[0], ctx.ranks
        if torch.is_grad_enabled() and ranks is None and not torch.compiler.is_compiling():
            found = differentiable_gradients(
                dy, x, weight, mean, rstd, kappa_mean, kappa_var, ctx.needs_input_grad, ctx.bias_dtype
            )
            return (*found, *[None] * 8)
        with torch.no_grad():
            gradients = exact_gradients(dy, x, weight, mean, rstd, kappa_mean, kappa_var, needs_dx, ranks, ctx.witness)
            found = _affine_gradients(ctx, weight, gradients)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = refuse_second_derivative(POOLED_TWICE, dy, x, found)
        return (*found, *[None] * 8)


class NormalizeRunning(Function):
    """The same y; the two sums in backward are running averages; see `functional.normalize_running`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
        scratch: tuple[Tensor, Tensor] | None, ranks: RankGroup | None, n: Tensor | None,
        mean: Tensor, var: Tensor, trust: Tensor, offset: Tensor, batch_std: Tensor, *gradient: Tensor,
    ) -> Tensor:  # fmt: skip
        """y by statistics that are done."""
        ctx.save_for_backward(x, weight, (var + eps).rsqrt(), n, mean, var, trust, offset, batch_std)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.ranks = ranks
        # Not saved for backward: these buffers are meant to change between forward and backward.
        ctx.gradient = GradientState(*gradient)
        return _normalized(x, mean, var, weight, bias, eps, scratch)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """The gradients of x, weight and bias; None for the rest."""
        x, weight, rstd, n, *fixed = ctx.saved_tensors
        needs_dx = ctx.needs_input_grad[0]
        with torch.no_grad():
            gradients = running_gradients(
                dy, x, weight, rstd, RunningCoefficients(*fixed), ctx.gradient, needs_dx, ctx.ranks, n
            )
            found = _affine_gradients(ctx, weight, gradients)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = refuse_second_derivative(RUNNING_TWICE, dy, x, found)
        return (*found, *[None] * (4 + len(RunningCoefficients._fields) + len(GradientState._fields)))


def _affine_gradients(ctx: Any, weight: Tensor | None, gradients: Gradients) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight and bias, in the dtypes of these."""
    dx, sum_dy, sum_dy_xhat = gradients
    dweight = None if weight is None else _cast(sum_dy_xhat, weight.dtype)
    return dx, dweight, None if ctx.bias_dtype is None else _cast(sum_dy, ctx.bias_dtype)


def _cast(vector: Tensor, dtype: torch.dtype) -> Tensor:
    """``vector.to(dtype)``, which is a call into torch where there is nothing to do, too."""
    return vector if vector.dtype is dtype else vector.to(dtype)


def _normalized(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    scratch: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """`kernels.normalize`, but also for the empty input of a rank among others."""
    if x.numel() > 0:
        return kernels.normalize(x, mean, var, weight, bias, eps, *(scratch or ()))
    return torch.empty_like(x)
