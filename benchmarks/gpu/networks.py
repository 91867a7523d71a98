"""The networks of the parts *models* and *compiled*."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 1000


class UNet(nn.Module):
    """A U-Net with BatchNorm: (N, 3, H, W) to (N, 2, H, W), H and W divisible by 2^(depths − 1).

    Source: Ronneberger, Fischer and Brox, "U-Net", MICCAI 2015; padded, and with BatchNorm as is usual since.
    """

    def __init__(self, width: int = 64, depths: int = 5) -> None:
        super().__init__()
        widths = [width * 2**depth for depth in range(depths)]
        self.down = nn.ModuleList(_twice(before, after) for before, after in zip([3, *widths], widths))
        pairs = list(zip(widths[::-1], widths[-2::-1]))
        self.raise_up = nn.ModuleList(nn.ConvTranspose2d(deep, shallow, 2, stride=2) for deep, shallow in pairs)
        self.up = nn.ModuleList(_twice(deep, shallow) for deep, shallow in pairs)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of two classes for every position."""
        kept = []
        for block in self.down:
            x = block(x if not kept else nn.functional.max_pool2d(x, 2))
            kept.append(x)
        for raise_up, block, beside in zip(self.raise_up, self.up, kept[-2::-1]):
            x = block(torch.cat([beside, raise_up(x)], 1))
        logits: Tensor = self.head(x)
        return logits


def _twice(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (before, after):
        layers += [nn.Conv2d(width, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def _of_timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, num_classes=CLASSES)
        return model

    return make


# By name: how it is made, and the height and width of its images.
NETWORKS: dict[str, tuple[Callable[[], Any], int]] = {
    "ResNet-50": (_of_timm("resnet50"), 224),
    "MobileNetV3": (_of_timm("mobilenetv3_large_100"), 224),
    "EfficientNet-B0": (_of_timm("efficientnet_b0"), 224),
    "U-Net": (UNet, 256),
}
SMALL = {"small U-Net": (lambda: UNet(1, 2), 4)}
