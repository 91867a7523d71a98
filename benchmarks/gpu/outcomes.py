"""A pytest plugin that writes the outcome of every test as soon as it is known, one line of JSON each.

RUNNINGBN_OUTCOMES names the file. Under pytest-xdist, the process that distributes the tests writes it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

VARIABLE = "RUNNINGBN_OUTCOMES"
# Of what a failure prints, what is kept.
KEPT = 3000


class Outcomes:
    """Appends to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test has an outcome when it was run, and before or after that if its fixtures skip or fail."""
        if report.when != "call" and report.passed:
            return
        message = ""
        if report.skipped and isinstance(report.longrepr, tuple):
            message = report.longrepr[2]
        elif report.failed:
            message = report.longreprtext[-KEPT:]
        with self.path.open("a") as stream:
            found = {"test": report.nodeid, "outcome": report.outcome, "message": message, "seconds": report.duration}
            stream.write(json.dumps(found) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    """Watch in the process that has all reports."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(Path(os.environ[VARIABLE])))
