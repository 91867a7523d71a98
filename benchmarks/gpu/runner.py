"""Run parts one after the other, each in a separate process with a time limit, and collect their results.

A part is a module with a command line: ``python -m MODULE --to FILE --seconds S [--dry-run]``. It appends its rows to
FILE, one line of JSON each, as soon as it has them, and exits with 0 if it succeeded. So the rows written before a
failure are kept. The results are written again after every part.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

# What a part takes beyond its limit to come to an end by itself, and the least that it is worth to start one.
GRACE, LEAST = 10.0, 15.0
# Of the output of a part, what is kept.
KEPT_OUTPUT = 20_000

PASSED, FAILED, TIMED_OUT, NOT_RUN = "passed", "failed", "timed out", "not run"


class Part(NamedTuple):
    """One part.

    Attributes:
        name: of the part.
        module: whose command line it is.
        seconds: after which it starts nothing new; some seconds later it is ended.
    """

    name: str
    module: str
    seconds: float


def run_parts(
    parts: Sequence[Part], path: Path, about: dict[str, Any], seconds: float, dry_run: bool, say: TextIO = sys.stdout
) -> bool:
    """Run the parts in their order; whether all have passed.

    Args:
        parts: what to run.
        path: of the results, one JSON object: what `about` has, and `parts`, each with its outcome ("passed",
            "failed", "timed out" or "not run"), seconds, rows, and, unless it has passed, the end of its output.
        about: the machine.
        seconds: for everything; parts that it leaves no time for are not run.
        dry_run: whether the parts are told so.
        say: where progress goes.
    """
    started = time.monotonic()
    results: dict[str, dict[str, Any]] = {part.name: {"outcome": NOT_RUN, "rows": []} for part in parts}
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, {**about, "parts": results})
    for part in parts:
        left = seconds - (time.monotonic() - started)
        if left < min(LEAST, part.seconds):
            print(f"{part.name}: {NOT_RUN}, {left:.0f} s are left of {seconds:.0f}", file=say, flush=True)
            continue
        print(f"{part.name}: started", file=say, flush=True)
        results[part.name] = found = _run(part, min(part.seconds, left - GRACE), dry_run)
        _write(path, {**about, "parts": results})
        print(f"{part.name}: {found['outcome']} in {found['seconds']} s", file=say, flush=True)
        if found["outcome"] != PASSED:
            print(found["output"], file=say, flush=True)
    outcomes = [result["outcome"] for result in results.values()]
    print("; ".join(f"{name}: {result['outcome']}" for name, result in results.items()), file=say, flush=True)
    return all(outcome == PASSED for outcome in outcomes)


def _run(part: Part, seconds: float, dry_run: bool) -> dict[str, Any]:
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows, output = Path(folder) / "rows.jsonl", Path(folder) / "output"
        command = [sys.executable, "-m", part.module, "--to", str(rows), "--seconds", str(seconds)]
        command += ["--dry-run"] if dry_run else []
        with output.open("wb") as stream:
            # In a session of its own, to be ended with all that it has started.
            process = subprocess.Popen(
                command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
            try:
                code = process.wait(max(seconds, 0) + GRACE)
                outcome = PASSED if code == 0 else FAILED
            except subprocess.TimeoutExpired:
                code, outcome = None, TIMED_OUT
            finally:
                _end(process)
        found: dict[str, Any] = {
            "outcome": outcome, "exit code": code, "seconds": round(time.monotonic() - begin, 1), "rows": _rows(rows),
        }  # fmt: skip
        text = output.read_text(errors="replace")
        return found if outcome == PASSED else {**found, "output": text[-KEPT_OUTPUT:]}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the processes of its session: itself, if it still runs, and what it has left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _rows(path: Path) -> list[Any]:
    """The rows that are whole: a part may have been ended while it wrote one."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _write(path: Path, contents: dict[str, Any]) -> None:
    """Replace the file at once: whatever happens, it is one JSON object."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(json.dumps(contents, indent=1) + "\n")
    beside.replace(path)
