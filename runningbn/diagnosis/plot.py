"""The figure of a diagnosis."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..recalibration.report import LayerReport
from ..recalibration.text import counted
from .evidence import FEW, OFF

if TYPE_CHECKING:
    from .result import Diagnosis


def plot(diagnosis: Diagnosis) -> Any:
    """Left: how far stored and recomputed statistics are off. Right: the effective sample size of a batch."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Diagnosis.plot needs matplotlib: pip install 'runningbn[plot]'") from error
    layers = diagnosis.layers
    figure = Figure(figsize=(10, 1.8 + 0.24 * max(len(layers), 4)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    series = (
        ("stored mean, in std", "#0072b2", "o", [_mean(layer.stored) for layer in layers], -0.24),
        ("stored std, relative", "#d55e00", "s", [_std(layer.stored) for layer in layers], -0.08),
        ("recomputed mean", "#56b4e9", "o", [_mean(layer.recomputed) for layer in layers], 0.08),
        ("recomputed std", "#e69f00", "s", [_std(layer.recomputed) for layer in layers], 0.24),
    )
    for label, colour, marker, values, offset in series:
        places = [place + offset for place in range(len(layers))]
        # Recomputed statistics are from the same data, so they have no sampling error.
        errors = [2 * error if error == error and "stored" in label else 0.0 for _, error in values]
        left.errorbar(
            [far for far, _ in values], places, xerr=errors, fmt=marker, color=colour, label=label, markersize=4,
            capsize=2,
        )  # fmt: skip
    left.axvline(OFF, color="gray", linewidth=0.8, linestyle=":")
    left.set_xlim(left=0)
    left.set_xlabel("off by (root mean square over channels; bars: ± 2 standard errors)")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    sizes = [layer.between.effective_batch for layer in layers]
    right.barh(
        range(len(layers)), [size if math.isfinite(size) else 0.0 for size in sizes], height=0.5, color="#009e73"
    )
    right.axvline(FEW, color="gray", linewidth=0.8, linestyle=":")
    right.set_xlabel("effective sample size of a batch")
    left.set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize=7)
    left.invert_yaxis()
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(f"Diagnosed from {counted(diagnosis.batches, 'batch')}: first layer on top", fontsize=10)
    return figure


def _mean(report: LayerReport) -> tuple[float, float]:
    return report.mean_shift, report.mean_standard_error


def _std(report: LayerReport) -> tuple[float, float]:
    return report.std_shift, report.std_standard_error
