"""One training step, forward and backward: sweep the batch, absorb its sums, normalise by the outcome.

Shapes: N batch, C channels, any trailing dimensions; n = elements per channel. Per-channel vectors are (C,) in the
dtype of the statistics (float32 or float64).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function

from . import kernels
from .distributed import RankGroup, pool, pool_gradients
from .momentum import Momentum, batch_weight, weighs_whole_batches
from .statistics import Sums, moments
from .update import Coefficients, GradientState, State, absorb_gradient, absorb_precise, absorb_running


class Step(NamedTuple):
    """A forward whose statistics are done.

    Attributes:
        fixed: what to normalise by.
        scratch: (p, x − p) as the statistics left it, for the output to be made in, once; None where there is none.
        ranks: the ranks that the batch was pooled over, and its gradients have to be; None where it was not.
        n: elements per channel of the pooled batch.
        witness: see `distributed.all_gather`.
    """

    fixed: Coefficients
    scratch: tuple[Tensor, Tensor] | None = None
    ranks: RankGroup | None = None
    n: Tensor | None = None
    witness: Tensor | None = None


def running_step(x: Tensor, state: State, momentum: Momentum, ranks: RankGroup | None = None) -> Step:
    """Absorb a batch and normalise by the running statistics, this batch included. See `update.absorb_running`."""
    return _step(absorb_running, x, state, momentum, ranks)


def precise_step(x: Tensor, state: State, momentum: Momentum, ranks: RankGroup | None = None) -> Step:
    """Absorb a batch and normalise by its own statistics, as ``nn.BatchNorm`` does. See `update.absorb_precise`."""
    return _step(absorb_precise, x, state, momentum, ranks)


@torch.no_grad()
def _step(
    absorb: Callable[[State, Sums, Tensor, int | Tensor, bool], Coefficients],
    x: Tensor, state: State, momentum: Momentum, ranks: RankGroup | None,
) -> Step:  # fmt: skip
    batch, scratch = _batch_sums(x, state.shift.dtype)
    samples: int | Tensor = len(x)
    if ranks is not None:
        batch, samples = pool(batch, len(x) if x.numel() > 0 else 0, ranks, state.last_keep)
    weight = batch_weight(momentum, samples, state.samples, state.steps)
    fixed = absorb(state, batch, weight, samples, weighs_whole_batches(momentum))
    if ranks is None:
        return Step(fixed, scratch)
    return Step(_with_pooled_kappa(fixed, batch), scratch, ranks, batch.count, state.last_keep)


@torch.no_grad()
def batch_step(x: Tensor, dtype: torch.dtype, ranks: RankGroup) -> Step:
    """Normalise by the statistics of the batch over all ranks, in `dtype`, and keep none."""
    batch, scratch = _batch_sums(x, dtype)
    batch, _ = pool(batch, 0, ranks, None)
    return Step(_with_pooled_kappa(Coefficients(*moments(batch)), batch), scratch, ranks, batch.count)


def _batch_sums(x: Tensor, dtype: torch.dtype) -> tuple[Sums, tuple[Tensor, Tensor] | None]:
    """Sums of this rank's batch, which with other ranks to pool with may be empty; and the scratch of a `Step`."""
    if x.numel() == 0:
        return Sums(*torch.zeros((4, x.shape[1]), dtype=dtype, device=x.device).unbind()), None
    batch, centred = kernels.batch_sums(x, dtype)
    # About the pivot of this rank, which pooling leaves behind.
    return batch, None if centred is None else (batch.shift, centred)


def _with_pooled_kappa(fixed: Coefficients, batch: Sums) -> Coefficients:
    """κ = 1/n of the pooled batch where x is normalised by its own statistics, which x does not tell."""
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
    fixed = step.fixed
    y: Tensor = _NormalizeExact.apply(
        x, weight, bias, eps, step.scratch, step.ranks,
        fixed.mean, fixed.var, fixed.kappa_mean, fixed.kappa_var, step.witness,
    )  # fmt: skip
    return y


def normalize_running(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, step: Step, eps: float, gradient: GradientState
) -> Tensor:
    """y as in `normalize`; in backward the two sums are running averages too.

        dbias = Σdy    dweight = Σdy·z    dx = weight·rstd·[dy − G0 − z·G1]

    with G0, G1 the running means of dy and dy·z, this batch included, that `update.absorb_gradient` keeps in `gradient`
    with this forward's keep and gain; those of a pooled batch are over all ranks, but for dweight and dbias. Not the
    derivative of a function: a second derivative raises RuntimeError.

    The nearest published relative is MABN: Yan et al., "Towards Stabilizing Batch Statistics in Backward Propagation
    of Batch Normalization", ICLR 2020.
    """
    fixed = step.fixed
    y: Tensor = _NormalizeRunning.apply(
        x, weight, bias, eps, step.scratch, step.ranks,
        fixed.mean, fixed.var, fixed.keep, fixed.gain, step.n, *gradient,
    )  # fmt: skip
    return y


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
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            gradients = _exact_gradients(ctx, dy)
        elif ctx.ranks is None:
            gradients = _differentiable_gradients(ctx, dy)
        else:
            with torch.no_grad():
                gradients = _exact_gradients(ctx, dy)
            gradients = _RefuseSecondDerivative.apply(_POOLED_TWICE, dy, ctx.saved_tensors[0], *gradients)
        return (*gradients, *[None] * 8)


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
        with torch.no_grad():
            sum_dy, sum_dy_xhat = _gradient_sums(dy, x, mean, rstd)
            pooled = sum_dy, sum_dy_xhat
            if ctx.ranks is not None:
                pooled = pool_gradients(sum_dy, sum_dy_xhat, ctx.ranks, ctx.gradient.count_dy)
            n = x.numel() // x.shape[1] if n is None else n
            mean_dy, mean_dy_xhat = absorb_gradient(ctx.gradient, *pooled, keep, gain, n)
            dx = None
            if ctx.needs_input_grad[0]:
                dx = _input_gradient(dy, x, mean, rstd, weight, mean_dy, mean_dy_xhat)
            gradients = (dx, *_affine_gradients(ctx, weight, sum_dy, sum_dy_xhat))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            gradients = _RefuseSecondDerivative.apply(_RUNNING_TWICE, dy, x, *gradients)
        return (*gradients, *[None] * 11)


def _exact_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight and bias."""
    x, weight, mean, rstd, kappa_mean, kappa_var = ctx.saved_tensors
    if kappa_mean is None and ctx.needs_input_grad[0]:
        of_batch, sum_dy, sum_dy_xhat = kernels.batch_norm_gradients(dy, x, mean, rstd, weight)
        return (of_batch, *_affine_gradients(ctx, weight, sum_dy, sum_dy_xhat))
    sum_dy, sum_dy_xhat = _gradient_sums(dy, x, mean, rstd)
    pooled = sum_dy, sum_dy_xhat
    if ctx.ranks is not None:
        # Also where this rank needs no dx: another one may, and waits.
        pooled = pool_gradients(sum_dy, sum_dy_xhat, ctx.ranks, ctx.witness)
    dx: Tensor | None = None
    if ctx.needs_input_grad[0]:
        m0, m1 = _times(kappa_mean, pooled[0]), _times(kappa_var, pooled[1])
        dx = _input_gradient(dy, x, mean, rstd, weight, m0, m1)
    return (dx, *_affine_gradients(ctx, weight, sum_dy, sum_dy_xhat))


def _affine_gradients(
    ctx: Any, weight: Tensor | None, sum_dy: Tensor, sum_dy_xhat: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    dweight = None if weight is None else sum_dy_xhat.to(weight.dtype)
    return dweight, None if ctx.bias_dtype is None else sum_dy.to(ctx.bias_dtype)


def _normalized(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    scratch: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """`kernels.normalize`, but also for the empty input of a rank among others; so are the next two."""
    if x.numel() > 0:
        return kernels.normalize(x, mean, var, weight, bias, eps, *(scratch or ()))
    return torch.empty_like(x)


def _gradient_sums(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    if x.numel() > 0:
        return kernels.gradient_sums(dy, x, mean, rstd)
    return torch.zeros_like(mean), torch.zeros_like(mean)


def _input_gradient(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, m0: Tensor, m1: Tensor
) -> Tensor:
    if x.numel() > 0:
        return kernels.input_gradient(dy, x, mean, rstd, weight, m0, m1)
    return torch.empty_like(x)


def _differentiable_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
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
    return (*(None if t is None else next(found) for t in wanted), dbias)


def _times(kappa: Tensor, total: Tensor) -> Tensor:
    """kappa·total, and 0 where kappa is: a channel that was not finite has totals that are not either."""
    return torch.where(kappa == 0, 0, kappa * total)


_RUNNING_TWICE = (
    "RunningBatchNorm(gradient='running') cannot be differentiated twice: its backward uses running averages, "
    "which no function has as its derivative. Use gradient='exact' for a double backward."
)
_POOLED_TWICE = (
    "a layer with sync=True cannot be differentiated twice while it pools over several processes. "
    "Use sync=False for a double backward."
)


class _RefuseSecondDerivative(Function):
    """Passes gradients on, and explains itself to whoever differentiates them, by dy or by x."""

    @staticmethod
    def forward(ctx: Any, message: str, dy: Tensor, x: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.message = message
        return tuple(None if g is None else g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *second: Tensor) -> None:  # type: ignore[override]
        raise RuntimeError(ctx.message)
