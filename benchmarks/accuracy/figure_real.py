"""docs/accuracy_real.png: scores on real images at the best rate; rows are cells, panels are networks."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .contenders import BATCH_NORM, OURS, OURS_CENTERED, RECALIBRATED
from .report_results import GROUP_NORM, MABN, MAIN, STANDARDISED, RealResults, begun
from .report_tables import label
from .results import IN_WORDS, Cell, Results

# Okabe and Ito's colours; hollow where something is added to the contender of that shape.
MARKS = {
    BATCH_NORM: ("#777777", "o", True),
    RECALIBRATED: ("#777777", "o", False),
    GROUP_NORM: ("#0072b2", "s", True),
    STANDARDISED: ("#0072b2", "s", False),
    MABN: ("#009e73", "^", True),
    OURS: ("#d55e00", "D", True),
    OURS_CENTERED: ("#d55e00", "D", False),
}
SPREAD = 0.62  # of the height of a row


def real_figure(results: RealResults, cells: Sequence[Cell] | None = None) -> Figure:
    """A panel for each task and optimizer of which there is anything, one below the other; of some cells, or of all."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in begun(results):
        if cells is not None and cell not in cells:
            continue
        groups.setdefault((cell.task, cell.optimizer), []).append(cell)
    heights = [len(cells) + 0.9 for cells in groups.values()] or [1]
    shown = Figure(figsize=(9, 1 + 0.42 * sum(heights)), dpi=120, layout="constrained")
    panels = shown.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, ((task, optimizer), cells) in zip(panels, groups.items(), strict=False):
        draw(panel, results, cells)
        panel.set_title(f"{task.removeprefix('garments, ')}, {optimizer}", fontsize=10, loc="left")
    panels[-1].set_xlabel("test score in % at the best rate, mean ± standard deviation over the seeds")
    handles = {handle.get_label(): handle for panel in panels for handle in panel.containers}
    if handles:
        shown.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return shown


def draw(panel: Axes, results: Results, cells: Sequence[Cell]) -> None:
    """The main contenders in each cell, the first cell on top, the first contender on top of its row."""
    for number, name in enumerate(MAIN):
        scores = [(row, score) for row, cell in enumerate(cells) if (score := results.best(cell, name)) is not None]
        if scores:
            colour, shape, filled = MARKS[name]
            panel.errorbar(
                [100 * score.mean for _, score in scores],
                [row + SPREAD * (number / (len(MAIN) - 1) - 0.5) for row, _ in scores],
                xerr=[100 * score.std for _, score in scores], label=label(name), color=colour, linestyle="none",
                marker=shape, markersize=5, elinewidth=0.8, markerfacecolor=colour if filled else "white",
            )  # fmt: skip
    panel.set_yticks(range(len(cells)), [_row(cell) for cell in cells], fontsize=9)
    panel.set_ylim(len(cells) - 0.5, -0.5)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    panel.tick_params(axis="x", labelsize=8)
    panel.grid(axis="x", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    for row in range(1, len(cells)):
        panel.axhline(row - 0.5, color="#dddddd", linewidth=0.6)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _row(cell: Cell) -> str:
    longer = str(cell).partition(f"{cell.optimizer}")[2]
    return f"batch {cell.batch}{IN_WORDS[cell.batches]}{longer}"
