"""One training step (forward and backward) of each layer against nn.BatchNorm2d: check, then time.

    python -m benchmarks.training_step [--quick] [--write]

First every contender is checked against float64; then all are timed in turn, round after round in one process, so that
whatever else the machine does hits all of them alike. Reported are medians and their ratio to nn.BatchNorm2d's in the
same rounds. `--write` stores the numbers, with machine and versions, in ``benchmarks/results/training_step.json``.

Outputs of tens of MB come from fresh pages of the operating system in glibc's default setting, and page faults then
outweigh the arithmetic. Run with MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000 to leave them out; what was set
is stored with the numbers, and so are the faults per step.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from runningbn import PreciseBatchNorm2d, RunningBatchNorm

from .results_file import FOLDER, store

RESULTS = FOLDER / "training_step.json"

LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "nn.BatchNorm2d": nn.BatchNorm2d,
    "PreciseBatchNorm2d": PreciseBatchNorm2d,
    "RunningBatchNorm": RunningBatchNorm,
    "RunningBatchNorm exact": lambda channels: RunningBatchNorm(channels, gradient="exact"),
}
# The shape that the project's first promise is about, ResNet-50's others at batch 32, and where overhead rules.
SHAPES = [(32, 64, 56, 56), (32, 256, 56, 56), (32, 512, 28, 28), (32, 2048, 7, 7), (2, 64, 56, 56), (2, 64, 16, 16)]
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def data(shape: tuple[int, ...], layout: str, dtype: str) -> tuple[Tensor, Tensor]:
    """An input that wants a gradient, and the gradient of its output."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator).to(DTYPES[dtype]) for _ in range(2))
    x, dy = (t.contiguous(memory_format=LAYOUTS[layout]) for t in (x, dy))
    return x.requires_grad_(), dy


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward with fresh gradients; the output and the input's gradient."""
    x.grad = None
    layer.zero_grad(set_to_none=True)
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None
    return y.detach(), x.grad


def check(layer: nn.Module, x: Tensor, dy: Tensor) -> None:
    """The first step of every layer here is BatchNorm's; compare it with that in float64."""
    wide = x.detach().double().requires_grad_()
    expected = step(nn.BatchNorm2d(x.shape[1]).double(), wide, dy.double())
    # float32: sums over up to 1e5 elements; bfloat16: rounded to 8 bits on the way out.
    tolerance = 1e-4 if x.dtype == torch.float32 else 4e-2
    for got, reference in zip(step(layer, x, dy), expected, strict=True):
        torch.testing.assert_close(got.double(), reference, rtol=tolerance, atol=tolerance)


def measure(shape: tuple[int, ...], layout: str, dtype: str, seconds: float) -> dict[str, object]:
    """Median milliseconds, ratio and page faults per step of every layer at one shape."""
    x, dy = data(shape, layout, dtype)
    layers = {name: make(shape[1]) for name, make in LAYERS.items()}
    for layer in layers.values():
        check(layer, x, dy)
    times: dict[str, list[float]] = {name: [] for name in layers}
    faults = dict.fromkeys(layers, 0)
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(times["nn.BatchNorm2d"]) < 5:
        for name, layer in layers.items():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            begin = time.perf_counter()
            step(layer, x, dy)
            times[name].append(time.perf_counter() - begin)
            faults[name] += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    rounds = len(times["nn.BatchNorm2d"])
    peer = times["nn.BatchNorm2d"]
    return {
        "shape": "x".join(map(str, shape)),
        "layout": layout,
        "dtype": dtype,
        "rounds": rounds,
        "milliseconds": {name: round(1e3 * statistics.median(taken), 3) for name, taken in times.items()},
        # The median of the ratios within a round: a slow second of the machine hits both sides of it.
        "ratio": {
            name: round(statistics.median(a / b for a, b in zip(taken, peer, strict=True)), 3)
            for name, taken in times.items()
        },
        "page faults": {name: round(count / rounds) for name, count in faults.items()},
    }


def table(rows: list[dict[str, object]]) -> Table:
    """Ratios to nn.BatchNorm2d; a loss is red."""
    shown = Table(title="Training step, time relative to nn.BatchNorm2d (below 1 is faster)", title_justify="left")
    ours = [name for name in LAYERS if name != "nn.BatchNorm2d"]
    for column in ("shape", "layout", "dtype", "nn.BatchNorm2d ms", *ours):
        shown.add_column(column)
    for row in rows:
        ratios, milliseconds = row["ratio"], row["milliseconds"]
        assert isinstance(ratios, dict)
        assert isinstance(milliseconds, dict)
        cells = [f"[{'red' if ratios[name] > 1 else 'green'}]{ratios[name]:.2f}" for name in ours]
        time_of_peer = str(milliseconds["nn.BatchNorm2d"])
        shown.add_row(str(row["shape"]), str(row["layout"]), str(row["dtype"]), time_of_peer, *cells)
    return shown


def main() -> None:
    """Measure all cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first shape only, one second a case")
    parser.add_argument("--write", action="store_true", help=f"store the numbers in {RESULTS.name}")
    arguments = parser.parse_args()
    shapes, seconds = (SHAPES[:1], 1.0) if arguments.quick else (SHAPES, 4.0)
    rows = [measure(shape, layout, dtype, seconds) for dtype in DTYPES for layout in LAYOUTS for shape in shapes]
    Console().print(table(rows))
    if arguments.write:
        store(RESULTS, "python -m benchmarks.training_step --write", rows)


if __name__ == "__main__":
    main()
