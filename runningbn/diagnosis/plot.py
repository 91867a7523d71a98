"""The figure of a diagnosis."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..recalibration.plot import Series, draw, new_figure
from ..recalibration.text import counted
from .thresholds import FEW, OFF

if TYPE_CHECKING:
    from .result import Diagnosis


def plot(diagnosis: Diagnosis) -> Any:
    """Left: how far stored and recomputed statistics are off. Right: the effective sample size of a batch."""
    layers = diagnosis.layers
    figure = new_figure("Diagnosis.plot", layers=len(layers), width=10, margin=1.8)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    stored, recomputed = [layer.stored for layer in layers], [layer.recomputed for layer in layers]
    # Recomputed statistics are from the same data, so they have no sampling error.
    series = (
        Series(
            label="stored mean, in std", colour="#0072b2", marker="o", offset=-0.24,
            values=[report.mean_shift for report in stored],
            errors=[report.mean_standard_error for report in stored],
        ),
        Series(
            label="stored std, relative", colour="#d55e00", marker="s", offset=-0.08,
            values=[report.std_shift for report in stored],
            errors=[report.std_standard_error for report in stored],
        ),
        Series(
            label="recomputed mean", colour="#56b4e9", marker="o", offset=0.08,
            values=[report.mean_shift for report in recomputed],
        ),
        Series(
            label="recomputed std", colour="#e69f00", marker="s", offset=0.24,
            values=[report.std_shift for report in recomputed],
        ),
    )  # fmt: skip
    draw(left, series, [layer.name for layer in layers])
    left.axvline(OFF, color="gray", linewidth=0.8, linestyle=":")
    left.set_xlabel("off by (root mean square over channels; bars: ± 2 standard errors)")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    sizes = [layer.between.effective_batch for layer in layers]
    right.barh(
        range(len(layers)), [size if math.isfinite(size) else 0.0 for size in sizes], height=0.5, color="#009e73"
    )
    right.axvline(FEW, color="gray", linewidth=0.8, linestyle=":")
    right.set_xlabel("effective sample size of a batch")
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(f"Diagnosed from {counted(diagnosis.batches, 'batch')}: first layer on top", fontsize=10)
    return figure
