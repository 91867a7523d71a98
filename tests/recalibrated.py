"""What the tests of the recalibration callbacks share: a small net, and what its statistics are and should be."""

from __future__ import annotations

import copy
import random

import torch
from processes import ranks
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset

from runningbn import batchnormify, update_bn_stats

GENERATOR = torch.Generator().manual_seed(1)
X, Y = torch.randn(24, 3, 8, 8, generator=GENERATOR) * 2 + 1, torch.randint(3, (24,), generator=GENERATOR)
STEPS = 3  # of an epoch, with batches of 8


def noting(model: nn.Module) -> nn.Module:
    """The model, which notes its inputs in training mode in `drawn`."""
    model.drawn = []

    def note(module, arguments, keywords):
        if module.training:
            module.drawn.append(next(iter([*arguments, *keywords.values()])).clone())

    model.register_forward_pre_hook(note, with_kwargs=True)
    return model


def net(to: str = "torch") -> nn.Module:
    """Two layers, of which the second sees what the first normalised, and dropout, which draws in training."""
    torch.manual_seed(0)
    first, second = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()], [nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)]
    return noting(batchnormify(nn.Sequential(*first, *second, nn.Flatten(), nn.Dropout(), nn.Linear(64, 3)), to))


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def statistics(model: nn.Module) -> Tensor:
    """The statistics of all layers in one vector."""
    return torch.cat([b.detach().clone() for m in norms(model) for b in (m.running_mean, m.running_var)])


def expected(model: nn.Module, batches=None, **options) -> Tensor:
    """What update_bn_stats gives for the weights that the model has now, on the images in their order."""
    model = copy.deepcopy(model)
    update_bn_stats(model, X.split(8) if batches is None else batches, **options)
    return statistics(model)


def assert_same_training(plain: nn.Module, model: nn.Module) -> None:
    """Both have seen the same batches in training, and end with the same parameters."""
    assert len(plain.drawn) == len(model.drawn) > 0
    assert all(map(torch.equal, plain.drawn, model.drawn))
    assert all(map(torch.equal, plain.parameters(), model.parameters()))


class Noisy(TensorDataset):
    """Augments with generators of its own, and with that of Python."""

    def __init__(self):
        super().__init__(X, Y)
        self.torch, self.python = torch.Generator().manual_seed(5), random.Random(6)

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + torch.randn(3, 8, 8, generator=self.torch) + self.python.random() + random.random(), y


class OneShot(IterableDataset):
    """Can be read only once, which shows when its iterator is asked for again."""

    def __init__(self, items=None):
        self.left = iter(zip(X, Y) if items is None else items)

    def __iter__(self):
        return self.left


def assert_two_processes_share(make, train_in_parallel) -> None:
    """``train_in_parallel(rank, recalibrated)`` has the parameters of plain training, and statistics of all data."""
    plain = ranks(2)(train_in_parallel, False)
    for state, other in zip(ranks(2)(train_in_parallel, True), plain):
        model = make()
        model.load_state_dict(state)
        parameters = dict(model.named_parameters())
        assert all(torch.equal(parameters[name], other[name]) for name in parameters)
        batches = [x for rank in (0, 1) for x in X[rank::2].split(4)]
        torch.testing.assert_close(statistics(model), expected(model, batches))
