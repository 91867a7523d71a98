"""Shared by the examples: handwritten digits, a small network with BatchNorm, training, and a table.

scikit-learn includes the digits: 1797 images of 8x8 pixels, of which 1347 are for training and 450 for testing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, stdev

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from runningbn.demo.experiment import Digits, load_data, residual_net

Results = dict[str, dict[str, list[float]]]  # row of the table -> column -> one share per seed


def network(seed: int) -> nn.Module:
    """Five convolutions, each with a BatchNorm, and ten logits; the seed determines the weights."""
    torch.manual_seed(seed)
    return residual_net(nn.BatchNorm2d)


def batches(data: Digits, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled images and labels; an incomplete last batch is dropped."""
    for indices in torch.randperm(len(data.train_labels)).split(size):
        if len(indices) == size:
            yield data.train_images[indices], data.train_labels[indices]


def train_epoch(model: nn.Module, data: Digits, optimizer: torch.optim.Optimizer, size: int = 64) -> None:
    """One epoch as usual."""
    model.train()
    for images, labels in batches(data, size):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


def trained(data: Digits, seed: int, epochs: int) -> nn.Module:
    """A network trained by AdamW for the given number of epochs."""
    model = network(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    for _ in range(epochs):
        train_epoch(model, data, optimizer)
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that are classified correctly, in evaluation mode."""
    return (model.eval()(images).argmax(1) == labels).double().mean().item()


def summary(title: str, results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table: mean ± standard deviation over the seeds, in per cent."""
    columns = list(next(iter(results.values())))
    rows = [[row, *(percent(entries[column]) for column in columns)] for row, entries in results.items()]
    return [f"{title} in %", *columns], rows


def percent(values: list[float]) -> str:
    """Mean ± standard deviation."""
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.1f}{spread}"


def run_example(
    name: str, title: str, one_seed: Callable[[Digits, int, bool], dict[str, dict[str, float]]], seeds: int
) -> None:
    """Run an example with every seed, print its table and, if asked, store its numbers.

    Args:
        name: of the example, and its key in the file of ``--json``.
        title: says what the rows are.
        one_seed: ``one_seed(data, seed, quick)`` gives numbers by row and column.
        seeds: how many; with ``--quick``, one.
    """
    parser = argparse.ArgumentParser(description=f"The example {name} on scikit-learn's digits.")
    parser.add_argument("--quick", action="store_true", help="one seed and fewer epochs")
    parser.add_argument("--json", type=Path, metavar="PATH", help="add the numbers to this file")
    arguments = parser.parse_args()
    data, seeds = load_data(), 1 if arguments.quick else seeds
    results: Results = {}
    torch.set_num_threads(1)  # more hardly help on images of 8x8, and would add up in another order
    for seed in range(seeds):
        for row, entries in one_seed(data, seed, arguments.quick).items():
            for column, value in entries.items():
                results.setdefault(row, {}).setdefault(column, []).append(value)
    header, rows = summary(title, results)
    heading = f"{len(data.test_labels)} test images, mean ± standard deviation over {seeds} seed{'s' * (seeds > 1)}"
    table = Table(title=heading, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for place, column in enumerate(header):
        table.add_column(column, justify="left" if place == 0 else "right", no_wrap=place == 0)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if arguments.json:
        contents = json.loads(arguments.json.read_text(encoding="utf-8")) if arguments.json.exists() else {}
        contents[name] = {"title": title, "seeds": seeds, "torch": torch.__version__, "results": results}
        arguments.json.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
