"""The file of results, and the scores of a contender in a cell computed from it.

It holds one JSON object per line. A line with a "part" describes the machine on which the lines after it were measured.
Every other line is the result of one run, or of the recalibration after it. Lines are only appended, so a run that is
killed loses only its own result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

Record = dict[str, Any]

SWEEP_SEEDS = tuple(range(5))

# What the batches of a run are: independent samples, samples of one class, shifted views of one image, or the next ones
# of a stream that stays with a class for long.
SHUFFLED, ONE_CLASS, VIEWS, STREAM = "shuffled", "one class", "views", "stream"
IN_WORDS = {SHUFFLED: "", ONE_CLASS: " of one class", VIEWS: " of views of one image", STREAM: " of a slow stream"}
DIGITS_SAMPLES, IMAGE_SAMPLES = 1088, 5000  # trained on in a run, whatever the batch size


@dataclass(frozen=True)
class Cell:
    """What is trained on what, in what batches, by what optimizer, for how many samples."""

    task: str
    batch: int
    batches: str
    optimizer: str
    samples: int = DIGITS_SAMPLES

    @classmethod
    def of(cls, record: Record) -> Cell:
        """The cell of a record; those of the first results say `one_class` and not how many samples."""
        batches = record["batches"] if "batches" in record else ONE_CLASS if record["one_class"] else SHUFFLED
        samples = record.get("samples", DIGITS_SAMPLES)
        return cls(record["task"], record["batch"], batches, record["optimizer"], samples)

    def __str__(self) -> str:
        longer = "" if self.samples <= IMAGE_SAMPLES else f", {self.samples} samples"
        return f"{self.task}, batch {self.batch}{IN_WORDS[self.batches]}, {self.optimizer}{longer}"


@dataclass(frozen=True)
class Score:
    """A contender at one rate over all its seeds."""

    rate: float
    test: tuple[float, ...]
    diverged: int  # runs whose test loss is not finite

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return fmean(self.test)

    @property
    def std(self) -> float:
        """Standard deviation over the seeds."""
        return stdev(self.test) if len(self.test) > 1 else 0.0

    @property
    def standard_error(self) -> float:
        """Of the mean."""
        return self.std / math.sqrt(len(self.test))


class Results:
    """All records, by cell and contender."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._records: dict[tuple[Cell, str], list[Record]] = {}
        self.parts: list[Record] = []
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """Take a line of the file."""
        if "part" in record:
            self.parts.append(record["part"])
            return
        self._records.setdefault((Cell.of(record), record["contender"]), []).append(record)

    def cells(self) -> list[Cell]:
        """Those with any result, in the order of the file."""
        return list(dict.fromkeys(cell for cell, _ in self._records))

    def missing(self, cell: Cell, name: str, rates: Sequence[float], seeds: Sequence[int]) -> tuple[float, ...]:
        """The rates at which these seeds were not run; none where the contender cannot train."""
        if self.error(cell, name):
            return ()
        records = [record for record in self._records.get((cell, name), ()) if record["seeds"] == list(seeds)]
        return tuple(rate for rate in rates if not any(rate in record["rates"] for record in records))

    def error(self, cell: Cell, name: str) -> str | None:
        """Why a contender cannot train there."""
        return next((record["error"] for record in self._records.get((cell, name), ()) if "error" in record), None)

    def scores(self, cell: Cell, name: str) -> list[Score]:
        """One for each rate of the sweep; empty where there is no result."""
        rates = [rate for record in self._sweeps(cell, name) for rate in record["rates"]]
        return [self._score(cell, name, rate) for rate in rates]

    def best_rate(self, cell: Cell, name: str) -> float | None:
        """The rate with the best mean on the validation part, over the seeds of the sweep; None without results."""
        means = {
            rate: fmean(values)
            for record in self._sweeps(cell, name)
            for rate, values in zip(record["rates"], record["validation"], strict=True)
        }
        return max(means, key=lambda rate: means[rate]) if means else None

    def best(self, cell: Cell, name: str) -> Score | None:
        """The score at the best rate."""
        rate = self.best_rate(cell, name)
        return None if rate is None else self._score(cell, name, rate)

    def worst(self, cell: Cell, name: str) -> Score | None:
        """The lowest mean of the sweep."""
        return min(self.scores(cell, name), key=lambda score: score.mean, default=None)

    def _sweeps(self, cell: Cell, name: str) -> list[Record]:
        records = self._records.get((cell, name), ())
        return [record for record in records if "error" not in record and SWEEP_SEEDS[0] in record["seeds"]]

    def _score(self, cell: Cell, name: str, rate: float) -> Score:
        test, losses = [], []
        for record in self._records[cell, name]:
            if rate in record["rates"]:
                row = record["rates"].index(rate)
                test += record["test"][row]
                losses += record["loss"][row]
        return Score(rate, tuple(test), losses.count(None))


def load(path: Path) -> Results:
    """What is in a file; nothing where there is none."""
    return Results(records(path))


def records(path: Path) -> Iterator[Record]:
    """The lines of a file, if there is one. A last line without its end is that of a killed run."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return (json.loads(line) for line in lines if line.endswith("\n"))


def drop_unfinished_line(path: Path) -> None:
    """Cut off what a killed run has left of its line, before another is appended to it."""
    if path.exists():
        contents = path.read_bytes()
        path.write_bytes(contents[: contents.rfind(b"\n") + 1])


def append(path: Path, records: Iterable[Record]) -> None:
    """Write whole lines, at once."""
    with path.open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))
