"""The figure of a report, and what all figures of layers share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .text import counted

if TYPE_CHECKING:
    from .report import StatsReport


@dataclass(frozen=True, kw_only=True)
class Series:
    """One number of every layer.

    Attributes:
        label: in the legend.
        colour, marker: of the points.
        values: by layer, in the order of the model.
        errors: their standard errors, NaN where not known; None without error bars.
        offset: distance from the middle of the layer's row, in rows.
    """

    label: str
    colour: str
    marker: str
    values: Sequence[float]
    errors: Sequence[float] | None = None
    offset: float

    @property
    def places(self) -> list[float]:
        """Where the points are on the vertical axis."""
        return [place + self.offset for place in range(len(self.values))]

    @property
    def bars(self) -> list[float]:
        """Two standard errors; 0 where they are not known."""
        return [0.0 if math.isnan(error) else 2 * error for error in self.errors or [0.0] * len(self.values)]


def plot(report: StatsReport) -> Any:
    """How far each layer moved: the first layer on top."""
    layers = report.layers
    figure = new_figure("StatsReport.plot", layers=len(layers), width=7.5, margin=1.6)
    axes = figure.add_subplot()
    series = (
        Series(
            label="mean, in std", colour="#0072b2", marker="o", offset=-0.13,
            values=[layer.mean_shift for layer in layers],
            errors=[layer.mean_standard_error for layer in layers],
        ),
        Series(
            label="std, relative", colour="#d55e00", marker="s", offset=0.13,
            values=[layer.std_shift for layer in layers],
            errors=[layer.std_standard_error for layer in layers],
        ),
    )  # fmt: skip
    for each in series:
        axes.barh(each.places, each.values, height=0.22, color=each.colour, alpha=0.25)
    draw(axes, series, [layer.name for layer in layers])
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("how far the statistics moved (root mean square over channels; bars: ± 2 standard errors)")
    axes.set_title(f"Recalibrated from {counted(report.batches, 'batch')}: first layer on top", fontsize=10)
    axes.legend(loc="best", fontsize=8)
    return figure


def new_figure(caller: str, *, layers: int, width: float, margin: float) -> Any:
    """An empty figure with a row for each layer, in inches, which no graphical backend knows of.

    Raises:
        ImportError: without matplotlib, in the name of the caller.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{caller} needs matplotlib: pip install 'runningbn[plot]'") from error
    return Figure(figsize=(width, margin + 0.24 * max(layers, 4)), layout="constrained")


def draw(axes: Any, series: Sequence[Series], names: Sequence[str]) -> None:
    """Points with error bars, a row for each layer, the first on top."""
    for each in series:
        axes.errorbar(
            each.values, each.places, xerr=each.bars, fmt=each.marker, color=each.colour, label=each.label,
            markersize=4, capsize=2,
        )  # fmt: skip
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(left=0)


def saved(figure: Any, path: Any) -> Any:
    """The figure, saved if there is a path."""
    if path is not None:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    return figure
