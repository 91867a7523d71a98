"""Convert a pretrained stack of nn.BatchNorm2d to the layers of a contender, in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from runningbn import batchnormify


def as_it_is(stack: nn.Module) -> None:
    """Leave nn.BatchNorm2d."""


def to_running(**options: Any) -> Callable[[nn.Module], None]:
    """To RunningBatchNorm with these options."""

    def convert(stack: nn.Module) -> None:
        batchnormify(stack, **options)

    return convert


def to_running_centred(stack: nn.Module) -> None:
    """To RunningBatchNorm after convolutions with centred weights; at first the net is the same function."""
    batchnormify(stack)
    for layer in list(stack.modules()):
        if isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.bias is None and layer.weight[0].numel() > 1:
            parametrize.register_parametrization(layer, "weight", CentredAround(mean_of_filters(layer.weight.detach())))


class CentredAround(nn.Module):
    """w − mean w + the mean that the filter had when it was made."""

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)

    def forward(self, weight: Tensor) -> Tensor:
        """(filters, inputs, *) in and out."""
        return weight - mean_of_filters(weight) + self.mean


def mean_of_filters(weight: Tensor) -> Tensor:
    """Over inputs and positions, (filters, 1, ..., 1)."""
    return weight.mean(list(range(1, weight.dim())), keepdim=True)


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Always in evaluation; weight and bias learn."""

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        """Stay in evaluation."""
        return super().train(False)


def freeze(stack: nn.Module) -> None:
    """To nn.BatchNorm2d that keeps the statistics of the pretraining."""
    for layer in stack.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.__class__ = FrozenBatchNorm2d
            layer.eval()
