"""Read the results on real images for the report, and define the groups of cells and contenders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..results_file import FOLDER
from .contenders import BATCH_NORM, OURS, OURS_CENTERED, REAL_CONTENDERS, RECALIBRATED
from .grid_real import CELLS, trained_in
from .report_tables import was_run
from .results import Cell, Record, Results, Score, records
from .tasks_real import REAL_TASKS

REAL_RESULTS = FOLDER / "real_images.jsonl"

LEFT_ALONE = tuple(n for contender in REAL_CONTENDERS.values() if contender.prepare is None for n in contender.names)
TRANSFORMED = tuple(n for contender in REAL_CONTENDERS.values() if contender.prepare for n in contender.names)
MABN, GROUP_NORM, STANDARDISED = "MABN", "GroupNorm", "GroupNorm, standardised weights"
MAIN = (BATCH_NORM, RECALIBRATED, GROUP_NORM, STANDARDISED, MABN, OURS, OURS_CENTERED)

Source = tuple[str, str, str, str]  # code, processor, torch, date
UNKNOWN = "not recorded"


class RealResults(Results):
    """Results with what the report on real images needs besides: sources, and scores in training mode."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.sources: dict[Source, Counter[str]] = {}  # how many results of each contender
        super().__init__(records)

    def add(self, record: Record) -> None:
        """Take a line of the file; a result is of the last part before it."""
        super().add(record)
        if "part" not in record:
            on = self.parts[-1]["machine"] if self.parts else {}
            source = tuple(str(on.get(key) or UNKNOWN) for key in ("code", "processor", "torch", "date"))
            self.sources.setdefault(source, Counter())[record["contender"]] += 1

    def training_mode(self, cell: Cell, name: str) -> Score | None:
        """The score in training mode at the best rate; None where there is none, or one is not a number."""
        rate, scores = self.best_rate(cell, name), []
        for record in self._sweeps(cell, name):
            if rate in record["rates"] and "training_mode" in record:
                scores += record["training_mode"][record["rates"].index(rate)]
        return None if rate is None or not scores or None in scores else Score(rate, tuple(scores), 0)


def load_real(path: Path) -> RealResults:
    """What is in a file; nothing where there is none."""
    return RealResults(records(path))


def begun(results: Results) -> list[Cell]:
    """The cells of the grid with any result, in the order of the grid."""
    found = set(results.cells())
    return [cell for cell in CELLS if cell in found]


def from_scratch(results: Results) -> list[Cell]:
    """Those of them in which nothing is pretrained."""
    return [cell for cell in begun(results) if not REAL_TASKS[cell.task].pretrained]


def missing(results: Results, cell: Cell) -> list[str]:
    """The contenders that are still to be run in a cell."""
    names = [name for contender in trained_in(cell) for name in contender.names]
    return [name for name in names if not was_run(results, cell, name)]


def have_any(results: Results, cells: Sequence[Cell], names: Sequence[str]) -> list[Cell]:
    """The cells in which at least one of these was run."""
    return [cell for cell in cells if any(was_run(results, cell, name) for name in names)]


def without_optimizer(cell: Cell) -> str:
    """The description of a cell, without its optimizer and without saying that the images are of garments."""
    return str(cell).replace(f", {cell.optimizer}", "").removeprefix("garments, ")
