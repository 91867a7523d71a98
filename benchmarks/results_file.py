"""Where measurements are stored: one file per benchmark, with the command, the machine and the versions."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "results"
ALLOCATOR = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


def store(path: Path, command: str, cases: Sequence[object]) -> None:
    """Write what was measured on this machine."""
    contents = {"command": command, "machine": machine(), "cases": cases}
    path.write_text(json.dumps(contents, indent=1) + "\n")


def code_version() -> str | None:
    """The commit that is checked out, with "-dirty" where files differ from it; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def machine() -> dict[str, object]:
    """What the numbers were taken on."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = models[0] if models else processor
    return {
        "code": code_version(),
        "date": datetime.date.today().isoformat(),
        "processor": processor,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "allocator": {name: os.environ[name] for name in ALLOCATOR if name in os.environ} or "default",
    }
