"""The cells of the benchmark on real images and their order, the most informative first.

A run sees 5000 samples, and 20 000 in two cells. There are three seeds at each of five rates, which are the
same for all contenders; where somebody's best was the first or the last of them, there are more. In cells whose
scores scatter more than they differ, there are nine seeds more at the best rate.
"""

from __future__ import annotations

from .contenders import DEPTHWISE, FINE_TUNED, REAL_CONTENDERS, Contender
from .jobs import Grid
from .results import IMAGE_SAMPLES, ONE_CLASS, SHUFFLED, STREAM, VIEWS, Cell
from .tasks_real import (
    AT_28,
    DEEP,
    FINE_TUNING,
    MOBILE,
    PERCEPTRON,
    PLAIN,
    PRE_ACTIVATION,
    REAL_TASKS,
    RESIDUAL,
    SEGMENTATION,
    SERIES,
)

SEEDS = (0, 1, 2)
LONG = 20_000
RATES = {"AdamW": (0.0003, 0.001, 0.003, 0.01, 0.03), "SGD": (0.003, 0.01, 0.03, 0.1, 0.3)}
FINE_TUNING_RATES = (0.0003, 0.001, 0.003, 0.01, 0.03)


def _cell(
    task: str, batch: int, batches: str = SHUFFLED, optimizer: str = "AdamW", samples: int = IMAGE_SAMPLES
) -> Cell:
    return Cell(task, batch, batches, optimizer, samples)


def _residual(optimizer: str) -> list[Cell]:
    """What all others vary."""
    kinds = ((1, SHUFFLED), (2, SHUFFLED), (4, ONE_CLASS), (32, SHUFFLED))
    return [_cell(RESIDUAL, batch, batches, optimizer) for batch, batches in kinds]


CELLS = (
    *_residual("AdamW"),
    *_residual("SGD"),
    *(_cell(SEGMENTATION, batch) for batch in (1, 2)),
    *(_cell(MOBILE, batch, batches) for batch, batches in ((1, SHUFFLED), (2, SHUFFLED), (4, ONE_CLASS))),
    _cell(AT_28, 1),
    _cell(PLAIN, 2),
    _cell(PLAIN, 4, ONE_CLASS),
    _cell(RESIDUAL, 4, VIEWS),
    _cell(RESIDUAL, 4, STREAM),
    _cell(RESIDUAL, 32, ONE_CLASS),
    _cell(DEEP, 2),
    _cell(SERIES, 2),
    *(_cell(task, batch) for task in FINE_TUNING for batch in (1, 2)),
    *(_cell(RESIDUAL, batch, samples=LONG) for batch in (1, 2)),
    # Added when all rules were settled and the cells above were measured, to confirm them or not.
    _cell(PLAIN, 1),
    _cell(DEEP, 1),
    _cell(AT_28, 4, ONE_CLASS),
    _cell(SERIES, 32),
    # Two more networks and one more batch, likewise.
    _cell(PRE_ACTIVATION, 1),
    _cell(PRE_ACTIVATION, 4, ONE_CLASS),
    _cell(PERCEPTRON, 1),
    _cell(PERCEPTRON, 4),
    _cell(PERCEPTRON, 4, ONE_CLASS),
    _cell(RESIDUAL, 8, ONE_CLASS),
)

# Rates beyond the five, for all contenders, where the best of some was the first or the last.
WIDER = {
    _cell(RESIDUAL, 4, STREAM): (0.00003, 0.0001),
    _cell(RESIDUAL, 4, ONE_CLASS): (0.0001,),
    _cell(PLAIN, 1): (0.0001,),
    _cell(RESIDUAL, 1, optimizer="SGD"): (0.001,),
    _cell(RESIDUAL, 4, ONE_CLASS, "SGD"): (0.001,),
    _cell(RESIDUAL, 32, optimizer="SGD"): (1.0,),
    _cell(SERIES, 2): (0.1,),
    _cell(SERIES, 32): (0.1,),
}

SCATTERED = (_cell(RESIDUAL, 4, STREAM), _cell(RESIDUAL, 32, ONE_CLASS), _cell(SERIES, 2))
MORE_SEEDS = tuple(range(3, 12))


def common_rates(cell: Cell) -> tuple[float, ...]:
    """The learning rates that all cells of this kind have."""
    return FINE_TUNING_RATES if REAL_TASKS[cell.task].pretrained else RATES[cell.optimizer]


def rates(cell: Cell) -> tuple[float, ...]:
    """The learning rates of the sweep, from low to high."""
    return tuple(sorted((*common_rates(cell), *WIDER.get(cell, ()))))


def trained_in(cell: Cell) -> list[Contender]:
    """The contenders, or those that can take over a pretrained net."""
    if REAL_TASKS[cell.task].pretrained:
        return list(FINE_TUNED.values())
    return list((DEPTHWISE if cell.task == MOBILE else REAL_CONTENDERS).values())


def more_seeds(cell: Cell) -> tuple[int, ...]:
    """The seeds at the best rate besides those of the sweep."""
    return MORE_SEEDS if cell in SCATTERED else ()


REAL_GRID = Grid("python -m benchmarks.accuracy --real", CELLS, rates, trained_in, SEEDS, more_seeds)
