"""A whole training step of real networks before and after `batchnormify`. Every case is checked before it is timed.

    python -m benchmarks.models            all cases, some ten minutes on two cores
    python -m benchmarks.models --quick    ResNet-18 and MobileNetV2 on small images, less than a minute
    python -m benchmarks.models --write    also store the numbers in benchmarks/results
    python -m benchmarks.models --device cuda

A step is forward, cross-entropy, backward and SGD with momentum. The networks are those of `networks`. All variants
start as copies of one network and run their steps in turn, round after round in one process, every other round in the
opposite order, so that other load on the machine affects all of them equally. Reported are medians, and the median of
the ratios to the plain network within a round. Before timing, the loss with ``PreciseBatchNorm2d`` is compared with
that of the plain network.

"norm layers" is the share of the plain step that torch's profiler attributes to batch_norm and its backward. Replacing
these layers cannot give a ratio below 1 − norm layers; lower ratios are noise. "saved" counts each storage once that
any operation of the step keeps for backward, without parameters and buffers.

On the CPU everything is measured in two processes, one with glibc's default setting and one in which it keeps its
pages; page faults per step are stored with the numbers. layers.py says why that matters.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile, record_function

from runningbn import batchnormify

from .networks import CLASSES, NETWORKS
from .results_file import ALLOCATOR, FOLDER, machine, store

PLAIN = "nn.BatchNorm2d"
VARIANTS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    PLAIN: lambda model, images: model,
    "precise": lambda model, images: batchnormify(model, "precise"),
    "running": lambda model, images: batchnormify(model, "running"),
    "running exact": lambda model, images: batchnormify(model, "running", gradient="exact"),
    "running, centred": lambda model, images: batchnormify(model, "running", center_weights=images),
}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
# Pages once taken from the operating system are kept, so that hardly any step faults.
KEPT_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4000000000"}

Case = dict[str, Any]


class Training:
    """A network with its optimizer, and the images it is trained on over and over."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, dtype: str) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        self.images, self.labels, self.dtype = images, labels, dtype

    def step(self) -> Tensor:
        """Forward, loss, backward with fresh gradients, and the optimizer; the loss, once all of it has been done."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            out = self.model(self.images)
            loss = F.cross_entropy(getattr(out, "logits", out), self.labels)
        loss.backward()
        self.optimizer.step()
        if self.images.is_cuda:
            torch.cuda.synchronize()
        return loss.detach()


@contextmanager
def storages_saved(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes by address of what is saved for backward within; parameters and buffers are there anyway."""
    saved: dict[int, int] = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in itertools.chain(model.parameters(), model.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the graph keeps it, so no address is used twice; the tensor itself would be a cycle

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def first_steps(trainings: dict[str, Training]) -> dict[str, int]:
    """One step of every variant: compare the losses, and count the bytes saved for backward."""
    losses, saved = {}, {}
    for name, training in trainings.items():
        torch.manual_seed(1)  # MobileNetV2 ends in a dropout
        with storages_saved(training.model) as storages:
            losses[name] = training.step().double()
        saved[name] = sum(storages.values())
    # Relative rounding errors of 1e-7 (TF32, in cuDNN's convolutions: 5e-4; bfloat16: 4e-3) grow from layer to layer.
    # The gradients of these networks at their start are so large that later losses tell nothing: there, float32 itself
    # is some percent away from float64.
    rough = trainings[PLAIN].dtype == "bfloat16" or trainings[PLAIN].images.is_cuda
    torch.testing.assert_close(losses["precise"], losses[PLAIN], rtol=3e-2 if rough else 3e-5, atol=0)
    return saved


def share_of_norm_layers(training: Training) -> float:
    """The part of a step that batch_norm and its backward take, by wall time on the CPU, by kernel time on a GPU."""
    on_gpu = training.images.is_cuda
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler, record_function("step"):
        training.step()
    events = profiler.key_averages()
    node = "autograd::engine::evaluate_function: "
    norms = [e for e in events if e.key == "aten::batch_norm" or (e.key.startswith(node) and "BatchNorm" in e.key)]
    if on_gpu:
        kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and e.key != "step"]
        return sum(e.device_time_total for e in norms) / sum(e.self_device_time_total for e in kernels)
    return sum(e.cpu_time_total for e in norms) / next(e.cpu_time_total for e in events if e.key == "step")


def measure(
    name: str, batch: int, size: int, layout: str, dtype: str, *, device: str = "cpu", seconds: float, rounds: int
) -> Case:
    """Time every variant of a network for some seconds, but for so many rounds at least."""
    torch.manual_seed(0)
    model = NETWORKS[name]().to(device, memory_format=LAYOUTS[layout])
    images = torch.randn(batch, 3, size, size).to(device, memory_format=LAYOUTS[layout])
    labels = torch.randint(CLASSES, (batch,)).to(device)
    copies = {variant: convert(copy.deepcopy(model), images) for variant, convert in VARIANTS.items()}
    trainings = {variant: Training(converted, images, labels, dtype) for variant, converted in copies.items()}
    saved = first_steps(trainings)
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    faults: dict[str, list[int]] = {variant: [] for variant in VARIANTS}
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(times[PLAIN]) < rounds:
        forth = len(times[PLAIN]) % 2 == 0
        for variant, training in list(trainings.items())[:: 1 if forth else -1]:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            begin = time.perf_counter()
            loss = training.step()
            times[variant].append(time.perf_counter() - begin)
            faults[variant].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
            assert loss.isfinite(), f"{name} with {variant} diverged; arithmetic on NaNs is not what is to be timed"
    ratios = {variant: [a / b for a, b in zip(times[variant], times[PLAIN], strict=True)] for variant in VARIANTS}
    return {
        "model": name,
        "batch": batch,
        "size": size,
        "layout": layout,
        "dtype": dtype,
        "device": torch.cuda.get_device_name() if images.is_cuda else device,
        "allocator": machine()["allocator"],
        "rounds": len(times[PLAIN]),
        "milliseconds": {variant: round(1e3 * statistics.median(times[variant]), 2) for variant in VARIANTS},
        # The median of the ratios within a round: a slow second of the machine hits both sides of it.
        "ratio": {variant: round(statistics.median(ratios[variant]), 3) for variant in VARIANTS},
        "ratio from and to": {v: [round(f(ratios[v]), 3) for f in (min, max)] for v in VARIANTS},
        "norm layers": round(share_of_norm_layers(trainings[PLAIN]), 3),
        "saved MB": {variant: round(count / 1e6, 2) for variant, count in saved.items()},
        "page faults": {variant: round(statistics.median(counts)) for variant, counts in faults.items()},
    }


def plan(quick: bool, device: str) -> list[Case]:
    """The arguments of `measure`, case by case."""
    names, size, batches, seconds = list(NETWORKS), 224, (1, 2, 8), 6.0
    in_bfloat16 = ("ResNet-18", 2)  # emulated, and slow, on processors without instructions for it
    if device == "cuda":
        batches, in_bfloat16 = (8, 64), ("ResNet-50", 64)  # fewer images only measure how fast kernels are launched
    if quick:
        names, size, batches, seconds = ["ResNet-18", "MobileNetV2"], 64, batches[:1], 0.0
    kinds = [(name, batch, layout, "float32") for name in names for batch in batches for layout in LAYOUTS]
    if not quick:
        kinds += [(*in_bfloat16, layout, "bfloat16") for layout in LAYOUTS]
    common = {"size": size, "device": device, "seconds": seconds, "rounds": 3}
    return [{"name": n, "batch": b, "layout": layout, "dtype": dtype, **common} for n, b, layout, dtype in kinds]


def in_another_process(arguments: list[str], allocator: dict[str, str]) -> list[Case]:
    """All cases, measured in a process with this setting of the allocator and no other."""
    environment = {name: value for name, value in os.environ.items() if name not in ALLOCATOR} | allocator
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cases.json"
        command = [sys.executable, "-m", "benchmarks.models", *arguments, "--cases-to", str(path)]
        subprocess.run(command, env=environment, check=True)
        cases: list[Case] = json.loads(path.read_text())
        return cases


def ours(cases: list[Case]) -> list[str]:
    """The variants beside the plain one."""
    return [variant for variant in cases[0]["ratio"] if variant != PLAIN]


def pages(case: Case) -> str:
    """The setting of the allocator in two words."""
    return "default" if case["allocator"] == "default" else "kept pages"


def table(cases: list[Case]) -> Table:
    """Ratios to the plain network; a loss is red."""
    shown = Table(title="Training step, time relative to the plain network (below 1 is faster)", title_justify="left")
    columns = ("model", "batch", "layout", "dtype", "allocator", "plain, ms", "norm layers", *ours(cases))
    for column in (*columns, "saved, MB", "page faults"):
        shown.add_column(column)
    for case in cases:
        cells = []
        for variant in ours(cases):
            ratio, (low, high) = case["ratio"][variant], case["ratio from and to"][variant]
            cells.append(f"[{'red' if ratio > 1 else 'green'}]{ratio:.2f}[/] ({low:.2f} to {high:.2f})")
        shown.add_row(
            case["model"], str(case["batch"]), case["layout"], case["dtype"], pages(case),
            f"{case['milliseconds'][PLAIN]:.0f}", f"{case['norm layers']:.0%}", *cells,
            " / ".join(f"{megabytes:.0f}" for megabytes in case["saved MB"].values()),
            " / ".join(str(count) for count in case["page faults"].values()),
        )  # fmt: skip
    return shown


def markdown_table(contents: dict[str, Any]) -> str:
    """The stored results as a table of GitHub's Markdown, and what they were measured on."""
    cases: list[Case] = contents["cases"]
    header = ["model", "batch", "layout", "dtype", "allocator", "plain, ms", "norm layers", *ours(cases)]
    header.append(f"saved, MB: {', '.join(['plain', *ours(cases)])}")
    rows = [
        [
            case["model"], str(case["batch"]), case["layout"], case["dtype"], pages(case),
            f"{case['milliseconds'][PLAIN]:.0f}", f"{case['norm layers']:.0%}",
            *[f"{case['ratio'][variant]:.2f}" for variant in ours(cases)],
            ", ".join(f"{megabytes:.0f}" for megabytes in case["saved MB"].values()),
        ]
        for case in cases
    ]  # fmt: skip
    lines = "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])
    where = contents["machine"]
    device = where["processor"] if cases[0]["device"] == "cpu" else cases[0]["device"]
    note = f"{device}, {where['threads']} threads, torch {where['torch']}, {where['date']}"
    settings = [case["allocator"] for case in cases if case["allocator"] != "default"]
    if settings:
        note += f"; kept pages: {' '.join(f'{name}={value}' for name, value in settings[0].items())}"
    return f"{lines}\n\n({note})"


def main() -> None:
    """Measure all cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two networks on images of 64x64, three rounds")
    parser.add_argument("--write", action="store_true", help="store the numbers in benchmarks/results")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases-to", type=Path, help=argparse.SUPPRESS)  # how a process hands its numbers over
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.cases_to:
        cases = [measure(**case) for case in plan(arguments.quick, arguments.device)]
        arguments.cases_to.write_text(json.dumps(cases))
        return
    passed_on = [f"--device={arguments.device}", f"--threads={arguments.threads}", *["--quick"] * arguments.quick]
    # Activations on a GPU do not come from glibc.
    settings: list[dict[str, str]] = [{}, KEPT_PAGES] if arguments.device == "cpu" else [{}]
    cases = [case for setting in settings for case in in_another_process(passed_on, setting)]
    Console().print(table(cases))
    if arguments.write:
        path = FOLDER / ("models.json" if arguments.device == "cpu" else "models_cuda.json")
        store(path, " ".join(["python -m benchmarks.models", *sys.argv[1:]]), cases)


if __name__ == "__main__":
    main()
