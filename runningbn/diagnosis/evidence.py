"""What counts as evidence in a diagnosis: thresholds, each with its reason, and what is beyond them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..recalibration.report import LayerReport
    from .result import LayerDiagnosis

# In std, of the mean and of the std. With momentum 0.1, nn.BatchNorm knows a mean of independent values from
# 1.9/0.1 = 19 batches' worth: to 1/√(19·8) = 0.08 std with batches of 8.
OFF = 0.1
# Independent samples that a batch counts for.
FEW = 8
# Of a metric, relative to its larger value: an accuracy is known to about a point from a thousand samples.
GAIN = 0.02
# Standard errors that a deviation has to exceed, for there are many layers, with a mean and a variance each.
ERRORS = 3
# What Student's t has in their place for so few batches.
_FEWEST = {2: 236.0, 3: 19.2, 4: 9.2, 5: 6.6, 6: 5.5, 7: 4.9}


def is_off(report: LayerReport) -> bool:
    """Whether the statistics differ from what evaluation shows by more than `OFF`, and beyond their error."""
    return _excess(report, errors_to_exceed(report.batches)) > OFF


def errors_to_exceed(batches: int) -> float:
    """The quantile of Student's t with batches − 1 degrees of freedom at the level that `ERRORS` has of a normal one.

    Source: Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.5.
    """
    if batches in _FEWEST:
        return _FEWEST[batches]
    z, degrees = ERRORS, max(batches - 1, 1)
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def is_left(layer: LayerDiagnosis) -> bool:
    """Whether recomputed statistics are off. They are from the same data, so chance has no part in it."""
    return not layer.frozen and max(layer.recomputed.mean_shift, layer.recomputed.std_shift) > OFF


def _excess(report: LayerReport, errors: float) -> float:
    """The distance of means in std or of log(std), the larger, without what chance contributes.

    Distances below so many standard errors count as none; so do those of a single batch, which has no errors.
    """
    beyond = [math.sqrt(max(far**2 - error**2, 0.0)) for far, error in distances(report) if far > errors * error]
    return max(beyond, default=0.0)


def distances(report: LayerReport) -> tuple[tuple[float, float], ...]:
    """Of means in std and of log(std), each with its standard error."""
    return ((report.mean_shift, report.mean_standard_error), (report.std_shift, report.std_standard_error))


def is_known(report: LayerReport) -> bool:
    """Whether twice `OFF` would have been seen, and nothing looks like `OFF`."""
    errors = errors_to_exceed(report.batches)
    return all(errors * error <= 2 * OFF for _, error in distances(report)) and _excess(report, 0.0) <= OFF


def certain_batch(layer: LayerDiagnosis) -> float:
    """What a batch counts for; where the correlation may be chance, its samples. Infinite where it is not known."""
    size = layer.between.effective_batch if is_correlated(layer) else layer.between.samples_per_batch
    return math.inf if math.isnan(size) else size


def is_correlated(layer: LayerDiagnosis) -> bool:
    """Whether the samples of a batch are more alike than chance makes them."""
    between = layer.between
    return between.design_effect - errors_to_exceed(between.batches) * between.design_effect_error > 1


def gains(before: float, after: float) -> bool:
    """Whether a metric is better by more than `GAIN`; any number is better than NaN."""
    if math.isnan(before):
        return not math.isnan(after)
    return after - before > GAIN * max(abs(before), abs(after))
