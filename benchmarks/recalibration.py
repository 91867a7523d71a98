"""The time of update_bn_stats on real networks, compared with fvcore's, torch's, and the forward passes alone.

    python -m benchmarks.recalibration            all cases, about three minutes on two cores
    python -m benchmarks.recalibration --quick    ResNet-18 on small images
    python -m benchmarks.recalibration --write    also store the numbers in benchmarks/results

All contenders get the same weights and the same batches, in the same process, one after the other in every round.
Before timing, the statistics of the first layer are checked against float64.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from fvcore.nn.precise_bn import update_bn_stats as fvcore_update_bn_stats
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from transformers import ResNetConfig, ResNetForImageClassification

import runningbn

from .results_file import FOLDER, store

RESULTS = FOLDER / "recalibration.json"
RESNETS = {
    "ResNet-18": ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic"
    ),
    "ResNet-50": ResNetConfig(),
}
BARE = "forward passes alone"


class Case(NamedTuple):
    """A network, the size of its images, how many of them are in a batch, and how many batches there are.

    A call takes some time beside that of its batches, which only few and small ones show.
    """

    model: str
    size: int
    batch: int
    batches: int = 2


CASES = [
    Case("ResNet-18", 224, 16),
    Case("ResNet-50", 224, 8),
    Case("ResNet-50", 224, 2),
    Case("ResNet-50", 224, 2, batches=20),
]
QUICK = [Case("ResNet-18", 64, 16)]


def forward_passes(model: nn.Module, batches: list[Tensor]) -> None:
    """What none of the others can do without: one training-mode forward per batch, without gradients."""
    model.train()
    with torch.no_grad():
        for batch in batches:
            model(batch)


def by_runningbn(model: nn.Module, batches: list[Tensor]) -> None:
    """Ours."""
    runningbn.update_bn_stats(model, batches)


def by_fvcore(model: nn.Module, batches: list[Tensor]) -> None:
    """fvcore's wants the training mode set and the number of batches exactly."""
    model.train()
    fvcore_update_bn_stats(model, batches, len(batches))


def by_torch(model: nn.Module, batches: list[Tensor]) -> None:
    """torch's, which averages the variances within batches."""
    update_bn(batches, model)


SYSTEMS: dict[str, Callable[[nn.Module, list[Tensor]], None]] = {
    BARE: forward_passes,
    "runningbn": by_runningbn,
    "fvcore": by_fvcore,
    "swa_utils.update_bn": by_torch,
}


def check(model: nn.Module, batches: list[Tensor]) -> None:
    """The first layer's statistics must be those of its input, in float64."""
    seen: list[Tensor] = []
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double().transpose(0, 1).flatten(1)))
    with runningbn.update_bn_stats(model, batches, layers=[name]):
        elements = torch.cat(seen, 1)
        torch.testing.assert_close(layer.running_mean.double(), elements.mean(1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.running_var.double(), elements.var(1), rtol=1e-4, atol=0)
    hook.remove()


def measure(case: Case, layout: str, rounds: int) -> dict[str, object]:
    """Median seconds per call, and the median of its ratio to the bare forward passes of the same round."""
    torch.manual_seed(0)
    model = ResNetForImageClassification(RESNETS[case.model])
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    model = model.to(memory_format=memory_format)
    shape = case.batch, 3, case.size, case.size
    batches = [torch.randn(shape).to(memory_format=memory_format) for _ in range(case.batches)]
    check(model, batches)
    models = {system: copy.deepcopy(model) for system in SYSTEMS}
    times: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    for number in range(rounds + 1):
        for system, update in SYSTEMS.items():
            begin = time.perf_counter()
            update(models[system], batches)
            if number > 0:  # the first round warms up
                times[system].append(time.perf_counter() - begin)
    return {
        "model": case.model,
        "images": " x ".join(map(str, (case.batches, *shape))),
        "layout": layout,
        "rounds": rounds,
        "seconds": {system: round(statistics.median(taken), 3) for system, taken in times.items()},
        "ratio": {
            system: round(statistics.median(a / b for a, b in zip(taken, times[BARE], strict=True)), 3)
            for system, taken in times.items()
        },
    }


def table(rows: list[dict[str, object]]) -> Table:
    """Ratios to the forward passes alone."""
    shown = Table(title="Time relative to the training-mode forward passes alone", title_justify="left")
    for column in ("model", "images", "layout", f"{BARE}, s", *list(SYSTEMS)[1:]):
        shown.add_column(column)
    for row in rows:
        seconds, ratio = row["seconds"], row["ratio"]
        assert isinstance(seconds, dict)
        assert isinstance(ratio, dict)
        cells = [f"{ratio[system]:.2f}" for system in list(SYSTEMS)[1:]]
        shown.add_row(str(row["model"]), str(row["images"]), str(row["layout"]), str(seconds[BARE]), *cells)
    return shown


def main() -> None:
    """Measure all cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ResNet-18 on images of 64x64, three rounds")
    parser.add_argument("--write", action="store_true", help=f"store the numbers in {RESULTS.name}")
    arguments = parser.parse_args()
    cases, rounds = (QUICK, 3) if arguments.quick else (CASES, 6)
    rows = [measure(case, layout, rounds) for case in cases for layout in ("NCHW", "channels_last")]
    Console().print(table(rows))
    if arguments.write:
        store(RESULTS, "python -m benchmarks.recalibration --write", rows)


if __name__ == "__main__":
    main()
