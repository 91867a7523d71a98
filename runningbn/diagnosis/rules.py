"""What a diagnosis advises, and why: one table of rules, each with its threshold and its reason.

A rule of the severity "error" says that the BatchNorm layers are at fault; "warning" is worth knowing; "fine" is
neither. Reasons that rest on measurements name the page that has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..recalibration.text import counted
from .evidence import ERRORS, FEW, GAIN, OFF, certain_batch, distances, gains, is_correlated, is_known, is_left, is_off

if TYPE_CHECKING:
    from .result import Diagnosis

ERROR, WARNING, FINE = "error", "warning", "fine"

MOST_SENTENCES = 3


@dataclass(frozen=True)
class Finding:
    """A rule that applies, and what it says here.

    Attributes:
        rule: its name.
        severity: "error", "warning" or "fine".
        sentence: of advice.
    """

    rule: str
    severity: str
    sentence: str


@dataclass(frozen=True)
class Rule:
    """``find`` gives a sentence where the rule applies, else None; ``when`` and ``reason`` are for its readers."""

    name: str
    severity: str
    when: str
    reason: str
    find: Callable[[Diagnosis], str | None]


def findings(diagnosis: Diagnosis) -> tuple[Finding, ...]:
    """What the rules say, in the order of `RULES`."""
    said = ((rule, rule.find(diagnosis)) for rule in RULES)
    return tuple(Finding(rule.name, rule.severity, sentence) for rule, sentence in said if sentence is not None)


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
        f"{_shown(first.name)} "
        f"(mean by {first.stored.mean_shift:.2f} std, variance {1 / first.stored.var_ratio:.2g} times that of the data)"
    )
    left = [layer.name for layer in diagnosis.layers if is_left(layer)]
    if all(layer.frozen for layer in wrong):
        remedy = "frozen layers keep theirs, and update_bn_stats(model.eval(), …) recomputes them, too"
    elif not left:
        remedy = "update_bn_stats repairs that"
    elif diagnosis.normalize == "batch":
        remedy = (
            f"after update_bn_stats with these batches {_listed(left)} would still be off, and with "
            'normalize="population" none'
        )
    else:
        remedy = f"update_bn_stats repairs that, but for {_listed(left)}"
    return f"{where}: {remedy} ({_effect(diagnosis)})."


def _off_without_effect(diagnosis: Diagnosis) -> str | None:
    wrong = [layer for layer in diagnosis.layers if is_off(layer.stored)]
    if not wrong or not _without_effect(diagnosis):
        return None
    where = f"{len(wrong)} of {counted(len(diagnosis.layers), 'layer')}, first in {_shown(wrong[0].name)}"
    return (
        f"Stored statistics are off in {where}, but by recomputed ones the metric gains less than {GAIN:.0%} "
        f"({_effect(diagnosis)}): look elsewhere, too."
    )


def _relies_on_batch(diagnosis: Diagnosis) -> str | None:
    values = diagnosis.metric
    if values is None:
        return None
    best = max((v for v in (values.stored, values.recomputed) if not math.isnan(v)), default=math.nan)
    if not gains(best, values.batch):
        return None
    return (
        f"The model relies on its batches: normalised by them the metric is {values.batch:.4g}, and with statistics of "
        f"all data no more than {best:.4g}; train it with RunningBatchNorm (batchnormify), which relies on none."
    )


def _nothing(diagnosis: Diagnosis) -> str | None:
    silent = (_not_finite, _off, _off_without_effect, _relies_on_batch, _unresolved, _without_statistics)
    if any(find(diagnosis) for find in silent):
        return None
    found = [each for layer in diagnosis.layers for each in distances(layer.stored)]
    far, error = (max(numbers) for numbers in zip(*found))
    return (
        f"Stored statistics differ from the data by no more than {far:.2g} std in "
        f"{counted(len(diagnosis.layers), 'layer')}, with standard errors of {error:.2g}: it is not the BatchNorm."
    )


def _unresolved(diagnosis: Diagnosis) -> str | None:
    if not diagnosis.layers or any(not layer.finite or is_off(layer.stored) for layer in diagnosis.layers):
        return None
    unknown = [layer for layer in diagnosis.layers if not is_known(layer.stored)]
    if not unknown:
        return None
    if diagnosis.batches == 1:
        return "A single batch has no error bars: take more to tell whether statistics are off."
    error = max(error for layer in unknown for _, error in distances(layer.stored))
    return (
        f"Too few data to tell whether statistics are off: in {counted(len(unknown), 'layer')}, standard errors are up "
        f"to {error:.2g} std from {counted(diagnosis.batches, 'batch')}."
    )


def _without_statistics(diagnosis: Diagnosis) -> str | None:
    if not diagnosis.without_statistics:
        return None
    return (
        f"{_listed(diagnosis.without_statistics)} keep no running statistics and normalise by the batch in evaluation, "
        "too, so the output depends on what else is in the batch."
    )


def _few(diagnosis: Diagnosis) -> str | None:
    by_batch = [layer for layer in diagnosis.layers if not layer.relies_on_no_batch and not layer.frozen]
    smallest = min(by_batch, key=certain_batch, default=None)
    if smallest is None or not certain_batch(smallest) < FEW:
        return None
    between = smallest.between
    if is_correlated(smallest):
        what = (
            f"The samples of a batch are alike: in {_shown(smallest.name)}, {between.samples_per_batch:.3g} count for "
            f"{between.effective_batch:.2g}"
        )
    else:
        what = f"Batches of {between.samples_per_batch:.3g} are small"
    return (
        f"{what}; for training from scratch, take RunningBatchNorm with centred weights "
        "(batchnormify(model, center_weights=True))."
    )


def _without_effect(diagnosis: Diagnosis) -> bool:
    """Whether the metric tells that recomputed statistics, which are right, do not help."""
    values = diagnosis.metric
    left = any(is_left(layer) for layer in diagnosis.layers)
    return values is not None and not left and not gains(values.stored, values.recomputed)


def _effect(diagnosis: Diagnosis) -> str:
    if diagnosis.metric is not None:
        return f"the metric goes from {diagnosis.metric.stored:.4g} to {diagnosis.metric.recomputed:.4g}"
    if math.isnan(diagnosis.recomputed.relative_rms):
        return "the outputs cannot be compared: give a metric"
    return f"the output changes by {diagnosis.recomputed.relative_rms:.1%}"


def _shown(name: str) -> str:
    """Of a model that is itself the layer, the name is empty."""
    return name or "the model itself"


def _listed(names: list[str] | tuple[str, ...]) -> str:
    shown = [_shown(name) for name in names]
    return ", ".join(shown) if len(shown) <= 3 else f"{', '.join(shown[:2])} and {len(shown) - 2} more"


RULES = (
    Rule(
        "not_finite",
        ERROR,
        "A stored mean or variance is NaN or infinite, or a variance negative.",
        "Evaluation gives NaN there, whatever comes in.",
        _not_finite,
    ),
    Rule(
        "off",
        ERROR,
        f"In some layer, stored mean or std are off by more than {OFF:g} std, and by {ERRORS} standard errors.",
        "The moving average of nn.BatchNorm is itself that noisy with batches below 8, not with larger ones. "
        "With recomputed statistics a model mostly comes back: pages Accuracy and Recalibrating BatchNorm.",
        _off,
    ),
    Rule(
        "off_without_effect",
        WARNING,
        f"The same, but the metric gains less than {GAIN:.0%} by recomputed statistics that are right.",
        "What does not gain by right statistics has another fault, or none.",
        _off_without_effect,
    ),
    Rule(
        "relies_on_batch",
        ERROR,
        f"With batch statistics the metric is more than {GAIN:.0%} better than with stored and recomputed ones.",
        "Trained by nn.BatchNorm on batches of 1, a model scores well only normalised by its batches, and "
        "update_bn_stats brings little back; RunningBatchNorm does as well in both modes: page Accuracy.",
        _relies_on_batch,
    ),
    Rule(
        "nothing",
        FINE,
        "None of the rules but `few` applies, and error bars are small enough to tell.",
        "Evaluation then normalises by what it shows to the layers.",
        _nothing,
    ),
    Rule(
        "unresolved",
        WARNING,
        f"No layer is surely off, but one of {OFF:g} std may be there, or one of {2 * OFF:g} std would not be seen.",
        "More data make standard errors smaller.",
        _unresolved,
    ),
    Rule(
        "without_statistics",
        WARNING,
        "A BatchNorm layer has track_running_stats=False.",
        "What evaluation gives for a sample depends on the others of its batch.",
        _without_statistics,
    ),
    Rule(
        "few",
        WARNING,
        f"A batch counts for fewer than {FEW} independent samples in a layer that trains by its batch.",
        "RunningBatchNorm is ahead with batches of 1, 2 and 4, far ahead where these 4 are of one class, and level "
        "with the others from 8 on: page Accuracy.",
        _few,
    ),
)
