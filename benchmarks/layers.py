"""The speed of the layers relative to nn.BatchNorm, case by case. Every case is checked before it is timed.

    python -m benchmarks.layers            every case, under twenty minutes on two cores
    python -m benchmarks.layers --quick    two shapes, under a minute
    python -m benchmarks.layers --write    also store the numbers in benchmarks/results

Before anything is timed, output and gradients of every contender are checked against float64. Then all contenders run
in turn in one process, in a new order in each round, so that other load on the machine affects all of them equally.
Reported are medians, and the median over rounds of the ratio to nn.BatchNorm within the round. benchmarks/cases.py has
the cases.

With glibc's defaults, outputs of tens of MB are allocated from fresh pages of the operating system in every step, and
page faults take longer than the arithmetic. So there are two processes: one keeps its pages (MALLOC_MMAP_MAX_=0 and a
large MALLOC_TRIM_THRESHOLD_), and one uses the default allocator, for a separate grid. The minor page faults per call
and the number of cores used by other processes are reported with each number.

On CUDA, times are device times with a cold L2 cache; host times are reported, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from time import perf_counter

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

import runningbn

from .cases import COPY, FASTAI, PEER, QUICK_SECONDS, Case, cases, data, values
from .clocks import Call, Sample, others_seconds, take_turns
from .fastai import FastaiRunningBatchNorm
from .layers_report import case_table, disturbed, losses, losses_title, summary_table, worst_errors
from .results_file import FOLDER, store

RESULTS = {"cpu": FOLDER / "layers.json", "cuda": FOLDER / "layers_cuda.json"}
KEEP_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
ALLOCATORS = {"pages kept": False, "default": True}  # and whether there are page faults
# Of the largest value. float32: sums over up to 1e6 elements; the others: some roundings of 2⁻⁹ or 2⁻¹² on the way.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 3e-3}
# On the CPU, channels_last, torch adds up to 1e6 float32 numbers one to the other.
TOLERANCE_OF_PEER = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 3e-3}
ALL_THREADS = torch.get_num_threads()


def layer_of(name: str, size: tuple[int, ...]) -> nn.Module:
    """A contender for inputs (N, C, *), with the weights and biases that all have."""
    dimensions = max(len(size) - 2, 1)
    makers: dict[str, Callable[[int], nn.Module]] = {
        PEER: getattr(nn, f"BatchNorm{dimensions}d"),
        "PreciseBatchNorm": getattr(runningbn, f"PreciseBatchNorm{dimensions}d"),
        "RunningBatchNorm": runningbn.RunningBatchNorm,
        "RunningBatchNorm exact": partial(runningbn.RunningBatchNorm, gradient="exact"),
        FASTAI: FastaiRunningBatchNorm,
    }
    layer = makers[name](size[1])
    with torch.no_grad():
        for parameter, wanted in zip(layer.parameters(), affine(size[1]), strict=True):
            parameter.copy_(wanted.view_as(parameter))
    return layer


def affine(channels: int) -> tuple[Tensor, Tensor]:
    """Weight and bias."""
    generator = torch.Generator().manual_seed(1)
    return 0.5 + torch.rand(channels, generator=generator), torch.randn(channels, generator=generator)


# ------------------------------------------------------------------------------------------------------ what is timed


def training_step(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """y, dx, dweight, dbias."""
    y = layer(x)
    return (y.detach(), *torch.autograd.grad(y, (x, *layer.parameters()), dy))


def forward(layer: nn.Module, x: Tensor, _: Tensor) -> Tensor:
    """In training mode, all that backward needs kept."""
    y: Tensor = layer(x)
    return y


@torch.no_grad()
def evaluation(layer: nn.Module, x: Tensor, _: Tensor) -> Tensor:
    """Of a layer in evaluation mode."""
    y: Tensor = layer(x)
    return y


MODES: dict[str, Callable[[nn.Module, Tensor, Tensor], object]] = {
    "training step": training_step,
    "forward": forward,
    "evaluation": evaluation,
}


# -------------------------------------------------------------------------------------------------------------- checks


class WrongResultError(AssertionError):
    """A contender is off by more than its arithmetic explains."""


@lru_cache(maxsize=1)
def reference(size: tuple[int, ...], dtype: torch.dtype, device: str, activation: bool) -> tuple[Tensor, ...]:
    """y, dx, dweight, dbias of batch normalisation, in float64 from the values in `dtype`; rounded to float32.

    The first training step of every contender is this one. With `activation` y is that after a ReLU.
    """
    x, dy = (t.to(dtype).double() for t in values(size, device))
    others = (0, *range(2, x.dim()))
    along = (1, -1, *[1] * (x.dim() - 2))
    weight, bias = (t.to(device).double().view(along) for t in affine(size[1]))
    var, mean = torch.var_mean(x, others, correction=0, keepdim=True)
    rstd = (var + 1e-5).rsqrt()
    x_hat = (x - mean).mul_(rstd)
    if activation:
        dy.mul_(x_hat * weight + bias > 0)
    sum_dy, sum_dy_xhat = dy.sum(others, keepdim=True), (dy * x_hat).sum(others, keepdim=True)
    n = x.numel() // size[1]
    dx = dy.sub_(sum_dy / n).sub_(x_hat * (sum_dy_xhat / n)).mul_(weight * rstd)
    y = x_hat.mul_(weight).add_(bias)
    if activation:
        y.clamp_(min=0)
    return tuple(t.float() for t in (y, dx, sum_dy_xhat.flatten(), sum_dy.flatten()))


def error(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest difference of two lists of tensors, each relative to the largest value in its tensor."""
    pairs = zip(got, expected, strict=True)
    return max(float((a.float().reshape(b.shape) - b).abs_().max() / b.abs().max()) for a, b in pairs)


def check(name: str, layer: nn.Module, call: nn.Module, case: Case, x: Tensor, dy: Tensor) -> float:
    """The error of a fresh layer's first training step, and of evaluation by its statistics where that is measured.

    Raises:
        WrongResultError: if it is more than it may be.
    """
    expected = reference(case.shape.size, x.dtype, x.device.type, case.grid.activation)
    found = training_step(call, x, dy)
    if case.grid.activation:
        # Not dx: where y is 0 but for rounding, some have passed the gradient on and others not.
        (y, _, *found_sums), (expected_y, _, *expected_sums) = found, expected
        off = error((y, *found_sums), (expected_y, *expected_sums))
    else:
        off = error(found, expected)
    if case.grid.mode == "evaluation":
        layer.eval()
        off = max(off, error((evaluation(call, x, dy),), (evaluated(layer, x),)))
    if not off <= (TOLERANCE_OF_PEER if name == PEER else TOLERANCE)[case.dtype]:  # nor NaN
        raise WrongResultError(f"{name} is off by {off:.1e} in {case}")
    return off


@torch.no_grad()
def evaluated(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer should give in evaluation by the statistics that it has, from float64."""
    if isinstance(layer, FastaiRunningBatchNorm):
        mean = layer.sums.double() / layer.count
        var = layer.sqrs.double() / layer.count - mean.square()
        if layer.batch < 20:
            var = var.clamp_min(0.01)
    else:
        mean, var = layer.running_mean.double(), layer.running_var.double()
    along = (1, -1, *[1] * (x.dim() - 2))
    weight, bias = (t.detach().double().view(along) for t in layer.parameters())
    wide = x.detach().double()
    return (wide - mean.view(along)).mul_((var.view(along) + 1e-5).rsqrt() * weight).add_(bias).float()


# -------------------------------------------------------------------------------------------------------------- memory


def saved_bytes(call: nn.Module, layer: nn.Module, x: Tensor) -> int:
    """What a training forward keeps for backward, x included but not the layer's own parameters and buffers.

    Each storage counts once, whole. Only what is saved in autograd's way is seen.
    """
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call(x)  # held until all is counted, so that no address is used twice
    del y
    return sum(kept.values())


def peak_bytes(run: Call) -> int:
    """The most that a call takes on the GPU beyond what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# --------------------------------------------------------------------------------------------------------- measurement


def measure(case: Case, seconds: float, device: str = "cpu") -> dict[str, object]:
    """Check all contenders of a case, then time them; a row of the results.

    Raises:
        WrongResultError: if a contender is wrong, but for fastai's under torch.compile, which is left out and named.
    """
    grid, size = case.grid, case.shape.size
    torch.set_num_threads(1 if grid.one_thread else ALL_THREADS)
    x, dy = data(case, device)
    calls: dict[str, Call] = {}
    errors: dict[str, float] = {}
    saved: dict[str, int] = {}
    wrong: dict[str, str] = {}
    if grid.compiled:
        torch._dynamo.reset()
    for name in (PEER, *grid.contenders):
        if name == COPY:
            calls[name] = partial(torch.empty_like(x).copy_, x.detach())
            continue
        layer = layer_of(name, size).to(device)
        network = nn.Sequential(layer, nn.ReLU()) if grid.activation else layer
        call = torch.compile(network) if grid.compiled else network
        try:
            errors[name] = check(name, layer, call, case, x, dy)
        except WrongResultError as problem:
            if name != FASTAI or not grid.compiled:
                raise
            wrong[name] = str(problem)
            continue
        if grid.mode != "evaluation":
            saved[name] = saved_bytes(call, layer, x)
        calls[name] = partial(MODES[grid.mode], call, x, dy)
    begin, others = perf_counter(), others_seconds()
    samples = take_turns(calls, seconds, device)
    disturbance = (others_seconds() - others) / (perf_counter() - begin)
    row: dict[str, object] = {
        "grid": grid.name,
        "family": case.shape.family,
        "shape": "x".join(map(str, size)),
        "count": case.shape.count,
        "layout": case.layout,
        "dtype": case.dtype,
        "mode": grid.mode,
        "threads": torch.get_num_threads(),
        "backend": backend(layer_of(PEER, size).to(device), x),
        "rounds": len(samples[PEER]),
        # Cores that other processes kept busy meanwhile: threads that wait for each other suffer a lot from that.
        "disturbance": round(max(disturbance, 0.0), 2),
        "milliseconds": {name: milliseconds(sample.device for sample in taken) for name, taken in samples.items()},
        "ratio": {name: median_ratio(taken, samples[PEER]) for name, taken in samples.items() if name != PEER},
        "page faults": {
            name: statistics.median_low(sample.faults for sample in taken) for name, taken in samples.items()
        },
        "saved bytes": saved,
        "wrong": wrong,
        "error": {name: float(f"{off:.1e}") for name, off in errors.items()},
    }
    if device == "cuda":
        row["device"], row["cudnn"] = torch.cuda.get_device_name(), torch.backends.cudnn.version()
        row["host milliseconds"] = {
            name: milliseconds(sample.host for sample in taken) for name, taken in samples.items()
        }
        row["peak bytes"] = {name: peak_bytes(run) for name, run in calls.items()}
    return row


def milliseconds(seconds: Iterable[float]) -> float:
    """The median."""
    return round(1e3 * statistics.median(seconds), 4)


def median_ratio(taken: list[Sample], peer: list[Sample]) -> float:
    """The median of the ratios within a round: a slow second of the machine hits both sides of it."""
    return round(statistics.median(a.device / b.device for a, b in zip(taken, peer, strict=True)), 3)


def backend(layer: nn.Module, x: Tensor) -> str:
    """Which kernels torch takes for nn.BatchNorm in training; "unknown" where torch does not say."""
    select = getattr(torch._C, "_select_batch_norm_backend", None)
    if select is None:
        return "unknown"
    chosen = select(x, layer.weight, layer.bias, layer.running_mean, layer.running_var, True, layer.eps)
    return str(chosen).rpartition(".")[2]


# ----------------------------------------------------------------------------------------------------------- processes


def work(device: str, allocator: str, quick: bool) -> None:
    """Measure the cases of one allocator in this process; a line of JSON each."""
    for case in cases(device, ALLOCATORS[allocator], quick):
        row = measure(case, QUICK_SECONDS if quick else case.grid.seconds, device)
        print(json.dumps({**row, "allocator": allocator}), flush=True)


def rows_of_process(device: str, allocator: str, quick: bool) -> Iterator[dict[str, object]]:
    """The rows of a process that has this allocator, as they come.

    Raises:
        RuntimeError: if it failed; why is on its stderr.
    """
    environment = {name: value for name, value in os.environ.items() if name not in KEEP_PAGES}
    if not ALLOCATORS[allocator]:
        environment |= KEEP_PAGES
    command = [sys.executable, "-m", "benchmarks.layers", "--device", device, "--allocator", allocator]
    command += ["--quick"] if quick else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield json.loads(line)
    if process.returncode:
        raise RuntimeError(f"the process with the allocator {allocator!r} failed")


def measure_all(device: str, quick: bool) -> list[dict[str, object]]:
    """All rows, with a bar to watch."""
    counts = {name: len(list(cases(device, faults, quick))) for name, faults in ALLOCATORS.items()}
    columns = TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    rows: list[dict[str, object]] = []
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=300) as progress:
        task = progress.add_task("starting", total=sum(counts.values()))
        for allocator in (name for name, count in counts.items() if count):
            for row in rows_of_process(device, allocator, quick):
                rows.append(row)
                text = f"{row['grid']}: {row['shape']}, {row['layout']}, {row['dtype']}"
                progress.update(task, advance=1, description=text)
    return rows


def main() -> None:
    """Measure all cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two shapes, a tenth of a second a case, not compiled")
    parser.add_argument("--write", action="store_true", help="store the numbers in benchmarks/results")
    parser.add_argument("--device", choices=RESULTS, default="cpu")
    parser.add_argument("--allocator", choices=ALLOCATORS, help=argparse.SUPPRESS)  # a process of `rows_of_process`
    arguments = parser.parse_args()
    if arguments.quick and arguments.write:
        parser.error("--quick is for a look; what is stored has to be whole")
    if arguments.allocator:
        work(arguments.device, arguments.allocator, arguments.quick)
        return
    rows = measure_all(arguments.device, arguments.quick)
    console = Console()
    console.print(case_table(rows))
    console.print(summary_table(rows))
    for line in (losses_title(rows), *losses(rows), worst_errors(rows), disturbed(rows)):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    if arguments.write:
        store(RESULTS[arguments.device], " ".join(["python -m benchmarks.layers", *sys.argv[1:]]), rows)


if __name__ == "__main__":
    main()
