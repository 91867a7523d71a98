"""Batch normalisation for small and correlated batches: layers, a converter for models, recalibration and diagnosis."""

import sys as _sys

from .conversion import classes as _classes
from .conversion.convert import batchnormify
from .diagnosis.diagnose import diagnose
from .diagnosis.result import Diagnosis
from .inspection.merge import merge_statistics
from .inspection.summary import bn_summary
from .layers import precise as _precise
from .layers import running as _running
from .layers.precise import PreciseBatchNorm1d, PreciseBatchNorm2d, PreciseBatchNorm3d
from .layers.running import RunningBatchNorm
from .momentum import Horizon, MomentumRule, SquareRoot
from .ops import pooling as _pooling
from .recalibration.recalibrate import get_bn_modules, precise_bn, update_bn_stats
from .recalibration.report import StatsReport
from .weights.centering import bake_weights, center_weights

__version__ = "0.2.0"

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

# Where the classes were that models pickled whole by version 0.1 name.
for _name, _module in {
    "converted": _classes, "distributed": _pooling, "precise": _precise, "running": _running,
}.items():  # fmt: skip
    _sys.modules[f"{__name__}.{_name}"] = _module
