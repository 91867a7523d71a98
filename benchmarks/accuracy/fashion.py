"""Fashion-MNIST, 70 000 images of garments, read from the files that its authors published.

The files are read from the folder named by RUNNINGBN_DATA, or from where Debian's package installs them. Nothing is
downloaded.
"""

from __future__ import annotations

import gzip
import os
from functools import cache
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .tasks import Data, Part, standardised

VARIABLE, DEBIAN_FOLDER = "RUNNINGBN_DATA", "/usr/share/datasets/fashion-mnist"
HOW_TO_GET = f"apt-get install dataset-fashion-mnist gets it; --data DIR or {VARIABLE} names another folder"
IMAGES, LABELS = "{kind}-images-idx3-ubyte", "{kind}-labels-idx1-ubyte"
SIZE, CLASSES = 28, 10
TRAINED = 5 / 6  # of the file to train on, its first 50 000; validation samples are of the rest
VALIDATION, TEST = 4000, 4000
VIEWS_OF_AN_IMAGE, FARTHEST = 8, 3  # pixels


class Files(NamedTuple):
    """Images (E, 28, 28) and classes (E,), bytes."""

    images: Tensor
    classes: Tensor


def folder() -> Path:
    """Where the files are to be."""
    return Path(os.environ.get(VARIABLE, DEBIAN_FOLDER))


def find(name: str, where: Path) -> Path:
    """A file, compressed or not; FileNotFoundError says how to get it."""
    for path in (where / f"{name}.gz", where / name):
        if path.exists():
            return path
    raise FileNotFoundError(f"Fashion-MNIST: no {name}.gz and no {name} in {where}; {HOW_TO_GET}")


def check() -> None:
    """All files are there, or FileNotFoundError."""
    for kind in ("train", "t10k"):
        for name in (IMAGES, LABELS):
            find(name.format(kind=kind), folder())


def read_idx(path: Path) -> Tensor:
    """The array of bytes in an IDX file: two zeros, the code of bytes, dimensions, the sizes in four bytes each, data.

    Source: Yann LeCun's page on MNIST.
    """
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        contents = file.read()
    if len(contents) < 4 or contents[:2] != b"\0\0":
        raise ValueError(f"{path}: expected an IDX file, which begins with two zeros, got {contents[:4]!r}")
    if contents[2] != 0x08:
        raise ValueError(f"{path}: expected unsigned bytes, code 0x08, got code {contents[2]:#04x}")
    begin = 4 + 4 * contents[3]
    sizes = [int.from_bytes(contents[i : i + 4], "big") for i in range(4, begin, 4)]
    if len(contents) != begin + prod(sizes):
        raise ValueError(f"{path}: expected {begin + prod(sizes)} bytes for sizes {sizes}, got {len(contents)}")
    return torch.frombuffer(bytearray(contents[begin:]), dtype=torch.uint8).view(sizes)


def read(kind: str, where: Path) -> Files:
    """The images and classes of "train" or "t10k"."""
    images = read_idx(find(IMAGES.format(kind=kind), where))
    classes = read_idx(find(LABELS.format(kind=kind), where))
    if images.shape != (len(classes), SIZE, SIZE) or classes.dim() != 1 or classes.max() >= CLASSES:
        raise ValueError(
            f"{where}: expected {kind} images of {SIZE}x{SIZE} and a class below {CLASSES} for each, "
            f"got {list(images.shape)} and {list(classes.shape)} up to {int(classes.max())}"
        )
    return Files(images, classes)


def raw_garments() -> Data:
    """Images (E, 1, 28, 28) in [0, 1] and their classes; always the same split."""
    return _raw_garments(folder())


@cache
def _raw_garments(where: Path) -> Data:
    train, test = read("train", where), read("t10k", where)
    trained = round(len(train.classes) * TRAINED)
    generator = torch.Generator().manual_seed(0)
    validation = trained + torch.randperm(len(train.classes) - trained, generator=generator)[:VALIDATION]
    tested = torch.randperm(len(test.classes), generator=generator)[:TEST]
    return Data(_part(train, torch.arange(trained)), _part(train, validation), _part(test, tested))


def _part(files: Files, chosen: Tensor) -> Part:
    classes = files.classes[chosen].long()
    return Part(files.images[chosen].unsqueeze(1) / 255, classes, classes)


def garments() -> Data:
    """The images, standardised."""
    return _garments(folder())


@cache
def _garments(where: Path) -> Data:
    return standardised(*_raw_garments(where))


def views() -> Data:
    """To train on, every image several times, each time shifted; a sample's class for batches is its image."""
    return _views(folder())


@cache
def _views(where: Path) -> Data:
    data = _garments(where)
    generator = torch.Generator().manual_seed(0)
    number = len(data.train.inputs) // VIEWS_OF_AN_IMAGE
    images = torch.arange(number).repeat_interleave(VIEWS_OF_AN_IMAGE)
    shifts = torch.randint(-FARTHEST, FARTHEST + 1, (len(images), 2), generator=generator)
    shown = shifted(data.train.inputs[images], shifts)
    return data._replace(train=Part(shown, data.train.labels[images], images))


def shifted(images: Tensor, shifts: Tensor) -> Tensor:
    """Each (1, H, W) moved down and to the right by its shift, (E, 2); background comes in."""
    background, far = float(images.min()), int(shifts.abs().max())
    padded = torch.nn.functional.pad(images, [far] * 4, value=background)
    height, width = images.shape[2:]
    rows = (far - shifts[:, :1] + torch.arange(height)).view(-1, height, 1)
    columns = (far - shifts[:, 1:] + torch.arange(width)).view(-1, 1, width)
    return padded[torch.arange(len(images)).view(-1, 1, 1), 0, rows, columns].unsqueeze(1)
