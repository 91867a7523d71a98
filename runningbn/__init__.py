"""Batch normalisation whose statistics are right: running, precise, and put into existing models."""

from .convert import batchnormify
from .modules import PreciseBatchNorm1d, PreciseBatchNorm2d, PreciseBatchNorm3d, RunningBatchNorm
from .momentum import Horizon, SquareRoot

__version__ = "0.1.0"

__all__ = [
    "Horizon",
    "PreciseBatchNorm1d",
    "PreciseBatchNorm2d",
    "PreciseBatchNorm3d",
    "RunningBatchNorm",
    "SquareRoot",
    "batchnormify",
]
