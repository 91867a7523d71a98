"""Run what is missing, or write the report; see the package's docstring."""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ..results_file import FOLDER
from . import fashion
from .contenders import CONTENDERS
from .grid import CELLS, GRID
from .grid_real import REAL_GRID
from .report import write_report
from .results import SHUFFLED, Cell, load
from .runner import run_missing

RESULTS, REAL_RESULTS = FOLDER / "accuracy.jsonl", FOLDER / "real_images.jsonl"
QUICK_CELLS = (Cell("perceptron", 8, SHUFFLED, "AdamW", samples=64),)


def quick(say: Callable[[str], None]) -> None:
    """One small cell, all contenders, a few batches, into a file that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        run_missing(Path(folder) / "quick.jsonl", replace(GRID, cells=QUICK_CELLS), jobs=1, budget=600, say=say)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=f"Train {len(CONTENDERS)} contenders in {len(CELLS)} cells."
    )
    parser.add_argument("--real", action="store_true", help=f"real images; results go to {REAL_RESULTS.name}")
    parser.add_argument("--data", metavar="DIR", help=f"Fashion-MNIST's files; else {fashion.VARIABLE}, else Debian's")
    parser.add_argument("--only", metavar="TEXT", default="", help="only cells with this text in their description")
    parser.add_argument("--contenders", metavar="A;B", default="", help="only these; semicolons between the names")
    parser.add_argument("--budget-minutes", type=float, default=math.inf, help="begin no run after so long")
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
        try:
            grid = (REAL_GRID if arguments.real else GRID).part(
                arguments.only, [name.strip() for name in arguments.contenders.split(";") if name.strip()]
            )
            if arguments.data:
                os.environ[fashion.VARIABLE] = arguments.data  # which the processes inherit
            if arguments.real:
                fashion.check()
        except (ValueError, FileNotFoundError) as error:
            parser.error(str(error))
        path = REAL_RESULTS if arguments.real else RESULTS
        run_missing(path, grid, arguments.jobs, 60 * arguments.budget_minutes, say)


if __name__ == "__main__":
    main()
