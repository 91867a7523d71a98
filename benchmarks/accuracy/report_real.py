"""The part of docs/accuracy.md on real images, and the README's table of them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from statistics import fmean, median

from . import fashion, report_real_details
from .contenders import OURS, OURS_CENTERED
from .grid_real import CELLS, MORE_SEEDS, SCATTERED, SEEDS, WIDER, common_rates, trained_in
from .report_results import (
    LEFT_ALONE,
    MAIN,
    TRANSFORMED,
    UNKNOWN,
    RealResults,
    begun,
    from_scratch,
    have_any,
    missing,
    without_optimizer,
)
from .report_tables import (
    CLOSE,
    MISSING,
    Distance,
    against_reference,
    best_of,
    best_scores,
    distance,
    label,
    listed,
    markdown,
    points,
    was_run,
)
from .results import IMAGE_SAMPLES, IN_WORDS, ONE_CLASS, SHUFFLED, Cell, Results
from .tasks_real import FINE_TUNING, LAYOUT, REAL_TASKS, RESIDUAL, SEGMENTATION, SERIES
from .train import RECALIBRATED_WITH

NOTHING = "Nothing is measured yet: `python -m benchmarks.accuracy --real` does it."
TABLES = {OURS: LEFT_ALONE, OURS_CENTERED: TRANSFORMED}  # whom each of ours is compared with

# ------------------------------------------------------------------------------------------------ the introduction


INTRODUCTION = """![Score by cell, on real images](accuracy_real.png)

`python -m benchmarks.accuracy --real` measured it; `benchmarks/results/real_images.jsonl` has the results.

- **Data**: Fashion-MNIST, grey images of {size}x{size} of ten kinds of garments. {validated} images are to validate
  with, {tested} to test on; nobody trains on them.{other_data}
- **A run** sees {samples} images, whatever the batch size, at a learning rate that falls to zero linearly. Cells that
  say so have more. In a cell, everybody begins with the same weights and sees the same batches. There are {seeds} seeds
  at each rate.{more_seeds}
- **Rates**: {rates}. They are the same for all. A contender's *best rate* in a cell is the one with the best mean over
  the seeds on validation data. Scores are of test data at the best rate, in percent: mean ± standard deviation over the
  seeds.
- **Differences** are shown ± their standard error. It is the root of the sum of the squares of the standard errors of
  both means. Half of the means have a standard error above {error} points. The best of several is chosen by its test
  score, so it is a little better than it should be.
- **Batches** are of independent images, unless a cell says more. *Of one class*: all images of a batch are of the same
  class. *Of views of one image*: the images of a batch are shifted copies of one image. *Of a slow stream*: the images
  come in long runs of one class.
- **What the defaults were settled on**: prototypes on the residual net with batches of 1, 2 and 4 of one class and a
  slow stream, with AdamW, batches of 2 with SGD, and segmentation with batches of 1, all with two to four seeds and
  3000 test images; and ten cells of the digits, those that the law before it had lost among them. The longest horizon
  was 128 samples then. 512 was found later, on the mobile net with batches of 4 of one class, and on the residual net
  with batches of 1, of 4 and of 32 of one class. The plain net, the series and 20 000 images confirmed it before they
  were measured for the tables. Runs on digits are so short that both are the same. The other cells could only confirm
  or refute all this.
- **Contenders**: {contenders}. *RunningBatchNorm* has its defaults. *Centred weights*: the mean of each filter of a
  convolution is subtracted from it. *Standardised weights*: it is divided by its standard deviation, too.
  *+ update_bn_stats*: the model of the contender without it, with statistics recomputed from {recalibrated} training
  images.
- **Measured**: {complete} of the {grid} cells of the grid are complete, {partly} in part."""

OTHER_DATA = {
    SEGMENTATION: f" For segmentation, four of them are on a canvas of {LAYOUT.canvas}x{LAYOUT.canvas}. Its score is "
    "the mean IoU of the pixels' classes; that of all others is the accuracy.",
    SERIES: " The series are of the six sensors of a smart watch, of ten people at seven exercises; nobody is in two "
    "parts of the data.",
}


def introduction(results: RealResults, cells: Sequence[Cell]) -> str:
    """Data, networks, runs and machines, in plain words."""
    names = dict.fromkeys(name for cell in cells for contender in trained_in(cell) for name in contender.names)
    run = [name for name in names if any(was_run(results, cell, name) for cell in cells)]
    scores = [score for cell in cells for name in run if (score := results.best(cell, name)) is not None]
    tasks = dict.fromkeys(cell.task for cell in cells)
    complete = sum(not missing(results, cell) for cell in cells)
    about = INTRODUCTION.format(
        size=fashion.SIZE, validated=fashion.VALIDATION, tested=fashion.TEST, samples=IMAGE_SAMPLES,
        rates=_rates(cells),
        seeds=len(SEEDS), more_seeds=_more_seeds(results),
        error=points(median(score.standard_error for score in scores)) if scores else MISSING,
        other_data="".join(OTHER_DATA.get(task, "") for task in tasks), contenders="; ".join(map(label, run)),
        recalibrated=RECALIBRATED_WITH, complete=complete, grid=len(CELLS), partly=len(cells) - complete,
    )  # fmt: skip
    return f"{about}\n\nThe networks:\n\n{listed(_networks(tasks))}\n\nWhere it was measured:\n\n{sources(results)}"


def _more_seeds(results: RealResults) -> str:
    """In which cells the contenders have more seeds, and how many of the contenders; empty where none has."""
    cells = []
    for cell in SCATTERED:
        found = (results.best(cell, name) for contender in trained_in(cell) for name in contender.names)
        scores = [score for score in found if score is not None]
        if more := sum(len(score.test) > len(SEEDS) for score in scores):
            cells.append(f"{without_optimizer(cell)} ({more} of {len(scores)} contenders)")
    if not cells:
        return ""
    return (
        f" Where scores scatter more than they differ, there are {len(MORE_SEEDS)} more at the best rate: "
        f"{'; '.join(cells)}."
    )


def _rates(cells: Sequence[Cell]) -> str:
    """The rates of every sweep, by optimizer or for fine-tuning."""
    sweeps = {
        "fine-tuning" if REAL_TASKS[cell.task].pretrained else cell.optimizer: ", ".join(
            f"{rate:g}" for rate in common_rates(cell)
        )
        for cell in cells
    }
    common = "; ".join(f"{sweep} with {optimizer}" for optimizer, sweep in sweeps.items())
    return (
        f"{common}; one or two more in the {len(WIDER)} cells where somebody's best was the first or the last of these"
    )


def _networks(tasks: Sequence[str] | dict[str, None]) -> list[str]:
    """What the networks say about themselves."""
    described = []
    for task in tasks:
        if task not in FINE_TUNING:
            about = (inspect.getdoc(REAL_TASKS[task].network) or "").splitlines()[0]
            described.append(f"{task.removeprefix('garments, ')}: {about}")
    return described


def sources(results: RealResults) -> str:
    """Which code on which machine measured how many results, and how many of them of the layers of this library."""
    rows = []
    for (code, *machine), counts in results.sources.items():
        ours = sum(count for name, count in counts.items() if "RunningBatchNorm" in label(name))
        rows.append([code if code == UNKNOWN else f"`{code}`", *machine, str(counts.total()), str(ours)])
    return markdown(["commit", "processor", "torch", "date", "results", "of them of RunningBatchNorm"], rows)


# ------------------------------------------------------------------------------------------------------ the tables


def table(results: RealResults, names: Sequence[str]) -> str:
    """A table for each optimizer: cells by contender, the best of a cell bold; empty where nobody was run."""
    cells = have_any(results, from_scratch(results), names)
    parts = []
    for optimizer in dict.fromkeys(cell.optimizer for cell in cells):
        some = [cell for cell in cells if cell.optimizer == optimizer]
        rows = [[without_optimizer(cell), *best_scores(results, cell, names)] for cell in some]
        parts.append(f"**{optimizer}**\n\n{markdown(['', *map(label, names)], rows)}")
    return "\n\n".join(parts)


def beside_others(results: Results, cell: Cell, name: str) -> tuple[Distance, str, int] | None:
    """One of ours minus the best of the others of its table, who that is, and how many others are missing."""
    others = [other for other in TABLES[name] if other != name]
    ours, best = results.best(cell, name), best_of(results, cell, others)
    if ours is None or best is None:
        return None
    return distance(ours, best[1]), best[0], sum(not was_run(results, cell, other) for other in others)


def differences(results: RealResults) -> str:
    """A row for each cell, and a sentence on all of them for each of ours."""
    cells = [cell for cell in from_scratch(results) if any(beside_others(results, cell, name) for name in TABLES)]
    if not cells:
        return ""
    rows = [[str(cell).removeprefix("garments, "), *_difference_texts(results, cell)] for cell in cells]
    header = [""]
    for name in TABLES:
        header += [f"{label(name)} minus the best other", "the best other"]
    summaries = [_summary(results, cells, name) for name in TABLES]
    return f"{markdown(header, rows)}\n\n{listed([summary for summary in summaries if summary])}"


def _difference_texts(results: RealResults, cell: Cell) -> list[str]:
    texts = []
    for name in TABLES:
        found = beside_others(results, cell, name)
        if found is None:
            texts += [MISSING, MISSING]
            continue
        difference, best, absent = found
        texts.append(f"**{difference}**" if difference.points < 0 else str(difference))
        texts.append(label(best) + (f" ({absent} of {len(TABLES[name]) - 1} others not run)" if absent else ""))
    return texts


def _summary(results: RealResults, cells: Sequence[Cell], name: str) -> str:
    """In how many cells one of ours is ahead and behind, in all of them and in those where everybody was run."""
    found = [beside for cell in cells if (beside := beside_others(results, cell, name)) is not None]
    whole = [beside for beside in found if not beside[2]]
    if not found:
        return ""
    text = f"{label(name)}: {_counts([difference for difference, *_ in found])}."
    if whole and len(whole) < len(found):
        text += f" Where all the others were run: {_counts([difference for difference, *_ in whole])}."
    elif not whole:
        text += " In none of these cells all the others were run."
    return text


def _counts(differences: Sequence[Distance]) -> str:
    ahead, behind = (sum(sign * found.points > 0 for found in differences) for sign in (1, -1))
    clearly = sum(found.points < -2 * found.error for found in differences)
    return (
        f"ahead in {ahead} of {len(differences)} cells, behind in {behind}, by more than two standard errors in "
        f"{clearly}; mean difference {100 * fmean(found.points for found in differences):+.1f} points"
    )


def not_measured(results: RealResults) -> str:
    """Who is missing in the cells that were begun, and which were not; empty where nothing is missing."""
    cells = begun(results)
    lines = [f"{cell}: {'; '.join(map(label, names))}" for cell in cells if (names := missing(results, cell))]
    rest = [str(cell) for cell in CELLS if cell not in cells]
    return listed([*lines, *([f"everybody in: {'; '.join(rest)}"] if rest else [])]) if lines or rest else ""


# ---------------------------------------------------------------------------------------------------------- the part


def section(results: RealResults) -> str:
    """All about real images."""
    cells = begun(results)
    if not cells:
        return f"## Real images\n\n{NOTHING}"
    reference = against_reference(results, written=label)
    sections = {
        "Convolutions left alone": ("The best of a line is bold.", table(results, LEFT_ALONE)),
        "Weights centred or standardised": (
            "All of them transform the weights of convolutions. The best of a line is bold.",
            table(results, TRANSFORMED),
        ),
        "By cell: RunningBatchNorm minus the best of the others": (
            "The others are those in the same of the two tables above. Losses are bold.",
            differences(results),
        ),
        "Batches of 1 and 2 beside BatchNorm with batches of 32": (
            f"Bold: more than {points(CLOSE)} points behind.",
            reference,
        ),
        **report_real_details.sections(results),
    }
    parts = [f"## Real images\n\n{introduction(results, cells)}"]
    for title, (about, contents) in sections.items():
        parts.append(f"### {title}\n\n" + (f"{about}\n\n{contents}" if contents else "Not measured yet."))
    if absent := not_measured(results):
        parts.append(f"### Not measured yet\n\n{absent}")
    return "\n\n".join(parts)


def residual_net_cells() -> list[Cell]:
    """The README's: the residual net with AdamW."""
    kinds = ((1, SHUFFLED), (2, SHUFFLED), (4, ONE_CLASS), (32, SHUFFLED))
    return [Cell(RESIDUAL, batch, batches, "AdamW", IMAGE_SAMPLES) for batch, batches in kinds]


def residual_net_table(results: RealResults) -> str:
    """The README's: the main contenders, the cells in which all of them were run."""
    cells = residual_net_cells()
    cells = [cell for cell in cells if all(results.best(cell, name) is not None for name in MAIN)]
    if not cells:
        return "No cell is measured with all of these contenders yet."
    seeds = sorted({len(score.test) for cell in cells for name in MAIN if (score := results.best(cell, name))})
    rows = [[f"batches of {cell.batch}{IN_WORDS[cell.batches]}", *best_scores(results, cell, MAIN)] for cell in cells]
    return markdown([f"test accuracy in %, {' or '.join(map(str, seeds))} seeds", *map(label, MAIN)], rows)
