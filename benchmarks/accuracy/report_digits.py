"""The part of docs/accuracy.md on the quick grid of digits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from statistics import fmean, median

from .contenders import BATCH_NORM, CONTENDERS, OURS, OURS_CENTERED, RECALIBRATED
from .grid import rates
from .report_tables import (
    CLOSE,
    MISSING,
    OURS_BOTH,
    against_reference,
    best_of,
    distance,
    emphasised,
    listed,
    markdown,
    not_finite,
    points,
    score_text,
    was_run,
)
from .results import IN_WORDS, ONE_CLASS, SHUFFLED, Cell, Results, Score
from .tasks import TASKS

BATCHES = (1, 2, 4, 8, 32)
NAMES = tuple(dict.fromkeys(name for contender in CONTENDERS.values() for name in contender.names))
OTHERS = (BATCH_NORM, RECALIBRATED, "GroupNorm", "Batch Renormalization")  # what people have without this library

# Whom each of ours is compared with: the default with those that leave convolutions alone, as it does.
COMPARED = {OURS: tuple(name for name in NAMES if name != OURS_CENTERED), OURS_CENTERED: NAMES}

ScoreOf = Callable[[Results, Cell, str], Score | None]


def complete(results: Results) -> list[Cell]:
    """The cells in which every contender was trained or could not be: only those are compared."""
    return [cell for cell in results.cells() if all(was_run(results, cell, name) for name in NAMES)]


# ------------------------------------------------------------------------------------------------------ the summary


def ranking(results: Results, cells: Sequence[Cell]) -> str:
    """Every contender over all cells: how far from the best at its best rate, and what its worst rate costs."""
    rows = []
    for name in NAMES:
        trained = [cell for cell in cells if results.best(cell, name)]
        if not trained:
            continue
        short = [_shortfall(results, cell, name, NAMES, Results.best) for cell in trained]
        worst = [_shortfall(results, cell, name, NAMES, Results.worst) for cell in trained]
        close = sum(behind <= CLOSE for behind in short)
        rows.append([
            emphasised(name), f"{close} of {len(trained)}", points(fmean(short)), points(max(short)),
            points(fmean(worst)),
        ])  # fmt: skip
    header = [
        "", "within half a point of the best", "behind the best, mean", "largest", "worst rate: behind the best, mean",
    ]  # fmt: skip
    return markdown(header, rows)


def _shortfall(results: Results, cell: Cell, name: str, everybody: Sequence[str], score: ScoreOf) -> float:
    """By how much somebody is behind the best of all, which may be itself."""
    own = score(results, cell, name)
    assert own is not None
    return max(found.mean for other in everybody if (found := score(results, cell, other)) is not None) - own.mean


def by_batch(results: Results, cells: Sequence[Cell], name: str) -> str:
    """One of ours against the best of all contenders, and of those that people have, by batch size and kind."""
    rows = []
    for batches, batch in product((SHUFFLED, ONE_CLASS), BATCHES):
        some = [cell for cell in cells if (cell.batch, cell.batches) == (batch, batches) and results.best(cell, name)]
        if some:
            short = [_shortfall(results, cell, name, COMPARED[name], Results.best) for cell in some]
            over_others = [-_shortfall(results, cell, name, OTHERS, Results.best) for cell in some]
            worst = [-_shortfall(results, cell, name, OTHERS, Results.worst) for cell in some]
            rows.append([
                f"{batch}{IN_WORDS[batches]}", str(len(some)),
                f"{sum(behind <= CLOSE for behind in short)}", points(fmean(short)),
                f"{100 * fmean(over_others):+.1f}", f"{sum(ahead > 0 for ahead in worst)}",
            ])  # fmt: skip
    header = [
        "batch", "cells", "within half a point of the best", "behind the best, mean",
        "ahead of the best of the four others, mean", "worst rate better than that of all four",
    ]  # fmt: skip
    return markdown(header, rows)


def losses(results: Results, cells: Sequence[Cell], name: str) -> list[str]:
    """Every cell in which one of ours is more than half a point behind somebody, the worst first."""
    found = []
    for cell in cells:
        ours, best = results.best(cell, name), best_of(results, cell, COMPARED[name])
        if ours is not None and best is not None and ours.mean < best[1].mean - CLOSE:
            others = best_of(results, cell, OTHERS)
            also = "" if others is None else f"; against {others[0]} {distance(ours, others[1])}"
            also = "" if others is not None and others[0] == best[0] else also
            gap = distance(ours, best[1])
            found.append((gap.points, f"{cell}: {score_text(ours)}, {gap} against {best[0]}{also}"))
    return [line for _, line in sorted(found)]


def worst_rate_losses(results: Results, cells: Sequence[Cell], name: str) -> list[str]:
    """Every cell in which one of the four others has a better worst rate than one of ours."""
    found = []
    for cell in cells:
        ours = results.worst(cell, name)
        others = {other: score for other in OTHERS if (score := results.worst(cell, other)) is not None}
        other, best = max(others.items(), key=lambda item: item[1].mean)
        if ours is not None and ours.mean < best.mean:
            line = f"{cell}: {score_text(ours)} at {ours.rate:g}, {other} {score_text(best)} at {best.rate:g}"
            found.append((ours.mean - best.mean, line))
    return [line for _, line in sorted(found)]


# ------------------------------------------------------------------------------------------------------- the tables


def task_tables(results: Results, task: str) -> str:
    """A table for each optimizer and kind of batch: contenders by batch size."""
    groups = dict.fromkeys((cell.optimizer, cell.batches) for cell in results.cells() if cell.task == task)
    parts = []
    for optimizer, batches in groups:
        cells = [Cell(task, batch, batches, optimizer) for batch in BATCHES]
        cells = [cell for cell in cells if cell in results.cells()]
        tried = dict.fromkeys(", ".join(f"{rate:g}" for rate in rates(cell)) for cell in cells)
        kind = "batches of one class" if batches == ONE_CLASS else "independent batches"
        rows = [[emphasised(name), *(cell_text(results, cell, name) for cell in cells)] for name in NAMES]
        table = markdown(["", *(f"batch {cell.batch}" for cell in cells)], rows)
        parts.append(f"**{optimizer}, {kind}** (rates {'; '.join(tried)})\n\n{table}")
    return "\n\n".join(parts)


def cell_text(results: Results, cell: Cell, name: str) -> str:
    """Mean ± standard deviation at the best rate, that rate, and the mean at the worst; the best of a cell is bold."""
    if results.error(cell, name):
        return "cannot"
    best, worst = results.best(cell, name), results.worst(cell, name)
    if best is None or worst is None:
        return MISSING
    first = best_of(results, cell, NAMES)
    text = f"**{score_text(best)}**" if first is not None and first[0] == name else score_text(best)
    return f"{text} at {best.rate:g} / {points(worst.mean)}{not_finite(best)}"


# ---------------------------------------------------------------------------------------------------------- the part


INTRODUCTION = """## The quick grid: digits

![Score by batch size, on digits](accuracy.png)

`python -m benchmarks.accuracy` measured it. The tasks are small, all made of scikit-learn's digits of 8x8: what is
right here for nets of seconds need not be for nets of days. There are more batch sizes than above.

- As above, everybody starts from the same weights and sees the same batches: {samples} images, whatever the batch
  size, at a learning rate that falls to zero linearly. The best rate is the one with the best mean on validation data.
  The tables show scores on test data, in percent, over {seeds}.
- *running* and *exact* are the gradients of RunningBatchNorm, followed by its momentum. **{ours}** is its default,
  **{centered}** the default with centred weights.
- *{recalibrated}* is the BatchNorm of the line before it after `update_bn_stats` with all training data.
- *of one class*: all samples of a batch are of the same class, and so are the digits on a canvas of the segmentation.
- The best of several is better than it should be: half of the means have a standard error above {error} points, and
  of a dozen that are equally good the luckiest is about 1.6 standard errors above the truth.
- Compared are cells in which every contender was run. {complete} of {begun} begun cells are.
- Measured with {where}.
"""


def section(results: Results) -> str:
    """All about the digits."""
    if not results.cells():
        return "## The quick grid: digits\n\nNothing is measured yet: `python -m benchmarks.accuracy` does it."
    cells = complete(results)
    parts = [_introduction(results, cells), *(_compared(results, cells) if cells else ())]
    parts.append(
        "## Task by task\n\nDigits. Mean ± standard deviation at the best rate, that rate / mean at the worst rate of "
        f"the sweep. {MISSING}: not run. cannot: one value per channel."
    )
    for task in TASKS.values():
        if any(cell.task == task.name for cell in results.cells()):
            parts.append(f"### {task.name}: {task.measure}\n\n{task_tables(results, task.name)}")
    return "\n\n".join(parts)


def _introduction(results: Results, cells: Sequence[Cell]) -> str:
    scores = [score for cell in results.cells() for name in NAMES if (score := results.best(cell, name)) is not None]
    counts = sorted({len(score.test) for score in scores})
    machines = [part["machine"] for part in results.parts]
    where = dict.fromkeys(f"{on['processor']}, torch {on['torch']}, {on['date']}" for on in machines)
    return INTRODUCTION.format(
        samples=results.cells()[0].samples, seeds=f"{' or '.join(map(str, counts))} seeds",
        error=points(median(score.standard_error for score in scores)) if scores else MISSING, ours=OURS,
        centered=OURS_CENTERED, recalibrated=RECALIBRATED, complete=len(cells), begun=len(results.cells()),
        where="; ".join(where),
    ).rstrip()  # fmt: skip


def _compared(results: Results, cells: Sequence[Cell]) -> list[str]:
    """What is said about cells in which every contender was run."""
    parts = [f"### All contenders, over {len(cells)} cells\n\n{ranking(results, cells)}"]
    others = f"The four others are {'; '.join(OTHERS)}."
    parts += [f"### {name}, by batch size\n\n{others}\n\n{by_batch(results, cells, name)}" for name in OURS_BOTH]
    if reference := against_reference(results):
        about = "Digits. Bold: more than half a point behind."
        parts.append(f"### Batches of 1 and 2 beside batches of 32\n\n{about}\n\n{reference}")
    titles = {OURS: "## Losses\n\nDigits.", OURS_CENTERED: "## Losses with centred weights\n\nDigits."}
    for name, title in titles.items():
        behind, worse = losses(results, cells, name), worst_rate_losses(results, cells, name)
        among = f", {OURS_CENTERED} left out," if OURS_CENTERED not in COMPARED[name] else ""
        parts += [
            f"{title} {name} is more than half a point behind the best contender{among} in {len(behind)} of "
            f"{len(cells)} cells (difference ± its standard error):\n\n{listed(behind)}",
            f"Its worst rate is worse than that of one of the four others in {len(worse)}:\n\n{listed(worse)}",
        ]
    return parts
