"""Train what is still missing, or write the report; see the package's docstring."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from ..results_file import FOLDER
from .contenders import CONTENDERS
from .grid import CELLS
from .report import write_report
from .results import Cell, load
from .runner import run_missing
from .tasks import SAMPLES

RESULTS = FOLDER / "accuracy.jsonl"
QUICK_CELLS, QUICK_SAMPLES = (Cell("perceptron", 8, False, "AdamW"),), 64


def quick(say: Callable[[str], None]) -> None:
    """One small cell, all contenders, a few batches, into a file that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        run_missing(Path(folder) / "quick.jsonl", QUICK_CELLS, QUICK_SAMPLES, jobs=1, budget=600, say=say)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=f"Train {len(CONTENDERS)} contenders in {len(CELLS)} cells."
    )
    parser.add_argument("--budget-minutes", type=float, default=float("inf"), help="begin no run after so long")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--quick", action="store_true", help="one small cell, into a temporary file")
    parser.add_argument("--report", action="store_true", help="write docs/accuracy.md and docs/accuracy.png")
    arguments = parser.parse_args()

    def say(line: str) -> None:
        Console().print(f"{time.strftime('%H:%M:%S')} {line}", highlight=False, soft_wrap=True)

    if arguments.report:
        write_report(load(RESULTS))
    elif arguments.quick:
        quick(say)
    else:
        run_missing(RESULTS, CELLS, SAMPLES, arguments.jobs, 60 * arguments.budget_minutes, say)


if __name__ == "__main__":
    main()
