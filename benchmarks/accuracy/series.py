"""Series of six sensors of a smart watch, from ten people doing seven shoulder exercises; from the package seglearn.

Burns et al., "Shoulder physiotherapy exercise recognition: machine learning the inertial signals from a smartwatch",
2018. The package is in the extra `bench`. Only its data file is read: importing the package would require pandas.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from .tasks import Data, Part

WINDOW, STEP = 128, 32  # times, at 50 Hz
PEOPLE = ((1, 2, 3, 4, 5, 6), (7, 8), (9, 10))  # to train, to validate and to test on


def file() -> Path:
    """The data in the installed package."""
    package = find_spec("seglearn")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("the series are in the package seglearn: pip install 'runningbn[bench]' gets it")
    return Path(package.origin).parent / "data" / "watch_dataset.npy"


@cache
def watch() -> Data:
    """Windows (E, 6, 128) and exercises; standardised by sensor. Nobody is in two parts."""
    contents = np.load(file(), allow_pickle=True).item()  # a dictionary, with a list of arrays in it
    train, *others = (_part(contents, people) for people in PEOPLE)
    std, mean = torch.std_mean(train.inputs, (0, 2), keepdim=True)
    return Data(*(part._replace(inputs=(part.inputs - mean) / std) for part in (train, *others)))


def _part(contents: dict[str, object], people: tuple[int, ...]) -> Part:
    """All windows of some people, shuffled."""
    windows, exercises = [], []
    for series, exercise, person in zip(contents["X"], contents["y"], contents["subject"], strict=True):
        if person in people:
            found = torch.as_tensor(series, dtype=torch.float32).unfold(0, WINDOW, STEP)
            windows.append(found)
            exercises.append(torch.full((len(found),), int(exercise)))
    labels = torch.cat(exercises)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return Part(torch.cat(windows)[order], labels[order], labels[order])
