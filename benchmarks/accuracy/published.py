"""Small versions of two published tables: they should show the same pattern; the numbers cannot be the same.

    python -m benchmarks.accuracy.published             measure and print
    python -m benchmarks.accuracy.published --write     also store the numbers in benchmarks/results

1. The notebook of the fastai course (part 2, 2019, 07_batchnorm): nn.BatchNorm and RunningBatchNorm on batches of 2.
2. Tables 1 and 2 of Wu and Johnson, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576: the running averages of
   nn.BatchNorm compared with statistics computed afterwards, by the number of samples and by the batch size used for
   computing them.

All numbers are means ± standard deviations over five seeds. It takes some minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from runningbn import update_bn_stats

from ..results_file import FOLDER, store
from .contenders import BATCH_NORM, CONTENDERS, OURS, OURS_CENTERED
from .networks import Site, build_stack, with_relu
from .results import SHUFFLED
from .tasks import SAMPLES, TASKS, schedule
from .train import RatedOptimizer, evaluate, train

RESULTS = FOLDER / "accuracy_published.json"
SEEDS = (0, 1, 2, 3, 4)

NOTEBOOK_RATES = (0.4, 0.1, 0.03)
NOTEBOOK = {BATCH_NORM: "0.2348", "exact, SquareRoot(0.1)": "0.9723", OURS: "–", OURS_CENTERED: "–"}


@dataclass(frozen=True)
class Trained:
    """What stands for a row of the paper's tables: SGD with batches of `batch`, for so many epochs."""

    label: str
    task: str
    batch: int
    epochs: int
    normalised: int  # samples that are normalised together


NUMBERS = (10, 100, SAMPLES)
TABLE_1 = {
    Trained("8192, epoch 30", "residual net", 128, 2, 128): ("52.8", "45.5", "40.1", "39.4"),
    Trained("256, epoch 100", "residual net", 32, 20, 32): ("23.7", "28.1", "24.0", "23.6"),
    Trained("8192, epoch 100", "residual net", 128, 20, 128): ("24.0", "29.0", "24.1", "23.8"),
}
SPLITS = (2, 10, 100, SAMPLES)
TABLE_2 = {
    Trained("normalised by 32", "fastai's net", 32, 5, 32): ("23.7", "28.8", "24.0", "23.5", "23.5"),
    Trained("normalised by 2", "fastai's net", 32, 5, 2): ("35.5", "34.4", "32.3", "32.0", "32.0"),
}
RATE = 0.03


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Normalises every few samples by themselves in training, as on several GPUs, the first of which keeps averages."""

    def __init__(self, channels: int, normalised: int) -> None:
        super().__init__(channels)
        self.normalised = normalised

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) in and out."""
        if not self.training:
            return super().forward(input)
        first, *others = input.split(self.normalised)
        outputs = [F.batch_norm(part, None, None, self.weight, self.bias, True, 0.0, self.eps) for part in others]
        return torch.cat([super().forward(first), *outputs])


def notebook() -> dict[str, Any]:
    """Accuracy after one epoch of plain SGD on batches of 2, at a constant rate."""
    task = TASKS["fastai's net"]
    data = task.data(SHUFFLED)
    batches = torch.stack([schedule(data.train.classes, 2, SHUFFLED, SAMPLES, seed) for seed in SEEDS], 1)
    rows = {}
    for name, theirs in NOTEBOOK.items():
        contender = CONTENDERS[name]
        stack = build_stack(task.network, contender.norm(len(batches)), SEEDS, len(NOTEBOOK_RATES))
        if contender.prepare is not None:
            contender.prepare(stack)
        rates = torch.tensor(NOTEBOOK_RATES).repeat_interleave(len(SEEDS))
        train(stack, RatedOptimizer("plain SGD", stack, rates), data.train, batches, len(NOTEBOOK_RATES), falling=False)
        accuracies, _ = evaluate(stack, task, data.test, len(rates))
        rows[name] = [theirs, *map(mean_and_std, torch.tensor(accuracies).view(-1, len(SEEDS)).tolist())]
    return {
        "title": "The fastai notebook: batches of 2",
        "about": "Accuracy after one epoch of plain SGD at a constant rate, with the notebook's network. There: MNIST, "
        "30 000 steps at 0.4. Here: 544 steps. exact, SquareRoot(0.1) is the notebook's layer.\n\n"
        "Alike: nn.BatchNorm learns next to nothing, the layers that normalise by running statistics do. Different: at "
        "0.4, everybody loses most of it in so few steps; the notebook's gap is at lower rates.",
        "columns": ["there, at 0.4", *(f"here, at {rate:g}" for rate in NOTEBOOK_RATES)],
        "rows": rows,
    }


def trained(how: Trained) -> nn.Module:
    """A stack with the statistics of nn.BatchNorm, one model for each seed."""

    def split(site: Site) -> nn.Module:
        return with_relu(SplitBatchNorm2d(site.models * site.channels, how.normalised), site)

    def plain(site: Site) -> nn.Module:
        return with_relu(nn.BatchNorm2d(site.models * site.channels), site)

    task = TASKS[how.task]
    part = task.data(SHUFFLED).train
    samples = how.epochs * SAMPLES
    batches = torch.stack([schedule(part.classes, how.batch, SHUFFLED, samples, seed) for seed in SEEDS], 1)
    stack = build_stack(task.network, split, SEEDS, 1)
    train(stack, RatedOptimizer("SGD", stack, torch.full((len(SEEDS),), RATE)), part, batches, 1)
    # As layers that update_bn_stats knows.
    averaged = build_stack(task.network, plain, SEEDS, 1)
    averaged.load_state_dict(stack.state_dict())
    return averaged


def errors(stack: nn.Module, how: Trained) -> str:
    """Share of wrong answers on the test images in percent."""
    task = TASKS[how.task]
    accuracies, _ = evaluate(stack, task, task.data(SHUFFLED).test, len(SEEDS))
    return mean_and_std([100 * (1 - accuracy) for accuracy in accuracies], digits=1)


def recalibrated(stack: nn.Module, how: Trained, number: int, batch: int) -> str:
    """Errors with statistics of so many training images, in batches of so many; the statistics are put back."""
    images = TASKS[how.task].data(SHUFFLED).train.inputs
    generator = torch.Generator().manual_seed(number)
    # Every model is shown images of its own.
    chosen = torch.stack([images[torch.randperm(len(images), generator=generator)[:number]] for _ in SEEDS], 1)
    with update_bn_stats(stack, chosen.flatten(1, 2).split(batch), num_iters=None):
        return errors(stack, how)


def by_number() -> dict[str, Any]:
    """Table 1."""
    rows = {}
    for how, theirs in TABLE_1.items():
        stack = trained(how)
        ours = [errors(stack, how), *(recalibrated(stack, how, number, min(number, 64)) for number in NUMBERS)]
        rows[f"batch {how.label}; here {how.batch}, epoch {how.epochs}"] = list(_beside(theirs, ours))
    return {
        "title": "Table 1 of “Rethinking ‘Batch’ in BatchNorm”: how many samples",
        "about": "Error in percent with nn.BatchNorm's running averages (EMA) and with precise statistics of N "
        "images, there / here. There: ResNet-50 on ImageNet, N of 10, 100, 1000. Here: the residual net, N of 10, 100, "
        f"{SAMPLES} (all), in batches of 64.\n\n"
        "Alike: ten images are too few and a hundred nearly enough; early in training with large batches EMA is far "
        "off, and any number of images is better. Different: where training is done, EMA is as good as all images, "
        "for nets that are wrong in one image of a hundred have little to gain.",
        "columns": ["EMA", *(f"N = {number}" for number in (10, 100, 1000))],
        "rows": rows,
    }


def by_batch() -> dict[str, Any]:
    """Table 2."""
    rows = {}
    for how, theirs in TABLE_2.items():
        stack = trained(how)
        ours = [errors(stack, how), *(recalibrated(stack, how, SAMPLES, batch) for batch in SPLITS)]
        rows[how.label] = list(_beside(theirs, ours))
    return {
        "title": "Table 2: in batches of how many",
        "about": "Error in percent with EMA and with precise statistics computed in batches of B, there / here. "
        "There: ResNet-50, N = 10 000, batches of 256 normalised so many samples at a time. Here: fastai's net after "
        f"5 epochs, N = {SAMPLES}, batches of 32.\n\n"
        "Alike: where two samples were normalised together, precise statistics gain on EMA. Different: statistics "
        "computed in batches of 2 are hardly worse than the others here, in a net of five layers.",
        "columns": ["EMA", *(f"B = {batch}" for batch in (2, 10, 100)), "B = 1000; here all"],
        "rows": rows,
    }


def _beside(theirs: Sequence[str], ours: Sequence[str]) -> Iterator[str]:
    for there, here in zip(theirs, ours, strict=True):
        yield f"{there} / {here}"


def mean_and_std(values: Sequence[float], digits: int = 3) -> str:
    """Over the seeds."""
    return f"{fmean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def shown(table: dict[str, Any]) -> Table:
    """For the terminal."""
    printed = Table(title=table["title"], title_justify="left")
    for column in ("", *table["columns"]):
        printed.add_column(column)
    for row, cells in table["rows"].items():
        printed.add_row(row, *cells)
    return printed


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.published")
    parser.add_argument("--write", action="store_true", help=f"store the numbers in {RESULTS.name}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tables = []
    for measure in (notebook, by_number, by_batch):
        tables.append(measure())
        Console().print(shown(tables[-1]))
    if arguments.write:
        store(RESULTS, "python -m benchmarks.accuracy.published --write", tables)


if __name__ == "__main__":
    main()
