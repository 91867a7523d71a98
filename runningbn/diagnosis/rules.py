"""The advice of a diagnosis: a table of rules, each with its threshold and its reason.

Severities: "error", the BatchNorm layers are at fault; "warning", useful information; "fine", neither. Reasons based on
measurements name the page of the documentation with these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..recalibration.text import counted, shown
from .thresholds import (
    ERRORS,
    FEW,
    GAIN,
    OFF,
    certain_batch,
    distances,
    gains,
    is_correlated,
    is_known,
    is_off,
    is_off_recomputed,
)  # fmt: skip

if TYPE_CHECKING:
    from .result import Diagnosis, LayerDiagnosis

ERROR, WARNING, FINE = "error", "warning", "fine"

MAX_SENTENCES = 3


@dataclass(frozen=True)
class Finding:
    """A rule that applies, with its advice.

    Attributes:
        rule: its name.
        severity: "error", "warning" or "fine".
        sentence: the advice.
    """

    rule: str
    severity: str
    sentence: str


@dataclass(frozen=True)
class Rule:
    """``find`` returns the advice if the rule applies, else None; ``when`` and ``reason`` document the rule."""

    name: str
    severity: str
    when: str
    reason: str
    find: Callable[[Diagnosis], str | None]


def findings(diagnosis: Diagnosis) -> tuple[Finding, ...]:
    """The findings of the rules that apply, in the order of `RULES`."""
    results = ((rule, rule.find(diagnosis)) for rule in RULES)
    return tuple(Finding(rule.name, rule.severity, sentence) for rule, sentence in results if sentence is not None)


def _not_finite(diagnosis: Diagnosis) -> str | None:
    names = [layer.name for layer in diagnosis.layers if not layer.finite]
    if not names:
        return None
    return f"The stored statistics of {_listed(names)} are NaN, infinite or negative: update_bn_stats recomputes them."


def _off(diagnosis: Diagnosis) -> str | None:
    wrong = [layer for layer in diagnosis.layers if is_off(layer.stored)]
    if not wrong or _without_effect(diagnosis):
        return None
    first = wrong[0]
    where = (
        f"Stored statistics are off in {len(wrong)} of {counted(len(diagnosis.layers), 'layer')}, first in "
        f"{shown(first.name)} "
        f"(mean by {first.stored.mean_shift:.2f} std, variance {1 / first.stored.var_ratio:.2g} times that of the data)"
    )
    left = [layer.name for layer in diagnosis.layers if is_off_recomputed(layer)]
    if all(layer.frozen for layer in wrong):
        remedy = "these layers are frozen; update_bn_stats(model.eval(), …) recomputes frozen layers, too"
    elif not left:
        remedy = "update_bn_stats repairs that"
    elif diagnosis.normalize == "batch":
        remedy = (
            f"after update_bn_stats with these batches {_listed(left)} would still be off, but none with "
            'normalize="population"'
        )
    else:
        remedy = f"update_bn_stats repairs that, except for {_listed(left)}"
    return f"{where}: {remedy} ({_effect(diagnosis)})."


def _off_without_effect(diagnosis: Diagnosis) -> str | None:
    wrong = [layer for layer in diagnosis.layers if is_off(layer.stored)]
    if not wrong or not _without_effect(diagnosis):
        return None
    where = f"{len(wrong)} of {counted(len(diagnosis.layers), 'layer')}, first in {shown(wrong[0].name)}"
    return (
        f"Stored statistics are off in {where}, but with recomputed ones the metric gains less than {GAIN:.0%} "
        f"({_effect(diagnosis)}): look for other causes, too."
    )


def _relies_on_batch(diagnosis: Diagnosis) -> str | None:
    values = diagnosis.metric
    if values is None:
        return None
    best = max((v for v in (values.stored, values.recomputed) if not math.isnan(v)), default=math.nan)
    if not gains(best, values.batch):
        return None
    return (
        f"The model relies on its batches: the metric is {values.batch:.4g} with batch statistics, but at most "
        f"{best:.4g} with statistics of all data; train it with RunningBatchNorm (batchnormify), which does not."
    )


def _nothing(diagnosis: Diagnosis) -> str | None:
    if any(rule.find(diagnosis) for rule in RULES if rule.find not in (_nothing, _few)):
        return None
    found = [each for layer in diagnosis.layers for each in distances(layer.stored)]
    far, error = (max(numbers) for numbers in zip(*found))
    if diagnosis.metric is None and any(_normalises_by_batch(layer) for layer in diagnosis.layers):
        conclusion = "they are not the cause. Give a metric to test whether the model relies on its batches"
    else:
        conclusion = "it is not the BatchNorm"
    return (
        f"Stored statistics differ from the data by no more than {far:.2g} std in "
        f"{counted(len(diagnosis.layers), 'layer')}, with standard errors of {error:.2g}: {conclusion}."
    )


def _normalises_by_batch(layer: LayerDiagnosis) -> bool:
    return not layer.relies_on_no_batch and not layer.frozen


def _unresolved(diagnosis: Diagnosis) -> str | None:
    if not diagnosis.layers or any(not layer.finite or is_off(layer.stored) for layer in diagnosis.layers):
        return None
    unknown = [layer for layer in diagnosis.layers if not is_known(layer.stored)]
    if not unknown:
        return None
    if diagnosis.batches == 1:
        return "A single batch has no error bars: use more batches to determine whether statistics are off."
    error = max(error for layer in unknown for _, error in distances(layer.stored))
    return (
        f"Too few data to determine whether statistics are off: in {counted(len(unknown), 'layer')}, standard errors "
        f"are up to {error:.2g} std from {counted(diagnosis.batches, 'batch')}."
    )


def _without_statistics(diagnosis: Diagnosis) -> str | None:
    if not diagnosis.without_statistics:
        return None
    return (
        f"No running statistics in {_listed(diagnosis.without_statistics)}: normalised by the batch in evaluation, "
        "too, so the output for a sample depends on the other samples of the batch."
    )


def _few(diagnosis: Diagnosis) -> str | None:
    by_batch = [layer for layer in diagnosis.layers if _normalises_by_batch(layer)]
    smallest = min(by_batch, key=certain_batch, default=None)
    if smallest is None or not certain_batch(smallest) < FEW:
        return None
    between = smallest.between
    if is_correlated(smallest):
        what = (
            f"The samples of a batch are correlated: in {shown(smallest.name)}, the effective sample size of a batch "
            f"of {between.samples_per_batch:.3g} is {between.effective_batch:.2g}"
        )
    else:
        what = f"Batches of {between.samples_per_batch:.3g} are small"
    return (
        f"{what}; for training from scratch, use RunningBatchNorm with centred weights "
        "(batchnormify(model, center_weights=True))."
    )


def _without_effect(diagnosis: Diagnosis) -> bool:
    """Whether recomputed statistics are not off, but do not improve the metric."""
    values = diagnosis.metric
    left = any(is_off_recomputed(layer) for layer in diagnosis.layers)
    return values is not None and not left and not gains(values.stored, values.recomputed)


def _effect(diagnosis: Diagnosis) -> str:
    if diagnosis.metric is not None:
        return f"the metric goes from {diagnosis.metric.stored:.4g} to {diagnosis.metric.recomputed:.4g}"
    if math.isnan(diagnosis.recomputed.relative_rms):
        return "the outputs cannot be compared: give a metric"
    return f"the output changes by {diagnosis.recomputed.relative_rms:.1%}"


def _listed(names: list[str] | tuple[str, ...]) -> str:
    listed = [shown(name) for name in names]
    return ", ".join(listed) if len(listed) <= 3 else f"{', '.join(listed[:2])} and {len(listed) - 2} more"


RULES = (
    Rule(
        "not_finite",
        ERROR,
        "A stored mean or variance is NaN or infinite, or a variance negative.",
        "In evaluation, the output of such a channel is wrong: mostly NaN or a constant.",
        _not_finite,
    ),
    Rule(
        "off",
        ERROR,
        f"In some layer, stored mean or std are off by more than {OFF:g} std, and by {ERRORS} standard errors.",
        "The moving average of nn.BatchNorm has errors of this size with fewer than about 8 independent values per "
        "batch, and smaller ones with more. Recomputed statistics mostly restore the accuracy: pages Accuracy and "
        "Recalibrating BatchNorm.",
        _off,
    ),
    Rule(
        "off_without_effect",
        WARNING,
        f"The same, but correct recomputed statistics improve the metric by less than {GAIN:.0%}.",
        "If correct statistics do not help, the model has another problem, or none.",
        _off_without_effect,
    ),
    Rule(
        "relies_on_batch",
        ERROR,
        f"With batch statistics the metric is more than {GAIN:.0%} better than with stored and recomputed ones.",
        "A model trained with nn.BatchNorm on batches of 1 scores well only with batch statistics, and "
        "update_bn_stats helps little; RunningBatchNorm scores the same in both modes: page Accuracy.",
        _relies_on_batch,
    ),
    Rule(
        "nothing",
        FINE,
        "No rule except `few` applies, and the standard errors are small enough.",
        "The statistics then match the layers' inputs in evaluation.",
        _nothing,
    ),
    Rule(
        "unresolved",
        WARNING,
        f"No layer is significantly off, but one seems off by {OFF:g} std, or {2 * OFF:g} std would be insignificant.",
        "More data make standard errors smaller.",
        _unresolved,
    ),
    Rule(
        "without_statistics",
        WARNING,
        "A BatchNorm layer has no running statistics, as if made with track_running_stats=False.",
        "The output for a sample in evaluation depends on the other samples of the batch.",
        _without_statistics,
    ),
    Rule(
        "few",
        WARNING,
        f"The effective sample size of a batch is below {FEW} in a layer that normalises by the batch in training.",
        "RunningBatchNorm is more accurate with batches of 1, 2 and 4, and about as accurate from 8 on; much more "
        "accurate if a batch has images of one class: page Accuracy.",
        _few,
    ),
)
