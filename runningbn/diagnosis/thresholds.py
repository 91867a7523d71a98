"""The thresholds of a diagnosis, each with its reason, and the tests against them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..recalibration.report import LayerReport
    from .result import LayerDiagnosis

# Deviation of mean or std that counts as off, in std. With momentum 0.1, the running mean of nn.BatchNorm averages
# (2 − 0.1)/0.1 = 19 batches effectively; with batches of 8 independent values its standard error is 1/√(19·8) = 0.08.
OFF = 0.1
# Effective sample size of a batch below which it counts as small.
FEW = 8
# Relative gain of a metric that counts. The standard error of an accuracy from 1000 samples is about one point.
GAIN = 0.02
# Number of standard errors that a deviation must exceed. It is 3, since many layers are tested, for mean and variance.
ERRORS = 3
# The same by Student's t distribution, by the number of batches.
_ERRORS_BY_BATCHES = {2: 236.0, 3: 19.2, 4: 9.2, 5: 6.6, 6: 5.5, 7: 4.9}


def is_off(report: LayerReport) -> bool:
    """Whether the statistics differ from the moments in evaluation by more than `OFF`, and significantly."""
    return _excess(report, errors_to_exceed(report.batches)) > OFF


def errors_to_exceed(batches: int) -> float:
    """The quantile of Student's t with batches − 1 degrees of freedom at the level of `ERRORS` for a normal variable.

    Source: Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.5.
    """
    if batches in _ERRORS_BY_BATCHES:
        return _ERRORS_BY_BATCHES[batches]
    z, degrees = ERRORS, max(batches - 1, 1)
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def is_off_recomputed(layer: LayerDiagnosis) -> bool:
    """Whether recomputed statistics are off. They are from the same data, so there is no sampling error."""
    return not layer.frozen and max(layer.recomputed.mean_shift, layer.recomputed.std_shift) > OFF


def _excess(report: LayerReport, errors: float) -> float:
    """The larger distance, of means in std or of log(std), minus its standard error in quadrature.

    A distance below `errors` standard errors counts as 0, and so does one whose standard error is NaN (single batch).
    """
    beyond = [math.sqrt(max(far**2 - error**2, 0.0)) for far, error in distances(report) if far > errors * error]
    return max(beyond, default=0.0)


def distances(report: LayerReport) -> tuple[tuple[float, float], ...]:
    """The distances of means in std and of log(std), each with its standard error."""
    return ((report.mean_shift, report.mean_standard_error), (report.std_shift, report.std_standard_error))


def is_known(report: LayerReport) -> bool:
    """Whether a deviation of twice `OFF` would be significant, and the measured one is at most `OFF`."""
    errors = errors_to_exceed(report.batches)
    return all(errors * error <= 2 * OFF for _, error in distances(report)) and _excess(report, 0.0) <= OFF


def certain_batch(layer: LayerDiagnosis) -> float:
    """The effective sample size of a batch; its samples if the correlation is not significant; infinite for NaN."""
    size = layer.between.effective_batch if is_correlated(layer) else layer.between.samples_per_batch
    return math.inf if math.isnan(size) else size


def is_correlated(layer: LayerDiagnosis) -> bool:
    """Whether the samples of a batch are significantly correlated."""
    between = layer.between
    return between.design_effect - errors_to_exceed(between.batches) * between.design_effect_error > 1


def gains(before: float, after: float) -> bool:
    """Whether a metric improves by more than `GAIN`; any number is better than NaN."""
    if math.isnan(before):
        return not math.isnan(after)
    return after - before > GAIN * max(abs(before), abs(after))
