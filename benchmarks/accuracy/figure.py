"""docs/accuracy.png: scores on digits at the best rate, by batch size; panels by task, optimizer and kind of batch."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .contenders import BATCH_NORM, OURS, OURS_CENTERED, RECALIBRATED
from .results import ONE_CLASS, SHUFFLED, Cell, Results
from .tasks import TASKS

# Okabe and Ito's colours, as in the demo's figure.
LINES = {
    BATCH_NORM: ("#999999", "-"),
    RECALIBRATED: ("#999999", ":"),
    "GroupNorm": ("#56b4e9", "-"),
    "Batch Renormalization": ("#009e73", "-"),
    OURS: ("#d55e00", "-"),
    OURS_CENTERED: ("#d55e00", ":"),
}
BATCHES = (1, 2, 4, 8, 32)
ROWS = (("AdamW", SHUFFLED), ("SGD", SHUFFLED), ("AdamW", ONE_CLASS), ("SGD", ONE_CLASS))


def figure(results: Results) -> Figure:
    """A column for each task, a row for each optimizer and kind of batch of which there is anything."""
    run = {(cell.optimizer.removeprefix("plain "), cell.batches) for cell in results.cells()}
    rows = [row for row in ROWS if row in run]
    shown = Figure(figsize=(2.3 * len(TASKS), 0.6 + 2 * len(rows)), dpi=120, layout="constrained")
    panels = shown.subplots(len(rows), len(TASKS), sharex=True, squeeze=False)
    for axes, (optimizer, batches) in zip(panels, rows, strict=True):
        for panel, task in zip(axes, TASKS, strict=True):
            plain = "plain SGD" if (task, optimizer) == ("fastai's net", "SGD") else optimizer
            draw(panel, results, task, plain, batches)
        axes[0].set_ylabel(f"{optimizer}\n{'independent' if batches == SHUFFLED else batches}\nscore in %")
    for panel, task in zip(panels[0], TASKS, strict=True):
        panel.set_title(task, fontsize=10)
    for panel in panels[-1]:
        panel.set_xlabel("batch size")
    handles = {line.get_label(): line for panel in panels.flat for line in panel.get_lines()}
    if handles:
        shown.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(LINES), frameon=False)
    return shown


def draw(panel: Axes, results: Results, task: str, optimizer: str, batches: str) -> None:
    """Mean ± standard deviation over the seeds, of each contender that has any."""
    for name, (colour, style) in LINES.items():
        scores = {batch: results.best(Cell(task, batch, batches, optimizer), name) for batch in BATCHES}
        points = [(BATCHES.index(batch), score.mean, score.std) for batch, score in scores.items() if score]
        if points:
            x, mean, std = zip(*points, strict=True)
            means, stds = ([100 * value for value in values] for values in (mean, std))
            panel.errorbar(
                x, means, stds, color=colour, linestyle=style, marker="o", markersize=3, lw=1, elinewidth=0.6
            )
            panel.get_lines()[-1].set_label(name)
    panel.set_xticks(range(len(BATCHES)), [str(batch) for batch in BATCHES])
    panel.tick_params(labelsize=8)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    if not panel.has_data():
        panel.set_yticks([])
        panel.text(0.5, 0.5, "not run", transform=panel.transAxes, ha="center", color="#999999", fontsize=8)
