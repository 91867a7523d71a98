"""The networks, each as a stack of M models concatenated along the channels: shapes are (N, M·C, *) throughout.

M = 1 is the plain network. In dimension 0, the parameters of a stack are those of its models, one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Site(NamedTuple):
    """Where a normalisation layer goes: inputs of (N, models · channels, *) with so many dimensions in *.

    `activated` says that a ReLU follows. It is part of the layer, since some contenders have an activation of their
    own.
    """

    channels: int
    models: int
    dimensions: int
    activated: bool = False


Norm = Callable[[Site], nn.Module]  # the layer, with its activation where the site is activated
Network = Callable[[int, Norm], nn.Module]  # M and the layer -> a stack of M models


def with_relu(layer: nn.Module, site: Site) -> nn.Module:
    """The layer, followed by a ReLU where the site is activated."""
    return nn.Sequential(layer, nn.ReLU()) if site.activated else layer


def convolution(
    channels_in: int, channels: int, models: int, dimensions: int = 2, *,
    kernel: int = 3, stride: int = 1, bias: bool = False,
) -> nn.Module:  # fmt: skip
    """M convolutions that keep the size, but for the stride; a bias before a normalisation would be cancelled."""
    kind = {1: nn.Conv1d, 2: nn.Conv2d}[dimensions]
    return kind(
        models * channels_in, models * channels, kernel, stride, padding=kernel // 2, groups=models, bias=bias
    )  # fmt: skip


def chain(
    widths: Sequence[int], strides: Sequence[int], models: int, norm: Norm, *,
    dimensions: int = 2, kernel: int = 3, last_activated: bool = True,
) -> list[nn.Module]:  # fmt: skip
    """Convolution and activated normalisation for each step from one width to the next."""
    layers: list[nn.Module] = []
    steps = list(zip(widths[:-1], widths[1:], strides, strict=True))
    for number, (channels_in, channels, stride) in enumerate(steps, 1):
        activated = last_activated or number < len(steps)
        layers += [
            convolution(channels_in, channels, models, dimensions, kernel=kernel, stride=stride),
            norm(Site(channels, models, dimensions, activated)),
        ]
    return layers


class ResidualBlock(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x))))))."""

    def __init__(self, channels: int, models: int, norm: Norm) -> None:
        super().__init__()
        self.body = nn.Sequential(*chain((channels,) * 3, (1, 1), models, norm, last_activated=False))

    def forward(self, x: Tensor) -> Tensor:
        """(N, M·C, H, W) in and out."""
        return F.relu(x + self.body(x))


class MeanOverPositions(nn.Module):
    """(N, M·C, *) to (N, M·C, 1, ..., 1)."""

    def forward(self, x: Tensor) -> Tensor:
        """What AdaptiveAvgPool1d/2d(1) do."""
        return x.mean(list(range(2, x.dim())), keepdim=True)


def classifier(channels: int, models: int, dimensions: int = 2) -> list[nn.Module]:
    """Mean over the positions, then ten logits of each model."""
    return [MeanOverPositions(), convolution(channels, 10, models, dimensions, kernel=1, bias=True)]


def plain_net(models: int, norm: Norm) -> nn.Module:
    """Four convolutions; the last ones on maps of 4x4."""
    return nn.Sequential(*chain((1, 16, 32, 32, 32), (1, 2, 1, 1), models, norm), *classifier(32, models))


def residual_net(models: int, norm: Norm, blocks: int = 2, channels: int = 32) -> nn.Module:
    """A stem and blocks of two convolutions on maps of 4x4, as in the demo."""
    body = [ResidualBlock(channels, models, norm) for _ in range(blocks)]
    return nn.Sequential(*chain((1, channels), (2,), models, norm), *body, *classifier(channels, models))


def deep_residual_net(models: int, norm: Norm) -> nn.Module:
    """29 convolutions, 28 of them in residual blocks, of 16 channels."""
    return residual_net(models, norm, blocks=14, channels=16)


def fastai_net(models: int, norm: Norm) -> nn.Module:
    """The five convolutions of fastai's lesson, which end in 1x1 maps there and here; see `demo_experiment`."""
    return nn.Sequential(*chain((1, 8, 16, 32, 64, 64), (1, 2, 1, 2, 2), models, norm), *classifier(64, models))


def perceptron(models: int, norm: Norm) -> nn.Module:
    """Two normalised layers of 64 units on 64 pixels, (N, 64, 1): a batch of N has N elements per channel."""
    hidden = chain((64, 64, 64), (1, 1), models, norm, dimensions=1, kernel=1)
    return nn.Sequential(*hidden, *classifier(64, models, dimensions=1))


def sequence_net(models: int, norm: Norm) -> nn.Module:
    """Four convolutions along a sequence of 64, which end at 16 positions."""
    body = chain((1, 16, 32, 32, 32), (2, 2, 1, 1), models, norm, dimensions=1, kernel=5)
    return nn.Sequential(*body, *classifier(32, models, dimensions=1))


def segmentation_net(models: int, norm: Norm) -> nn.Module:
    """Four convolutions at half the resolution, eleven logits for each pixel."""
    body = chain((1, 16, 32, 32), (2, 1, 1), models, norm)
    head = convolution(32, 11, models, kernel=1, bias=True)
    return nn.Sequential(*body, head, nn.Upsample(scale_factor=2, mode="bilinear"))


def build_stack(network: Network, norm: Norm, seeds: Sequence[int], copies: int) -> nn.Module:
    """The network with the initial weights of each seed, all that `copies` times; torch's global RNG is put back."""
    single = []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.default_generator.manual_seed(seed)
            single.append(dict(network(1, norm).named_parameters()))
        stack = network(len(seeds) * copies, norm)
    with torch.no_grad():
        for name, parameter in stack.named_parameters():
            parameter.copy_(torch.cat([parameters[name] for parameters in single] * copies))
    return stack
