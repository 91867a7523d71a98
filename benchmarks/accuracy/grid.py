"""The cells of the benchmark and their order, the most informative first.

A cell is a task, a batch size, independent batches or batches of one class, and an optimizer; everybody is trained in
it. The whole grid is there, but for these:

- The 29-layer net is trained on independent batches of 1 by AdamW only, and on batches of one class at sizes 2 and 4
  only.
- Segmentation is a task for batches of 1; there is a batch of 2, and one of 32 to compare with. Its batches of 1 can be
  of one class, since each holds four digits. Elsewhere a batch of 1 is of one class anyway.
- fastai's net takes SGD as in the notebook, without momentum.
- Larger images come in batches of 2, and of 4 of one class. One experiment is trained there, too.

The sweep has five seeds at each rate. When all cells have theirs, ten more seeds are trained at each contender's best
rate. Experiments are trained in the first cells only, and in the sweep only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from .contenders import CONTENDERS, TWIN_BATCH, Contender
from .experiments import ALL_LAYERS, EXPERIMENTS, PLAIN_SUMS
from .results import MORE_SEEDS, SWEEP_SEEDS, Cell, Results

# A factor of about 3 apart and the same for all contenders; 0.4 for plain SGD is the notebook's.
RATES = {
    ("AdamW", "small"): (0.001, 0.003, 0.01, 0.03),
    ("AdamW", "large"): (0.001, 0.003, 0.01, 0.03, 0.1),
    ("SGD", "small"): (0.001, 0.003, 0.01, 0.03),
    ("SGD", "large"): (0.01, 0.03, 0.1, 0.3, 1.0),
    ("plain SGD", "small"): (0.015, 0.05, 0.13, 0.4),
    ("plain SGD", "large"): (0.015, 0.05, 0.13, 0.4, 1.2),
}
LARGE = 8  # batches from here on are tried with higher rates, as are canvases, each as large as nine images

SMALL_NETS = ("residual net", "perceptron", "plain conv net", "fastai's net", "sequence")
DEEP, SEGMENTATION, LARGER = "29-layer residual net", "segmentation", "larger images"


@dataclass(frozen=True)
class Job:
    """One run: a contender in a cell, with all these rates and seeds."""

    cell: Cell
    contender: str
    rates: tuple[float, ...]
    seeds: tuple[int, ...]

    def record(self, name: str) -> dict[str, Any]:
        """The fields of a result that say what it is a result of."""
        return {**asdict(self.cell), "contender": name, "rates": list(self.rates), "seeds": list(self.seeds)}


def _cells(optimizer: str, one_class: bool, small_nets: tuple[int, ...] = (), **others: tuple[int, ...]) -> list[Cell]:
    """Cells of one optimizer: batch sizes for all small nets, and for tasks of their own, underscores for blanks."""
    batches = dict.fromkeys(SMALL_NETS, small_nets) | {DEEP: others.pop("deep", ())}
    batches |= {name.replace("_", " "): sizes for name, sizes in others.items()}
    without_momentum = {("fastai's net", "SGD"): "plain SGD"}
    return [
        Cell(task, batch, one_class, without_momentum.get((task, optimizer), optimizer))
        for task, sizes in batches.items()
        for batch in sizes
    ]


CELLS = tuple(
    dict.fromkeys(
        chain(
            _cells("AdamW", False, (2, 32)),
            _cells("AdamW", False, residual_net=(1,), perceptron=(1,), segmentation=(1,)),
            _cells("AdamW", True, (4,)),
            _cells("SGD", False, (2, 32)),
            _cells("AdamW", False, (1,), segmentation=(32,)),
            _cells("SGD", True, (4,)),
            _cells("AdamW", False, deep=(32, 2)),
            _cells("SGD", False, (1,), segmentation=(1, 32)),
            _cells("AdamW", False, (8, 4)),
            _cells("SGD", False, (8, 4), deep=(32, 2)),
            _cells("AdamW", True, (32, 8, 2), deep=(4,), segmentation=(1,)),
            _cells("SGD", True, (32, 8, 2), deep=(4,), segmentation=(1,)),
            _cells("AdamW", False, deep=(8, 4, 1), segmentation=(2,)),
            _cells("SGD", False, deep=(8, 4), segmentation=(2,)),
            _cells("AdamW", True, deep=(2,), segmentation=(32,)),
            _cells("AdamW", False, larger_images=(2,)),
            _cells("AdamW", True, larger_images=(4,)),
            _cells("SGD", False, larger_images=(2,)),
            _cells("SGD", True, larger_images=(4,)),
        )
    )
)
# Until where the defaults were sought, but for the limit to the lag; the cells after these could only confirm or refute
# them.
EXPERIMENT_CELLS = CELLS[:28]


def rates(cell: Cell) -> tuple[float, ...]:
    """The learning rates of the sweep."""
    large = cell.batch >= LARGE or cell.task == SEGMENTATION
    return RATES[cell.optimizer, "large" if large else "small"]


def trained_in(cell: Cell) -> list[Contender]:
    """The contenders and experiments without those that are twins of others there."""
    known = ALL_LAYERS if cell in EXPERIMENT_CELLS else CONTENDERS
    if cell.task == LARGER:
        known = CONTENDERS | {PLAIN_SUMS: EXPERIMENTS[PLAIN_SUMS]}
    twins = {contender.twin for contender in known.values()} if cell.batch <= TWIN_BATCH else set()
    return [contender for contender in known.values() if contender.name not in twins]


def pending(results: Results, cells: Sequence[Cell]) -> Iterator[Job]:
    """The runs that are still missing, in their order: all sweeps, then more seeds at the best rates."""
    for cell, contender in everybody(cells):
        names = contender.names(cell.batch)
        if missing := {rate for name in names for rate in results.missing(cell, name, rates(cell), SWEEP_SEEDS)}:
            yield Job(cell, contender.name, tuple(sorted(missing)), SWEEP_SEEDS)
    for cell, contender in everybody(cells):
        if contender.name in EXPERIMENTS:
            continue
        best = {name: results.best_rate(cell, name) for name in contender.names(cell.batch)}
        at_best = [results.missing(cell, name, [rate], MORE_SEEDS) for name, rate in best.items() if rate is not None]
        if missing := {rate for rates_of_one in at_best for rate in rates_of_one}:
            yield Job(cell, contender.name, tuple(sorted(missing)), MORE_SEEDS)


def everybody(cells: Sequence[Cell]) -> Iterator[tuple[Cell, Contender]]:
    """Every cell with every contender that is to be trained in it."""
    return ((cell, contender) for cell in cells for contender in trained_in(cell))
