"""Shared by both parts of docs/accuracy.md: how scores are formatted, compared and put into tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from .contenders import BATCH_NORM, OURS, OURS_CENTERED, RECALIBRATED
from .results import SHUFFLED, Cell, Results, Score

OURS_BOTH = (OURS, OURS_CENTERED)
CLOSE = 0.005  # half a point
REFERENCE_BATCH = 32
MISSING = "–"

# From names in the files of results to those in tables, in this order.
IN_TABLES = (
    (OURS, "RunningBatchNorm"),
    ("running, ", "RunningBatchNorm, "),
    ("exact, ", "RunningBatchNorm, exact, "),
    (", update_bn_stats", " + update_bn_stats"),
    (", standardised weights", " + standardised weights"),
    (", centred weights", " + centred weights"),
)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of GitHub's Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def label(name: str) -> str:
    """A contender by the name of its layer."""
    for old, new in IN_TABLES:
        name = name.replace(old, new)
    return name


def emphasised(name: str) -> str:
    """The name as it is in the file; bold where it is one of ours."""
    return f"**{name}**" if name in OURS_BOTH else name


def points(value: float) -> str:
    """In percent."""
    return f"{100 * value:.1f}"


def score_text(score: Score | None) -> str:
    """Mean ± standard deviation in percent."""
    return MISSING if score is None else f"{points(score.mean)} ± {points(score.std)}"


def not_finite(score: Score) -> str:
    """How many of the runs have a loss that is not finite, if any."""
    return f", {score.diverged} of {len(score.test)} not finite" if score.diverged else ""


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


def was_run(results: Results, cell: Cell, name: str) -> bool:
    """The contender was trained there, or could not be."""
    return results.best(cell, name) is not None or results.error(cell, name) is not None


def best_scores(results: Results, cell: Cell, names: Sequence[str]) -> list[str]:
    """The score of each at its best rate, the best of them bold."""
    first = best_of(results, cell, names)
    texts = []
    for name in names:
        score = results.best(cell, name)
        if score is None:
            texts.append("cannot" if results.error(cell, name) else MISSING)
        else:
            text = score_text(score)
            texts.append((f"**{text}**" if first is not None and first[0] == name else text) + not_finite(score))
    return texts


def against_reference(
    results: Results, names: Sequence[str] = OURS_BOTH, written: Callable[[str], str] = emphasised
) -> str:
    """Contenders at batch 1 and 2 beside nn.BatchNorm at batch 32, recalibrated and not; empty without results."""
    rows = []
    references = [cell for cell in results.cells() if cell.batch == REFERENCE_BATCH and cell.batches == SHUFFLED]
    for reference, name in product(references, names):
        theirs = [results.best(reference, other) for other in (BATCH_NORM, RECALIBRATED)]
        ours = [results.best(replace(reference, batch=batch), name) for batch in (1, 2)]
        if theirs[0] is None or not any(ours):
            continue
        differences = [_difference(own, other) for own, other in product(ours, theirs)]
        where = f"{reference.task}, {reference.optimizer}"
        rows.append([where, written(name), *map(score_text, theirs), *map(score_text, ours), *differences])
    header = [
        "", "", f"{written(BATCH_NORM)} at 32", f"{written(RECALIBRATED)} at 32", "ours at 1", "ours at 2",
        "1 minus BatchNorm", "1 minus recalibrated", "2 minus BatchNorm", "2 minus recalibrated",
    ]  # fmt: skip
    return markdown(header, rows) if rows else ""


def _difference(ours: Score | None, theirs: Score | None) -> str:
    if ours is None or theirs is None:
        return MISSING
    found = distance(ours, theirs)
    return f"**{found}**" if found.points < -CLOSE else str(found)


def listed(lines: Sequence[str]) -> str:
    """A list of Markdown."""
    return "\n".join(f"- {line}" for line in lines) or "- none"
