"""The layers compared with nn.BatchNorm on a GPU: device time, host time, launches, and bandwidth relative to a copy.

Run by ``python -m benchmarks.gpu``; see there. Cases, checks and clocks are those of ``python -m benchmarks.layers``:
output and gradients of all contenders are checked against float64 before anything is timed, and device times are with a
cold L2 cache. nn.BatchNorm is measured with the kernels that torch chooses, which each row names, and without cuDNN.
Switching cuDNN off and on is part of the host time of the latter.

A training step reads x, writes y, reads x and dy for the sums, and reads both again and writes dx. With one more read
of x for the sums of forward, this is eight times the memory of x, which is four copies. So the share of a copy's
bandwidth is 4 · (time of a copy) / (time of the step). It exceeds 1 if the cache holds what is read again.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import COPY, LARGE, MIDDLE, OURS, PEER, TINY, Case, Grid, Shape, data
from benchmarks.clocks import Call, take_turns
from benchmarks.layers import (
    backend,
    check,
    layer_of,
    median_ratio,
    milliseconds,
    peak_bytes,
    saved_bytes,
    training_step,
)  # fmt: skip

from .launches import kernels_of
from .part import Work

NATIVE = f"{PEER} without cuDNN"
# Passes over memory as large as x in a training step, and in a copy.
OF_A_STEP, OF_A_COPY = 8, 2
# The most important first: there may not be time for all.
SIZES = (
    MIDDLE, TINY, LARGE, (32, 512, 28, 28), (32, 2048, 7, 7), (2, 64, 56, 56), (2, 256, 14, 14), (1, 1024, 14, 14),
    (128, 256, 56, 56), (8, 32, 160, 160), (16, 3, 224, 224), (2, 32, 64, 64, 64), (100_000, 32), (20, 6, 65_536),
)  # fmt: skip
KINDS = (("NCHW", "float32"), ("channels_last", "bfloat16"), ("channels_last", "float32"), ("NCHW", "bfloat16"))
# Calls in a row for the time of the host: fewer than fill a queue of launches.
IN_A_ROW, REPEATS = 40, 7
LARGEST_OF_HOST = 2**20


def cases(dry_run: bool) -> list[Case]:
    """All kinds of the first shapes, then the next."""
    sizes, kinds, seconds = (((2, 3, 4, 4),), KINDS[:2], 0.0) if dry_run else (SIZES, KINDS, 0.25)
    found = []
    for size in sizes:
        shape = Shape("GPU", size)
        grid = Grid("training step", (shape,), seconds=seconds)
        # Rows have one layout.
        found += [Case(grid, shape, *kind) for kind in kinds if kind[0] == "NCHW" or len(size) > 2]
    return found


class WithoutCudnn(nn.Module):
    """A layer whose kernels are torch's own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """What the layer does."""
        with torch.backends.cudnn.flags(enabled=False):
            y: Tensor = self.layer(x)
            return y


def contender(name: str, size: tuple[int, ...], device: str) -> nn.Module:
    """A layer on the device."""
    if name == NATIVE:
        return WithoutCudnn(layer_of(PEER, size)).to(device)
    return layer_of(name, size).to(device)


def measure(case: Case, device: str) -> dict[str, Any]:
    """A row of the results."""
    size = case.shape.size
    x, dy = data(case, device)
    layers = {name: contender(name, size, device) for name in (PEER, NATIVE, *OURS)}
    errors = {
        name: check(PEER if name == NATIVE else name, layer, layer, case, x, dy) for name, layer in layers.items()
    }
    steps: dict[str, Call] = {name: partial(training_step, layer, x, dy) for name, layer in layers.items()}
    samples = take_turns({**steps, COPY: partial(torch.empty_like(x).copy_, x.detach())}, case.grid.seconds, device)
    taken = {name: milliseconds(sample.device for sample in found) for name, found in samples.items()}
    launched = {name: kernels_of(step) for name, step in steps.items()}
    return {
        "shape": "x".join(map(str, size)),
        "layout": case.layout,
        "dtype": case.dtype,
        f"kernels of {PEER}": backend(layers[PEER], x),
        "rounds": len(samples[PEER]),
        "milliseconds": taken,
        "ratio": {name: median_ratio(found, samples[PEER]) for name, found in samples.items() if name != PEER},
        "share of the bandwidth of a copy": {
            name: round(OF_A_STEP / OF_A_COPY * taken[COPY] / taken[name], 3) for name in layers if taken[name]
        },
        "host microseconds": {name: host_microseconds(layer, x, dy) for name, layer in layers.items()},
        "launches": {name: len(kernels) for name, kernels in launched.items()},
        "microseconds by kernel": {name: times(kernels) for name, kernels in launched.items()},
        "saved bytes": {name: saved_bytes(layer, layer, x) for name, layer in layers.items()},
        "peak bytes": {name: peak_bytes(step) for name, step in steps.items()} if device == "cuda" else {},
        "error": {name: float(f"{off:.1e}") for name, off in errors.items()},
    }


def times(kernels: list[Any]) -> dict[str, float]:
    """By name, cut short: templates of C++ fill pages."""
    total: Counter[str] = Counter()
    for kernel in kernels:
        total[kernel.name[:60]] += kernel.microseconds
    return {name: round(microseconds, 2) for name, microseconds in total.items()}


def host_microseconds(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, float]:
    """How long the host is busy with one forward and with one backward; of small inputs, where that is what counts."""
    if x.numel() > LARGEST_OF_HOST:
        return {}
    wanted = (x, *layer.parameters())
    in_a_row, repeats = (IN_A_ROW, REPEATS) if x.is_cuda else (1, 1)  # a dry run
    forward = per_call(lambda: layer(x), in_a_row, repeats)
    outputs = [layer(x) for _ in range(in_a_row * repeats)]
    backward = per_call(lambda: torch.autograd.grad(outputs.pop(), wanted, dy), in_a_row, repeats)
    return {"forward": forward, "backward": backward}


def per_call(run: Callable[[], object], in_a_row: int, repeats: int) -> float:
    """Microseconds of the host: the median of some calls in a row, and the least of these."""
    best = []
    for _ in range(repeats):
        seconds = []
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for _ in range(in_a_row):
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
        best.append(statistics.median(seconds))
    return round(1e6 * min(best), 1)


def main() -> int:
    """Measure what there is time for; the exit status."""
    work = Work(__doc__)
    return work.each(cases(work.dry_run), lambda case: measure(case, work.device))


if __name__ == "__main__":
    sys.exit(main())
