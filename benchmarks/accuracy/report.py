"""docs/accuracy.md: tables made from the committed results and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ..readme import markdown
from ..results_file import FOLDER
from .contenders import BATCH_NORM, CONTENDERS, OURS, RECALIBRATED
from .figure import figure
from .grid import rates
from .results import IN_WORDS, ONE_CLASS, SHUFFLED, Cell, Results, Score
from .tasks import TASKS

DOCS = Path(__file__).parents[2] / "docs"
PUBLISHED = FOLDER / "accuracy_published.json"
BATCHES = (1, 2, 4, 8, 32)
NAMES = tuple(dict.fromkeys(name for contender in CONTENDERS.values() for name in contender.names))
OTHERS = (BATCH_NORM, RECALIBRATED, "GroupNorm", "Batch Renormalization")  # what people have without this library
CLOSE = 0.005  # half a point
REFERENCE_BATCH = 32


@dataclass(frozen=True)
class Distance:
    """By how much one score is better than another, with the standard error of the difference over the seeds."""

    points: float
    error: float

    def __str__(self) -> str:
        return f"{100 * self.points:+.1f} ± {100 * self.error:.1f}"


def distance(ours: Score, theirs: Score) -> Distance:
    """Mean difference; the seeds are the same, but the runs hardly correlate."""
    return Distance(ours.mean - theirs.mean, math.hypot(ours.standard_error, theirs.standard_error))


def best_of(results: Results, cell: Cell, names: Sequence[str]) -> tuple[str, Score] | None:
    """Who of these has the best mean at its best rate; None where nobody has any."""
    scores = {name: score for name in names if (score := results.best(cell, name)) is not None}
    return max(scores.items(), key=lambda item: item[1].mean) if scores else None


def complete(results: Results) -> list[Cell]:
    """The cells in which every contender was trained or could not be: only those are compared."""
    return [
        cell
        for cell in results.cells()
        if all(results.best(cell, name) or results.error(cell, name) for name in NAMES)
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------ the summary


def ranking(results: Results, cells: Sequence[Cell]) -> str:
    """Every contender over all cells: how far from the best at its best rate, and what its worst rate costs."""
    rows = []
    for name in NAMES:
        trained = [cell for cell in cells if results.best(cell, name)]
        short = [_shortfall(results, cell, name, Results.best) for cell in trained]
        worst = [_shortfall(results, cell, name, Results.worst) for cell in trained]
        close = sum(behind <= CLOSE for behind in short)
        rows.append([
            _emphasised(name), f"{close} of {len(trained)}", _points(fmean(short)), _points(max(short)),
            _points(fmean(worst)),
        ])  # fmt: skip
    header = [
        "", "within half a point of the best", "behind the best, mean", "largest", "worst rate: behind the best, mean",
    ]  # fmt: skip
    return markdown(header, rows)


def _shortfall(
    results: Results, cell: Cell, name: str, score: Callable[[Results, Cell, str], Score | None]
) -> float:  # fmt: skip
    """By how much somebody is behind the best contender, which may be itself; an experiment may be ahead."""
    everybody = [found.mean for other in NAMES if (found := score(results, cell, other)) is not None]
    own = score(results, cell, name)
    assert own is not None
    return max(everybody) - own.mean


def _points(value: float) -> str:
    return f"{100 * value:.1f}"


def _emphasised(name: str) -> str:
    return f"**{name}**" if name == OURS else name


def by_batch(results: Results, cells: Sequence[Cell]) -> str:
    """The default against the best of all contenders, and of those that people have, by batch size and kind."""
    rows = []
    for batches, batch in product((SHUFFLED, ONE_CLASS), BATCHES):
        some = [cell for cell in cells if (cell.batch, cell.batches) == (batch, batches)]
        if some:
            short = [_shortfall(results, cell, OURS, Results.best) for cell in some]
            over_others = [_over_others(results, cell, Results.best) for cell in some]
            worst = [_over_others(results, cell, Results.worst) for cell in some]
            rows.append([
                f"{batch}{IN_WORDS[batches]}", str(len(some)),
                f"{sum(behind <= CLOSE for behind in short)}", _points(fmean(short)),
                f"{100 * fmean(over_others):+.1f}", f"{sum(ahead > 0 for ahead in worst)}",
            ])  # fmt: skip
    header = [
        "batch", "cells", "within half a point of the best", "behind the best, mean",
        "ahead of the best of the four others, mean", "worst rate better than that of all four",
    ]  # fmt: skip
    return markdown(header, rows)


def _over_others(
    results: Results, cell: Cell, score: Callable[[Results, Cell, str], Score | None]
) -> float:  # fmt: skip
    others = [found.mean for name in OTHERS if (found := score(results, cell, name)) is not None]
    own = score(results, cell, OURS)
    assert own is not None
    return own.mean - max(others)


def against_reference(results: Results) -> str:
    """The default at batch 1 and 2 beside nn.BatchNorm at batch 32, recalibrated and not."""
    rows = []
    references = [cell for cell in results.cells() if cell.batch == REFERENCE_BATCH and cell.batches == SHUFFLED]
    for reference in references:
        theirs = [results.best(reference, name) for name in (BATCH_NORM, RECALIBRATED)]
        ours = [results.best(_at(reference, batch), OURS) for batch in (1, 2)]
        if theirs[0] is None or not any(ours):
            continue
        differences = [_difference(own, other) for own, other in product(ours, theirs)]
        rows.append([reference.task, reference.optimizer, *map(_score, theirs), *map(_score, ours), *differences])
    header = [
        "task", "optimizer", f"{BATCH_NORM} at 32", f"{RECALIBRATED} at 32", "ours at 1", "ours at 2",
        "1 less BatchNorm", "1 less recalibrated", "2 less BatchNorm", "2 less recalibrated",
    ]  # fmt: skip
    return markdown(header, rows)


def _at(cell: Cell, batch: int) -> Cell:
    return Cell(cell.task, batch, cell.batches, cell.optimizer)


def _difference(ours: Score | None, theirs: Score | None) -> str:
    if ours is None or theirs is None:
        return "–"
    found = distance(ours, theirs)
    return f"**{found}**" if found.points < -CLOSE else str(found)


def _score(score: Score | None) -> str:
    return "–" if score is None else f"{100 * score.mean:.1f} ± {100 * score.std:.1f}"


def losses(results: Results, cells: Sequence[Cell]) -> list[str]:
    """Every cell in which the default is more than half a point behind somebody, the worst first."""
    found = []
    for cell in cells:
        ours, best = results.best(cell, OURS), best_of(results, cell, NAMES)
        if ours is not None and best is not None and ours.mean < best[1].mean - CLOSE:
            others = best_of(results, cell, OTHERS)
            also = "" if others is None else f"; against {others[0]} {distance(ours, others[1])}"
            also = "" if others is not None and others[0] == best[0] else also
            gap = distance(ours, best[1])
            found.append((gap.points, f"{cell}: {_score(ours)}, {gap} against {best[0]}{also}"))
    return [line for _, line in sorted(found)]


def worst_rate_losses(results: Results, cells: Sequence[Cell]) -> list[str]:
    """Every cell in which one of the four others has a better worst rate than the default."""
    found = []
    for cell in cells:
        ours = results.worst(cell, OURS)
        others = {name: score for name in OTHERS if (score := results.worst(cell, name)) is not None}
        name, best = max(others.items(), key=lambda item: item[1].mean)
        if ours is not None and ours.mean < best.mean:
            line = f"{cell}: {_score(ours)} at {ours.rate:g}, {name} {_score(best)} at {best.rate:g}"
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
        rows = [[_emphasised(name), *(cell_text(results, cell, name) for cell in cells)] for name in NAMES]
        table = markdown(["", *(f"batch {cell.batch}" for cell in cells)], rows)
        parts.append(f"**{optimizer}, {kind}** (rates {'; '.join(tried)})\n\n{table}")
    return "\n\n".join(parts)


def cell_text(results: Results, cell: Cell, name: str) -> str:
    """Mean ± standard deviation at the best rate, that rate, and the mean at the worst; the best of a cell is bold."""
    if results.error(cell, name):
        return "cannot"
    best, worst = results.best(cell, name), results.worst(cell, name)
    if best is None or worst is None:
        return "–"
    first = best_of(results, cell, NAMES)
    text = f"**{_score(best)}**" if first is not None and first[0] == name else _score(best)
    diverged = f", {best.diverged} of {len(best.test)} not finite" if best.diverged else ""
    return f"{text} at {best.rate:g} / {100 * worst.mean:.1f}{diverged}"


# --------------------------------------------------------------------------------------------------------- the page


INTRODUCTION = """# Accuracy

![Score by batch size](accuracy.png)

Made by `python -m benchmarks.accuracy --report` from what `python -m benchmarks.accuracy` measured and stored in
`benchmarks/results/accuracy.jsonl`. The tasks are small, all made of scikit-learn's digits: what is right here for nets
of seconds need not be for nets of days.

- Everybody starts from the same weights and sees the same batches: {samples} images, whatever the batch size, at a
  learning rate that falls to zero linearly. Of the same rates for all, the one with the best mean on validation data
  is everybody's best rate; what is shown are the scores on test data, in percent, over {seeds}.
- *running* and *exact* are the gradients of RunningBatchNorm, followed by its momentum; **{ours}** is its
  default.
- *{recalibrated}* is the BatchNorm of the line before it after `update_bn_stats` with all training data.
- *of one class*: all samples of a batch are of the same class, and so are the digits on a canvas of the segmentation.
- The best of a dozen is better than it should be: half of the means have a standard error above {error} points, and of
  a dozen that are equally good the luckiest is about 1.6 standard errors above the truth.
- Compared are cells in which every contender was run. {complete} of {begun} begun cells are; {where}.
"""


def page(results: Results) -> str:
    """The whole of docs/accuracy.md."""
    cells = complete(results)
    if not cells:
        raise ValueError("the report compares cells in which every contender was run, and there is none yet")
    parts = [
        _introduction(results, cells),
        f"## All contenders, over {len(cells)} cells\n\n{ranking(results, cells)}",
        f"## {OURS}, by batch size\n\nThe four others are {'; '.join(OTHERS)}.\n\n{by_batch(results, cells)}",
        "## Batches of 1 and 2 beside batches of 32\n\n"
        f"Bold: more than half a point behind.\n\n{against_reference(results)}",
    ]
    behind, worse = losses(results, cells), worst_rate_losses(results, cells)
    parts += [
        f"## Losses\n\n{OURS} is more than half a point behind the best contender in {len(behind)} of {len(cells)} "
        f"cells (difference ± its standard error):\n\n{_listed(behind)}",
        f"Its worst rate is worse than that of one of the four others in {len(worse)}:\n\n{_listed(worse)}",
        "## Task by task\n\nMean ± standard deviation at the best rate, that rate / mean at the worst rate of the "
        "sweep. –: not run. cannot: one value per channel.",
    ]
    for task in TASKS.values():
        if any(cell.task == task.name for cell in results.cells()):
            parts.append(f"### {task.name}: {task.measure}\n\n{task_tables(results, task.name)}")
    if PUBLISHED.exists():
        parts.append(published(json.loads(PUBLISHED.read_text())))
    return "\n\n".join(parts) + "\n"


def _introduction(results: Results, cells: Sequence[Cell]) -> str:
    last = results.parts[-1]
    on = last["machine"]
    scores = [score for cell in cells for name in NAMES if (score := results.best(cell, name)) is not None]
    counts = sorted({len(score.test) for score in scores})
    return INTRODUCTION.format(
        samples=cells[0].samples, seeds=f"{' or '.join(map(str, counts))} seeds",
        error=_points(median(score.standard_error for score in scores)), ours=OURS, recalibrated=RECALIBRATED,
        complete=len(cells), begun=len(results.cells()),
        where=f"{on['processor']}, torch {on['torch']}, {on['date']}",
    ).rstrip()  # fmt: skip


def _listed(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines) or "- none"


def published(contents: dict[str, Any]) -> str:
    """The published tables in small, as `published` measured them."""
    parts = ["## Two published tables, in small"]
    for table in contents["cases"]:
        rows = [[row, *cells] for row, cells in table["rows"].items()]
        parts.append(f"### {table['title']}\n\n{table['about']}\n\n{markdown(['', *table['columns']], rows)}")
    return "\n\n".join(parts)


def write_report(results: Results) -> None:
    """Rewrite docs/accuracy.md and docs/accuracy.png."""
    (DOCS / "accuracy.md").write_text(page(results), encoding="utf-8")
    figure(results).savefig(DOCS / "accuracy.png")
