"""Run a model with stored, recomputed and batch statistics, and measure the layers' inputs and the outputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers.buffers import PooledStatistics
from ..layers.running import RunningBatchNorm
from ..recalibration.batches import Forward, keeping, runner
from ..recalibration.conventions import Convention, Moments, views
from ..recalibration.hooks import observed, random_state_kept
from ..recalibration.model_state import KeptState
from ..recalibration.moments import Accumulator, Call, Population
from ..recalibration.observer import Observer
from ..recalibration.recalibrate import get_bn_modules, update_bn_stats
from ..recalibration.report import LayerReport
from .between import Group, between_batches, group
from .outputs import Comparison
from .result import LayerDiagnosis
from .watch import Watcher, replaced_statistics, unchanged

Metric = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Mode:
    """The statistics that the layers normalise by: fixed moments, or the batch for layers without these.

    Attributes:
        fixed: the moments by the index of the layer.
        replaces: whether `running_mean` and `running_var` are replaced by these, for other code that reads them.
    """

    fixed: dict[int, Moments]
    replaces: bool = False


@dataclass
class Subject:
    """A model with its layers by index, and their stored and recomputed statistics."""

    model: nn.Module
    names: list[str]
    layers: list[_BatchNorm]
    frozen: set[int]
    stored: dict[int, Moments]
    recomputed: dict[int, Moments]

    @classmethod
    def of(cls, model: nn.Module, layers: dict[str, _BatchNorm]) -> Subject:
        """A subject before recomputation: `recomputed` holds the stored statistics."""
        updated = set(get_bn_modules(model))
        frozen = {number for number, layer in enumerate(layers.values()) if layer not in updated}
        stored = _statistics(list(layers.values()))
        return cls(model, list(layers), list(layers.values()), frozen, stored, dict(stored))

    def recompute(self, data_loader: Iterable[Any], num_iters: int | None, **how: Any) -> list[Any]:
        """Set `recomputed`; the statistics of the model are restored. Returns the batches."""
        batches: list[Any] = []
        if len(self.frozen) == len(self.layers):
            batches = list(itertools.islice(data_loader, num_iters))
            if not batches:
                raise ValueError("the data loader gave no batch")
        else:
            report = update_bn_stats(self.model, keeping(data_loader, batches), num_iters, process_group=False, **how)
            self.recomputed = _statistics(self.layers)
            report.undo()
        return batches

    def modes(self) -> tuple[Mode, Mode, Mode]:
        """Stored, recomputed, batch."""
        without_batch = {
            number: self.stored[number]
            for number, layer in enumerate(self.layers)
            if number in self.frozen or _normalises_by_running(layer)
        }
        return Mode(self.stored), Mode(self.recomputed, replaces=True), Mode(without_batch)


class _Measured:
    """The moments of the layers' inputs in one mode, and the change of the outputs from the stored statistics."""

    def __init__(self, layers: list[_BatchNorm]) -> None:
        cpu = torch.device("cpu")
        # One for each layer, so that a batch that is not finite in one layer is dropped only there.
        self.sums = [Accumulator([layer.num_features], Population(), cpu) for layer in layers]
        self.calls = [0] * len(layers)  # the largest number of calls of a layer in one batch
        self.comparison = Comparison()

    def add(self, calls: list[Call]) -> None:
        """Add the calls of all layers for one batch."""
        for number, sums in enumerate(self.sums):
            own = [replace(each, layer=0) for each in calls if each.layer == number]
            if own:
                sums.add(own)
                self.calls[number] = max(self.calls[number], len(own))


class AllMeasured:
    """The measurements in the three modes, and the sample means; `used` has the indices of the layers reached."""

    def __init__(self, layers: list[_BatchNorm]) -> None:
        self.stored, self.recomputed, self.batch = (_Measured(layers) for _ in range(3))
        self.groups: list[list[Group]] = [[] for _ in layers]
        self.conventions: dict[int, Convention] = {}  # of subclasses with a custom forward

    @property
    def used(self) -> list[int]:
        """The indices of the layers that a batch reached, in the order of the model."""
        return [number for number, calls in enumerate(self.recomputed.calls) if calls]


def measure(subject: Subject, batches: list[Any], forward: Forward, device: Any) -> AllMeasured:
    """Run every batch in the three modes."""
    found = AllMeasured(subject.layers)
    watcher = Watcher(subject.layers, subject.recomputed.__getitem__, subject.names)
    outputs: list[Any] = []
    run = runner(subject.model, lambda model, batch: outputs.append(forward(model, batch)), device)
    modes = list(zip(subject.modes(), (found.stored, found.recomputed, found.batch)))
    with observed(subject.model, watcher):
        state = KeptState(subject.model)
        for batch in batches:
            outputs.clear()
            for mode, measured in modes:
                watcher.fixed = mode.fixed
                watcher.collects_sample_means = measured is found.recomputed
                # Every mode starts with the same buffers and the same random state.
                replacements = mode.fixed if mode.replaces else {}
                with random_state_kept(subject.model), replaced_statistics(subject.layers, replacements):
                    run(batch)
                state.restore()
                measured.add(watcher.take_calls())
            for number, means in watcher.take_sample_means().items():
                found.groups[number].append(group(means))
            stored, recomputed, by_batch = outputs
            found.recomputed.comparison.add(stored, recomputed)
            found.batch.comparison.add(stored, by_batch)
    found.conventions = watcher.conventions
    return found


def score(subject: Subject, mode: Mode, metric: Metric) -> float:
    """The value of the metric in one mode."""
    watcher = Observer(subject.layers, subject.recomputed.__getitem__, subject.names)
    watcher.fixed, watcher.watched = mode.fixed, set()
    with unchanged(subject.model), replaced_statistics(subject.layers, mode.fixed if mode.replaces else {}):
        # If all layers have fixed statistics, this is plain evaluation and needs no observer.
        observes = len(mode.fixed) < len(subject.layers)
        with observed(subject.model, watcher if observes else Observer([], watcher.so_far)):
            value = metric(subject.model)
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"metric: expected a number, got {type(value).__name__}") from error


def diagnosis_of_layer(subject: Subject, measured: AllMeasured, number: int) -> LayerDiagnosis:
    """The results for one layer."""
    layer, convention = subject.layers[number], measured.conventions.get(number, Convention())
    if isinstance(layer, PooledStatistics):
        convention = Convention(correction=int(layer.corrects_variance))
    stored, recomputed = (
        _compared(subject.names[number], layer, convention.correction, sums[number], statistics[number])
        for sums, statistics in ((measured.stored.sums, subject.stored), (measured.recomputed.sums, subject.recomputed))
    )
    mean, var = subject.stored[number]
    return LayerDiagnosis(
        name=subject.names[number],
        stored=stored,
        recomputed=recomputed,
        between=between_batches(measured.groups[number], recomputed.std.square()),
        frozen=number in subject.frozen,
        calls=measured.recomputed.calls[number],
        finite=bool((mean.isfinite() & var.isfinite() & (var >= 0)).all()),
        not_finite=int(measured.recomputed.sums[number].dropped),
        relies_on_no_batch=_normalises_by_running(layer),
    )


def _compared(
    name: str, layer: _BatchNorm, correction: int, sums: Accumulator, statistics: Moments
) -> LayerReport:  # fmt: skip
    """A report with the moments of the layer's input as new statistics, and those it normalised by as old ones."""
    estimate = sums.estimate()
    mean, var, mean_error, var_error = (
        vector.clone() for vector in (estimate.mean, estimate.var, estimate.mean_error, estimate.var_error)
    )
    n = int(estimate.elements[0])
    if n == 0:
        mean, var, mean_error, var_error = (torch.full_like(mean, torch.nan) for _ in range(4))
    elif n > 1:
        var, var_error = var * (n / (n - correction)), var_error * (n / (n - correction))
    old_mean, old_var = (moment.to("cpu", torch.float64) for moment in statistics)
    return LayerReport(
        name=name,
        mean=mean,
        var=var,
        old_mean=old_mean,
        old_var=old_var,
        eps=layer.eps,
        mean_error=mean_error,
        var_error=var_error,
        batches=int(estimate.batches[0]),
        samples=int(estimate.samples[0]),
        elements=n,
        correction=correction,
    )


def _statistics(layers: list[_BatchNorm]) -> dict[int, Moments]:
    """Copies of `running_mean` and `running_var`."""
    return {
        number: (mean.detach().clone(), var.detach().clone()) for number, (mean, var) in enumerate(map(views, layers))
    }


def _normalises_by_running(layer: _BatchNorm) -> bool:
    """Whether the layer normalises by running statistics in training, too."""
    return isinstance(layer, RunningBatchNorm)
