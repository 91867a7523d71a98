"""The cells of the benchmark on digits and their order, the most informative first.

A cell is a task, a batch size, a kind of batch (independent or of one class) and an optimizer. Every contender is
trained in every cell. All combinations are in the grid, with these exceptions:

- The 29-layer net is trained on independent batches of 1 with AdamW only, and on batches of one class at sizes 2 and 4
  only.
- Segmentation is a task for batches of 1; there is a batch of 2, and one of 32 for comparison. Its batches of 1 can be
  of one class, since each image holds four digits. In other tasks a batch of 1 is always of one class.
- fastai's net uses SGD without momentum, as in the notebook.
- Larger images come in batches of 2, and of 4 of one class.

There are five seeds at each rate.
"""

from __future__ import annotations

from itertools import chain

from .contenders import CONTENDERS, Contender
from .jobs import Grid
from .results import ONE_CLASS, SHUFFLED, SWEEP_SEEDS, Cell

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


def _cells(optimizer: str, batches: str, small_nets: tuple[int, ...] = (), **others: tuple[int, ...]) -> list[Cell]:
    """Cells of one optimizer: batch sizes for all small nets, and for tasks of their own, underscores for blanks."""
    sizes = dict.fromkeys(SMALL_NETS, small_nets) | {DEEP: others.pop("deep", ())}
    sizes |= {name.replace("_", " "): some for name, some in others.items()}
    without_momentum = {("fastai's net", "SGD"): "plain SGD"}
    return [
        Cell(task, batch, batches, without_momentum.get((task, optimizer), optimizer))
        for task, some in sizes.items()
        for batch in some
    ]


CELLS = tuple(
    dict.fromkeys(
        chain(
            _cells("AdamW", SHUFFLED, (2, 32)),
            _cells("AdamW", SHUFFLED, residual_net=(1,), perceptron=(1,), segmentation=(1,)),
            _cells("AdamW", ONE_CLASS, (4,)),
            _cells("SGD", SHUFFLED, (2, 32)),
            _cells("AdamW", SHUFFLED, (1,), segmentation=(32,)),
            _cells("SGD", ONE_CLASS, (4,)),
            _cells("AdamW", SHUFFLED, deep=(32, 2)),
            _cells("SGD", SHUFFLED, (1,), segmentation=(1, 32)),
            _cells("AdamW", SHUFFLED, (8, 4)),
            _cells("SGD", SHUFFLED, (8, 4), deep=(32, 2)),
            _cells("AdamW", ONE_CLASS, (32, 8, 2), deep=(4,), segmentation=(1,)),
            _cells("SGD", ONE_CLASS, (32, 8, 2), deep=(4,), segmentation=(1,)),
            _cells("AdamW", SHUFFLED, deep=(8, 4, 1), segmentation=(2,)),
            _cells("SGD", SHUFFLED, deep=(8, 4), segmentation=(2,)),
            _cells("AdamW", ONE_CLASS, deep=(2,), segmentation=(32,)),
            _cells("AdamW", SHUFFLED, larger_images=(2,)),
            _cells("AdamW", ONE_CLASS, larger_images=(4,)),
            _cells("SGD", SHUFFLED, larger_images=(2,)),
            _cells("SGD", ONE_CLASS, larger_images=(4,)),
        )
    )
)


def rates(cell: Cell) -> tuple[float, ...]:
    """The learning rates of the sweep."""
    large = cell.batch >= LARGE or cell.task == SEGMENTATION
    return RATES[cell.optimizer, "large" if large else "small"]


def trained_in(cell: Cell) -> list[Contender]:
    """Everybody, in every cell."""
    return list(CONTENDERS.values())


GRID = Grid("python -m benchmarks.accuracy", CELLS, rates, trained_in, SWEEP_SEEDS)
