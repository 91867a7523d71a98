"""Whole training steps of networks on a GPU, before and after `batchnormify`, in eager mode and as CUDA graphs.

Run by ``python -m benchmarks.gpu``; see there. A step is forward, loss, backward and SGD with momentum. All variants
start as copies of one network and run their steps in turn, round after round. Times are by the host's clock, from the
first operation until the device has finished. The times until all operations are launched are reported, too. Weights
and images are random. Dropout and stochastic depth are as defined by the networks.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runningbn import batchnormify

from .launches import kernels_of
from .networks import NETWORKS, SMALL
from .part import Work

PLAIN = "nn.BatchNorm2d"
VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    PLAIN: lambda model: model,
    "precise": lambda model: batchnormify(model, "precise"),
    "running": lambda model: batchnormify(model, "running"),
}
ROUNDS, SECONDS = 10, 2.0
# TF32 and bfloat16 round to some 1e-3, which deep networks make more of.
TOLERANCE = 5e-2


class Case(NamedTuple):
    """One network, at one batch size, run in one way ("eager", "graph" or "compiled")."""

    model: str
    batch: int
    way: str
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch}, {self.way}, {self.dtype}"


def cases(dry_run: bool) -> list[Case]:
    """The smallest batches of the first network come first: what is small shows launches and Python."""
    if dry_run:
        return [Case(name, 2, "eager") for name in SMALL]
    first, *others = NETWORKS
    found = [Case(first, batch, way) for batch in (1, 2, 8, 32) for way in ("eager", "graph")]
    found += [Case(first, batch, way, "bfloat16") for batch in (2, 32) for way in ("eager", "graph")]
    return found + [Case(name, batch, way) for batch in (2, 32, 1, 8) for name in others for way in ("eager", "graph")]


class Training:
    """A network with its optimizer, and the images that it is trained on over and over.

    The layout is channels_last with bfloat16, as it is fast, and NCHW with float32.
    """

    def __init__(self, model: nn.Module, images: Tensor, dtype: str) -> None:
        self.model, self.images, self.dtype = model.train(), images, dtype
        self.call: Callable[[Tensor], Tensor] = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step(self) -> Tensor:
        """The loss; nothing waits for the device."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            logits = self.call(self.images)
        # The first class everywhere: labels on the host would have to be sent.
        loss = -F.log_softmax(logits.float(), 1)[:, 0].mean()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def trainings(case: Case, device: str) -> dict[str, Training]:
    """By variant."""
    make, side = (NETWORKS | SMALL)[case.model]
    torch.manual_seed(0)
    layout = torch.channels_last if case.dtype == "bfloat16" else torch.contiguous_format
    model = make().to(device, memory_format=layout)
    images = torch.randn(case.batch, 3, side, side).to(device, memory_format=layout)
    return {name: Training(change(copy.deepcopy(model)), images, case.dtype) for name, change in VARIANTS.items()}


def captured(training: Training) -> Callable[[], object]:
    """A step as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            training.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        training.step()
    return graph.replay


def measure(case: Case, device: str, seconds: float = SECONDS) -> dict[str, Any]:
    """A row of the results."""
    variants = trainings(case, device)
    losses = {}
    for name, training in variants.items():
        torch.manual_seed(1)  # dropout
        losses[name] = float(training.step())
    close = abs(losses["precise"] - losses[PLAIN]) <= TOLERANCE * abs(losses[PLAIN])
    if not close and case.batch > 1:  # at batch 1 some layers of the last stages have one element each
        raise AssertionError(f"the first loss: {losses}")
    steps: dict[str, Callable[[], object]] = {
        name: captured(training) if case.way == "graph" else training.step for name, training in variants.items()
    }
    return {**case._asdict(), "first losses": losses, **timed(steps, device, seconds)}


def timed(steps: dict[str, Callable[[], object]], device: str, seconds: float) -> dict[str, Any]:
    """Milliseconds of steps that take turns, all relative to the first, and their launches."""
    whole: dict[str, list[float]] = {name: [] for name in steps}
    sent: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    started = time.perf_counter()
    rounds = ROUNDS if device == "cuda" else 1
    while len(whole[next(iter(steps))]) < rounds or (device == "cuda" and time.perf_counter() - started < seconds):
        forth = len(whole[next(iter(steps))]) % 2 == 0
        for name, step in list(steps.items())[:: 1 if forth else -1]:
            synchronize(device)
            begin = time.perf_counter()
            step()
            sent[name].append(time.perf_counter() - begin)
            synchronize(device)
            whole[name].append(time.perf_counter() - begin)
    first = whole[next(iter(steps))]
    return {
        "rounds": len(first),
        "milliseconds": {name: _milliseconds(found) for name, found in whole.items()},
        "host milliseconds": {name: _milliseconds(found) for name, found in sent.items()},
        "ratio": {
            name: round(statistics.median(a / b for a, b in zip(found, first, strict=True)), 3)
            for name, found in whole.items()
        },
        "launches": {name: len(kernels_of(step)) for name, step in steps.items()},
    }


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def _milliseconds(seconds: list[float]) -> float:
    return round(1e3 * statistics.median(seconds), 3)


def main() -> int:
    """Measure what there is time for; the exit status."""
    work = Work(__doc__)

    def fresh(case: Case) -> dict[str, Any]:
        try:
            return measure(case, work.device)
        finally:
            if work.device == "cuda":
                torch.cuda.empty_cache()

    return work.each(cases(work.dry_run), fresh)


if __name__ == "__main__":
    sys.exit(main())
