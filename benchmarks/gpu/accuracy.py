"""A short training on Fashion-MNIST on a GPU and on the CPU: both must reach the same accuracy, up to chance.

Run by ``python -m benchmarks.gpu``; see there. Without the files of Fashion-MNIST, nothing is trained and a row says
so. The network is small, so that the CPU takes seconds.
"""

from __future__ import annotations

import copy
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy import fashion
from runningbn import batchnormify

from .part import Work

STEPS, BATCH, RATE = 400, 8, 0.01
TESTED = 2000
# Between two trainings that only round differently, in points of accuracy: two standard deviations of a proportion of
# 0.8 among the tested images, of either.
TOLERANCE = 2 * 2**0.5 * (0.8 * 0.2 / TESTED) ** 0.5
TARGETS = ("torch", "precise", "running")


def network() -> nn.Module:
    """Three convolutions with BatchNorm, (N, 1, 28, 28) to (N, 10)."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, fashion.CLASSES))


def accuracy(model: nn.Module, device: str, images: Tensor, labels: Tensor, tests: tuple[Tensor, Tensor]) -> float:
    """After training on batches of consecutive images."""
    model = copy.deepcopy(model).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    for x, y in zip(images.to(device).split(BATCH), labels.to(device).split(BATCH), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        answers = model(tests[0].to(device)).argmax(1).cpu()
    return float((answers == tests[1]).double().mean())


def images_and_labels(kind: str, count: int) -> tuple[Tensor, Tensor]:
    """(E, 1, 28, 28) in [−1, 1], and (E,), int64; the first of a file."""
    where = fashion.folder()
    images = fashion.read_idx(fashion.find(fashion.IMAGES.format(kind=kind), where))[:count]
    labels = fashion.read_idx(fashion.find(fashion.LABELS.format(kind=kind), where))[:count]
    return images.unsqueeze(1).float() / 127.5 - 1, labels.long()


def measure(target: str, device: str, steps: int, tested: int) -> dict[str, Any]:
    """A row; AssertionError where the two devices have learned something else."""
    images, labels = images_and_labels("train", steps * BATCH)
    tests = images_and_labels("t10k", tested)
    model = batchnormify(network(), target) if target != "torch" else network()
    begin = time.perf_counter()
    # In TF32, which rounds to some 1e-3, the devices would soon train different networks, with any layer.
    with torch.backends.cudnn.flags(allow_tf32=False):
        found = {name: accuracy(model, name, images, labels, tests) for name in dict.fromkeys((device, "cpu"))}
    row = {"target": target, "steps": steps, "batch": BATCH, "accuracy": found}
    if abs(found[device] - found["cpu"]) > TOLERANCE:
        raise AssertionError(f"expected the same accuracy within {TOLERANCE:.3f}, got {row}")
    return {**row, "seconds": round(time.perf_counter() - begin, 1)}


def main() -> int:
    """Train where there are data; the exit status."""
    work = Work(__doc__)
    try:
        fashion.check()
    except FileNotFoundError as error:
        work.row({"not run": str(error)})
        return 0
    targets, steps, tested = (TARGETS[-1:], 1, 8) if work.dry_run else (TARGETS, STEPS, TESTED)
    return work.each(targets, lambda target: measure(target, work.device, steps, tested))


if __name__ == "__main__":
    sys.exit(main())
