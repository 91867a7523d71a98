"""Models of torch's layers for batchnormify to convert, and what it can convert them to."""

import pytest
import torch
import torch.nn.functional as F
from cases import noise, with_random_affine
from torch import Tensor, nn

from runningbn import PreciseBatchNorm1d, PreciseBatchNorm2d, PreciseBatchNorm3d
from runningbn.conversion.classes import RunningBatchNorm1d, RunningBatchNorm2d, RunningBatchNorm3d

OURS = ("running", "precise")
TARGETS = (*OURS, "torch")
PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
PRECISE = (PreciseBatchNorm1d, PreciseBatchNorm2d, PreciseBatchNorm3d)
CONVERTED = (RunningBatchNorm1d, RunningBatchNorm2d, RunningBatchNorm3d)
CLASSES = {"running": CONVERTED, "precise": PRECISE, "torch": PLAIN}

each_target = pytest.mark.parametrize("to", TARGETS)
each_of_ours = pytest.mark.parametrize("to", OURS)


def pretrained(layer: nn.Module, seed: int = 0) -> nn.Module:
    """The BatchNorm layers of a model with statistics that they might have learnt, and affine parameters."""
    generator = torch.Generator().manual_seed(seed)
    for module in layer.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            shape = module.running_mean.shape
            module.running_mean.copy_(torch.randn(shape, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(shape, generator=generator))
            module.num_batches_tracked.fill_(17)
            with_random_affine(module, seed)
    return layer


class BatchNormAct2d(nn.BatchNorm2d):
    """What timm.layers.BatchNormAct2d is: batch norm, then drop, then act, with a forward of its own."""

    def __init__(self, num_features: int, act_layer=nn.ReLU, inplace: bool = True, drop_layer=None, **kwargs) -> None:
        super().__init__(num_features, **kwargs)
        self.drop = nn.Identity() if drop_layer is None else drop_layer()
        self.act = act_layer(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return self.act(self.drop(x))


class Tangle(nn.Module):
    """One layer in many places: twice in one parent, under another parent, and in a list that torch does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.first = nn.BatchNorm2d(4)
        self.again = self.first
        self.blocks = nn.ModuleList([nn.ModuleDict({"norm": nn.BatchNorm2d(4), "shared": self.first})])
        self.aliases = [self.first, self.blocks[0]["norm"]]
        self.head = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in (self.first, *self.aliases, self.blocks[0]["shared"], self.again):
            x = layer(x).relu()
        return self.head(x)


def tangle() -> nn.Module:
    torch.manual_seed(0)
    return pretrained(Tangle())


def images(batch_size: int = 6, seed: int = 0) -> Tensor:
    return noise((batch_size, 3, 3, 3), seed)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return pretrained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)))
