"""The demo's experiment: small networks, four normalisations, three situations with tiny batches.

All contenders start from the same weights, get the same batches in the same order and use the same optimizer and
learning rate. The data are scikit-learn's handwritten digits, which are part of that package. `command` shows the
results.

Letters: N images, C channels, H = W = 8 the image size.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from runningbn import batchnormify

Norm = Callable[[int], nn.Module]  # C -> a layer that normalises C channels


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, H, W), standardised by the training images' mean and std, and labels (N,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Situation:
    """The batches and the training settings, the same for all contenders."""

    name: str
    network: str
    batch_size: int
    one_class: bool
    optimizer: str
    rate: float
    steps: int


@dataclass(frozen=True)
class Contender:
    """A normalisation: the layer that the model is built with, and a conversion of the built model."""

    name: str
    norm: Norm
    convert: Callable[[nn.Module], nn.Module] | None = None


@dataclass(frozen=True)
class Run:
    """The result of one run on the test images, in evaluation mode. The loss is not finite if training diverged."""

    situation: str
    contender: str
    seed: int
    accuracy: float
    loss: float


class ResidualBlock(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x))))))."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *conv_norm(channels, channels, 1, norm), nn.ReLU(), *conv_norm(channels, channels, 1, norm)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in and out."""
        return F.relu(x + self.body(x))


def conv_norm(channels_in: int, channels: int, stride: int, norm: Norm) -> tuple[nn.Module, nn.Module]:
    """A convolution and a normalisation of its output; without a bias, which the normalisation would cancel."""
    return nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False), norm(channels)


def classifier(channels: int) -> tuple[nn.Module, ...]:
    """Mean over the positions, then ten logits."""
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)


def residual_net(norm: Norm) -> nn.Module:
    """Five convolutions, four of them in residual blocks, with 4x4 feature maps: 16 elements per channel and image."""
    stem = (*conv_norm(1, 32, 2, norm), nn.ReLU())
    return nn.Sequential(*stem, ResidualBlock(32, norm), ResidualBlock(32, norm), *classifier(32))


def fastai_net(norm: Norm) -> nn.Module:
    """The five convolutions of fastai's BatchNorm lesson (2019), which end in 1x1 feature maps.

    There the images are 28x28, and every convolution halves the size; here they are 8x8, so two of the five keep it.
    """
    layers: list[nn.Module] = []
    channels_in = 1
    for channels, stride in zip((8, 16, 32, 64, 64), (1, 2, 1, 2, 2), strict=True):
        layers += [*conv_norm(channels_in, channels, stride, norm), nn.ReLU()]
        channels_in = channels
    return nn.Sequential(*layers, *classifier(channels_in))


def group_norm(channels: int) -> nn.Module:
    """GroupNorm with four channels per group, but at most eight groups."""
    return nn.GroupNorm(min(8, channels // 4), channels)


def batchnormify_and_center(model: nn.Module) -> nn.Module:
    """Convert to RunningBatchNorm, and centre the filters of the convolutions before it."""
    return batchnormify(model, center_weights=torch.zeros(1, 1, 8, 8))


NETWORKS = {"residual net": residual_net, "fastai's net": fastai_net}

OURS, OURS_CENTERED = "RunningBatchNorm", "+ centred weights"
CONTENDERS = (
    Contender("BatchNorm", nn.BatchNorm2d),
    Contender("GroupNorm", group_norm),
    Contender(OURS, nn.BatchNorm2d, convert=batchnormify),
    Contender(OURS_CENTERED, nn.BatchNorm2d, convert=batchnormify_and_center),
)

# AdamW uses torch's default rate, tuned for no contender. fastai's lesson uses plain SGD at 0.4; at that rate no
# contender learns these images in one epoch, 673 steps. Of 0.03, 0.1 and 0.2, nn.BatchNorm was best at the rate here.
SITUATIONS = (
    Situation("batches of 1", "residual net", 1, False, optimizer="AdamW", rate=1e-3, steps=1000),
    Situation("batches of 2 at a high rate", "fastai's net", 2, False, optimizer="SGD", rate=0.1, steps=673),
    Situation("batches of 4 of one class", "residual net", 4, True, optimizer="AdamW", rate=1e-3, steps=500),
)

TEST_IMAGES = 450  # a quarter
MAX_PROCESSES = 4  # each uses a few hundred MB, since it imports torch


def load_data() -> Digits:
    """1797 images of 8x8 pixels in 0..16, `TEST_IMAGES` of them for testing; always the same split."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=TEST_IMAGES, stratify=labels, random_state=0)
    train_images, test_images = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) for part in parts[:2])
    train_labels, test_labels = (torch.tensor(part, dtype=torch.int64) for part in parts[2:])
    mean, std = train_images.mean(), train_images.std()
    return Digits((train_images - mean) / std, train_labels, (test_images - mean) / std, test_labels)


def build_model(situation: Situation, contender: Contender, seed: int) -> nn.Module:
    """The contender's model with the initial weights of this seed, the same for all; torch's global RNG is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = NETWORKS[situation.network](contender.norm)
    return contender.convert(model) if contender.convert else model


def build_optimizer(situation: Situation, model: nn.Module) -> torch.optim.Optimizer:
    """The situation's optimizer, with its default weight decay and momentum."""
    if situation.optimizer == "AdamW":
        return torch.optim.AdamW(model.parameters(), situation.rate, fused=True)
    return torch.optim.SGD(model.parameters(), situation.rate, fused=True)


def one_epoch(labels: Tensor, situation: Situation, generator: torch.Generator) -> Sequence[Tensor]:
    """Indices of every full batch of one epoch, shuffled; an incomplete last batch is dropped."""

    def split(indices: Tensor) -> list[Tensor]:
        shuffled = indices[torch.randperm(len(indices), generator=generator)]
        return [batch for batch in shuffled.split(situation.batch_size) if len(batch) == situation.batch_size]

    if not situation.one_class:
        return split(torch.arange(len(labels)))
    batches = [batch for digit in range(10) for batch in split((labels == digit).nonzero().flatten())]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


def schedule(labels: Tensor, situation: Situation, seed: int) -> list[Tensor]:
    """The batches of a run: the same for every contender with this seed."""
    generator = torch.Generator().manual_seed(seed)
    batches: list[Tensor] = []
    while len(batches) < situation.steps:
        batches += one_epoch(labels, situation, generator)
    return batches[: situation.steps]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Digits, batches: Sequence[Tensor]) -> None:
    """One step per batch."""
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(data.train_images[batch]), data.train_labels[batch]).backward()
        optimizer.step()


@torch.no_grad()
def evaluate(model: nn.Module, data: Digits) -> tuple[float, float]:
    """Accuracy and mean loss on the test images. A model whose outputs are NaN predicts class 0."""
    model.eval()
    logits = model(data.test_images)
    accuracy = (logits.argmax(1) == data.test_labels).double().mean().item()
    return accuracy, F.cross_entropy(logits, data.test_labels).item()


@contextmanager
def settings_for_tiny_tensors() -> Iterator[None]:
    """One thread and no oneDNN, about twice as fast on images of 8x8; both settings are restored afterwards."""
    threads, onednn = torch.get_num_threads(), torch.backends.mkldnn.enabled
    torch.set_num_threads(1)
    torch.backends.mkldnn.set_flags(_enabled=False)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.mkldnn.set_flags(_enabled=bool(onednn))


def run_one(situation: Situation, contender: Contender, seed: int) -> Run:
    """Train and evaluate one model. The same arguments give the same numbers, in any process."""
    data = load_data()
    with settings_for_tiny_tensors():
        model = build_model(situation, contender, seed)
        train(model, build_optimizer(situation, model), data, schedule(data.train_labels, situation, seed))
        return Run(situation.name, contender.name, seed, *evaluate(model, data))


def run_experiment(
    situations: Sequence[Situation], seeds: Sequence[int], on_run: Callable[[Run], None] = lambda run: None
) -> list[Run]:
    """Every contender with every seed in every situation; ``on_run`` is called after each run.

    The runs are independent, so they use one process per core: the models are too small to gain from several threads.
    """
    jobs = [(situation, contender, seed) for situation in situations for seed in seeds for contender in CONTENDERS]
    runs = []
    with multiprocessing.get_context("spawn").Pool(min(len(jobs), MAX_PROCESSES, _cores()), _leave_interrupts) as pool:
        for run in pool.imap(_run_job, jobs):
            on_run(run)
            runs.append(run)
    return runs


def _run_job(job: tuple[Situation, Contender, int]) -> Run:
    return run_one(*job)


def _leave_interrupts() -> None:
    """Ignore SIGINT in a worker. Ctrl-C is sent to all processes of a terminal; the parent ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
