"""Run the tests marked `gpu`: one row with the counts, and one for each test that failed.

Run by ``python -m benchmarks.gpu``; see there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from .outcomes import VARIABLE
from .part import Work

ROOT = Path(__file__).parents[2]
TESTS = ("tests/gpu", "tests/test_triton.py")
# Of the parameters of every test, those that a dry run takes.
OF_A_DRY_RUN = "1"
# Processes that compile kernels side by side, which is most of the time: each holds a context on the GPU and a core.
MOST_PROCESSES = 14


def command(dry_run: bool) -> list[str]:
    """The call of pytest."""
    tests = TESTS[:1] if dry_run else TESTS
    # Warnings are errors where versions are pinned; a GPU is met with those that it comes with.
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.outcomes", "-W", "default"]
    if importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(0 if dry_run else max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) - 2)))]
    return [sys.executable, "-m", "pytest", *options, "--tb=short", *tests]


def summary(outcomes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many passed, failed and were skipped, and why; then the failures, and the slowest tests."""
    # A test that passed may fail again in what cleans up after it, and is then a failed one.
    by_test = {outcome["test"]: outcome["outcome"] for outcome in outcomes}
    failed = [outcome for outcome in outcomes if outcome["outcome"] == "failed"]
    by_test |= {outcome["test"]: "failed" for outcome in failed}
    skipped = Counter(outcome["message"] for outcome in outcomes if outcome["outcome"] == "skipped")
    slowest = sorted(outcomes, key=lambda outcome: -outcome["seconds"])[:5]
    counts = {
        "tests": dict(Counter(by_test.values())),
        "skipped because": dict(skipped),
        "slowest": {outcome["test"]: round(outcome["seconds"], 1) for outcome in slowest},
    }
    return [counts, *failed]


def main() -> int:
    """Run the tests; the exit status."""
    work = Work(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcomes.jsonl"
        environment = {**os.environ, VARIABLE: str(path)}
        if work.dry_run:
            environment |= {"RUNNINGBN_GPU_DRY_RUN": "1", "RUNNINGBN_GPU_DRY_RUN_OF": OF_A_DRY_RUN}
        code: int | None = None
        try:
            done = subprocess.run(
                command(work.dry_run), cwd=ROOT, env=environment, timeout=max(work.left(), 1), check=False
            )
            code = done.returncode
        except subprocess.TimeoutExpired:
            work.row({"error": f"the tests were not through after {work.seconds:.0f} s"})
        lines = path.read_text().splitlines() if path.exists() else []
        rows = summary([json.loads(line) for line in lines])
        for row in rows:
            work.row(row)
        # No test at all, as with a wrong mark, is no success.
        return 0 if code == 0 and rows[0]["tests"].get("passed") else 1


if __name__ == "__main__":
    sys.exit(main())
