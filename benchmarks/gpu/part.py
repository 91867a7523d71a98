"""What all parts share: their command line, their time limit, and the rows that they write."""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


class Work:
    """The command line of a part, read.

    Attributes:
        dry_run: whether to do all of it in small, on the CPU and with Triton's interpreter.
        device: where to compute.
        failures: what went wrong so far.
    """

    def __init__(self, document: str | None, arguments: Sequence[str] | None = None) -> None:
        parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--to", type=Path, required=True, help="where to append rows, a line of JSON each")
        parser.add_argument("--seconds", type=float, default=3600, help="after which nothing new is started")
        parser.add_argument("--dry-run", action="store_true", help="in small, on the CPU")
        found = parser.parse_args(arguments)
        self.path, self.seconds, self.dry_run = found.to, found.seconds, found.dry_run
        self.device = "cpu" if self.dry_run else "cuda"
        self.failures: list[str] = []
        self._started = time.monotonic()

    def left(self) -> float:
        """Seconds until nothing new is to be started."""
        return self.seconds - (time.monotonic() - self._started)

    def row(self, row: dict[str, Any]) -> None:
        """Hand a row over."""
        with self.path.open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    def each(self, cases: Sequence[Any], measure: Callable[[Any], dict[str, Any]]) -> int:
        """A row of every case for which there is time; the exit status.

        A case that raises is a row with its "error", and the others go on. Those that are left out are named.
        """
        for number, case in enumerate(cases):
            if self.left() <= 0:
                self.row({"left out for lack of time": [str(left) for left in cases[number:]]})
                break
            try:
                self.row(measure(case))
            except Exception as error:
                self.failures.append(f"{case}: {error}")
                self.row({"case": str(case), "error": f"{type(error).__name__}: {error}"[:2000]})
                traceback.print_exc()
        for failure in self.failures:
            print(failure)
        return 1 if self.failures else 0


def check_device(dry_run: bool) -> str | None:
    """Why there is nothing to run on; None where there is."""
    if dry_run:
        return None if os.environ.get("TRITON_INTERPRET") == "1" else "a dry run needs TRITON_INTERPRET=1"
    return None if torch.cuda.is_available() else "torch found no CUDA device; --dry-run does without"
