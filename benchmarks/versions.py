"""Run the tests with the versions that are installed here, and append how they went to a file.

    python -m benchmarks.versions                            all tests
    python -m benchmarks.versions tests/test_compile*.py     some files
    python -m benchmarks.versions FILE -k "timm or monai"    some tests of a file
    python -m benchmarks.versions FILE ... --to results.jsonl

Each file of tests runs in a process of its own, so that one that crashes or takes too long is a failure like others. A
line of the results is one file of tests in one environment: its versions, the commit, and the tests that passed, failed
and were skipped. Of several lines for the same file and environment, the tables show the last. The exit status is 0 if
nothing failed. pytest and einops are needed; tests skip what else is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from .gpu.outcomes import VARIABLE
from .results_file import FOLDER, code_version, machine

ROOT = Path(__file__).parents[1]
RESULTS = FOLDER / "versions.jsonl"
PACKAGES = ("torch", "einops", "triton", "torchvision", "timm", "transformers")
# Environment variables that change what is tested.
VARIABLES = ("RUNNINGBN_BACKEND", "TRITON_INTERPRET")
SECONDS = 1800.0

Record = dict[str, Any]


def environment() -> dict[str, str]:
    """What decides whether a test passes, apart from the commit."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["system"] = f"{platform.system()} {platform.machine()}"
    return found | {name: os.environ[name] for name in VARIABLES if name in os.environ}


def outcomes(file: Path, seconds: float, options: Sequence[str]) -> Record:
    """Run one file of tests: how many passed, failed and were skipped, and which failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcomes.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.outcomes"]
        variables = {**os.environ, VARIABLE: str(path), "PYTHONPATH": str(ROOT)}
        try:
            done = subprocess.run([*command, *options, file], cwd=ROOT, env=variables, timeout=seconds, check=False)
            status = f"exit status {done.returncode}"
            succeeded, none_collected = done.returncode in (0, 1), done.returncode == 5
        except subprocess.TimeoutExpired:
            status, succeeded, none_collected = f"stopped after {seconds:.0f} s", False, False
        lines = path.read_text().splitlines() if path.exists() else []
    by_test: dict[str, str] = {}
    for outcome in map(json.loads, lines):
        # A test may pass, and then fail in what cleans up after it.
        if by_test.get(outcome["test"]) != "failed":
            by_test[outcome["test"]] = outcome["outcome"]
    failures = [test.partition("::")[2] for test, outcome in by_test.items() if outcome == "failed"]
    counts = Counter(by_test.values())
    if none_collected:
        counts["skipped"] += 1  # the file as a whole
    elif not succeeded:
        failures.append(f"({status})")
    return {"passed": counts["passed"], "failed": len(failures), "skipped": counts["skipped"], "failures": failures}


def run(files: Iterable[Path], to: Path, seconds: float, options: Sequence[str] = (), selection: str = "") -> bool:
    """Run files of tests, or what `selection` selects in them, and append a line for each; whether nothing failed."""
    options = [*options, "-k", selection] if selection else options
    on = machine()
    about = {"environment": environment(), "date": on["date"], "processor": on["processor"]}
    passed = True
    for file in files:
        name = file.resolve().relative_to(ROOT).as_posix() if file.resolve().is_relative_to(ROOT) else file.name
        code = code_version()  # before each file: work may go on meanwhile
        found = outcomes(file.resolve(), seconds, options)
        passed &= found["failed"] == 0
        print(name, *(f"{found[key]} {key}" for key in ("passed", "failed", "skipped")), flush=True)
        with to.open("a") as stream:
            stream.write(json.dumps({**about, "code": code, "file": name, "selection": selection, **found}) + "\n")
    return passed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the files; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: all in tests/")
    parser.add_argument(
        "--to", type=Path, default=RESULTS, metavar="FILE", help="what to append to; default: %(default)s"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each file; default: %(default)s")
    parser.add_argument("-k", dest="selection", default="", metavar="EXPRESSION", help="only these tests, as in pytest")
    parser.add_argument("-n", dest="processes", metavar="N", help="processes for each file, with pytest-xdist")
    found = parser.parse_args(arguments)
    files = found.files or sorted(ROOT.glob("tests/test_*.py"))
    missing = [str(file) for file in files if not file.exists()]
    if missing:
        parser.error(f"expected files of tests, and there is no {', '.join(missing)}")
    options = ["-n", found.processes] if found.processes else []
    return 0 if run(files, found.to, found.seconds, options, found.selection) else 1


if __name__ == "__main__":
    sys.exit(main())
