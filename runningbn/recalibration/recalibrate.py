"""update_bn_stats: recompute the statistics of the BatchNorm layers of any model, exactly.

Steps: choose the layers; run batches through the model while an `Observer` collects the moments of their inputs; sum
these over batches and processes; write the statistics. Only the last step changes the model.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from numbers import Real
from typing import Any, Literal

import torch
from torch import nn

from .batches import Forward, check_num_iters, keeping, length, progress_bar, runner, used_by_call
from .hooks import head_skipped, observed, random_state_kept, recording_outside_use
from .procedures import Recalibration
from .ranks import is_sharded
from .report import StatsReport
from .selection import Layers, left_alone, updatable
from .text import by_reason

logger = logging.getLogger("runningbn")


def update_bn_stats(
    model: nn.Module,
    data_loader: Iterable[Any],
    num_iters: int | None = 200,
    progress: str | None = None,
    *,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    normalize: Literal["batch", "population"] = "batch",
    variance: Literal["population", "batch"] = "population",
    layers: Layers = None,
    tolerance: float | None = None,
    prior: float = 0.0,
    process_group: Any = None,
    memory_limit: float = 2**30,
) -> StatsReport:
    r"""Recompute the statistics of the BatchNorm layers of a model from data, exactly.

    Updates every layer that `get_bn_modules` lists: ``nn.BatchNorm*d``, ``nn.SyncBatchNorm``, their subclasses, and
    layers of this library. Over all n elements x of a channel in the inputs of the layer,

    .. math::
        m = \frac{1}{n} \sum x, \qquad v = \frac{1}{n - 1} \sum (x - m)^2

    (1/n in RunningBatchNorm, which normalises by it, and in subclasses whose own update has no Bessel's correction),
    accumulated in float64 from the moments of the batches. m and v are written in place to `running_mean` and
    `running_var`. Nothing else in the model changes: other buffers, training flags and tensor attributes are restored,
    and so is the random state of torch, Python and NumPy. If an error or Ctrl-C stops it, nothing changes at all.

    The batches run in evaluation mode, without gradients unless the forward turns them on: dropout is off, and only the
    layers to update normalise by their batches. Layers in evaluation mode inside a model in training mode, and those
    with ``track_running_stats=False``, are frozen: they are not updated, and the report lists them. Several calls of a
    layer in one forward are pooled. An unused layer keeps its statistics. A batch with infinities or NaNs in some layer
    is left out in all of them, with a warning. A batch of one element per channel is normalised by the statistics
    collected before it.

    With ``torch.distributed`` initialised, every process uses its own part of the data, of any length, and all get the
    statistics of the whole. They communicate once, at the end (and once for each check of `tolerance`, or each pass of
    ``normalize="population"``); if one fails, all raise. Wrappers for parallel training are bypassed. Models whose
    forward communicates (FSDP) use batches while every process has one.

    Args:
        model: any module. It may be in training or in evaluation mode.
        data_loader: batches. The model is called with the first element of a list or tuple, with a mapping as keyword
            arguments, and with anything else, such as a tensor, as it is. At most `num_iters` batches are drawn.
        num_iters: number of batches for each process; None for all. A loader may have fewer.
        progress: None, or ``"tqdm"`` for a progress bar.
        forward: ``forward(model, batch)`` to call the model in another way.
        device: the device to move the tensors in a batch to, nested ones included; by default they are not moved.
        normalize: how the layers normalise while their statistics are collected:

            - ``"batch"``: by the batch, as in training; one pass over the data. The input of a layer then differs from
              that in evaluation, more so in deeper layers and with smaller or more dissimilar batches.
            - ``"population"``: by the final statistics of the layers before. The statistics are then the moments of
              each layer's input in evaluation, to 1e-4, for any batch size. The residual is measured with the new
              statistics in place, and reported. Every pass starts from the same state of the model, for stateful
              modules. The batches are kept in memory. There are two passes, of all batches joined and of each batch,
              if `memory_limit` allows it, the batches can be concatenated, and the model treats their samples
              independently. Otherwise, and with several processes, the number of passes is about half the number of
              layers. The statistics of both ways agree to rounding. (If all data fit into one batch, ``"batch"`` gives
              the same in one pass, up to Bessel's correction.)
        variance: ``"population"``, all data as one sample as above; ``"batch"``, the averages of the batches' means and
            of their Bessel-corrected variances, which omits the variance between batches.
        layers: which of ``get_bn_modules(model)`` to update: ``layers(name, module)`` or a collection of names or
            modules. The others use their statistics, as in evaluation.
        tolerance: stop when, in every layer, the standard errors of mean and std are below this fraction of the std
            (root mean square over channels, std = √(var + eps)). They are estimated from the variance between batches,
            so batches must be independent. At least 8 batches are used.
        prior: N pseudo-samples of the old statistics to mix in: with w = N/(N + samples),
            m = w·m₀ + (1 − w)·m₁ and v = w·v₀ + (1 − w)·v₁ + w·(1 − w)·(m₀ − m₁)².
        process_group: the processes that share the data; None for all; False for this process alone, without
            communication.
        memory_limit: with ``normalize="population"``, how many bytes a forward pass of all batches joined may need
            in addition to the batches, estimated from the first batch; by default 1 GiB. 0 never joins batches,
            infinity always does.

    Returns:
        A `StatsReport`: prints as a table of how far each layer moved, and can ``undo()``.

    Raises:
        ValueError: for a loader without a batch, an argument out of its range, a layer that cannot be updated, or,
            without `prior`, a layer with a single element per channel in all data.
        TypeError: for an argument that is not a module, or a mapping that does not fit the model's forward.
        ImportError: for ``progress="tqdm"`` without tqdm.
        RuntimeError: if no batch was finite, if another process failed, if statistics do not fit the dtype of a layer,
            or for a subclass with a custom forward whose update in training is not a moving average of the moments of
            its input.

    Source: Wu and Johnson, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576; the first four arguments are those of
    fvcore's function. `prior`: Schneider et al., "Improving robustness against common corruptions by covariate shift
    adaptation", NeurIPS 2020.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from runningbn import update_bn_stats
        >>> model, data = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.randn(100, 3)
        >>> report = update_bn_stats(model, data.split(32))
        >>> report.batches, report["1"].elements
        (4, 100)
        >>> torch.allclose(model[1].running_var, model[0](data).var(0))
        True
    """
    recalibration = Recalibration(model, variance=variance, layers=layers, prior=prior, process_group=process_group)
    if not recalibration.names:
        _warn_no_layers("update_bn_stats", model)
        return StatsReport(layers=[], skipped=left_alone(model, ()))
    with recalibration.transaction(), random_state_kept(model):
        _check(normalize, variance, num_iters, tolerance, memory_limit)
        show, run_plain = progress_bar(progress), runner(model, forward, device)

        def run(batch: Any) -> None:
            # The model is observed only while a batch runs: the loader may use the model between batches.
            skipping = nullcontext() if forward else head_skipped(model, recalibration.layers)
            # Recording sees every operation, which takes time, so it is done for the first batch only.
            recording = nullcontext() if recalibration.batches else recording_outside_use(recalibration.observer)
            with observed(model, recalibration.observer), skipping, recording:
                run_plain(batch)

        recalibration.available = length(data_loader)
        batches = show(itertools.islice(data_loader, num_iters), _smaller(recalibration.available, num_iters))
        if is_sharded(model):
            batches = recalibration.in_step(batches)
        if normalize == "batch":
            recalibration.collect(batches, run, tolerance)
        else:
            kept: list[Any] = []
            alone = recalibration.ranks.size == 1
            if tolerance is None and memory_limit and alone:
                kept.extend(batches)
            else:  # by batches, which tells when there are enough, and keeps processes in step
                recalibration.collect(keeping(batches, kept), run, tolerance, refines=True)
            used = [used_by_call(batch) for batch in kept] if forward is None else kept
            if not recalibration.refine_joined(used, run, memory_limit):
                # Of several processes, one may have no batch: all have collected.
                if alone and not recalibration.batches:
                    recalibration.collect(kept, run, refines=True)
                recalibration.refine(kept, run, show)
    return recalibration.finish()


@contextmanager
def precise_bn(
    model: nn.Module,
    *,
    variance: Literal["population", "batch"] = "population",
    layers: Layers = None,
    prior: float = 0.0,
    process_group: Any = None,
) -> Iterator[Recalibration]:
    """Recompute statistics from all forward passes made inside the ``with`` block; for custom loops.

    Works as `update_bn_stats` with ``normalize="batch"``, which documents the arguments. Inside the block, the model is
    in evaluation mode without gradients and must be called at least once; each call is a batch. On leaving, the
    statistics are written and ``report`` is set. After an exception, the model is unchanged.

    Yields:
        A `Recalibration`.

    Raises:
        As `update_bn_stats`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from runningbn import precise_bn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        >>> with precise_bn(model) as recalibration:
        ...     for _ in range(3):
        ...         _ = model(torch.randn(16, 3))
        >>> recalibration.report.batches
        3
    """
    recalibration = Recalibration(model, variance=variance, layers=layers, prior=prior, process_group=process_group)
    if not recalibration.names:
        _warn_no_layers("precise_bn", model)
        recalibration.report = StatsReport(layers=[], skipped=left_alone(model, ()))
        yield recalibration
        return
    recalibration.without_batch = "the model was not called inside the block of precise_bn"
    with recalibration.transaction(), observed(model, recalibration.observer):
        hook = model.register_forward_hook(lambda *_: recalibration.end_batch())
        try:
            yield recalibration
        finally:
            hook.remove()
        if recalibration.observer.calls:
            recalibration.end_batch()
        recalibration.collect((), lambda batch: None, None)
    recalibration.finish()


def get_bn_modules(model: nn.Module) -> list[nn.Module]:
    """The layers that `update_bn_stats` updates, each once, in the order of the model.

    These are the ``nn.BatchNorm*d``, ``nn.SyncBatchNorm``, subclasses of them and layers of this library that have
    running statistics and ``track_running_stats=True``. If the model itself or one of them is in training mode, those
    in evaluation mode are frozen and not listed; otherwise all are listed.

    Raises:
        TypeError: for an argument that is not a module.

    Source: fvcore's function of this name, which leaves out all layers in evaluation mode.

    Example:
        >>> from torch import nn
        >>> from runningbn import get_bn_modules
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.InstanceNorm2d(8))
        >>> get_bn_modules(model) == [model[1]]
        True
    """
    return list(updatable(model).values())


def _warn_no_layers(function: str, model: nn.Module) -> None:
    reasons = by_reason(left_alone(model, ()))
    found = f"no layer is updated in {type(model).__name__}:\n{reasons}" if reasons else (
        f"there is no BatchNorm layer to update in {type(model).__name__}"
    )  # fmt: skip
    logger.warning("%s: %s", function, found)


def _smaller(*numbers: int | None) -> int | None:
    return min((number for number in numbers if number is not None), default=None)


def _check(
    normalize: str, variance: str, num_iters: int | None, tolerance: float | None, memory_limit: float
) -> None:  # fmt: skip
    if normalize not in ("batch", "population"):
        raise ValueError(f"normalize: expected 'batch' or 'population', got {normalize!r}")
    if normalize == "population" and variance == "batch":
        raise ValueError("normalize='population' needs variance='population', got variance='batch'")
    check_num_iters(num_iters)
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance: expected None or a positive number, got {tolerance!r}")
    if isinstance(memory_limit, bool) or not isinstance(memory_limit, Real) or not memory_limit >= 0:
        raise ValueError(f"memory_limit: expected a number of bytes of at least 0, got {memory_limit!r}")
