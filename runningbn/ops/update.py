"""The update of the state by a batch: C-sized, in place, opaque to compilers.

Shapes: C channels; all tensors are (C,) in the dtype of the statistics (float32 or float64) unless stated. n is the
number of elements per channel of the batch.

Traced code that writes buffers in place compiles to wrong gradients without a warning (seen in torch 2.13 and 2.14):
the backward recomputes its coefficients from buffers that the forward has already overwritten. So each update is one
operator, which the compiler cannot look into and whose results it has to save. Eager mode calls the function itself,
which spares the dispatch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import kernels
from ..kernels.contract import GradientSums
from ..kernels.cpu_operators import written
from .compat import current_backward
from .law import Law, bounded, limited, measured_noise, noise_of_batch, trust
from .spec import Coefficients, Mode, StepSpec
from .state import Batch, GradientState, LayerState, NoiseState, State, Sums, combine, moments, nonzero, unbiased

Fields = TypeVar("Fields", bound=tuple[Any, ...])


def update(state: LayerState, batch: Batch, spec: StepSpec) -> tuple[Tensor, Coefficients]:
    """Let a batch enter the state; return the variance that it is to be normalised by, and the coefficients.

    `Mode.BATCH` normalises by the statistics of the batch; `running_mean` and `running_var` become the pooled mean and
    the unbiased variance. The other modes normalise by the state, this batch included: mean = shift + sums/count,
    var = sqrs/count − (sums/count)², but at least 0.01 while fewer than 20 samples have been seen; `running_mean` and
    `running_var` are set to these. `Mode.RUNNING` does so within the limits of the law, and updates R in `state.noise`.

    Args:
        state: updated in place.
        batch: the sums of the batch, and how much it weighs.
        spec: the mode, eps and the law; the momentum is in `batch.weight` already.
    """
    # Not `state.forward_buffers`: older compilers do not trace a property of a tuple.
    noise = () if state.noise is None else state.noise
    arguments = *state.statistics, *noise, *batch.sums, batch.weight, batch.samples, batch.whole, *spec.law
    mean, var, *others = _call(f"update_{spec.mode.label}", batch.samples, *arguments)
    values = mean, (var + spec.eps).rsqrt(), *others
    return var, Coefficients(**dict(zip(spec.mode.coefficients, values)))


def update_gradient(
    state: GradientState, sums: GradientSums, coefficients: Coefficients, n: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Let the sums Σdy and Σdy·z of a backward enter the state; return the running means G0 and G1, `law.bounded`.

    A sum S in `state` becomes (1 − ρ)·S + ρ·(mean over the batch), `count_dy` (1 − ρ)·count_dy + ρ, and the means are
    their quotients. A channel whose sums are not finite (a GradScaler's overflow) leaves its state as it was.
    """
    of_batch = coefficients.rstd, coefficients.trust, coefficients.offset, coefficients.batch_std
    m0, m1 = _call("update_gradient", n, *state, *sums, *of_batch, n)
    return m0, m1


def _update(mode: Mode, *arguments: Any) -> tuple[Tensor, ...]:
    """The operators of all modes: mean and var, then the other coefficients."""
    state, batch, law = _unpack(mode, arguments)
    updates = not is_recomputation()
    if (backend := kernels.updating(state.forward_buffers)) is not None:
        return backend.update(mode, state, batch, law, updates)
    return _IN_TORCH[mode](state, batch, law, updates)


def _update_batch(state: LayerState, batch: Batch, law: Law, updates: bool) -> tuple[Tensor, ...]:
    if updates:
        statistics = state.statistics
        ignored = _enter(statistics, batch)
        mean, var = moments(statistics.linear)
        _set_unless(ignored, statistics.running_mean, mean)
        _set_unless(ignored, statistics.running_var, unbiased(var, statistics.count, statistics.count_sqrs))
    return moments(batch.sums)


def _update_exact(state: LayerState, batch: Batch, law: Law, updates: bool) -> tuple[Tensor, ...]:
    statistics = state.statistics
    if updates:
        _enter_and_normalise_by(statistics, batch, law)
    # By what evaluation takes, also in a channel that keeps its state, statistics written by hand included.
    mean, var = statistics.running_mean.clone(), statistics.running_var.clone()
    kappa = statistics.last_gain / nonzero(statistics.count)
    floored = (var <= law.variance_floor) & (statistics.samples < law.warmup_samples)
    return mean, var, kappa, kappa.masked_fill(floored, 0)


def _update_running(state: LayerState, batch: Batch, law: Law, updates: bool) -> tuple[Tensor, ...]:
    statistics, noise = state.statistics, state.noise
    assert noise is not None
    batch_mean, batch_var = moments(batch.sums)
    if updates:
        ignored = _enter_and_normalise_by(statistics, batch, law)
        variance = torch.maximum(statistics.running_var, batch_var)
        measured = measured_noise(noise, batch_mean, variance, batch.samples, law.window)
        for buffer, value in zip(noise, measured):
            _set_unless(ignored, buffer, value)
    mean, var = statistics.running_mean.clone(), statistics.running_var.clone()
    ignored, of_means = statistics.last_gain == 0, noise_of_batch(noise.noise, batch.samples)
    if law.limits:
        nearer = limited(mean, var, batch_mean, batch_var, of_means, law)
        mean, var = (torch.where(ignored, old, new) for old, new in zip((mean, var), nearer))
    # What is not finite may not reach a backward that it has no part in.
    of_batch = trust(1 - statistics.last_keep, of_means, law), batch_mean - mean, batch_var.sqrt()
    return mean, var, *(vector.masked_fill(ignored, 0) for vector in of_batch)


_IN_TORCH = {Mode.BATCH: _update_batch, Mode.EXACT: _update_exact, Mode.RUNNING: _update_running}


def _update_gradient(*arguments: Any) -> tuple[Tensor, ...]:
    given = iter(arguments)
    state, sums = _next_fields(GradientState, given), _next_fields(GradientSums, given)
    rstd, weight, offset, batch_std, n = given
    if (backend := kernels.updating(state)) is not None:
        coefficients = Coefficients(rstd, rstd, trust=weight, offset=offset, batch_std=batch_std)
        return backend.update_gradient(state, sums, coefficients, n)
    of_batch = sums.sum_dy / n, sums.sum_dy_xhat / n
    # Infinity and NaN times 0 are NaN, which equals nothing. What the forward has ignored is normalised by constants,
    # and no gradient flows through those.
    ignored = ((sums.sum_dy + sums.sum_dy_xhat) * 0 != 0) | (weight == 0)
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
    return bool(current_backward() != -1)


def _enter(state: State, batch: Batch) -> Tensor:
    """Lerp a batch into the linear state; return which channels were ignored.

    Those keep their state bit for bit: keep = 1 and gain = 0. Every operation on so few numbers costs more in its call
    than in its arithmetic, hence masks on what goes in rather than a choice for everything that comes out.
    """
    # Any infinity or NaN among the elements reaches the sum of squares, and so must a batch so far away that its
    # squares about the state's pivot overflow. None of it may enter, for 0·NaN is NaN.
    new = batch.sums
    distance = new.shift - state.shift
    finite = torch.addcmul(new.sqrs, new.count, distance * distance) < torch.inf
    not_finite = finite.logical_not()
    shift, sums, sqrs = (part.masked_fill(not_finite, 0) for part in (new.shift, new.sums, new.sqrs))
    new = Sums(shift, sums, sqrs, new.count)
    weight = batch.weight.masked_fill(not_finite, 0)
    ignored = weight == 0
    keep = 1 - weight
    # Elements per unit of batch weight. It becomes that of the batch where nothing was seen yet, and where statistics
    # were taken over from elsewhere, without a count: the batch then weighs exactly a, and those after it weigh as if
    # all before had been of its size.
    tiny = torch.finfo(weight.dtype).tiny
    unit = state.count.clamp_min(tiny) / state.debias.clamp_min(tiny)
    new_unit = torch.where((state.count_sqrs == 0) & ~ignored, new.count, unit)
    keep_sums = keep * new_unit / unit
    gain = weight * new_unit / new.count if batch.whole else weight
    combined = combine(state.linear, new, keep_sums, gain)
    count_sqrs = torch.addcmul(keep_sums.square() * state.count_sqrs, gain.square(), new.count)
    debias = torch.addcmul(weight, keep, state.debias)
    for buffer, value in zip(state, (*combined, count_sqrs, debias)):
        buffer.copy_(value)
    entered = ignored.logical_not()
    if isinstance(batch.samples, Tensor):
        state.samples.addcmul_(entered.to(batch.samples.dtype), batch.samples)
    else:
        state.samples.add_(entered, alpha=batch.samples)
    state.steps.add_(entered)
    state.num_batches_tracked.add_(batch.samples > 0)
    state.last_keep.copy_(keep)
    state.last_gain.copy_(gain)
    return ignored


def _enter_and_normalise_by(state: State, batch: Batch, law: Law) -> Tensor:
    """`_enter`, and the view of the state that is normalised by: the biased variance, with its floor."""
    ignored = _enter(state, batch)
    mean, var = moments(state.linear)
    floored = (var < law.variance_floor) & (state.samples < law.warmup_samples)
    _set_unless(ignored, state.running_mean, mean)
    _set_unless(ignored, state.running_var, var.masked_fill_(floored, law.variance_floor))
    return ignored


def _set_unless(ignored: Tensor, buffer: Tensor, value: Tensor) -> None:
    buffer.copy_(torch.where(ignored, buffer, value))


def _unpack(mode: Mode, arguments: Sequence[Any]) -> tuple[LayerState, Batch, Law]:
    """The flat arguments of an operator by name."""
    given = iter(arguments)
    state = LayerState(_next_fields(State, given), _next_fields(NoiseState, given) if mode is Mode.RUNNING else None)
    sums = _next_fields(Sums, given)
    weight, samples, whole, *law = given
    return state, Batch(sums, samples, weight, whole), Law(*law)


def _next_fields(cls: type[Fields], given: Iterator[Any]) -> Fields:
    """A named tuple of as many of the next arguments as it has fields."""
    return cls(*itertools.islice(given, len(cls._fields)))  # type: ignore[attr-defined]


def _call(name: str, number: int | Tensor, *arguments: Any) -> Any:
    """An update whose `number` of samples or elements is known to the host or, pooled over ranks, a tensor."""
    if not torch.compiler.is_compiling():
        return _UPDATES[name](*arguments)
    return getattr(torch.ops.runningbn, f"{name}_pooled" if isinstance(number, Tensor) else name)(*arguments)


def _per_channel(outputs: int) -> Callable[..., Any]:
    """What an update returns, for tracing: so many vectors like its first buffer."""

    def traced(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(arguments[0]) for _ in range(outputs))

    return traced


_BATCH = (
    ", ".join(f"Tensor batch_{name}" for name in Sums._fields)
    + ", Tensor weight, NUMBER batch_samples, bool whole_batches, "
    + ", ".join(f"float {name}" for name in Law._fields)
)
# Every name of a schema is one of its own.
_GRADIENT = (
    "Tensor batch_sum_dy, Tensor batch_sum_dy_xhat, "
    "Tensor rstd, Tensor trust, Tensor offset, Tensor batch_std, NUMBER n"
)
_UPDATES: dict[str, Callable[..., Any]] = {}
_LIBRARY = torch.library.Library("runningbn", "DEF")


def _define(name: str, function: Callable[..., Any], arguments: str, outputs: int) -> None:
    """Define the two operators of an update, see `_call`."""
    _UPDATES[name] = function
    for operator, number in ((name, "SymInt"), (f"{name}_pooled", "Tensor")):
        schema = f"{operator}({arguments}) -> ({', '.join(['Tensor'] * outputs)})"
        _LIBRARY.define(schema.replace("NUMBER", number))
        _LIBRARY.impl(operator, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"runningbn::{operator}", _per_channel(outputs))


for _mode in Mode:
    _arguments = f"{written(_mode.forward_buffers)}, {_BATCH}"
    _define(f"update_{_mode.label}", partial(_update, _mode), _arguments, len(_mode.coefficients))
_define("update_gradient", _update_gradient, f"{written(GradientState._fields)}, {_GRADIENT}", 2)
