"""Details on real images: high rates, training mode and evaluation, depthwise convolutions, fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from .contenders import BATCH_NORM, DEPTHWISE, FINE_TUNED, OURS, OURS_CENTERED, REAL_CONTENDERS
from .pretrained import BATCH, EPOCHS, KNOWN
from .report_results import MABN, STANDARDISED, RealResults, begun, from_scratch, have_any, without_optimizer
from .report_tables import MISSING, best_scores, label, markdown, points, was_run
from .results import Cell, Results, Score
from .run import SCORED_AS_TRAINED, SMALL_BATCH
from .tasks_real import FINE_TUNING, MOBILE

TRIED_TOO_HIGH = (OURS, OURS_CENTERED, MABN, STANDARDISED)
TENFOLD = 2  # steps of a sweep whose rates are about a factor of 3 apart
WITH_STATISTICS = (BATCH_NORM, OURS, OURS_CENTERED, MABN, "Online Normalization")
DEPTHWISE_TOO = tuple(name for name in DEPTHWISE if name not in REAL_CONTENDERS)
FINE_TUNED_NAMES = tuple(name for contender in FINE_TUNED.values() for name in contender.names)

Section = tuple[str, str]  # what is said about a table, and the table; empty where nothing of it was measured


def sections(results: RealResults) -> dict[str, Section]:
    """By title."""
    return {
        "A rate ten times the best": (
            "Score at the best rate / at ten times that rate: two steps further in a sweep whose rates are a factor of "
            "about 3 apart. Not tried: the sweep ends before.",
            too_high(results),
        ),
        "Training mode and evaluation": (
            "The same trained models at the best rate: score in evaluation mode / in training mode, with batches as in "
            f"training. Training mode is scored on up to {SCORED_AS_TRAINED} of the test samples, evaluation on all. "
            "By that alone, the two of a run differ by about a point.",  # √(0.8·0.2·(1/1000 − 1/4000)) = 1.1 points
            modes(results),
        ),
        "Depthwise convolutions": (
            "The mobile net. A filter of a depthwise convolution has one input channel. Centred weights leave these "
            "filters alone, unless it says *depthwise too*.",
            depthwise(results),
        ),
        "Fine-tuning": (
            f"The residual net, pretrained with nn.BatchNorm on the first {KNOWN} classes ({EPOCHS} epochs, batches of "
            f"{BATCH}), is trained on with AdamW on the other classes: the images as they are, inverted, or four times "
            "as bright. *Frozen*: BatchNorm stays in evaluation mode. *Recalibrated first*: the statistics are "
            "recomputed from the new data before training. The best of a column is bold.",
            fine_tuning(results),
        ),
    }


def _after(results: Results, cell: Cell, name: str, steps: int) -> Score | None:
    """The score so many steps of the sweep above the best rate; None where the sweep has no such rate."""
    scores = sorted(results.scores(cell, name), key=lambda score: score.rate)
    higher = [score for score in scores if score.rate >= (results.best_rate(cell, name) or 0)]
    return higher[steps] if len(higher) > steps else None


def too_high(results: RealResults) -> str:
    """Contenders at their best rates and at ten times these, by cell, and the mean change where all have both."""
    rows, changes = [], []
    for cell in have_any(results, from_scratch(results), TRIED_TOO_HIGH):
        pairs = [(results.best(cell, name), _after(results, cell, name, TENFOLD)) for name in TRIED_TOO_HIGH]
        rows.append([str(cell).removeprefix("garments, "), *(_at_two_rates(best, high) for best, high in pairs)])
        both = [high.mean - best.mean for best, high in pairs if best is not None and high is not None]
        if len(both) == len(pairs):
            changes.append(both)
    return _with_means(["", *map(label, TRIED_TOO_HIGH)], rows, changes, "mean change where all have both")


def _at_two_rates(best: Score | None, high: Score | None) -> str:
    if best is None:
        return MISSING
    return f"{points(best.mean)} at {best.rate:g} / " + (
        "not tried" if high is None else f"{points(high.mean)} at {high.rate:g}"
    )


def _with_means(header: list[str], rows: list[list[str]], changes: Sequence[Sequence[float]], title: str) -> str:
    """A table with a last row of means over the cells; empty without rows."""
    if changes:
        means = [f"{100 * fmean(column):+.1f}" for column in zip(*changes, strict=True)]
        rows = [*rows, [f"{title}; cells: {len(changes)}", *means]]
    return markdown(header, rows) if rows else ""


def modes(results: RealResults) -> str:
    """Evaluation beside training mode, by cell with a small batch, and the mean change where all have both."""
    rows, changes = [], []
    for cell in from_scratch(results):
        if cell.batch > SMALL_BATCH:
            continue
        pairs = [(results.best(cell, name), results.training_mode(cell, name)) for name in WITH_STATISTICS]
        both = [trained.mean - best.mean for best, trained in pairs if best is not None and trained is not None]
        if both:
            rows.append([str(cell).removeprefix("garments, "), *(_in_two_modes(*pair) for pair in pairs)])
        if len(both) == len(pairs):
            changes.append(both)
    title = "training mode minus evaluation, mean where all were run"
    return _with_means(["", *map(label, WITH_STATISTICS)], rows, changes, title)


def _in_two_modes(best: Score | None, trained: Score | None) -> str:
    if best is None or trained is None:
        return MISSING
    return f"{points(best.mean)} / {points(trained.mean)}"


def depthwise(results: RealResults) -> str:
    """The mobile net with weights as they are, centred, and centred in depthwise convolutions, too."""
    names = (OURS, OURS_CENTERED, *DEPTHWISE_TOO)
    cells = [cell for cell in have_any(results, begun(results), DEPTHWISE_TOO) if cell.task == MOBILE]
    rows = [[without_optimizer(cell), *best_scores(results, cell, names)] for cell in cells]
    return markdown(["", *map(label, names)], rows) if rows else ""


def fine_tuning(results: RealResults) -> str:
    """Contenders by domain and batch; those that were not run are left out."""
    cells = [cell for cell in begun(results) if cell.task in FINE_TUNING]
    names = [name for name in FINE_TUNED_NAMES if any(was_run(results, cell, name) for cell in cells)]
    columns = [best_scores(results, cell, names) for cell in cells]
    rows = [[label(name), *texts] for name, *texts in zip(names, *columns, strict=True)]
    return markdown(["", *map(_domain, cells)], rows) if rows else ""


def _domain(cell: Cell) -> str:
    domain = cell.task.removeprefix(FINE_TUNING[0]).removeprefix(", ") or "as they are"
    return f"{domain}, batch {cell.batch}"
