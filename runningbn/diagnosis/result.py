"""The result of a diagnosis: numbers, table, plot and JSON."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..recalibration.report import LayerReport
from ..recalibration.text import by_reason, counted, table
from . import rules
from .between import BetweenBatches
from .outputs import OutputChange


@dataclass(frozen=True, kw_only=True)
class LayerDiagnosis:
    """The results for one layer. C channels; tensors are (C,), float64, on the CPU.

    Attributes:
        name: of the layer in the model.
        stored: the stored statistics (`old_mean`, `old_var`) and the moments (`mean`, `var`) of the layer's input while
            they are in use. NaN if the input was not finite.
        recomputed: the same with the recomputed statistics in use.
        between: the variance between batches, with the recomputed statistics in use.
        frozen: whether it is in evaluation mode inside a model in training mode.
        calls: largest number of calls in a forward pass; more than 1 for a shared layer.
        finite: whether the stored statistics are finite and the variances not negative.
        not_finite: number of batches for which the input of this layer was not finite.
        relies_on_no_batch: whether it normalises by running statistics in training as well (RunningBatchNorm).
    """

    name: str
    stored: LayerReport
    recomputed: LayerReport
    between: BetweenBatches
    frozen: bool
    calls: int
    finite: bool
    not_finite: int
    relies_on_no_batch: bool

    @property
    def mean_off(self) -> Tensor:
        """(stored mean − mean)/std by channel, with std = (var + eps)^½ of the data."""
        return (self.stored.old_mean - self.stored.mean) / self.stored.std

    @property
    def mean_off_error(self) -> Tensor:
        """Its standard error."""
        return self.stored.mean_error / self.stored.std

    @property
    def log_var_off(self) -> Tensor:
        """log((stored var + eps)/(var + eps)) by channel."""
        return torch.log((self.stored.old_var + self.stored.eps) / self.stored.std.square())

    @property
    def log_var_off_error(self) -> Tensor:
        """Its standard error."""
        return self.stored.var_error / self.stored.std.square()

    @property
    def elements_per_batch(self) -> float:
        """Elements per channel of a batch, on average."""
        return self.recomputed.elements / self.recomputed.batches if self.recomputed.batches else float("nan")


@dataclass(frozen=True)
class MetricValues:
    """The metric, larger being better, with stored, recomputed and batch statistics."""

    stored: float
    recomputed: float
    batch: float


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The result of `diagnose`. Prints as a table that ends with advice; `layers` has the numbers.

    Attributes:
        layers: one `LayerDiagnosis` per layer, in the order of the model.
        unused: names of layers that no batch reached.
        without_statistics: names of layers that normalise by their batch in evaluation, too.
        skipped: other modules with running statistics that were not examined: the reason by name.
        batches: number of batches used.
        recomputed, batch: how the output changes from stored to recomputed, and to batch statistics.
        metric: its three values; None without a metric.
        normalize: how the recomputed statistics were collected.

    Raises:
        KeyError: ``diagnosis[name]`` for a layer that was not reached.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from runningbn import diagnose
        >>> model = nn.Sequential(nn.BatchNorm1d(1), nn.Flatten(0))
        >>> data = 5 + (torch.arange(240) ** 2 % 101).reshape(30, 8, 1) / 50
        >>> print(diagnose(model, data))
        layer  samples  elements  mean off/std  var data/stored  std. error/std  design effect  batch counts for
        0            8         8         9.838            0.371          0.0919    2.02 ± 0.73               4.0
        30 batches; off: stored statistics against the moments of the layer's input in evaluation
        output, stored to recomputed statistics: changes by 99.7%
        output, stored to batch statistics: changes by 100.0%
        Stored statistics are off in 1 of 1 layer, first in 0 (mean by 9.84 std, variance 2.7 times that of the \
data): update_bn_stats repairs that (the output changes by 99.7%).
    """

    layers: tuple[LayerDiagnosis, ...]
    unused: tuple[str, ...]
    without_statistics: tuple[str, ...]
    skipped: dict[str, str]
    batches: int
    recomputed: OutputChange
    batch: OutputChange
    metric: MetricValues | None
    normalize: str

    @property
    def findings(self) -> tuple[rules.Finding, ...]:
        """The rules that apply, the most important first."""
        return rules.findings(self)

    @property
    def advice(self) -> tuple[str, ...]:
        """At most three sentences."""
        return tuple(finding.sentence for finding in self.findings[: rules.MAX_SENTENCES])

    def __getitem__(self, name: str) -> LayerDiagnosis:
        """The results for the layer with this name."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def __str__(self) -> str:
        """A table of the layers in the order of the model, then results for the whole model, and advice."""
        header = (
            "layer", "samples", "elements", "mean off/std", "var data/stored", "std. error/std", "design effect",
            "batch counts for",
        )  # fmt: skip
        lines = [table(header, [_row(layer) for layer in self.layers])] if self.layers else []
        lines.append(
            f"{counted(self.batches, 'batch')}; off: stored statistics against the moments of the layer's input in "
            "evaluation"
        )
        for to, change in (("recomputed", self.recomputed), ("batch", self.batch)):
            lines.append(f"output, stored to {to} statistics: {_change(change)}")
        if self.metric is not None:
            stored, recomputed, batch = dataclasses.astuple(self.metric)
            lines.append(f"metric: stored {stored:.4g}, recomputed {recomputed:.4g}, batch {batch:.4g}")
        lists = (
            ("frozen", [layer.name for layer in self.layers if layer.frozen]),
            ("shared", [f"{layer.name} ({layer.calls} calls)" for layer in self.layers if layer.calls > 1]),
            ("unused", self.unused),
            ("statistics not finite", [layer.name for layer in self.layers if not layer.finite]),
            ("input not finite", [f"{x.name} ({counted(x.not_finite, 'batch')})" for x in self.layers if x.not_finite]),
            ("without statistics", self.without_statistics),
        )
        lines += [f"{what}: {', '.join(names)}" for what, names in lists if names]
        lines += [f"not examined: {by_reason(self.skipped)}"] if self.skipped else []
        return "\n".join((*lines, *self.advice))

    def to_dict(self) -> dict[str, Any]:
        """All numbers for JSON; None if not finite. Keys are stable: new ones may be added, none is removed."""
        contents = {
            "batches": self.batches,
            "normalize": self.normalize,
            "layers": [_layer_as_dict(layer) for layer in self.layers],
            "unused": list(self.unused),
            "without_statistics": list(self.without_statistics),
            "skipped": self.skipped,
            "output_recomputed": dataclasses.asdict(self.recomputed),
            "output_batch": dataclasses.asdict(self.batch),
            "metric": None if self.metric is None else dataclasses.asdict(self.metric),
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
        }
        finite: dict[str, Any] = _finite(contents)
        return finite

    def plot(self, path: Any = None) -> Any:
        """Plot how far statistics are off, with error bars of two standard errors, and effective batch sizes, by layer.

        Args:
            path: file to save the figure to; None to not save it.

        Returns:
            The ``matplotlib.figure.Figure``.

        Raises:
            ImportError: without matplotlib, which comes with ``pip install 'runningbn[plot]'``.
        """
        from ..recalibration.plot import saved
        from .plot import plot

        return saved(plot(self), path)


def _row(layer: LayerDiagnosis) -> tuple[str, ...]:
    between = layer.between
    return (
        layer.name,
        f"{between.samples_per_batch:.4g}",
        f"{layer.elements_per_batch:,.4g}",
        f"{layer.stored.mean_shift:.3f}",
        f"{layer.stored.var_ratio:.3f}",
        f"{layer.stored.standard_error:.4f}",
        f"{between.design_effect:.2f} ± {between.design_effect_error:.2f}",
        f"{between.effective_batch:.1f}",
    )


def _change(change: OutputChange) -> str:
    if math.isnan(change.relative_rms):
        return "cannot be compared"
    agreement = "" if math.isnan(change.agreement) else f", the largest entry agrees in {change.agreement:.1%}"
    return f"changes by {change.relative_rms:.1%}{agreement}"


def _layer_as_dict(layer: LayerDiagnosis) -> dict[str, Any]:
    between = layer.between
    return {
        "name": layer.name,
        "channels": len(layer.stored.mean),
        "frozen": layer.frozen,
        "calls": layer.calls,
        "finite": layer.finite,
        "batches_not_finite": layer.not_finite,
        "elements_per_batch": layer.elements_per_batch,
        "stored": _report_as_dict(layer.stored),
        "recomputed": _report_as_dict(layer.recomputed),
        "between": dataclasses.asdict(between)
        | {
            "samples_per_batch": between.samples_per_batch,
            "effective_samples": between.effective_samples,
            "effective_batch": between.effective_batch,
        },
    }


def _report_as_dict(report: LayerReport) -> dict[str, float]:
    names = ("mean_shift", "std_shift", "var_ratio", "mean_standard_error", "std_standard_error")
    return {name: getattr(report, name) for name in names}


def _finite(contents: Any) -> Any:
    """The contents with None in place of numbers that are not finite, which JSON cannot represent."""
    if isinstance(contents, dict):
        return {key: _finite(value) for key, value in contents.items()}
    if isinstance(contents, (list, tuple)):
        return [_finite(value) for value in contents]
    return None if isinstance(contents, float) and not math.isfinite(contents) else contents
