"""The layers that `batchnormify` makes of BatchNorm layers that have no public counterpart here."""

from __future__ import annotations

from torch import Tensor, nn

from .modules import PreciseBatchNorm, PreciseBatchNorm1d, PreciseBatchNorm2d, PreciseBatchNorm3d, RunningBatchNorm


class NormAct(nn.Module):
    """timm's BatchNormAct2d around another normalisation: y = act(drop(norm(x)))."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """The normalisation, dropped and activated as timm does."""
        y: Tensor = self.act(self.drop(super().forward(input)))
        return y


class RunningBatchNormAct2d(NormAct, RunningBatchNorm):
    """What `batchnormify` makes of timm's ``BatchNormAct2d``; not meant to be constructed."""


class PreciseBatchNormAct2d(NormAct, PreciseBatchNorm2d):
    """What `batchnormify` makes of timm's ``BatchNormAct2d``; not meant to be constructed."""


class PreciseSyncBatchNorm(PreciseBatchNorm):
    """What `batchnormify` makes of ``nn.SyncBatchNorm``, for inputs (N, C, *); not meant to be constructed."""

    _check_input_dim = RunningBatchNorm._check_input_dim  # type: ignore[assignment]


# What each layer of torch, and each of its subclasses, becomes.
PRECISE: dict[type[nn.Module], type[PreciseBatchNorm]] = {
    nn.BatchNorm1d: PreciseBatchNorm1d,
    nn.BatchNorm2d: PreciseBatchNorm2d,
    nn.BatchNorm3d: PreciseBatchNorm3d,
    nn.SyncBatchNorm: PreciseSyncBatchNorm,
}
