"""Absorbing a batch into the buffers of a layer: C-sized, in place, opaque to compilers.

Shapes: C channels; all tensors are (C,) in the dtype of the statistics (float32 or float64) unless stated. n is the
number of elements per channel of the batch.

Traced code that writes buffers in place compiles to wrong gradients without a warning (torch 2.13): the backward
recomputes its coefficients from buffers that the forward has already overwritten. So each update is one operator,
which the compiler cannot look into and whose results it has to save. Eager mode calls the function itself, which
spares the dispatch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import kernels
from .statistics import GradientState, State, Sums, combine, moments, unbiased

# fastai's guard: while fewer samples than this have been seen, a variance below the floor is not trusted.
WARMUP_SAMPLES = 20
VARIANCE_FLOOR = 0.01
# A batch of n elements is trusted by n/(n + PRIOR_ELEMENTS): for what it says of means that the weights move, which
# running averages know exactly but late.
PRIOR_ELEMENTS = 64
# Where running statistics may lag behind, by 1 + LAG_ELEMENTS/n times what they may behind a very large batch.
LAG_ELEMENTS = 512


class Coefficients(NamedTuple):
    """All that one forward fixes for its normalisation and its backward: fresh tensors, never views of buffers.

    Attributes:
        mean, var: what x is normalised by; var is biased.
        kappa_mean: derivative of mean by each element of x, gain/count.
        kappa_var: the same factor in the variance term; 0 where the variance is held at its floor.
        keep, gain: what `absorb_gradient` absorbs the backward sums with: 1 − ρ and ρ/n, or 1 and 0 where the batch was
            not finite. So the means of dy and dy·z are lerped towards those of the batch, by ρ = max(a, `trusted`), or
            by a where there is no limit to the lag.

    The last four are None where x is normalised by its own statistics: then κ = 1/n.
    """

    mean: Tensor
    var: Tensor
    kappa_mean: Tensor | None = None
    kappa_var: Tensor | None = None
    keep: Tensor | None = None
    gain: Tensor | None = None


def absorb_running(
    state: State, batch: Sums, weight: Tensor, samples: int | Tensor, whole_batches: bool, max_lag: float = math.inf
) -> Coefficients:
    """Absorb a batch; normalise by the state, this batch included.

    mean = shift + sums/count, var = sqrs/count − (sums/count)², but at least 0.01 while fewer than 20 samples have
    been seen; `running_mean` and `running_var` are set to these. What to normalise by is brought `within_reach`.

    Args:
        state: updated in place.
        batch: the sums of the batch.
        weight: a, the weight of the batch.
        samples: N, samples in the batch; a tensor, (), where it was pooled over ranks, and 0 where all were empty.
        whole_batches: whether the batch as a whole weighs a (gain = a·(count/debias)/n), or each of its elements
            (gain = a).
        max_lag: how far mean and std of a large batch may be from 0 and above 1 when it is normalised; without a limit,
            the backward means do not trust the batch either.
    """
    return Coefficients(*_call("absorb_running", samples, *state, *batch, weight, samples, whole_batches, max_lag))


def absorb_precise(
    state: State, batch: Sums, weight: Tensor, samples: int | Tensor, whole_batches: bool
) -> Coefficients:
    """Absorb a batch; normalise by its own statistics.

    `running_mean` and `running_var` become the pooled mean and unbiased variance. The arguments are those of
    `absorb_running`.
    """
    return Coefficients(*_call("absorb_precise", samples, *state, *batch, weight, samples, whole_batches))


def absorb_gradient(
    state: GradientState, sum_dy: Tensor, sum_dy_xhat: Tensor, keep: Tensor, gain: Tensor, n: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Absorb the sums of a backward pass; return their running means G0 = sum_dy/count_dy, G1 = sum_dy_xhat/count_dy.

    A channel whose sums are not finite (a GradScaler's overflow) leaves its state as it was.
    """
    mean_dy, mean_dy_xhat = _call("absorb_gradient", n, *state, sum_dy, sum_dy_xhat, keep, gain, n)
    return mean_dy, mean_dy_xhat


def _absorb_running(*arguments: Any) -> tuple[Tensor, ...]:
    *arguments, max_lag = arguments  # type: ignore[assignment]
    state, batch, weight, batch_samples, whole_batches = _unpack(arguments)
    if not is_recomputation():
        if (backend := kernels.updating(state)) is not None:
            return tuple(backend.absorb(state, batch, weight, batch_samples, whole_batches, True, max_lag))
        ignored = _absorb(state, batch, weight, batch_samples, whole_batches)
        mean, var = moments(Sums(*state[:4]))
        floored = (var < VARIANCE_FLOOR) & (state.samples < WARMUP_SAMPLES)
        _set_unless(ignored, state.running_mean, mean)
        _set_unless(ignored, state.running_var, var.masked_fill_(floored, VARIANCE_FLOOR))
    # By what evaluation takes, also in a channel that keeps its state, statistics written by hand included.
    mean, var = state.running_mean.clone(), state.running_var.clone()
    kappa = state.last_gain / state.count.clamp_min(torch.finfo(var.dtype).tiny)
    floored = (var <= VARIANCE_FLOOR) & (state.samples < WARMUP_SAMPLES)
    ignored = state.last_gain == 0
    trust = 1 - state.last_keep
    if max_lag < math.inf:
        nearer = within_reach(mean, var, batch, max_lag)
        mean, var = (torch.where(ignored, old, new) for old, new in zip((mean, var), nearer))
        trust = torch.maximum(trust, trusted(batch.count))
    trust.masked_fill_(ignored, 0)
    return mean, var, kappa, kappa.masked_fill(floored, 0), 1 - trust, trust / batch.count.clamp_min(1)


def trusted(n: Tensor) -> Tensor:
    """n/(n + 64), how far to believe the mean over a batch of n elements rather than a running mean that may lag."""
    return n / (n + PRIOR_ELEMENTS)


def within_reach(mean: Tensor, var: Tensor, batch: Sums, max_lag: float) -> tuple[Tensor, Tensor]:
    """The nearest mean and the nearest var, from above, by which a batch comes out with |mean| ≤ d and std ≤ 1 + d.

    d = max_lag·(1 + 512/n). A step of the optimizer can move the means of all channels at once by more than their std,
    and weights that have begun to diverge make the variance many times what it was before running averages know of it.
    There and no farther the batch, noisy as it is, knows better.
    """
    batch_mean, batch_var = moments(batch)
    lag = max_lag * (1 + LAG_ELEMENTS / batch.count.clamp_min(1))
    var = torch.maximum(var, batch_var / (1 + lag).square())
    reach = lag * var.sqrt()
    return torch.clamp(mean, batch_mean - reach, batch_mean + reach), var


def _absorb_precise(*arguments: Any) -> tuple[Tensor, ...]:
    state, batch, weight, batch_samples, whole_batches = _unpack(arguments)
    if not is_recomputation():
        if (backend := kernels.updating(state)) is not None:
            return tuple(backend.absorb(state, batch, weight, batch_samples, whole_batches, False))
        ignored = _absorb(state, batch, weight, batch_samples, whole_batches)
        mean, var = moments(Sums(*state[:4]))
        _set_unless(ignored, state.running_mean, mean)
        _set_unless(ignored, state.running_var, unbiased(var, state.count, state.count_sqrs))
    return moments(batch)


def _absorb_gradient(*arguments: Any) -> tuple[Tensor, ...]:
    state, (sum_dy, sum_dy_xhat, keep, gain, n) = GradientState(*arguments[:3]), arguments[3:]
    if (backend := kernels.updating(state)) is not None:
        return tuple(backend.absorb_gradient(state, sum_dy, sum_dy_xhat, keep, gain, n))
    # Infinity and NaN times 0 are NaN, which equals nothing.
    ignored = (sum_dy + sum_dy_xhat) * 0 != 0
    keep, gain = keep.masked_fill(ignored, 1), gain.masked_fill(ignored, 0)
    state.sum_dy.mul_(keep).addcmul_(gain, sum_dy.masked_fill(ignored, 0))
    state.sum_dy_xhat.mul_(keep).addcmul_(gain, sum_dy_xhat.masked_fill(ignored, 0))
    if isinstance(n, Tensor):
        state.count_dy.mul_(keep).addcmul_(gain, n)
    else:
        state.count_dy.mul_(keep).add_(gain, alpha=n)
    count = state.count_dy.clamp_min(torch.finfo(gain.dtype).tiny)
    return state.sum_dy / count, state.sum_dy_xhat / count


def is_recomputation() -> bool:
    """Whether this thread is inside a backward pass, where a forward is one that activation checkpointing repeats."""
    # There is no public sign of it; torch.utils.checkpoint itself asks the same function. Asked here, inside the
    # operators, it holds for compiled code, too.
    return bool(torch._C._current_graph_task_id() != -1)


def _absorb(state: State, batch: Sums, weight: Tensor, batch_samples: int | Tensor, whole_batches: bool) -> Tensor:
    """Lerp a batch into the linear state; return which channels were ignored.

    Those keep their state bit for bit: keep = 1 and gain = 0. Every operation on so few numbers costs more in its call
    than in its arithmetic, hence masks on what goes in rather than a choice for everything that comes out.
    """
    # Any infinity or NaN among the elements reaches the sum of squares, and so must a batch so far away that its
    # squares about the state's pivot overflow. None of it may enter, for 0·NaN is NaN.
    distance = batch.shift - state.shift
    finite = torch.addcmul(batch.sqrs, batch.count, distance * distance) < torch.inf
    not_finite = finite.logical_not()
    shift, sums, sqrs = (part.masked_fill(not_finite, 0) for part in batch[:3])
    batch = Sums(shift, sums, sqrs, batch.count)
    weight = weight.masked_fill(not_finite, 0)
    ignored = weight == 0
    keep = 1 - weight
    # Elements per unit of batch weight. It becomes that of the batch where nothing was seen yet, and where statistics
    # were taken over from elsewhere, without a count: the batch then weighs exactly a, and those after it weigh as if
    # all before had been of its size.
    tiny = torch.finfo(weight.dtype).tiny
    unit = state.count.clamp_min(tiny) / state.debias.clamp_min(tiny)
    new_unit = torch.where((state.count_sqrs == 0) & ~ignored, batch.count, unit)
    keep_sums = keep * new_unit / unit
    gain = weight * new_unit / batch.count if whole_batches else weight
    new = combine(Sums(*state[:4]), batch, keep_sums, gain)
    count_sqrs = torch.addcmul(keep_sums.square() * state.count_sqrs, gain.square(), batch.count)
    debias = torch.addcmul(weight, keep, state.debias)
    for buffer, value in zip(state, (*new, count_sqrs, debias)):
        buffer.copy_(value)
    if isinstance(batch_samples, Tensor):
        state.samples.addcmul_(finite.to(batch_samples.dtype), batch_samples)
    else:
        state.samples.add_(finite, alpha=batch_samples)
    state.steps.add_(finite)
    state.num_batches_tracked.add_(batch_samples > 0)
    state.last_keep.copy_(keep)
    state.last_gain.copy_(gain)
    return ignored


def _set_unless(ignored: Tensor, buffer: Tensor, value: Tensor) -> None:
    buffer.copy_(torch.where(ignored, buffer, value))


def _unpack(arguments: Sequence[Any]) -> tuple[State, Sums, Tensor, int | Tensor, bool]:
    state, batch = len(State._fields), len(Sums._fields)
    weight, batch_samples, whole_batches = arguments[state + batch :]
    return State(*arguments[:state]), Sums(*arguments[state : state + batch]), weight, batch_samples, whole_batches


def _call(name: str, number: int | Tensor, *arguments: Any) -> Any:
    """An update whose `number` of samples or elements is known to the host or, pooled over ranks, a tensor."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.runningbn, f"{name}_pooled" if isinstance(number, Tensor) else name)(*arguments)
    return _UPDATES[name](*arguments)


def _mutated(fields: tuple[str, ...]) -> str:
    return ", ".join(f"Tensor(buffer{i}!) {name}" for i, name in enumerate(fields))


def _per_channel(outputs: int) -> Callable[..., Any]:
    """The shapes an update returns, for tracing: so many vectors like its first buffer."""
    return lambda *arguments: tuple(torch.empty_like(arguments[0]) for _ in range(outputs))


_BATCH = (
    ", ".join(f"Tensor batch_{name}" for name in Sums._fields)
    + ", Tensor weight, NUMBER batch_samples, bool whole_batches"
)
_GRADIENT = "Tensor batch_sum_dy, Tensor batch_sum_dy_xhat, Tensor keep, Tensor gain, NUMBER n"
_UPDATES: dict[str, Callable[..., Any]] = {
    "absorb_running": _absorb_running,
    "absorb_precise": _absorb_precise,
    "absorb_gradient": _absorb_gradient,
}
_LIBRARY = torch.library.Library("runningbn", "DEF")
for _name, _arguments, _outputs in (
    ("absorb_running", f"{_mutated(State._fields)}, {_BATCH}, float max_lag", len(Coefficients._fields)),
    ("absorb_precise", f"{_mutated(State._fields)}, {_BATCH}", 2),
    ("absorb_gradient", f"{_mutated(GradientState._fields)}, {_GRADIENT}", 2),
):
    for _operator, _number in ((_name, "SymInt"), (f"{_name}_pooled", "Tensor")):
        _schema = f"{_operator}({_arguments}) -> ({', '.join(['Tensor'] * _outputs)})"
        _LIBRARY.define(_schema.replace("NUMBER", _number))
        _LIBRARY.impl(_operator, _UPDATES[_name], "CompositeExplicitAutograd")
        torch.library.register_fake(f"runningbn::{_operator}", _per_channel(_outputs))
