"""Means, losses, tables and the figure, from what `benchmarks.layers` measured. Measures nothing itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.table import Table

from .cases import COPY, DTYPES, FASTAI, LAYOUTS, OURS, PEER

Row = dict[str, Any]
COLOURS = {"PreciseBatchNorm": "#0072B2", "RunningBatchNorm": "#D55E00", "RunningBatchNorm exact": "#009E73"}
CAPTION_COLOUR = "#555555"
# How often as many bytes as x has must move if nothing stays in the cache. Forward: x is read for the sums and for the
# map, y is written. Backward: x and dy are read for both, dx is written.
TRANSFERS = {"training step": 8, "forward": 3, "evaluation": 2}
TRANSFERS_OF_COPY = 2
# What the summary calls the grids that have a few shapes only.
MARGINAL_GRIDS = {
    "float16": "training step, float16",
    "forward": "forward only",
    "evaluation": "evaluation",
    "one thread": "training step, one thread",
    "default allocator": "training step, default allocator (page faults)",
    "compiled": "training step, both compiled",
    "compiled with ReLU": "training step and a ReLU, both compiled",
}


class Line(NamedTuple):
    """A line of the summary: by layer, one value per row that it is over, and what each row weighs."""

    label: str
    rows: list[Row]
    values: dict[str, list[float]]
    weights: list[float]

    def cell(self, layer: str) -> str:
        """The weighted geometric mean, and the best and the worst."""
        values = self.values[layer]
        mean = math.exp(fmean([math.log(value) for value in values], self.weights))
        return f"{mean:.2f} ({min(values):.2f} to {max(values):.2f})"


def kind(row: Row) -> str:
    """Layout and dtype; the layouts that few tensors have are one kind."""
    return f"{row['layout'] if row['layout'] in LAYOUTS else 'sliced or mixed'}, {row['dtype']}"


def summary(rows: Sequence[Row], by_kind: bool = False) -> list[Line]:
    """The training step by layout and dtype, then what else there is: in one line each, or by layout and dtype too."""
    steps = of_grid(rows, "training step")
    lines = _lines("training step", steps, time, True)
    resnet = [row for row in steps if row["count"] and row["shape"].startswith("32x")]
    lines += _lines("ResNet-50 at batch 32, by number of layers", resnet, time, by_kind, weigh=lambda row: row["count"])
    for grid, label in MARGINAL_GRIDS.items():
        lines += _lines(label, of_grid(rows, grid), time, by_kind)
    lines += _lines("training step, relative to fastai's class", of_grid(rows, "fastai"), time_of_fastai, by_kind)
    lines += _lines("memory kept for backward", steps, memory, by_kind)
    on_gpu = [row for row in steps if "peak bytes" in row]
    lines += _lines("most memory taken in a training step", on_gpu, peak_memory, by_kind)
    lines += _lines("training step, time of the host", on_gpu, time_of_host, by_kind)
    return lines


def time(row: Row, layer: str) -> float:
    """Relative to nn.BatchNorm's."""
    return float(row["ratio"][layer])


def bandwidth(row: Row, name: str) -> float:
    """GB/s: the bytes that must move, see `TRANSFERS`, in the median time; more than memory has, from the cache."""
    transfers = TRANSFERS_OF_COPY if name == COPY else TRANSFERS[row["mode"]]
    size = math.prod(map(int, row["shape"].split("x"))) * DTYPES[row["dtype"]].itemsize
    return float(transfers * size / row["milliseconds"][name] / 1e6)


def bandwidths(row: Row) -> str:
    """Of nn.BatchNorm, of the layers and of the copy, where there is one."""
    names = [name for name in (PEER, *OURS, COPY) if name in row["milliseconds"]]
    return " / ".join(f"{bandwidth(row, name):.1f}" for name in names)


def time_of_fastai(row: Row, layer: str) -> float:
    """Relative to that of the fastai class."""
    return float(row["ratio"][layer] / row["ratio"][FASTAI])


def memory(row: Row, layer: str) -> float:
    """Bytes kept for backward, relative to nn.BatchNorm's."""
    return float(row["saved bytes"][layer] / row["saved bytes"][PEER])


def peak_memory(row: Row, layer: str) -> float:
    """The most bytes taken during a call, relative to nn.BatchNorm's; GPU only."""
    return float(row["peak bytes"][layer] / row["peak bytes"][PEER])


def time_of_host(row: Row, layer: str) -> float:
    """What the host takes to send the work, relative to nn.BatchNorm's; GPU only."""
    return float(row["host milliseconds"][layer] / row["host milliseconds"][PEER])


def of_grid(rows: Iterable[Row], grid: str) -> list[Row]:
    """The rows of a grid."""
    return [row for row in rows if row["grid"] == grid]


def _lines(
    label: str, rows: list[Row], value: Callable[[Row, str], float], by_kind: bool,
    weigh: Callable[[Row], float] = lambda row: 1.0,
) -> list[Line]:  # fmt: skip
    groups = {label: rows} if rows else {}
    if by_kind:
        groups = {
            f"{label}, {each}": [row for row in rows if kind(row) == each] for each in dict.fromkeys(map(kind, rows))
        }
    return [
        Line(
            name, group, {layer: [value(row, layer) for row in group] for layer in OURS}, [weigh(row) for row in group]
        )
        for name, group in groups.items()
    ]


def losses(rows: Iterable[Row]) -> list[str]:
    """Every case in which a layer takes longer than nn.BatchNorm, the worst first; a line each."""
    lost = []
    for row in rows:
        slower = {layer: row["ratio"][layer] for layer in OURS if row["ratio"][layer] > 1}
        if slower:
            times = ", ".join(f"{layer} {ratio:.3f}" for layer, ratio in slower.items())
            where = f"{row['grid']}, {row['shape']}, {row['layout']}, {row['dtype']}"
            lost.append((max(slower.values()), f"{where}: {times}"))
    return [line for _, line in sorted(lost, reverse=True)]


def losses_title(rows: Sequence[Row]) -> str:
    """How many comparisons were lost."""
    compared = [row["ratio"][layer] for row in rows for layer in OURS]
    return f"slower than nn.BatchNorm in {sum(ratio > 1 for ratio in compared)} of {len(compared)} comparisons"


def worst_errors(rows: Sequence[Row]) -> str:
    """The largest error of everybody against float64, each relative to the largest value of its tensor."""
    parts = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        off = [row["error"] for row in rows if row["dtype"] == dtype]
        names = [name for name in (PEER, *OURS, FASTAI) if any(name in errors for errors in off)]
        worst = (f"{name} {max(errors.get(name, 0.0) for errors in off):.0e}" for name in names)
        parts.append(f"{dtype}: {', '.join(worst)}")
    return f"largest error against float64, relative to the largest value: {'; '.join(parts)}"


def disturbed(rows: Sequence[Row]) -> str:
    """How much of the machine others had meanwhile."""
    cores = [row["disturbance"] for row in rows]
    return (
        f"other processes kept {fmean(cores):.2f} cores busy on average, more than 0.1 in {_many(cores)} of the cases"
    )


def _many(cores: list[float]) -> str:
    return f"{sum(each > 0.1 for each in cores) / len(cores):.0%}"


def summary_table(rows: Sequence[Row]) -> Table:
    """For the terminal."""
    shown = Table(title="Relative to nn.BatchNorm: geometric mean (best to worst)", title_justify="left")
    for column in ("", "cases", *OURS):
        shown.add_column(column)
    for line in summary(rows):
        shown.add_row(line.label, str(len(line.rows)), *(line.cell(layer) for layer in OURS))
    return shown


def case_table(rows: Sequence[Row]) -> Table:
    """Every case, for the terminal; a loss is red."""
    shown = Table(title="Time relative to nn.BatchNorm (below 1 is faster)", title_justify="left")
    for column in ("grid", "shape", "layout", "dtype", f"{PEER} ms", *OURS, FASTAI, COPY, "GB/s", "page faults"):
        shown.add_column(column)
    for row in rows:
        ratios = row["ratio"]
        cells = [f"[{'red' if ratios[layer] > 1 else 'green'}]{ratios[layer]:.2f}" for layer in OURS]
        cells += [f"{ratios[name]:.2f}" if name in ratios else "" for name in (FASTAI, COPY)]
        described = (row["grid"], row["shape"], row["layout"], row["dtype"], f"{row['milliseconds'][PEER]:.2f}")
        shown.add_row(*described, *cells, bandwidths(row), page_faults(row))
    return shown


def page_faults(row: Row) -> str:
    """Of nn.BatchNorm and of the layers, per call."""
    faults = [row["page faults"][name] for name in (PEER, *OURS)]
    return " / ".join(map(str, faults)) if any(faults) else "0"


def figure(rows: Sequence[Row], where: str) -> Figure:
    """A dot per case of the training step and layer, on a log scale; the geometric mean as a bar and in words.

    Needs no pyplot, so its state and backend stay alone.
    """
    lines = _lines("", of_grid(rows, "training step"), time, True)
    drawing = Figure(figsize=(10.4, 5.6), dpi=150, layout="constrained")
    axes = drawing.add_subplot()
    axes.set_yscale("log", base=2)
    axes.axhline(1, color="black", linewidth=1.6, zorder=2)
    axes.axhspan(1, 1e9, color="#f6f1ee", zorder=0)
    for side, word in {"bottom": "slower", "top": "faster"}.items():
        shift = 3 if side == "bottom" else -3
        axes.annotate(
            word, (1, 1), (-4, shift), xycoords=("axes fraction", "data"), textcoords="offset points",
            ha="right", va=side, fontsize=9, color=CAPTION_COLOUR,
        )  # fmt: skip
    width = 0.84 / len(OURS)
    for group, line in enumerate(lines):
        sizes = [math.prod(map(int, row["shape"].split("x"))) for row in line.rows]
        for i, layer in enumerate(OURS):
            middle = group + (i - (len(OURS) - 1) / 2) * width
            # From left to right the tensors grow, so that overhead is on the left and bandwidth on the right.
            ordered = [line.values[layer][place] for place in sorted(range(len(line.rows)), key=sizes.__getitem__)]
            steps = [(k + 0.5) / len(ordered) - 0.5 for k in range(len(ordered))]
            axes.scatter(
                [middle + 0.82 * width * step for step in steps], ordered,
                s=11, color=COLOURS[layer], alpha=0.75, linewidth=0, zorder=3,
                label=layer if group == 0 else None,
            )  # fmt: skip
            mean = math.exp(fmean(map(math.log, ordered)))
            axes.plot(
                [middle - 0.44 * width, middle + 0.44 * width], [mean] * 2, color="black", linewidth=1.6, zorder=4
            )
            axes.annotate(
                f"{mean:.2f}", (middle, 0), (0, 4), xycoords=("data", "axes fraction"), textcoords="offset points",
                ha="center", va="bottom", fontsize=9, color=COLOURS[layer], fontweight="bold",
            )  # fmt: skip
    _scale(axes, [value for line in lines for values in line.values.values() for value in values])
    axes.set_xticks(range(len(lines)), [_label(line) for line in lines], fontsize=9.5)
    axes.set_xlim(-0.5, len(lines) - 0.5)
    for edge in range(1, len(lines)):
        axes.axvline(edge - 0.5, color="#bbbbbb", linewidth=0.8)
    axes.tick_params(length=0, which="both")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_ylabel("time / nn.BatchNorm's")
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(OURS), frameon=False, fontsize=11, markerscale=2.2
    )
    drawing.suptitle("Training step, time relative to nn.BatchNorm: below 1 is faster", fontsize=14, fontweight="bold")
    caption = "A dot is a case; within a column tensors grow from left to right. Bars and numbers: geometric means.\n"
    drawing.supxlabel(caption + where, fontsize=8.5, color=CAPTION_COLOUR)
    return drawing


def _scale(axes: Any, values: list[float]) -> None:
    """Powers of two around all values and 1, with room for the means below."""
    low = math.floor(math.log2(min(*values, 1)))
    high = math.ceil(math.log2(max(*values, 1)))
    ticks = [2.0**power for power in range(low, high + 1)]
    axes.set_yticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylim(2 ** (low - 0.07 * (high - low + 1)), 2**high)


def _label(line: Line) -> str:
    layout, dtype = line.label.removeprefix(", ").rsplit(", ", 1)
    return f"{layout}\n{dtype}\n({len(line.rows)} cases)"
