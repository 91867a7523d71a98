"""Methods of finding statistics that are exact for evaluation, measured.

    python -m benchmarks.population [--quick] [--write]

The model is an untrained net of 20 layers, so that differences between batch and population statistics grow from layer
to layer; the recalibration batches have 32 images. The input of a layer in evaluation depends on the statistics of all
layers before it, so one pass in which every batch normalises itself is not exact. The methods:

    by batches          one pass in which every batch normalises itself: what normalize="batch" does; not exact
    sweep until still   all layers evaluate by the statistics of the previous pass, until these stop changing
    sliding sums        the same, but each batch replaces its own part of the sums immediately
    layer by layer      each pass determines the first layer that is not determined yet; whole passes
    up to each layer    the same, but each pass ends at the layer that it determines: what normalize="population" does
                        where the next is not possible
    joined              all batches joined into one, in which each layer normalises by the moments of its input, and a
                        pass over the batches to test the result: what normalize="population" does
    lock-step           one thread per batch; at each layer all wait for all, and continue by the pooled statistics
    one batch           everything in a single batch

Each runs in a separate process, on one thread. Reported: passes over the data (a partial pass counts as the share of
the layers that it runs), seconds of processor time, the additional memory that the process needed, and the largest
distance of a stored statistic from the moments in evaluation (mean in std, variance relative).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import runningbn

from .results_file import FOLDER, store

RESULTS = FOLDER / "population.json"
DEPTH, CHANNELS, BATCH = 20, 16, 32
BATCHES, QUICK_BATCHES = 32, 8
STILL = 1e-5
MOST_SWEEPS = 2 * DEPTH

Statistics = dict[int, tuple[Tensor, Tensor]]  # mean and variance by layer


def network() -> nn.Sequential:
    """DEPTH times convolution, batch norm and ReLU."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(DEPTH):
        layers += [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU()]
    return nn.Sequential(*layers).eval()


def data(batches: int) -> list[Tensor]:
    """Images of 16x16 whose brightness and contrast differ from batch to batch."""
    generator = torch.Generator().manual_seed(1)
    scale = 0.5 + torch.rand(batches, 1, 1, 1, 1, generator=generator)
    images = torch.randn(batches, BATCH, CHANNELS, 16, 16, generator=generator)
    return list(images * scale + scale)


def norms(net: nn.Sequential) -> list[nn.BatchNorm2d]:
    """The batch norms in order."""
    return [layer for layer in net if isinstance(layer, nn.BatchNorm2d)]


def sums(x: Tensor) -> Tensor:
    """(3, C), float64: elements, their sum, the sum of their squares."""
    wide = x.double().transpose(0, 1).flatten(1)
    return torch.stack((torch.full((len(wide),), wide.shape[1], dtype=wide.dtype), wide.sum(1), wide.square().sum(1)))


def moments(totals: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance."""
    mean = totals[1] / totals[0]
    return mean, (totals[2] / totals[0] - mean.square()).clamp_min(0) * totals[0] / (totals[0] - 1)


def normalized(layer: nn.BatchNorm2d, x: Tensor, statistics: tuple[Tensor, Tensor] | None) -> Tensor:
    """By the statistics given, or by the batch."""
    mean, var = (None, None) if statistics is None else (t.float() for t in statistics)
    return nn.functional.batch_norm(x, mean, var, layer.weight, layer.bias, statistics is None, 0.0, layer.eps)


def run(net: nn.Sequential, x: Tensor, by: Statistics, last: int = DEPTH) -> list[Tensor]:
    """The sums of the inputs of the batch norms, up to the one numbered `last`."""
    seen: list[Tensor] = []
    for layer in net:
        if isinstance(layer, nn.BatchNorm2d):
            seen.append(sums(x))
            if len(seen) > last:
                return seen
            x = normalized(layer, x, by.get(len(seen) - 1))
        else:
            x = layer(x)
    return seen


def sweep(net: nn.Sequential, batches: list[Tensor], by: Statistics) -> list[list[Tensor]]:
    """One pass."""
    return [run(net, x, by) for x in batches]


def pooled(parts: list[list[Tensor]]) -> Statistics:
    """Statistics of every layer."""
    return {number: moments(torch.stack(part).sum(0)) for number, part in enumerate(zip(*parts, strict=True))}


def distance(some: Statistics, others: Statistics) -> float:
    """The largest: of means in std, of variances relative."""
    worst = 0.0
    for number, (mean, var) in others.items():
        by_mean = (some[number][0] - mean).abs() / var.sqrt()
        by_var = (some[number][1] - var).abs() / var
        worst = max(worst, float(torch.maximum(by_mean, by_var).nan_to_num(float("inf")).max()))
    return worst


def write(net: nn.Sequential, statistics: Statistics) -> None:
    """Into the buffers."""
    for number, layer in enumerate(norms(net)):
        layer.running_mean.copy_(statistics[number][0])
        layer.running_var.copy_(statistics[number][1])


def by_batches(net: nn.Sequential, batches: list[Tensor]) -> float:
    """What normalize="batch" does."""
    return float(runningbn.update_bn_stats(net, batches, None).passes)


def until_still(net: nn.Sequential, batches: list[Tensor]) -> float:
    """Sweeps until nothing moves."""
    before: Statistics = {}
    statistics, passes = pooled(sweep(net, batches, {})), 1
    while passes < MOST_SWEEPS and (not before or distance(before, statistics) > STILL):
        before, statistics = statistics, pooled(sweep(net, batches, statistics))
        passes += 1
    write(net, statistics)
    return float(passes)


def sliding(net: nn.Sequential, batches: list[Tensor]) -> float:
    """Every batch replaces its part of the sums as soon as it has passed."""
    before: Statistics = {}
    parts, passes = sweep(net, batches, {}), 1
    while passes < MOST_SWEEPS and (not before or distance(before, pooled(parts)) > STILL):
        before = pooled(parts)
        totals = [torch.stack(part).sum(0) for part in zip(*parts, strict=True)]
        for place, x in enumerate(batches):
            new = run(net, x, {number: moments(total) for number, total in enumerate(totals)})
            totals = [total + b - a for total, a, b in zip(totals, parts[place], new, strict=True)]
            parts[place] = new
        passes += 1
    write(net, pooled(parts))
    return float(passes)


def layer_by_layer(net: nn.Sequential, batches: list[Tensor]) -> float:
    """Whole sweeps."""
    fixed: Statistics = {}
    for number in range(DEPTH):
        fixed[number] = pooled(sweep(net, batches, fixed))[number]
    write(net, fixed)
    return float(DEPTH)


def up_to_each(net: nn.Sequential, batches: list[Tensor]) -> float:
    """A whole pass first and last, and one up to each layer but the first."""
    report = runningbn.update_bn_stats(net, batches, None, normalize="population", memory_limit=0)
    return 2 + (report.passes - 2) * (DEPTH + 1) / (2 * DEPTH)


def all_joined(net: nn.Sequential, batches: list[Tensor]) -> float:
    """One forward of all batches joined, and one of each."""
    return float(runningbn.update_bn_stats(net, batches, None, normalize="population").passes)


def lock_step(net: nn.Sequential, batches: list[Tensor]) -> float:
    """One thread per batch; the last to arrive at a layer pools."""
    parts: list[Tensor] = [torch.empty(0)] * len(batches)
    found: Statistics = {}

    def pool() -> None:
        found[len(found)] = moments(torch.stack(parts).sum(0))

    meeting = threading.Barrier(len(batches), action=pool)

    @torch.no_grad()
    def go(place: int) -> None:
        x, number = batches[place], 0
        for layer in net:
            if isinstance(layer, nn.BatchNorm2d):
                parts[place] = sums(x)
                meeting.wait()
                x, number = normalized(layer, x, found[number]), number + 1
            else:
                x = layer(x)

    threads = [threading.Thread(target=go, args=(place,)) for place in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    write(net, found)
    return 1.0


def one_batch(net: nn.Sequential, batches: list[Tensor]) -> float:
    """All the data at once."""
    return float(runningbn.update_bn_stats(net, [torch.cat(batches)]).passes)


CANDIDATES: dict[str, Callable[[nn.Sequential, list[Tensor]], float]] = {
    "by batches": by_batches,
    "sweep until still": until_still,
    "sliding sums": sliding,
    "layer by layer": layer_by_layer,
    "up to each layer": up_to_each,
    "joined": all_joined,
    "lock-step": lock_step,
    "one batch": one_batch,
}


@torch.no_grad()
def measure(candidate: str, batches: int) -> dict[str, object]:
    """In this process, which should do nothing else."""
    torch.set_num_threads(1)
    net, images = network(), data(batches)
    run(net, images[0], {})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.process_time()
    passes = CANDIDATES[candidate](net, images)
    seconds = time.process_time() - begin
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    stored = {
        number: (layer.running_mean.double(), layer.running_var.double()) for number, layer in enumerate(norms(net))
    }
    return {
        "candidate": candidate,
        "passes": round(passes, 1),
        "seconds": round(seconds, 2),
        "MB": round(memory / 1024, 1),
        "error": distance(stored, pooled(sweep(net, images, stored))),
    }


def table(rows: list[dict[str, object]]) -> Table:
    """All candidates."""
    shown = Table(title=f"{DEPTH} layers, batches of {BATCH}", title_justify="left")
    for column in ("", "passes", "seconds", "memory, MB", "off by"):
        shown.add_column(column)
    for row in rows:
        cells = (row["candidate"], row["passes"], row["seconds"], row["MB"], f"{row['error']:.1e}")
        shown.add_row(*(str(cell) for cell in cells))
    return shown


def main() -> None:
    """Measure all candidates and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_BATCHES} batches instead of {BATCHES}")
    parser.add_argument("--write", action="store_true", help=f"store the numbers in {RESULTS.name}")
    parser.add_argument("--candidate", choices=CANDIDATES, help="only this one, in this process, as JSON")
    arguments = parser.parse_args()
    batches = QUICK_BATCHES if arguments.quick else BATCHES
    if arguments.candidate:
        print(json.dumps(measure(arguments.candidate, batches)))
        return
    command = [sys.executable, "-m", "benchmarks.population", *(["--quick"] if arguments.quick else []), "--candidate"]
    rows = []
    for candidate in CANDIDATES:
        done = subprocess.run([*command, candidate], stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout))
    Console().print(table(rows))
    if arguments.write:
        store(RESULTS, "python -m benchmarks.population --write", rows)


if __name__ == "__main__":
    main()
