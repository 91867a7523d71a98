"""The report of a recalibration: numbers, table, plot, and undo."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers.buffers import PooledStatistics
from .text import by_reason, counted, table


@dataclass(frozen=True)
class LayerShift:
    """The old and the new statistics of one layer. C channels; the tensors are (C,), float64, on the CPU.

    Attributes:
        name: of the layer in the model.
        mean, var: the new statistics, as `running_mean` and `running_var` hold them.
        old_mean, old_var: the old statistics.
        eps: of the layer.
    """

    name: str
    mean: Tensor
    var: Tensor
    old_mean: Tensor
    old_var: Tensor
    eps: float

    @property
    def std(self) -> Tensor:
        """(var + eps)^½, by which the layer divides; the unit of the distances below."""
        return (self.var + self.eps).sqrt()

    @property
    def mean_shift(self) -> float:
        """Distance of mean and old_mean in std, root mean square over channels."""
        return _rms((self.mean - self.old_mean) / self.std)

    @property
    def std_shift(self) -> float:
        """log(std/old std), approximately the relative change of the std, root mean square over channels."""
        return _rms(torch.log(self.std.square() / (self.old_var + self.eps)) / 2)

    @property
    def var_ratio(self) -> float:
        """var/old_var, each with eps, geometric mean over channels."""
        return float(torch.log(self.std.square() / (self.old_var + self.eps)).mean().exp())

    @property
    def moved(self) -> float:
        """How far the layer moved, √(mean_shift² + std_shift²), in std."""
        return float((self.mean_shift**2 + self.std_shift**2) ** 0.5)


@dataclass(frozen=True, kw_only=True)
class Certainty:
    """How well the new statistics of a layer are known; the tensors are (C,), float64.

    Attributes:
        mean_error, var_error: standard errors of the new statistics; NaN for a single batch.
        batches, samples, elements: amount of data that reached the layer: batches, the sum of N, elements per channel.
        residual: with ``normalize="population"``, the difference between the new statistics and the moments of the
            layer's input in evaluation: the largest over channels, of means in std, of variances in var; NaN otherwise.
    """

    mean_error: Tensor
    var_error: Tensor
    batches: int
    samples: int
    elements: int
    residual: float = float("nan")


@dataclass(frozen=True, kw_only=True)
class LayerReport(Certainty, LayerShift):
    """How a recalibration changed the statistics of one layer, with the standard errors of the new statistics.

    Attributes:
        mean_error, var_error, batches, samples, elements, residual: see `Certainty`.
        feeds_itself: whether it was called more than once in a forward pass.
        correction: 1 where var has Bessel's correction n/(n − 1), as in torch's layers; 0 where it is biased, as in
            RunningBatchNorm and in subclasses that compute a biased variance.
        computes_itself: whether it is a subclass with a custom forward, whose convention was detected by comparing its
            update in training with the moments of its input.
    """

    feeds_itself: bool = False
    correction: int = 1
    computes_itself: bool = False

    @property
    def mean_standard_error(self) -> float:
        """Standard error of the mean in std, root mean square over channels."""
        return _rms(self.mean_error / self.std)

    @property
    def std_standard_error(self) -> float:
        """Standard error of the std, relative to it, root mean square over channels; that of var divided by 2·var."""
        return _rms(self.var_error / (2 * self.std.square()))

    @property
    def standard_error(self) -> float:
        """The larger of the two standard errors."""
        mean, std = self.mean_standard_error, self.std_standard_error
        return mean if math.isnan(mean) or mean > std else std


@dataclass(kw_only=True)
class StatsReport:
    """The result of `update_bn_stats`. Prints as a table; `layers` has the numbers; `undo()` restores the statistics.

    As a context manager it calls `undo()` on leaving, to evaluate with other statistics for a while::

        with update_bn_stats(model, loader):
            evaluate(model)

    Attributes:
        layers: one `LayerReport` each, in the order of the model.
        unused: names of layers that no batch reached; they keep their statistics.
        batches: batches used, of all processes.
        not_finite: batches left out because of infinities or NaNs.
        passes: forward passes over the data; more than 1 for ``normalize="population"``.
        available: number of batches in the loaders of all processes; None if a loader has no length.
        skipped: other modules with `running_mean` and `running_var` that were not updated: the reason by name.

    Raises:
        KeyError: ``report[name]`` for a layer that was not updated.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from runningbn import update_bn_stats
        >>> print(update_bn_stats(nn.Sequential(nn.BatchNorm1d(1)), torch.tensor([[[1.0], [3.0]], [[3.0], [5.0]]])))
        layer  batches  elements  mean moved/std  var new/old  std. error/std
        0            2         4           1.837        2.667          0.6124
        1 layer updated from 2 batches
    """

    layers: list[LayerReport]
    unused: list[str] = field(default_factory=list)
    batches: int = 0
    not_finite: int = 0
    passes: int = 1
    available: int | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    _before: list[tuple[_BatchNorm, dict[str, Tensor]]] = field(default_factory=list, repr=False)

    @torch.no_grad()
    def undo(self) -> None:
        """Restore the old statistics, bit for bit. May be called repeatedly.

        Raises:
            RuntimeError: if a layer was converted to or from one of this library meanwhile, or resized, as by pruning.
                No layer is then restored.
        """
        for layer, buffers in self._before:
            if isinstance(layer, PooledStatistics) and not buffers.keys() >= {*layer.statistics_names}:
                raise RuntimeError(
                    f"cannot undo: a layer was converted to {type(layer).__name__} after the recalibration; undo "
                    "first, then convert"
                )
            kept = {name: layer._buffers.get(name) for name in buffers}
            if any(buffer is None or buffer.shape != buffers[name].shape for name, buffer in kept.items()):
                raise RuntimeError(
                    f"cannot undo: {type(layer).__name__} no longer has all of {', '.join(buffers)}, of "
                    f"{len(buffers['running_mean'])} channels"
                )
        for layer, buffers in self._before:
            restore(layer, buffers)

    def __enter__(self) -> StatsReport:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __getitem__(self, name: str) -> LayerReport:
        """The report of the layer with this name."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def __str__(self) -> str:
        """A table, sorted by how far the layers moved, the farthest first."""
        header = ("layer", "batches", "elements", "mean moved/std", "var new/old", "std. error/std")
        rows = [
            (
                layer.name,
                f"{layer.batches:,}",
                f"{layer.elements:,}",
                f"{layer.mean_shift:.3f}",
                f"{layer.var_ratio:.3f}",
                f"{layer.standard_error:.4f}",
            )
            for layer in sorted(self.layers, key=lambda layer: layer.moved, reverse=True)
        ]
        lines = [table(header, rows)] if rows else []
        passes = f" in {self.passes} passes" if self.passes > 1 else ""
        used = self.batches + self.not_finite
        batches = counted(self.batches, "batch")
        if self.available is not None and self.available > used:
            batches = f"{self.batches:,} of {counted(self.available, 'batch')}"
        lines.append(f"{counted(len(self.layers), 'layer')} updated from {batches}{passes}")
        measured = [layer for layer in self.layers if not math.isnan(layer.residual)]
        residuals = [layer.residual for layer in measured if not layer.feeds_itself]
        if residuals:
            lines.append(
                f"moments in evaluation match these statistics to within {max(residuals):.1e} (of std and variance)"
            )
        for layer in measured:
            if layer.feeds_itself:
                lines.append(f"{layer.name} is called several times per forward: to within {layer.residual:.1e} only")
        biased = [layer.name for layer in self.layers if layer.computes_itself and not layer.correction]
        if biased:
            lines.append(f"variance without Bessel's correction, as in the layer's own update: {', '.join(biased)}")
        if self.not_finite:
            lines.append(f"{counted(self.not_finite, 'batch')} left out: not finite")
        if self.unused:
            lines.append(f"unused, statistics kept: {', '.join(self.unused)}")
        if self.skipped:
            lines.append(f"not updated:\n{by_reason(self.skipped)}")
        return "\n".join(lines)

    def plot(self, path: Any = None) -> Any:
        """Plot how far each layer moved, in the order of the model, with error bars of two standard errors.

        Args:
            path: file to save the figure to; None to not save it.

        Returns:
            The ``matplotlib.figure.Figure``.

        Raises:
            ImportError: without matplotlib, which comes with ``pip install 'runningbn[plot]'``.
        """
        from .plot import plot, saved

        return saved(plot(self), path)


def restore(layer: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Restore buffers, in place."""
    for name, value in buffers.items():
        buffer = layer._buffers[name]
        assert buffer is not None
        buffer.copy_(value)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
