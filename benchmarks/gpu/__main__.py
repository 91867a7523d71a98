"""All tests and measurements on a GPU, in one command of less than nine minutes.

    python -m benchmarks.gpu --out DIR               all parts, on the first CUDA device
    python -m benchmarks.gpu --out DIR --only layers only some parts; each may use the time of all
    python -m benchmarks.gpu --out DIR --dry-run     the same in small, on the CPU and with Triton's interpreter

Parts run in order of importance, each in a separate process with a time limit: *correctness*, the tests marked `gpu`;
*layers*, compared with nn.BatchNorm; *models* before and after `batchnormify`, in eager mode and as CUDA graphs;
*accuracy*, a short training on Fashion-MNIST, if RUNNINGBN_DATA names a folder with its files; *compiled*, the models
with torch.compile. If a part fails or exceeds its time, the others still run. DIR/results.json contains all results and
is updated after every part. The exit status is 0 if all parts have passed.

It needs no network. It runs in a checkout and needs torch, Triton, einops, pytest, hypothesis, rich, timm and
torchvision. If pytest-xdist is installed, the tests compile their kernels in parallel.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.results_file import machine

from .part import check_device
from .runner import GRACE, Part, run_parts

# Together with what each may take longer, under nine minutes.
SECONDS = 535.0
PARTS = (
    Part("correctness", "benchmarks.gpu.correctness", 170),
    Part("layers", "benchmarks.gpu.layers", 90),
    Part("models", "benchmarks.gpu.models", 90),
    Part("accuracy", "benchmarks.gpu.accuracy", 30),
    # Compilers take long: this one has all that is left.
    Part("compiled", "benchmarks.gpu.compiled", SECONDS),
)
PACKAGES = ("triton", "einops", "timm", "torchvision", "numpy")


def about(dry_run: bool) -> dict[str, Any]:
    """The machine, its GPU and the versions of what runs there."""
    found: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "dry run": dry_run,
        "machine": machine(),
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "versions": {name: _version(name) for name in PACKAGES} | {"cuda": torch.version.cuda},
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results.json goes")
    parser.add_argument("--only", choices=names, nargs="+", default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--dry-run", action="store_true", help="in small, on the CPU, to see that all of it works")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything; default: %(default)s")
    found = parser.parse_args(arguments)
    if found.dry_run:
        # Read when the kernels are imported, in the processes of the parts.
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are tiny
    reason = check_device(found.dry_run)
    if reason is not None:
        parser.error(reason)
    parts = [part for part in PARTS if part.name in found.only]
    if len(parts) < len(PARTS):
        parts = [part._replace(seconds=found.seconds / len(parts) - GRACE) for part in parts]
    passed = run_parts(parts, found.out / "results.json", about(found.dry_run), found.seconds, found.dry_run)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
