"""One training step: reduce the batch to sums, update the state by them, normalise by the outcome.

With dy = dL/dy, z = (x − mean)·rstd and rstd = (var + eps)^−½, per channel::

    y = z·weight + bias        dbias = Σdy        dweight = Σdy·z

    dx = weight·rstd·[dy − κ·(Σdy + z·Σdy·z)]        exact; κ = gain/count, and κ = 1/n is BatchNorm
    dx = weight·rstd·[dy − s·(G0 + z·G1)]            by running means of dy and dy·z, see `update.update_gradient`

The z term of the exact gradient drops where the variance is held at its floor. It is differentiable twice, unless the
batch was pooled over ranks. Running means are not the derivative of a function: a second derivative raises
RuntimeError. Kept for backward are x and vectors over channels. The sums in dx of a pooled batch run over all ranks: it
is the gradient of the ranks' total loss. dweight and dbias are those of the rank.

Where a backend does all that at once, a step is one call of it forward and one backward. Otherwise, as in compiled code
and where ranks have to be asked in between, it is put together here.

The nearest published relative of the running means is MABN: Yan et al., "Towards Stabilizing Batch Statistics in
Backward Propagation of Batch Normalization", ICLR 2020.

Shapes: N batch, C channels, any trailing dimensions; n = elements per channel. Per-channel vectors are (C,) in the
dtype of the statistics (float32 or float64).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function

from .. import kernels
from ..kernels import cpu_operators, cpu_step
from ..kernels.contract import Reduction, StepKind
from ..momentum import rule_of
from .autograd import CompiledStep, FusedOutput, FusedStep, Normalize, Pooling
from .compat import are_transformed, is_captured
from .masks import blank, fill, real_sums
from .pooling import RankGroup, pool
from .spec import Coefficients, Mode, StepSpec
from .state import Batch, GradientState, LayerState, Sums, moments, without_empty
from .update import is_recomputation, update

TRANSFORMED = (
    "a training step that updates running statistics cannot go through torch.func transforms (grad, vmap, jvp, "
    "...) or forward-mode differentiation. Call eval() on the layer, or "
    "torch.func.replace_all_batch_norm_modules_(model) to normalise by the batch and keep no statistics"
)

_CAPTURED = (
    "a training step that updates running statistics cannot be recorded by torch.export or torch.jit.trace: its "
    "backward would be lost. Call eval() first, or convert the model with batchnormify(model, 'torch')"
)

# What `Function.apply` adds to this is for torch.func, whose transforms `kernels.is_ordinary` excludes.
_apply = super(Function, FusedStep).apply


def step_at_once(layer: Any, x: Tensor) -> Tensor | None:
    """`training_step` on the CPU, where nothing is out of the ordinary; None, with nothing changed, elsewhere.

    The layer's `_spec` and its attributes have to say all about a step; see `kernels.cpu_step`.
    """
    found = cpu_step.extension().forward(layer, x, not is_recomputation())
    if found is None:
        return None
    weight, bias, output = found
    y: Tensor = _apply(x, weight, bias, output)
    return y


def training_step(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: StepSpec, state: LayerState,
    ranks: RankGroup | None = None, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Let a batch enter the state, and normalise it as `spec` says.

    Args:
        x: (N, C, *).
        weight, bias: (C,), or None.
        spec: what to do.
        state: the buffers of the layer, updated in place; `state.gradient` in backward.
        ranks: the processes to pool the batch over.
        mask: (N, *), True for the elements that count, see `masks`; None for all.

    Raises:
        RuntimeError: under ``torch.func.grad``, ``vmap``, ``jvp`` and their like, and for dual numbers of forward-mode
            differentiation; under ``torch.export`` and ``torch.jit.trace``.
    """
    if is_captured():
        raise RuntimeError(_CAPTURED)
    # Before anything is changed: an update in place, and the backward of this library, are nothing to transform.
    if are_transformed(x, weight, bias):
        raise RuntimeError(TRANSFORMED)
    fused = kernels.fused(x, weight, bias, state, spec.momentum) if ranks is None and mask is None else None
    if fused is not None:
        backend, prepared = fused
        y, rows = backend.training_forward(x, weight, bias, prepared, spec, not is_recomputation())
        output = FusedOutput(y, rows, StepKind(None, backend, spec.mode), state.gradient or ())
        stepped: Tensor = FusedStep.apply(x, weight, bias, output)
        return stepped
    if torch.compiler.is_compiling() and ranks is None and mask is None:
        compiled = _compiled_step(x, weight, bias, spec, state)
        if compiled is not None:
            return compiled
    _check_buffers(x, state)
    with torch.no_grad():
        reduction, samples = _reduce(x, state.statistics.shift.dtype, ranks, mask)
        rule = rule_of(spec.momentum)
        share = rule.weight(samples, state.statistics.samples, state.statistics.steps)
        # A rule of somebody else's may return a number, or a tensor of another shape or dtype.
        share = torch.as_tensor(share, device=x.device).to(reduction.sums.shift).expand_as(reduction.sums.shift)
        var, coefficients = update(state, Batch(reduction.sums, samples, share, rule.whole_batches), spec)
        n = None
        if ranks is not None or mask is not None:
            n = reduction.sums.count
            if spec.mode is Mode.BATCH:
                coefficients = _with_kappa(coefficients, n)
    statistics = _Statistics(var, coefficients, Pooling(ranks, reduction.centred), n, state.gradient)
    return _normalize(x, weight, bias, spec.eps, statistics, mask)


def _compiled_step(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: StepSpec, state: LayerState
) -> Tensor | None:
    """A step by operators that compilers do not look into; None where they are to trace it."""
    rule = rule_of(spec.momentum)
    code = rule.code()
    buffers = *state.statistics, *(state.noise or ()), *(state.gradient or ())
    if code is None or kernels.forced_backend() not in (None, "cpu"):
        return None
    if not cpu_operators.supports(x, weight, bias, buffers):
        return None
    constants = cpu_operators.constants_of(spec.eps, spec.law, code, rule.whole_batches)
    y: Tensor = CompiledStep.apply(x, weight, bias, spec.mode, constants, *buffers)
    return y


def _check_buffers(x: Tensor, state: LayerState) -> None:
    """Before anything is changed: the buffers of a layer are beside x, and all of as many channels."""
    shift, channels = state.statistics.shift, x.shape[1]
    if shift.device != x.device:
        raise RuntimeError(f"expected an input on {shift.device}, where the layer is, got one on {x.device}")
    if len(shift) == len(state.statistics.running_mean) == len(state.statistics.running_var) == channels:
        return
    lengths = ", ".join(f"{name} {len(getattr(state.statistics, name))}" for name in ("running_mean", "running_var"))
    raise RuntimeError(
        f"buffers of different numbers of channels: {lengths}, the state {len(shift)}, the input {channels}. To resize "
        "a layer, assign running_mean and running_var as attributes, not their .data"
    )


def normalize_by_batch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype,
    ranks: RankGroup | None, mask: Tensor | None,
) -> Tensor:  # fmt: skip
    """Normalise by the statistics of the batch over all ranks, taken in `dtype`, and keep none."""
    with torch.no_grad():
        reduction, _ = _reduce(x, dtype, ranks, mask)
        mean, var = moments(reduction.sums)
        n = reduction.sums.count
        coefficients = _with_kappa(Coefficients(mean, (var + eps).rsqrt()), n)
    return _normalize(x, weight, bias, eps, _Statistics(var, coefficients, Pooling(ranks, reduction.centred), n), mask)


def normalize_by_itself(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, mean: Tensor, var: Tensor
) -> Tensor:
    """Normalise by the mean and the variance of x, which are known, with the gradient that this has."""
    coefficients = Coefficients(mean, (var + eps).rsqrt())
    return _normalize(x, weight, bias, eps, _Statistics(var, coefficients))


class _Statistics(NamedTuple):
    """What a batch is normalised by, and what its backward goes by; see `Normalize` for the names."""

    var: Tensor
    coefficients: Coefficients
    pooling: Pooling = Pooling()
    n: Tensor | None = None
    gradient: GradientState | None = None


def _normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, by: _Statistics, mask: Tensor | None = None
) -> Tensor:
    if mask is not None:
        x = fill(x, mask, by.coefficients.mean)
    tensors = *by.coefficients, *(by.gradient or ())
    y: Tensor = Normalize.apply(x, weight, bias, eps, by.pooling, by.n, by.var, *tensors)
    return y if mask is None else blank(y, mask)


def _reduce(
    x: Tensor, dtype: torch.dtype, ranks: RankGroup | None, mask: Tensor | None
) -> tuple[Reduction, int | Tensor]:
    """The sums of the batch, pooled over the ranks where there are any, and its samples."""
    samples: int | Tensor = len(x) if x.numel() > 0 else 0
    if mask is not None:
        sums, samples = real_sums(x, mask, dtype)
        reduction = Reduction(sums)
    elif x.numel() == 0:  # of a rank among others
        reduction = Reduction(Sums(*torch.zeros((4, x.shape[1]), dtype=dtype, device=x.device).unbind()))
    else:
        reduction = kernels.batch_sums(x, dtype)
    if ranks is not None:
        sums, samples = pool(reduction.sums, samples, ranks)
        reduction = reduction._replace(sums=sums)
    elif mask is not None:
        reduction = reduction._replace(sums=without_empty(reduction.sums))
    return reduction, samples


def _with_kappa(coefficients: Coefficients, n: Tensor) -> Coefficients:
    """κ = 1/n of a pooled or masked batch that is normalised by its own statistics: x does not tell n."""
    kappa = n.reciprocal()
    # A copy, as torch.compile takes no tensor twice.
    return coefficients._replace(kappa_mean=kappa, kappa_var=kappa.clone())
