"""The networks whose training steps are timed, untrained: transformers', and torchvision's where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

from torch import nn

CLASSES = 1000

# transformers and torchvision are imported where they are needed: who only wants the tables does without.


def resnet18() -> nn.Module:
    """Microsoft's resnet-18; 20 norm layers."""
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(embedding_size=64, num_labels=CLASSES, **sizes))


def resnet50() -> nn.Module:
    """Microsoft's resnet-50; 53 norm layers."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(num_labels=CLASSES))


def mobilenet_v2() -> nn.Module:
    """Google's mobilenet_v2_1.0_224; 52 norm layers, made with eps=0.001 and momentum=0.997."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=CLASSES))


def of_torchvision(name: str) -> nn.Module:
    """A network by its name there."""
    from torchvision.models import get_model

    model: nn.Module = get_model(name, weights=None, num_classes=CLASSES)
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": resnet18, "ResNet-50": resnet50, "MobileNetV2": mobilenet_v2,
}  # fmt: skip
OF_TORCHVISION = {
    "MobileNetV3": "mobilenet_v3_large", "EfficientNet-B0": "efficientnet_b0", "DenseNet-121": "densenet121",
}  # fmt: skip
if importlib.util.find_spec("torchvision") is not None:
    NETWORKS |= {title: partial(of_torchvision, name) for title, name in OF_TORCHVISION.items()}
