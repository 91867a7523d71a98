"""What a run is, and which runs a grid of cells consists of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .contenders import Contender
from .results import Cell, Results


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


@dataclass(frozen=True)
class Grid:
    """Cells in their order, with the contenders and the rates of each, and the seeds at every rate.

    `more_seeds` are those of a cell that are run at the best rate only, after the sweep.
    """

    command: str
    cells: tuple[Cell, ...]
    rates: Callable[[Cell], tuple[float, ...]]
    trained_in: Callable[[Cell], list[Contender]]
    seeds: tuple[int, ...]
    more_seeds: Callable[[Cell], tuple[int, ...]] = lambda cell: ()

    def part(self, text: str = "", names: Sequence[str] = ()) -> Grid:
        """The cells whose description contains the text, with the contenders of these names, or with all."""
        known = {contender.name for cell in self.cells for contender in self.trained_in(cell)}
        if unknown := sorted(set(names) - known):
            raise ValueError(f"unknown contenders {unknown}, expected some of {sorted(known)}")
        cells = tuple(cell for cell in self.cells if text in str(cell))
        if not cells:
            raise ValueError(
                f"no cell with {text!r} in its description, expected part of one of {list(map(str, self.cells))}"
            )

        def chosen(cell: Cell) -> list[Contender]:
            return [contender for contender in self.trained_in(cell) if not names or contender.name in names]

        return replace(self, cells=cells, trained_in=chosen)

    def pending(self, results: Results) -> Iterator[Job]:
        """The runs that are still missing, in their order."""
        for cell, contender in self.everybody():
            swept = dict.fromkeys(contender.names, self.rates(cell))
            job = _job(results, cell, contender, swept, self.seeds)
            if job is None and (more := self.more_seeds(cell)):
                best = {name: results.best_rate(cell, name) for name in contender.names}
                known = {name: (rate,) for name, rate in best.items() if rate is not None}
                job = _job(results, cell, contender, known, more)
            if job is not None:
                yield job

    def everybody(self) -> Iterator[tuple[Cell, Contender]]:
        """Every cell with every contender that is to be trained in it."""
        return ((cell, contender) for cell in self.cells for contender in self.trained_in(cell))


def _job(
    results: Results, cell: Cell, contender: Contender, rates: Mapping[str, tuple[float, ...]], seeds: tuple[int, ...]
) -> Job | None:
    """The run that adds what is missing of these rates, by name, with these seeds; None where nothing is."""
    missing = {rate for name, wanted in rates.items() for rate in results.missing(cell, name, wanted, seeds)}
    return Job(cell, contender.name, tuple(sorted(missing)), seeds) if missing else None
