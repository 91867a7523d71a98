"""Absorbing a batch into the buffers of a layer: C-sized, in place, opaque to compilers.

Shapes: C channels; all tensors are (C,) in the dtype of the statistics (float32 or float64) unless stated. n is the
number of elements per channel of the batch.

Traced code that writes buffers in place compiles to wrong gradients without a warning (torch 2.13): the backward
recomputes its coefficients from buffers that the forward has already overwritten. So each update is one operator,
which the compiler cannot look into and whose results it has to save. Eager mode calls the function itself, which
spares the dispatch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import kernels
from .law import Law, bounded, limited, measured_noise, noise_of_batch, trust
from .statistics import GradientState, NoiseState, State, Sums, combine, moments, nonzero, unbiased


class Coefficients(NamedTuple):
    """All that a forward fixes for its normalisation and its exact backward: fresh tensors, never views of buffers.

    Attributes:
        mean, var: what x is normalised by; var is biased.
        kappa_mean: derivative of mean by each element of x, gain/count.
        kappa_var: the same factor in the variance term; 0 where the variance is held at its floor.

    The last two are None where x is normalised by its own statistics: then κ = 1/n.
    """

    mean: Tensor
    var: Tensor
    kappa_mean: Tensor | None = None
    kappa_var: Tensor | None = None


class RunningCoefficients(NamedTuple):
    """The same for a backward by running means.

    Attributes:
        mean, var: what x is normalised by, within the limits of the `law`.
        trust: ρ, the weight of the batch in the running means of dy and dy·z; 0 where the batch was not finite.
        offset: by how much the mean of the batch is above `mean`.
        batch_std: its standard deviation.
    """

    mean: Tensor
    var: Tensor
    trust: Tensor
    offset: Tensor
    batch_std: Tensor


def absorb_exact(
    state: State, batch: Sums, weight: Tensor, samples: int | Tensor, whole_batches: bool, law: Law
) -> Coefficients:
    """Absorb a batch; normalise by the state, this batch included, as the exact gradient wants it.

    mean = shift + sums/count, var = sqrs/count − (sums/count)², but at least 0.01 while fewer than 20 samples have
    been seen; `running_mean` and `running_var` are set to these.

    Args:
        state: updated in place.
        batch: the sums of the batch.
        weight: a, the weight of the batch.
        samples: N, samples in the batch; a tensor, (), where it was pooled over ranks, and 0 where all were empty.
        whole_batches: whether the batch as a whole weighs a (gain = a·(count/debias)/n), or each of its elements
            (gain = a).
        law: its constants; there is no limit to the lag here.
    """
    return Coefficients(*_call("absorb_exact", samples, *state, *batch, weight, samples, whole_batches, list(law)))


def absorb_running(
    state: State, noise: NoiseState, batch: Sums, weight: Tensor, samples: int | Tensor, whole_batches: bool, law: Law
) -> RunningCoefficients:
    """The same within the limits of the law; R, in `noise`, is updated too."""
    arguments = *state, *noise, *batch, weight, samples, whole_batches, list(law)
    return RunningCoefficients(*_call("absorb_running", samples, *arguments))


def absorb_precise(
    state: State, batch: Sums, weight: Tensor, samples: int | Tensor, whole_batches: bool, law: Law
) -> Coefficients:
    """Absorb a batch; normalise by its own statistics.

    `running_mean` and `running_var` become the pooled mean and unbiased variance. The arguments are those of
    `absorb_exact`.
    """
    return Coefficients(*_call("absorb_precise", samples, *state, *batch, weight, samples, whole_batches, list(law)))


def absorb_gradient(
    state: GradientState, sums: tuple[Tensor, Tensor], rstd: Tensor, fixed: RunningCoefficients, n: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Absorb the sums Σdy and Σdy·z of a backward pass; return the running means G0 and G1, `law.bounded`.

    A sum S in `state` becomes (1 − ρ)·S + ρ·(mean over the batch), `count_dy` (1 − ρ)·count_dy + ρ, and the means are
    their quotients. A channel whose sums are not finite (a GradScaler's overflow) leaves its state as it was.
    """
    m0, m1 = _call("absorb_gradient", n, *state, *sums, rstd, fixed.trust, fixed.offset, fixed.batch_std, n)
    return m0, m1


def _absorb_exact(*arguments: Any) -> tuple[Tensor, ...]:
    state, batch, weight, batch_samples, whole_batches, law = _unpack(arguments)
    absorbs = not is_recomputation()
    if (backend := kernels.updating(state)) is not None:
        return tuple(backend.absorb(state, None, batch, weight, batch_samples, whole_batches, True, absorbs, law))
    if absorbs:
        _absorb_into_view(state, batch, weight, batch_samples, whole_batches, law)
    # By what evaluation takes, also in a channel that keeps its state, statistics written by hand included.
    mean, var = state.running_mean.clone(), state.running_var.clone()
    kappa = state.last_gain / nonzero(state.count)
    floored = (var <= law.variance_floor) & (state.samples < law.warmup_samples)
    return mean, var, kappa, kappa.masked_fill(floored, 0)


def _absorb_running(*arguments: Any) -> tuple[Tensor, ...]:
    begin, end = len(State._fields), len(State._fields) + len(NoiseState._fields)
    noise = NoiseState(*arguments[begin:end])
    state, batch, weight, batch_samples, whole_batches, law = _unpack((*arguments[:begin], *arguments[end:]))
    absorbs = not is_recomputation()
    if (backend := kernels.updating((*state, *noise))) is not None:
        return tuple(backend.absorb(state, noise, batch, weight, batch_samples, whole_batches, True, absorbs, law))
    batch_mean, batch_var = moments(batch)
    if absorbs:
        ignored = _absorb_into_view(state, batch, weight, batch_samples, whole_batches, law)
        variance = torch.maximum(state.running_var, batch_var)
        measured = measured_noise(noise, batch_mean, variance, batch_samples, law.window)
        for buffer, value in zip(noise, measured):
            _set_unless(ignored, buffer, value)
    mean, var = state.running_mean.clone(), state.running_var.clone()
    ignored, of_means = state.last_gain == 0, noise_of_batch(noise.noise, batch_samples)
    if law.limits:
        nearer = limited(mean, var, batch_mean, batch_var, of_means, law)
        mean, var = (torch.where(ignored, old, new) for old, new in zip((mean, var), nearer))
    # What is not finite may not reach a backward that it has no part in.
    of_batch = trust(1 - state.last_keep, of_means, law), batch_mean - mean, batch_var.sqrt()
    return mean, var, *(vector.masked_fill(ignored, 0) for vector in of_batch)


def _absorb_precise(*arguments: Any) -> tuple[Tensor, ...]:
    state, batch, weight, batch_samples, whole_batches, law = _unpack(arguments)
    absorbs = not is_recomputation()
    if (backend := kernels.updating(state)) is not None:
        return tuple(backend.absorb(state, None, batch, weight, batch_samples, whole_batches, False, absorbs, law))
    if absorbs:
        ignored = _absorb(state, batch, weight, batch_samples, whole_batches)
        mean, var = moments(Sums(*state[:4]))
        _set_unless(ignored, state.running_mean, mean)
        _set_unless(ignored, state.running_var, unbiased(var, state.count, state.count_sqrs))
    return moments(batch)


def _absorb_gradient(*arguments: Any) -> tuple[Tensor, ...]:
    fields = len(GradientState._fields)
    state, (sum_dy, sum_dy_xhat, rstd, weight, offset, batch_std, n) = (
        GradientState(*arguments[:fields]),
        arguments[fields:],
    )
    if (backend := kernels.updating(state)) is not None:
        return tuple(backend.absorb_gradient(state, sum_dy, sum_dy_xhat, rstd, weight, offset, batch_std, n))
    of_batch = sum_dy / n, sum_dy_xhat / n
    # Infinity and NaN times 0 are NaN, which equals nothing. What the forward has ignored is normalised by constants,
    # and no gradient flows through those.
    ignored = ((sum_dy + sum_dy_xhat) * 0 != 0) | (weight == 0)
    weight = weight.masked_fill(ignored, 0)
    for buffer, new in zip(state, (*of_batch, torch.ones_like(weight))):
        buffer.lerp_(new.masked_fill(ignored, 0), weight)
    count = nonzero(state.count_dy)
    means = state.sum_dy / count, state.sum_dy_xhat / count
    return tuple(mean.masked_fill(ignored, 0) for mean in bounded(means, of_batch, offset * rstd, batch_std * rstd))


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
    absorbed = ignored.logical_not()
    if isinstance(batch_samples, Tensor):
        state.samples.addcmul_(absorbed.to(batch_samples.dtype), batch_samples)
    else:
        state.samples.add_(absorbed, alpha=batch_samples)
    state.steps.add_(absorbed)
    state.num_batches_tracked.add_(batch_samples > 0)
    state.last_keep.copy_(keep)
    state.last_gain.copy_(gain)
    return ignored


def _absorb_into_view(
    state: State, batch: Sums, weight: Tensor, batch_samples: int | Tensor, whole_batches: bool, law: Law
) -> Tensor:
    """`_absorb`, and the view of the state that is normalised by: the biased variance, with its floor."""
    ignored = _absorb(state, batch, weight, batch_samples, whole_batches)
    mean, var = moments(Sums(*state[:4]))
    floored = (var < law.variance_floor) & (state.samples < law.warmup_samples)
    _set_unless(ignored, state.running_mean, mean)
    _set_unless(ignored, state.running_var, var.masked_fill_(floored, law.variance_floor))
    return ignored


def _set_unless(ignored: Tensor, buffer: Tensor, value: Tensor) -> None:
    buffer.copy_(torch.where(ignored, buffer, value))


def _unpack(arguments: Sequence[Any]) -> tuple[State, Sums, Tensor, int | Tensor, bool, Law]:
    state, batch = len(State._fields), len(Sums._fields)
    weight, batch_samples, whole_batches, law = arguments[state + batch :]
    sums = Sums(*arguments[state : state + batch])
    return State(*arguments[:state]), sums, weight, batch_samples, whole_batches, Law(*law)


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
    + ", Tensor weight, NUMBER batch_samples, bool whole_batches, float[] law"
)
_STATE, _STATE_AND_NOISE = _mutated(State._fields), _mutated((*State._fields, *NoiseState._fields))
# Every name of a schema is one of its own.
_GRADIENT = ", ".join(
    f"Tensor {name}" for name in ("batch_sum_dy", "batch_sum_dy_xhat", "rstd", "trust", "offset", "batch_std")
)
_GRADIENT += ", NUMBER n"
_UPDATES: dict[str, Callable[..., Any]] = {
    "absorb_exact": _absorb_exact,
    "absorb_running": _absorb_running,
    "absorb_precise": _absorb_precise,
    "absorb_gradient": _absorb_gradient,
}
_LIBRARY = torch.library.Library("runningbn", "DEF")
for _name, _arguments, _outputs in (
    ("absorb_exact", f"{_STATE}, {_BATCH}", len(Coefficients._fields)),
    ("absorb_running", f"{_STATE_AND_NOISE}, {_BATCH}", len(RunningCoefficients._fields)),
    ("absorb_precise", f"{_STATE}, {_BATCH}", 2),
    ("absorb_gradient", f"{_mutated(GradientState._fields)}, {_GRADIENT}", 2),
):
    for _operator, _number in ((_name, "SymInt"), (f"{_name}_pooled", "Tensor")):
        _schema = f"{_operator}({_arguments}) -> ({', '.join(['Tensor'] * _outputs)})"
        _LIBRARY.define(_schema.replace("NUMBER", _number))
        _LIBRARY.impl(_operator, _UPDATES[_name], "CompositeExplicitAutograd")
        torch.library.register_fake(f"runningbn::{_operator}", _per_channel(_outputs))
