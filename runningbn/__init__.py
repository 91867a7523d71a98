"""Batch normalisation whose statistics are right: running, precise, put into existing models, recomputed from data."""

from .convert import batchnormify
from .diagnosis.result import Diagnosis
from .diagnosis.run import diagnose
from .merge import merge_statistics
from .momentum import Horizon, MomentumRule, SquareRoot
from .precise import PreciseBatchNorm1d, PreciseBatchNorm2d, PreciseBatchNorm3d
from .recalibrate import get_bn_modules, precise_bn, update_bn_stats
from .report import StatsReport
from .running import RunningBatchNorm
from .summary import bn_summary
from .weights.centering import bake_weights, center_weights

__version__ = "0.1.0"

__all__ = [
    "Diagnosis",
    "Horizon",
    "MomentumRule",
    "PreciseBatchNorm1d",
    "PreciseBatchNorm2d",
    "PreciseBatchNorm3d",
    "RunningBatchNorm",
    "SquareRoot",
    "StatsReport",
    "bake_weights",
    "batchnormify",
    "bn_summary",
    "center_weights",
    "diagnose",
    "get_bn_modules",
    "merge_statistics",
    "precise_bn",
    "update_bn_stats",
]
