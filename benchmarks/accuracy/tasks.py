"""The tasks: data in three parts (training, validation, test), and how an output is scored.

All tasks use scikit-learn's handwritten digits, 1797 images of 8x8 pixels. The learning rate is chosen on the
validation part; the tables show the test part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F

from . import networks
from .networks import Network
from .results import DIGITS_SAMPLES, ONE_CLASS, STREAM, VIEWS

SAMPLES = DIGITS_SAMPLES  # the training images once, 34 batches of 32
VALIDATION, TEST = 259, 450
CANVASES = 160
BACKGROUND = 10  # the class of pixels without ink
RUN = 200, 300  # how long a stream stays with a class: from, to


class Part(NamedTuple):
    """Inputs (E, C, *), what to answer, (E,) or (E, H, W), and the class that batches of one class go by, (E,)."""

    inputs: Tensor
    labels: Tensor
    classes: Tensor


class Data(NamedTuple):
    """Standardised by mean and std of the training part."""

    train: Part
    validation: Part
    test: Part


@dataclass(frozen=True)
class Task:
    """A network, its data, and a score in [0, 1] of answers (E, M, *) to labels (E, *), (M,).

    The data depend on what batches are: see `SHUFFLED` and the others. `pretrained` says that runs begin with a net of
    nn.BatchNorm2d that knows other classes.
    """

    name: str
    network: Network
    data: Callable[[str], Data]
    score: Callable[[Tensor, Tensor], Tensor]
    measure: str
    pretrained: bool = False


class Layout(NamedTuple):
    """A square canvas with a square image in each quarter. Pixels are of the image where they exceed `ink`.

    That is in units of the images, above their darkest.
    """

    canvas: int
    image: int
    ink: float


@cache
def digits() -> Data:
    """Images (E, 1, 8, 8) and digits; always the same split."""
    images, labels = load_digits(return_X_y=True)
    rest, test, rest_labels, test_labels = train_test_split(
        images, labels, test_size=TEST, stratify=labels, random_state=0
    )
    train, validation, train_labels, validation_labels = train_test_split(
        rest, rest_labels, test_size=VALIDATION, stratify=rest_labels, random_state=0
    )
    parts = ((train, train_labels), (validation, validation_labels), (test, test_labels))
    return standardised(*(_part(images, labels) for images, labels in parts))


def _part(images: object, labels: object) -> Part:
    numbers = torch.as_tensor(labels, dtype=torch.int64)
    return Part(torch.as_tensor(images, dtype=torch.float32).view(-1, 1, 8, 8), numbers, numbers)


def standardised(*parts: Part) -> Data:
    """Inputs less the mean of the first part, over its std."""
    mean, std = parts[0].inputs.mean(), parts[0].inputs.std()
    return Data(*(part._replace(inputs=(part.inputs - mean) / std) for part in parts))


def images(batches: str) -> Data:
    """(E, 1, 8, 8)."""
    return digits()


def larger_images(batches: str) -> Data:
    """Enlarged threefold, (E, 1, 24, 24): a batch has nine times the elements, and says no more."""
    enlarge = partial(F.interpolate, scale_factor=3, mode="bilinear")
    return Data(*(part._replace(inputs=enlarge(part.inputs)) for part in digits()))


def vectors(batches: str) -> Data:
    """The pixels as 64 channels of one position, (E, 64, 1)."""
    return Data(*(part._replace(inputs=part.inputs.view(-1, 64, 1)) for part in digits()))


def sequences(batches: str) -> Data:
    """The pixels, row after row, as a sequence, (E, 1, 64)."""
    return Data(*(part._replace(inputs=part.inputs.view(-1, 1, 64)) for part in digits()))


@cache
def canvases(batches: str) -> Data:
    """Four digits on a canvas, (E, 1, 24, 24); what to answer for a pixel is its digit, or `BACKGROUND`.

    Where batches are of one class, so are the digits of a training canvas; those to validate and test on are mixed.
    """
    wanted = (SAMPLES, CANVASES, CANVASES)
    return composed(digits(), wanted, batches == ONE_CLASS, Layout(canvas=24, image=8, ink=0))


def composed(plain: Data, wanted: Sequence[int], alike: bool, layout: Layout) -> Data:
    """So many canvases of each part, always the same ones; those of the training part of one class if `alike`."""
    generator = torch.Generator().manual_seed(0)
    of_one_class = (alike, False, False)
    return standardised(*map(_compose, plain, wanted, of_one_class, [generator] * 3, [layout] * 3))


def _compose(part: Part, number: int, alike: bool, generator: torch.Generator, layout: Layout) -> Part:
    """Canvases with an image in each quarter, at a random place in it."""
    canvas, size = layout.canvas, layout.image
    background = part.inputs.min()
    inputs = background.expand(number, 1, canvas, canvas).clone()
    labels = torch.full((number, canvas, canvas), BACKGROUND)
    classes = torch.randint(10, (number,), generator=generator)
    half, room = canvas // 2, canvas // 2 - size + 1
    for i in range(number):
        choices = (part.classes == classes[i]).nonzero().flatten() if alike else torch.arange(len(part.classes))
        for quarter in range(4):
            chosen = choices[torch.randint(len(choices), (), generator=generator)]
            top, left = (torch.randint(room, (2,), generator=generator)).tolist()
            rows = slice(top + half * (quarter // 2), top + half * (quarter // 2) + size)
            columns = slice(left + half * (quarter % 2), left + half * (quarter % 2) + size)
            image = part.inputs[chosen, 0]
            inputs[i, 0, rows, columns] = image
            labels[i, rows, columns][image > background + layout.ink] = part.labels[chosen]
    return Part(inputs, labels, classes)


def accuracy(answers: Tensor, labels: Tensor) -> Tensor:
    """The share of right answers, (M,)."""
    return (answers == labels.unsqueeze(1)).double().mean(0)


def mean_iou(answers: Tensor, labels: Tensor) -> Tensor:
    """Intersection over union of the pixels of a class, mean over the eleven classes, (M,)."""
    labels = labels.unsqueeze(1)
    pixels = [0, *range(2, answers.dim())]
    ratios = []
    for number in range(BACKGROUND + 1):
        answered, right = answers == number, labels == number
        intersection, union = (answered & right).sum(pixels), (answered | right).sum(pixels)
        ratios.append(intersection / union.clamp(min=1))
    return torch.stack(ratios).double().mean(0)


TASKS = {
    task.name: task
    for task in (
        Task("plain conv net", networks.plain_net, images, accuracy, "accuracy"),
        Task("residual net", networks.residual_net, images, accuracy, "accuracy"),
        Task("29-layer residual net", networks.deep_residual_net, images, accuracy, "accuracy"),
        Task("perceptron", networks.perceptron, vectors, accuracy, "accuracy"),
        Task("fastai's net", networks.fastai_net, images, accuracy, "accuracy"),
        Task("segmentation", networks.segmentation_net, canvases, mean_iou, "mean IoU"),
        Task("sequence", networks.sequence_net, sequences, accuracy, "accuracy"),
        Task("larger images", networks.plain_net, larger_images, accuracy, "accuracy"),
    )
}


def schedule(classes: Tensor, batch: int, batches: str, samples: int, seed: int) -> Tensor:
    """Which training samples make up each batch of a run, (steps, batch); see `SHUFFLED` and the others.

    Epochs are of full batches, shuffled. Those of one class are filled class by class; so are views, whose class is the
    image that they show. A stream goes through all classes in random order, then through all in another order.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = samples // batch
    if batches == STREAM:
        return _stream(classes, steps * batch, generator).view(steps, batch)
    groups = _by_class(classes) if batches in (ONE_CLASS, VIEWS) else [torch.arange(len(classes))]
    found = torch.empty(0, batch, dtype=torch.int64)
    while len(found) < steps:
        shuffled = [group[torch.randperm(len(group), generator=generator)] for group in groups]
        full = torch.cat([group[: len(group) // batch * batch].view(-1, batch) for group in shuffled])
        found = torch.cat([found, full[torch.randperm(len(full), generator=generator)]])
    return found[:steps]


def _by_class(classes: Tensor) -> list[Tensor]:
    """The numbers of the samples of each class."""
    return list(classes.argsort(stable=True).split(classes.unique(return_counts=True)[1].tolist()))


def _stream(classes: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Runs of one class, of random lengths. A class whose samples are used up begins anew, in another order."""
    groups = _by_class(classes)
    left = [torch.empty(0, dtype=torch.int64) for _ in groups]
    runs: list[Tensor] = []
    while sum(map(len, runs)) < length:
        for number in torch.randperm(len(groups), generator=generator).tolist():
            wanted = int(torch.randint(RUN[0], RUN[1] + 1, (), generator=generator))
            while len(left[number]) < wanted:
                again = groups[number][torch.randperm(len(groups[number]), generator=generator)]
                left[number] = torch.cat([left[number], again])
            runs.append(left[number][:wanted])
            left[number] = left[number][wanted:]
    return torch.cat(runs)[:length]
