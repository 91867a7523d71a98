"""The host time of a training step on a GPU, measured without a GPU: launches are replaced by calls that do nothing.

    python -m benchmarks.gpu.host            a minute on one core
    python -m benchmarks.gpu.host --write    also store the numbers in benchmarks/results

Triton compiles the kernels for an H100 that is not present; see `no_device`. Tensors are on the CPU. So the launch
itself is missing, and what torch does for CUDA tensors in particular (its allocator, reading the stream): some
microseconds each. Times are in microseconds, of an eager forward in training mode and of the backward through autograd.
Each is the minimum of many medians, with the contenders measured in turn. *Nothing* is an autograd function that saves
its input and returns its gradient unchanged: the overhead of torch itself. *By Triton* is the same layer with every
launch made by Triton's own launcher, as before launches were prepared.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd.function import Function

from benchmarks.results_file import FOLDER, store
from runningbn import PreciseBatchNorm2d, RunningBatchNorm
from runningbn.kernels import triton_launch

from .no_device import Launch, no_device

SIZE = (2, 64, 16, 16)
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "RunningBatchNorm": lambda: RunningBatchNorm(SIZE[1]),
    "RunningBatchNorm exact": lambda: RunningBatchNorm(SIZE[1], gradient="exact"),
    "PreciseBatchNorm2d": lambda: PreciseBatchNorm2d(SIZE[1]),
}
IN_A_ROW, REPEATS = 100, 30


class _Nothing(Function):
    """As many tensors in and out as those of a layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        _, weight, bias = ctx.saved_tensors
        return dy, weight.detach(), bias.detach()


class Nothing(nn.Module):
    """A module of nothing but the least that torch takes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.ones(SIZE[1])) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Memory like x."""
        y: Tensor = _Nothing.apply(x, self.weight, self.bias)
        return y


@contextmanager
def by_triton() -> Iterator[None]:
    """Every launch goes Triton's own way."""

    def launch(_prepared: Any, *others: Any) -> None:
        triton_launch.launch({}, *others)

    with mock.patch("runningbn.kernels.triton.launch", launch):
        yield


class Clocked:
    """A layer, and the times of its passes so far."""

    def __init__(self, layer: nn.Module, triton: bool = False) -> None:
        self.layer, self.triton = layer, triton
        self.x = torch.randn(SIZE, requires_grad=True)
        self.wanted = (self.x, *layer.parameters())
        self.medians: dict[str, list[float]] = {"forward": [], "backward": []}

    def some(self, count: int) -> None:
        """So many steps, a median of which is noted."""
        seconds: dict[str, list[float]] = {name: [] for name in self.medians}
        dy = torch.ones(SIZE)
        if self.triton:
            with by_triton():
                self._steps(count, dy, seconds)
        else:
            self._steps(count, dy, seconds)
        for name, taken in seconds.items():
            self.medians[name].append(statistics.median(taken))

    def _steps(self, count: int, dy: Tensor, seconds: dict[str, list[float]]) -> None:
        for _ in range(count):
            begin = time.perf_counter()
            y = self.layer(self.x)
            middle = time.perf_counter()
            torch.autograd.grad(y, self.wanted, dy)
            end = time.perf_counter()
            seconds["forward"].append(middle - begin)
            seconds["backward"].append(end - middle)

    def microseconds(self) -> dict[str, float]:
        """The least median of each pass."""
        return {name: round(1e6 * min(medians), 1) for name, medians in self.medians.items()}


def measure(in_a_row: int = IN_A_ROW, repeats: int = REPEATS) -> list[dict[str, Any]]:
    """A row for each layer, and one for nothing."""
    launches: dict[str, list[Launch]] = {}
    for name, make in LAYERS.items():
        noted: list[Launch] = []
        with no_device(noted):
            Clocked(make()).some(1)
        launches[name] = noted
    clocked = {name: Clocked(make()) for name, make in LAYERS.items()}
    clocked |= {f"{name}, by Triton": Clocked(make(), triton=True) for name, make in LAYERS.items()}
    clocked["nothing"] = Clocked(Nothing())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with no_device():
        for one in clocked.values():
            one.some(2)
            for medians in one.medians.values():
                medians.clear()
        gc.collect()
        gc.disable()
        for _ in range(repeats):
            for one in clocked.values():
                one.some(in_a_row)
        gc.enable()
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    for name in LAYERS:
        rows.append(
            {
                "layer": name,
                "microseconds": clocked[name].microseconds(),
                "by Triton": clocked[f"{name}, by Triton"].microseconds(),
                "launches": [
                    {"kernel": launch.kernel, "arguments": arguments(launch), "shared memory": launch.shared}
                    for launch in launches[name]
                ],
            }
        )
    return [*rows, {"layer": "nothing", "microseconds": clocked["nothing"].microseconds()}]


def arguments(launch: Launch) -> int:
    """How many the kernel has at run time: pointers, those in tuples too, and numbers."""
    from runningbn.kernels import triton_kernels

    kernel = getattr(triton_kernels, launch.kernel)
    count = 0
    for parameter, argument in zip(kernel.params, launch.arguments, strict=True):
        if not parameter.is_constexpr and argument is not None:
            count += len(argument) if isinstance(argument, tuple) else 1
    return count


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="store the numbers in benchmarks/results")
    found = parser.parse_args()
    rows = measure()
    for row in rows:
        launches = ", ".join(f"{launch['kernel']} ({launch['arguments']})" for launch in row.get("launches", ()))
        print(row["layer"], row["microseconds"], row.get("by Triton", ""), launches)
    if found.write:
        store(FOLDER / "host.json", " ".join(["python -m benchmarks.gpu.host", *sys.argv[1:]]), rows)


if __name__ == "__main__":
    main()
