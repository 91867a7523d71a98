"""The networks for real images and series, each as a stack of M models concatenated along the channels.

They follow `networks`. Convolutions before the classifier are initialised as in He et al., by fan out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import fashion
from .networks import MeanOverPositions, Norm, ResidualBlock, Site, chain, classifier, convolution

CLASSES_OF_A_PIXEL = 11  # ten garments, and none
SENSORS = 6  # channels of a series


def he_initialised(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """The layers, with weights of convolutions of std √(2/fan out), and biases of zero.

    The fan out of a grouped convolution is that of a group: the outputs that an input has a part in, times positions.
    """
    layers = list(layers)
    with torch.no_grad():
        for module in (module for layer in layers for module in layer.modules()):
            if isinstance(module, nn.Conv1d | nn.Conv2d):
                fan_out = module.out_channels // module.groups * math.prod(module.kernel_size)
                module.weight.normal_(0, math.sqrt(2 / fan_out))
                if module.bias is not None:
                    module.bias.zero_()
    return layers


class ProjectionBlock(nn.Module):
    """relu(norm(conv1x1(x)) + norm(conv(relu(norm(conv(x)))))); both paths take the stride."""

    def __init__(self, channels_in: int, channels: int, stride: int, models: int, norm: Norm) -> None:
        super().__init__()
        widths = (channels_in, channels, channels)
        self.body = nn.Sequential(*chain(widths, (stride, 1), models, norm, last_activated=False))
        self.shortcut = nn.Sequential(
            *chain((channels_in, channels), (stride,), models, norm, kernel=1, last_activated=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, M·C, H, W) to (N, M·C', H/stride, W/stride)."""
        return F.relu(self.shortcut(x) + self.body(x))


class PreActivationBlock(nn.Module):
    """s(h) + conv(relu(norm(conv(h)))) with h = relu(norm(x)) and s a 1x1 convolution; s and the first take the stride.

    Source: He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016.
    """

    def __init__(self, channels_in: int, channels: int, stride: int, models: int, norm: Norm) -> None:
        super().__init__()
        self.activation = norm(Site(channels_in, models, 2, activated=True))
        self.body = nn.Sequential(
            *chain((channels_in, channels), (stride,), models, norm), convolution(channels, channels, models)
        )
        self.shortcut = convolution(channels_in, channels, models, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, M·C, H, W) to (N, M·C', H/stride, W/stride)."""
        activated = self.activation(x)
        return self.shortcut(activated) + self.body(activated)


class SqueezeExcitation(nn.Module):
    """x · s of the mean of x over positions; s are two 1x1 convolutions of each model, a ReLU between them."""

    def __init__(self, channels: int, models: int) -> None:
        super().__init__()
        self.scale = nn.Sequential(
            MeanOverPositions(),
            convolution(channels, channels // 4, models, kernel=1, bias=True),
            nn.ReLU(),
            convolution(channels // 4, channels, models, kernel=1, bias=True),
            nn.Hardsigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, M·C, H, W) in and out."""
        return x * self.scale(x)


class InvertedResidual(nn.Module):
    """1x1 to `inner` channels, depthwise 3x3, squeeze and excitation, 1x1 back; with a shortcut where it fits."""

    def __init__(self, channels_in: int, inner: int, channels: int, stride: int, models: int, norm: Norm) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *chain((channels_in, inner), (1,), models, norm, kernel=1),
            convolution(1, 1, models * inner, stride=stride),
            norm(Site(inner, models, 2, activated=True)),
            SqueezeExcitation(inner, models),
            *chain((inner, channels), (1,), models, norm, kernel=1, last_activated=False),
        )
        self.with_shortcut = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, M·C, H, W) to (N, M·C', H/stride, W/stride)."""
        return x + self.body(x) if self.with_shortcut else self.body(x)


def image_residual_net(models: int, norm: Norm, strides: Sequence[int] = (2, 2, 2)) -> nn.Module:
    """A stem of 16 channels at 28x28 and blocks of 16, 32, 64 channels, at 14x14, 7x7, 4x4: ten normalisations."""
    widths = (16, 16, 32, 64)
    body = [
        ProjectionBlock(*step, models, norm) for step in zip(widths[:-1], widths[1:], strides, strict=True)
    ]  # fmt: skip
    return nn.Sequential(
        *he_initialised([*chain((1, 16), (1,), models, norm), *body]), *classifier(64, models)
    )  # fmt: skip


def image_residual_net_at_28(models: int, norm: Norm) -> nn.Module:
    """The same with its first block at 28x28."""
    return image_residual_net(models, norm, strides=(1, 2, 2))


def pre_activation_net(models: int, norm: Norm) -> nn.Module:
    """Pre-activation blocks of 16, 32, 64 channels on maps of 14x14, 7x7, 4x4: seven normalisations."""
    widths = (16, 16, 32, 64)
    body = [PreActivationBlock(*step, 2, models, norm) for step in pairwise(widths)]
    last = norm(Site(64, models, 2, activated=True))
    return nn.Sequential(
        *he_initialised([convolution(1, 16, models), *body, last]), *classifier(64, models)
    )  # fmt: skip


def image_perceptron(models: int, norm: Norm) -> nn.Module:
    """Three normalised layers of 128, 128, 64 units on 784 pixels: a batch of N has N elements per channel."""
    pixels = nn.Flatten(), nn.Unflatten(1, (-1, 1))  # of one model after another, as its single channel is
    hidden = chain((fashion.SIZE**2, 128, 128, 64), (1, 1, 1), models, norm, dimensions=1, kernel=1)
    return nn.Sequential(*pixels, *he_initialised(hidden), *classifier(64, models, dimensions=1))


def deep_image_net(models: int, norm: Norm) -> nn.Module:
    """50 convolutions of 16 channels, 48 of them in residual blocks, on maps of 7x7."""
    body = [*chain((1, 16, 16), (2, 2), models, norm), *(ResidualBlock(16, models, norm) for _ in range(24))]
    return nn.Sequential(*he_initialised(body), *classifier(16, models))


def mobile_net(models: int, norm: Norm) -> nn.Module:
    """Five inverted residual blocks, as MobileNetV3's but for its activations, on maps of 14x14, 7x7, 4x4."""
    body = [
        *chain((1, 16), (2,), models, norm),
        InvertedResidual(16, 32, 16, 1, models, norm),
        InvertedResidual(16, 64, 24, 2, models, norm),
        InvertedResidual(24, 72, 24, 1, models, norm),
        InvertedResidual(24, 96, 40, 2, models, norm),
        InvertedResidual(40, 120, 40, 1, models, norm),
        *chain((40, 96), (1,), models, norm, kernel=1),
    ]
    return nn.Sequential(*he_initialised(body), *classifier(96, models))


def image_plain_net(models: int, norm: Norm) -> nn.Module:
    """Five convolutions, on maps of 28x28, 14x14, 7x7."""
    body = chain((1, 16, 16, 32, 32, 64), (1, 2, 1, 2, 1), models, norm)
    return nn.Sequential(*he_initialised(body), *classifier(64, models))


def image_segmentation_net(models: int, norm: Norm) -> nn.Module:
    """Down to a quarter of the resolution and up to half of it, five convolutions, eleven logits for each pixel."""
    body = [
        *chain((1, 16, 32, 32, 16), (2, 2, 1, 1), models, norm),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        *chain((16, 16), (1,), models, norm),
    ]
    head = convolution(16, CLASSES_OF_A_PIXEL, models, kernel=1, bias=True)
    return nn.Sequential(*he_initialised(body), head, nn.Upsample(scale_factor=2, mode="bilinear"))


def series_net(models: int, norm: Norm) -> nn.Module:
    """Four convolutions along a series of 128 times, which end at 16 positions."""
    body = chain((SENSORS, 16, 32, 32, 64), (2, 2, 1, 2), models, norm, dimensions=1, kernel=5)
    return nn.Sequential(*he_initialised(body), *classifier(64, models, dimensions=1))
