"""The layers that `batchnormify` makes of BatchNorm layers that have no public counterpart here."""

from __future__ import annotations

from torch import Tensor, nn

from .precise import PreciseBatchNorm, PreciseBatchNorm1d, PreciseBatchNorm2d, PreciseBatchNorm3d
from .running import RunningBatchNorm


class NormAct(nn.Module):
    """timm's norm-act layers around another normalisation: y = act(drop(norm(x)))."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """The normalisation, dropped and activated as timm does; `mask` as for the layers."""
        y: Tensor = self.act(self.drop(super().forward(input, mask)))
        return y


class RunningBatchNormAct(NormAct, RunningBatchNorm):
    """What `batchnormify` makes of timm's norm-act layers; not meant to be constructed."""


class PreciseBatchNormAct2d(NormAct, PreciseBatchNorm2d):
    """What `batchnormify` makes of timm's ``BatchNormAct2d``; not meant to be constructed."""


class PreciseSyncBatchNorm(PreciseBatchNorm):
    """What `batchnormify` makes of ``nn.SyncBatchNorm``, for inputs (N, C, *); not meant to be constructed."""

    _check_input_dim = RunningBatchNorm._check_input_dim  # type: ignore[assignment]


class PreciseSyncBatchNormAct(NormAct, PreciseSyncBatchNorm):
    """What `batchnormify` makes of timm's ``SyncBatchNormAct``; not meant to be constructed."""


# What each layer of torch, and each of its subclasses, becomes.
PRECISE: dict[type[nn.Module], type[PreciseBatchNorm]] = {
    nn.BatchNorm1d: PreciseBatchNorm1d,
    nn.BatchNorm2d: PreciseBatchNorm2d,
    nn.BatchNorm3d: PreciseBatchNorm3d,
    nn.SyncBatchNorm: PreciseSyncBatchNorm,
}
# The same of timm's norm-act layers, by what they are subclasses of.
PRECISE_ACT: dict[type[nn.Module], type[PreciseBatchNorm]] = {
    nn.BatchNorm2d: PreciseBatchNormAct2d,
    nn.SyncBatchNorm: PreciseSyncBatchNormAct,
}


def is_norm_act(layer: nn.Module) -> bool:
    """Whether it is one of timm's norm-act layers, or one of ours made of one."""
    cls = type(layer)
    if issubclass(cls, NormAct):
        return True
    # By name, without importing timm. A subclass that keeps the forward will do.
    origin = next((base for base in cls.__mro__ if base.__name__ in ("BatchNormAct2d", "SyncBatchNormAct")), None)
    if origin is None or not issubclass(cls, tuple(PRECISE_ACT)) or cls.forward is not vars(origin).get("forward"):
        return False
    return isinstance(getattr(layer, "drop", None), nn.Module) and isinstance(getattr(layer, "act", None), nn.Module)
