"""One training step, forward and backward: sweep the batch, absorb its sums, normalise by the outcome.

Where a backend fuses all that, a step is one call of it forward and one backward. Otherwise, as in compiled code and
where ranks have to be asked in between, it is put together from sweeps and updates.

Shapes: N batch, C channels, any trailing dimensions; n = elements per channel. Per-channel vectors are (C,) in the
dtype of the statistics (float32 or float64).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function

from . import kernels
from .distributed import RankGroup, pool
from .gradients import (
    POOLED_TWICE,
    RUNNING_TWICE,
    Gradients,
    differentiable_gradients,
    exact_gradients,
    refuse_second_derivative,
    running_gradients,
)
from .masks import blank, fill, real_sums
from .momentum import Momentum, batch_weight, weighs_whole_batches
from .statistics import GradientState, State, Sums, moments, without_empty
from .update import Coefficients, absorb_precise, absorb_running, is_recomputation


def running(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    state: State, gradient: GradientState | None, momentum: Momentum, ranks: RankGroup | None,
    mask: Tensor | None = None, max_lag: float = math.inf,
) -> Tensor:  # fmt: skip
    """Absorb a batch and normalise by the running statistics, this batch included. See `update.absorb_running`.

    Where `gradient` is given, the sums in backward are running averages, too: see `normalize_running`. Where there is a
    `mask`, only the elements count that it says are real: see `masks`.
    """
    if ranks is None and mask is None and (prepared := kernels.fused(x, state, momentum)) is not None:
        y: Tensor = _Fused.apply(x, weight, bias, eps, *prepared, gradient, momentum, True, max_lag)
        return y
    step = _step(partial(absorb_running, max_lag=max_lag), x, state, momentum, ranks, mask)
    if gradient is None:
        return normalize(x, weight, bias, step, eps)
    return normalize_running(x, weight, bias, step, eps, gradient)


def precise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    state: State, momentum: Momentum, ranks: RankGroup | None, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Absorb a batch and normalise by its own statistics, as ``nn.BatchNorm`` does. See `update.absorb_precise`."""
    if ranks is None and mask is None and (prepared := kernels.fused(x, state, momentum)) is not None:
        y: Tensor = _Fused.apply(x, weight, bias, eps, *prepared, None, momentum, False, math.inf)
        return y
    return normalize(x, weight, bias, _step(absorb_precise, x, state, momentum, ranks, mask), eps)


class Step(NamedTuple):
    """A forward whose statistics are done.

    Attributes:
        fixed: what to normalise by.
        scratch: (p, x − p) as the statistics left it, for the output to be made in, once; None where there is none.
        ranks: the ranks that the batch was pooled over, and its gradients have to be; None where it was not.
        n: elements per channel of a batch that was pooled or masked.
        witness: see `distributed.all_gather`.
        mask: which positions count, see `masks`; None for all.
    """

    fixed: Coefficients
    scratch: tuple[Tensor, Tensor] | None = None
    ranks: RankGroup | None = None
    n: Tensor | None = None
    witness: Tensor | None = None
    mask: Tensor | None = None


@torch.no_grad()
def _step(
    absorb: Callable[[State, Sums, Tensor, int | Tensor, bool], Coefficients],
    x: Tensor, state: State, momentum: Momentum, ranks: RankGroup | None, mask: Tensor | None,
) -> Step:  # fmt: skip
    batch, samples, scratch = _batch_sums(x, state.shift.dtype, ranks, mask, state.last_keep)
    weight = batch_weight(momentum, samples, state.samples, state.steps)
    fixed = absorb(state, batch, weight, samples, weighs_whole_batches(momentum))
    if ranks is None and mask is None:
        return Step(fixed, scratch)
    return Step(_with_pooled_kappa(fixed, batch), scratch, ranks, batch.count, state.last_keep, mask)


@torch.no_grad()
def batch_step(x: Tensor, dtype: torch.dtype, ranks: RankGroup | None, mask: Tensor | None) -> Step:
    """Normalise by the statistics of the batch over all ranks, in `dtype`, and keep none."""
    batch, _, scratch = _batch_sums(x, dtype, ranks, mask, None)
    fixed = _with_pooled_kappa(Coefficients(*moments(batch)), batch)
    return Step(fixed, scratch, ranks, batch.count, None, mask)


def _batch_sums(
    x: Tensor, dtype: torch.dtype, ranks: RankGroup | None, mask: Tensor | None, witness: Tensor | None
) -> tuple[Sums, int | Tensor, tuple[Tensor, Tensor] | None]:
    """Sums of the batch, pooled over the ranks where there are any, its samples, and the scratch of a `Step`."""
    samples: int | Tensor = len(x) if x.numel() > 0 else 0
    if mask is not None:
        (batch, samples), scratch = real_sums(x, mask, dtype), None
    else:
        batch, scratch = _sums_and_scratch(x, dtype)
    if ranks is not None:
        batch, samples = pool(batch, samples, ranks, witness)
    elif mask is not None:
        batch = without_empty(batch)
    return batch, samples, scratch


def _sums_and_scratch(x: Tensor, dtype: torch.dtype) -> tuple[Sums, tuple[Tensor, Tensor] | None]:
    """Sums of this rank's batch, which with other ranks to pool with may be empty; and the scratch of a `Step`."""
    if x.numel() == 0:
        return Sums(*torch.zeros((4, x.shape[1]), dtype=dtype, device=x.device).unbind()), None
    batch, centred = kernels.batch_sums(x, dtype)
    # About the pivot of this rank, which pooling leaves behind.
    return batch, None if centred is None else (batch.shift, centred)


def _with_pooled_kappa(fixed: Coefficients, batch: Sums) -> Coefficients:
    """κ = 1/n of a pooled or masked batch where x is normalised by its own statistics, which x does not tell."""
    if fixed.kappa_mean is not None:
        return fixed
    kappa = batch.count.reciprocal()
    # A copy, as torch.compile takes no tensor twice.
    return fixed._replace(kappa_mean=kappa, kappa_var=kappa.clone())


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, step: Step, eps: float) -> Tensor:
    """y = (x − mean)·rstd·weight + bias with the exact gradient through the statistics; rstd = (var + eps)^−½.

    With dy = dL/dy and z = (x − mean)·rstd, per channel

        dbias = Σdy    dweight = Σdy·z    dx = weight·rstd·[dy − κ·(Σdy + z·Σdy·z)]

    κ = gain/count; κ = 1/n is BatchNorm. The z term drops where the variance is held at its floor. Keeps x and C-sized
    vectors for backward. Differentiable twice, but for a pooled batch, whose second derivative raises RuntimeError.

    In a batch pooled over ranks the sums in dx run over all of them: it is the gradient of the ranks' total loss.
    dweight and dbias are those of this rank.
    """
    fixed, mask = step.fixed, step.mask
    y: Tensor = _NormalizeExact.apply(
        x if mask is None else fill(x, mask, fixed.mean), weight, bias, eps, step.scratch, step.ranks,
        fixed.mean, fixed.var, fixed.kappa_mean, fixed.kappa_var, step.witness,
    )  # fmt: skip
    return y if mask is None else blank(y, mask)


def normalize_running(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, step: Step, eps: float, gradient: GradientState
) -> Tensor:
    """y as in `normalize`; in backward the two sums are running averages too.

        dbias = Σdy    dweight = Σdy·z    dx = weight·rstd·[dy − G0 − z·G1]

    with G0, G1 the running means of dy and dy·z, this batch included, that `update.absorb_gradient` keeps in `gradient`
    with the keep and gain of `fixed`; those of a pooled batch are over all ranks, but for dweight and dbias. Not the
    derivative of a function: a second derivative raises RuntimeError.

    The nearest published relative is MABN: Yan et al., "Towards Stabilizing Batch Statistics in Backward Propagation
    of Batch Normalization", ICLR 2020.
    """
    fixed, mask = step.fixed, step.mask
    y: Tensor = _NormalizeRunning.apply(
        x if mask is None else fill(x, mask, fixed.mean), weight, bias, eps, step.scratch, step.ranks,
        fixed.mean, fixed.var, fixed.keep, fixed.gain, step.n, *gradient,
    )  # fmt: skip
    return y if mask is None else blank(y, mask)


class _Fused(Function):
    """One call of a backend forward and one backward; see `normalize` and `normalize_running` for what they compute."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
        backend: kernels.Backend, state: Any, gradient: GradientState | None, momentum: Momentum, running: bool,
        max_lag: float,
    ) -> Tensor:  # fmt: skip
        absorbs = not is_recomputation()
        y, fixed = backend.training_forward(x, weight, bias, eps, state, momentum, running, absorbs, max_lag)
        ctx.save_for_backward(x, weight, fixed)
        # Not saved for backward: these buffers are meant to change between forward and backward.
        ctx.backend, ctx.gradient = backend, gradient
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
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
    if gradient is not None:
        return running_gradients(dy, x, weight, fixed[0], fixed[1], fixed[4], fixed[5], gradient, needs_dx)
    return exact_gradients(dy, x, weight, *_moments_and_kappas(fixed), needs_dx)


def _moments_and_kappas(fixed: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    mean, rstd, *others = fixed.unbind()
    return (mean, rstd, others[0], others[1]) if others else (mean, rstd, None, None)


class _NormalizeExact(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
        scratch: tuple[Tensor, Tensor] | None, ranks: RankGroup | None,
        mean: Tensor, var: Tensor, kappa_mean: Tensor | None, kappa_var: Tensor | None, witness: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), kappa_mean, kappa_var)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.ranks, ctx.witness = ranks, witness
        return _normalized(x, mean, var, weight, bias, eps, scratch)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
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


class _NormalizeRunning(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
        scratch: tuple[Tensor, Tensor] | None, ranks: RankGroup | None,
        mean: Tensor, var: Tensor, keep: Tensor, gain: Tensor, n: Tensor | None, *gradient: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), keep, gain, n)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.ranks = ranks
        # Not saved for backward: these buffers are meant to change between forward and backward.
        ctx.gradient = GradientState(*gradient)
        return _normalized(x, mean, var, weight, bias, eps, scratch)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, rstd, keep, gain, n = ctx.saved_tensors
        needs_dx = ctx.needs_input_grad[0]
        with torch.no_grad():
            gradients = running_gradients(dy, x, weight, mean, rstd, keep, gain, ctx.gradient, needs_dx, ctx.ranks, n)
            found = _affine_gradients(ctx, weight, gradients)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = refuse_second_derivative(RUNNING_TWICE, dy, x, found)
        return (*found, *[None] * 11)


def _affine_gradients(ctx: Any, weight: Tensor | None, gradients: Gradients) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight and bias, in the dtypes of these."""
    dx, sum_dy, sum_dy_xhat = gradients
    dweight = None if weight is None else sum_dy_xhat.to(weight.dtype)
    return dx, dweight, None if ctx.bias_dtype is None else sum_dy.to(ctx.bias_dtype)


def _normalized(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    scratch: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """`kernels.normalize`, but also for the empty input of a rank among others."""
    if x.numel() > 0:
        return kernels.normalize(x, mean, var, weight, bias, eps, *(scratch or ()))
    return torch.empty_like(x)
