"""The tables of docs/versions.md, made of what `python -m benchmarks.versions` stored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from .accuracy.report_tables import markdown
from .versions import PACKAGES, RESULTS, VARIABLES, Record

# What is tested, and the names of the files that test it; a file belongs to the first that it matches.
GROUPS = {
    "layers, their state and gradients": (
        "running", "precise", "statistics", "momentum", "autograd", "masks", "memory_format", "buffers", "state*",
        "law*", "subclasses", "resizing", "merge", "transforms", "hostile_inputs", "checkpointing", "deployment",
    ),
    "backends and kernels": ("backends", "kernels", "cpu_*", "triton*"),
    "torch.compile and export": ("compile*", "export"),
    "several processes": ("sync*", "*_ranks*"),
    "batchnormify": ("convert*", "pickled_models"),
    "centred weights": ("weights*",),
    "update_bn_stats": ("recalibrate*",),
    "diagnose": ("diagnose*",),
    "checkpoint files and commands": ("checkpoint*", "command_line"),
    "models of other packages": ("real_*",),
    "training frameworks": ("frameworks*", "lightning", "transformers*", "ignite", "fastai", "callback*"),
    "types and packaging": ("typing", "packaging", "architecture", "release_files"),
    "pages, examples and benchmarks": ("docs", "readme", "examples", "demo", "benchmark*", "tutorials"),
}  # fmt: skip
OTHERS = "others"


class Environment:
    """The last results of each file of tests in one environment."""

    def __init__(self, about: dict[str, str]) -> None:
        self.about = about
        self.by_file: dict[str, Record] = {}

    @property
    def name(self) -> str:
        """The versions of Python and torch, and what was set."""
        settings = [f"{name}={self.about[name]}" for name in VARIABLES if name in self.about]
        return ", ".join([f"Python {self.about['python']}, torch {self.about['torch']}", *settings])

    def values(self, key: str) -> str:
        """The different values of an entry of the records."""
        return ", ".join(dict.fromkeys(str(record[key]) for record in self.by_file.values()))

    def cell(self, records: Sequence[Record]) -> str:
        """The counts of some records; a failure is bold."""
        if not records:
            return "not run"
        passed, failed, skipped = (sum(record[key] for record in records) for key in ("passed", "failed", "skipped"))
        parts = [f"{passed} passed"]
        parts += [f"**{failed} failed**"] if failed else []
        parts += [f"{skipped} skipped"] if skipped else []
        selected = dict.fromkeys(record.get("selection", "") for record in records)
        return ", ".join(parts) + "".join(f" (only `{selection}`)" for selection in selected if selection)


def load(path: Path = RESULTS) -> list[Environment]:
    """The environments of a file, the newest versions first."""
    found: dict[str, Environment] = {}
    for record in map(json.loads, path.read_text().splitlines()):
        about = record["environment"]
        environment = found.setdefault(json.dumps(about, sort_keys=True), Environment(about))
        environment.by_file[record["file"]] = record
    return sorted(found.values(), key=lambda e: (_numbers(e.about["torch"]), _numbers(e.about["python"])), reverse=True)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.partition("+")[0].split(".") if part.isdigit()]


def group(file: str) -> str:
    """What a file of tests is about."""
    stem = Path(file).stem.removeprefix("test_")
    return next((name for name, patterns in GROUPS.items() if any(fnmatch(stem, p) for p in patterns)), OTHERS)


def environments_table(environments: Sequence[Environment]) -> str:
    """What was installed, where and when."""
    header = ["", *PACKAGES[1:], "system", "date", "commits"]
    rows = [
        [
            e.name, *(e.about.get(package, "–") for package in PACKAGES[1:]), e.about["system"], e.values("date"),
            e.values("code"),
        ]
        for e in environments
    ]  # fmt: skip
    return markdown(header, rows)


def results_table(environments: Sequence[Environment]) -> str:
    """How many tests of each group passed, failed and were skipped in each environment."""
    rows = []
    for name in (*GROUPS, OTHERS):
        by_environment = [[r for file, r in e.by_file.items() if group(file) == name] for e in environments]
        if any(by_environment):
            rows.append([name, *(e.cell(records) for e, records in zip(environments, by_environment))])
    rows.append(["all of these", *(e.cell(list(e.by_file.values())).partition(" (only")[0] for e in environments)])
    return markdown(["", *(e.name for e in environments)], rows)


def failures_list(environments: Sequence[Environment]) -> str:
    """Every test that failed."""
    lines = [
        f"- {e.name}: `{file}`, `{failure}`"
        for e in environments
        for file, record in e.by_file.items()
        for failure in record["failures"]
    ]
    return "\n".join(lines) or "None."
