"""The device that these tests run on: a CUDA device, or in a dry run the CPU, by Triton's interpreter.

`python -m benchmarks.gpu` runs them, `--dry-run` included; `pytest -m gpu` does on a machine with a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from runningbn.kernels import use_backend

DRY_RUN = os.environ.get("RUNNINGBN_GPU_DRY_RUN") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            # The interpreter computes with numpy, which warns of what is meant to overflow.
            item.add_marker(pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"))
    if DRY_RUN and os.environ.get("RUNNINGBN_GPU_DRY_RUN_OF"):
        items[:] = some_of_each(items, int(os.environ["RUNNINGBN_GPU_DRY_RUN_OF"]))


def some_of_each(items: list[pytest.Item], most: int) -> list[pytest.Item]:
    """At most so many of the parameters of every test, spread over all: the interpreter is slow."""
    by_test: dict[str, list[pytest.Item]] = {}
    for item in items:
        by_test.setdefault(item.nodeid.partition("[")[0], []).append(item)
    chosen = []
    for alike in by_test.values():
        step = max(1, -(-len(alike) // most))
        chosen += alike[::step]
    return chosen


@pytest.fixture
def device() -> Iterator[str]:
    """Where to compute, with the Triton kernels forced: nothing is proved by what another backend does."""
    if not torch.cuda.is_available() and not DRY_RUN:
        pytest.skip("torch found no CUDA device")
    with use_backend("triton"):
        yield "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def gpu(device: str) -> str:
    """The same, for what no CPU can stand in for."""
    if device != "cuda":
        pytest.skip("torch found no CUDA device")
    return device
