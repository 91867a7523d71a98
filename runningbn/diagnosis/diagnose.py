"""diagnose: select the layers, run the measurements and collect the results."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..recalibration.batches import Forward, call, check_num_iters
from ..recalibration.selection import chosen, has_statistics, left_alone
from ..recalibration.text import by_reason, shown
from .measure import Metric, Subject, diagnosis_of_layer, measure, score
from .result import Diagnosis, MetricValues
from .watch import unchanged


def diagnose(
    model: nn.Module,
    data_loader: Iterable[Any],
    num_iters: int | None = 50,
    *,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    metric: Metric | None = None,
    normalize: Literal["batch", "population"] = "batch",
) -> Diagnosis:
    r"""Test whether a model evaluates badly because of its BatchNorm layers. The model is not changed.

    The model runs three times over the same batches, in evaluation mode and without gradients. Its BatchNorm layers
    normalise

    - by their *stored* statistics, as evaluation does;
    - by statistics *recomputed* from these batches, as after ``update_bn_stats(model, data_loader)``;
    - each by its *batch*, as nn.BatchNorm does in training. Frozen layers and RunningBatchNorm, which do not, use their
      stored statistics.

    Measured for every layer:

    - the difference of the stored and the recomputed statistics from the moments m, v of the layer's input while they
      are in use: :math:`(\mu - m)/\sqrt{v + \epsilon}` and :math:`\log((\sigma^2 + \epsilon)/(v + \epsilon))`, with
      standard errors from the variance between batches. Look at the first layer that is off: later layers depend on it.
    - the variance of its input between batches and the effective sample size of a batch (by the design effect), from an
      analysis of variance over sample means.

    Measured for the model: the change of its output, and a metric if given. Afterwards the statistics, other buffers,
    training flags and the random state of torch, Python and NumPy are restored, also after an exception. Only this
    process is examined: nothing is communicated.

    Args:
        model: any module. Frozen layers are defined as for `get_bn_modules`.
        data_loader: batches as for `update_bn_stats`, of the size and order used in training. At most `num_iters` are
            drawn, and kept in memory. They should be independent of each other.
        num_iters: number of batches; None for all.
        forward: ``forward(model, batch)`` to call the model in another way; it returns the output.
        device: the device to move the tensors in a batch to.
        metric: ``metric(model)`` evaluates the model on any data and returns a number, *larger being better*: for a
            loss, its negative. It is called three times.
        normalize: how the recomputed statistics are collected, see `update_bn_stats`.

    Returns:
        A `Diagnosis`: prints as a table that ends with at most three sentences of advice.

    Raises:
        ValueError: for a model without a BatchNorm layer that has running statistics, or one that is not initialised;
            otherwise as `update_bn_stats`.
        TypeError: for an argument that is not a module, or a metric that returns no number.
        RuntimeError, ImportError: as `update_bn_stats`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from runningbn import diagnose, update_bn_stats
        >>> model, data = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.randn(20, 32, 3)
        >>> [finding.rule for finding in diagnose(model, data).findings]
        ['off']
        >>> report = update_bn_stats(model, data)
        >>> [finding.rule for finding in diagnose(model, data).findings]
        ['nothing']
    """
    layers = _with_statistics(model)
    if not layers:
        raise ValueError(_nothing_to_diagnose(model))
    check_num_iters(num_iters)
    with unchanged(model):
        subject = Subject.of(model, layers)
        batches = subject.recompute(data_loader, num_iters, forward=forward, device=device, normalize=normalize)
        measured = measure(subject, batches, forward or call, device)
        values = None if metric is None else MetricValues(*(score(subject, each, metric) for each in subject.modes()))
    found = [diagnosis_of_layer(subject, measured, number) for number in measured.used]
    if not found:
        raise ValueError(f"no batch reached any of the layers {', '.join(subject.names)}")
    return Diagnosis(
        layers=tuple(found),
        unused=tuple(name for number, name in enumerate(subject.names) if number not in measured.used),
        without_statistics=tuple(name for name, module in model.named_modules() if _lacks_statistics(module)),
        skipped=left_alone(model, subject.layers),
        batches=len(batches),
        recomputed=measured.recomputed.comparison.result(),
        batch=measured.batch.comparison.result(),
        metric=values,
        normalize=normalize,
    )


def _with_statistics(model: nn.Module) -> dict[str, _BatchNorm]:
    """All BatchNorm layers with running statistics, frozen or not, by their first name."""
    chosen(model, None)  # raises if it is not a module or not initialised
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and has_statistics(m)}


def _lacks_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and (module.running_mean is None or module.running_var is None)


def _nothing_to_diagnose(model: nn.Module) -> str:
    modules = dict(model.named_modules())
    message = f"there is no BatchNorm layer with running statistics in {type(model).__name__}, so none can be at fault"
    lacking = [shown(name) for name, module in modules.items() if _lacks_statistics(module)]
    others = left_alone(model, ())
    kinds = sorted({type(m).__name__ for m in modules.values() if "Norm" in type(m).__name__})
    if lacking:
        message += f"; without statistics, and normalising by the batch in evaluation, too: {', '.join(lacking)}"
    if others:
        message += f"; {by_reason(others)}"
    elif kinds and not lacking:
        message += f"; it has {', '.join(kinds)}"
    return message
