"""Criteria for defects in the statistics of a layer, by its numbers alone.

A criterion is a function from a layer to the channels for which it holds. With the severity "error", evaluation is
wrong for any model; a "warning" should be checked and may be intended.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.state import moments
from .layers import SavedLayer, StateDict

ERROR, WARNING = "error", "warning"

# An initial variance of 1 decays to this in 262 batches of constant input, at momentum 0.1.
CONSTANT_VARIANCE = 1e-12
# The weight is multiplied by (x − mean)·rstd, of order 1. Below this, the product is lost to float32 rounding when a
# bias of order 1 is added.
ZERO_WEIGHT = 1e-7
# A standard deviation 100 times the median of the layer.
HUGE_VARIANCE_RATIO = 1e4
# In standard deviations. bfloat16 has 8 significant bits, so above 2⁸ x − mean has no correct digits.
FAR_MEAN = 256.0
# Tolerated difference between running_mean and the mean of the state: in standard deviations, which is far above
# rounding, plus 100 times the float32 rounding of the mean, for means far from 0.
STATE_MEAN = 1e-3
STATE_ROUNDING = 100 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Criterion:
    """``find`` returns the channels of a layer for which it holds, (C,) bool; ``sentence`` explains the criterion."""

    name: str
    severity: str
    sentence: str
    find: Callable[[SavedLayer], Tensor]


@dataclass(frozen=True)
class Finding:
    """A criterion that holds for a layer, and the indices of the channels."""

    criterion: Criterion
    indices: tuple[int, ...]


Judged = list[tuple[SavedLayer, list[Finding]]]


def mean_over_std(layer: SavedLayer) -> Tensor:
    """|mean|/std, (C,), with std = (var + eps)^½; NaN where var + eps is negative."""
    return layer.mean.abs() / (layer.var + layer.eps).sqrt()


def spread(values: Tensor) -> dict[str, float | None]:
    """Minimum, median and maximum of the finite values; None if there are none."""
    finite = values[values.isfinite()]
    if not len(finite):
        return {"min": None, "median": None, "max": None}
    return {"min": float(finite.min()), "median": float(finite.median()), "max": float(finite.max())}


def judge(state_dict: StateDict) -> Judged:
    """The findings of every layer."""
    return [(layer, findings(layer)) for layer in state_dict.layers]


def findings(layer: SavedLayer) -> list[Finding]:
    """The findings of a layer, in the order of `CRITERIA`."""
    found = [(criterion, criterion.find(layer).nonzero().flatten().tolist()) for criterion in CRITERIA]
    return [Finding(criterion, tuple(indices)) for criterion, indices in found if indices]


def _all_or_none(layer: SavedLayer, concerned: bool) -> Tensor:
    return torch.full_like(layer.mean, concerned, dtype=torch.bool)


def _any_not_finite(layer: SavedLayer, *parts: Tensor | None) -> Tensor:
    return torch.stack([_all_or_none(layer, False), *(~part.isfinite() for part in parts if part is not None)]).any(0)


def _not_finite(layer: SavedLayer) -> Tensor:
    return _any_not_finite(layer, layer.mean, layer.var)


def _affine_not_finite(layer: SavedLayer) -> Tensor:
    return _any_not_finite(layer, layer.weight, layer.bias)


def _negative_variance(layer: SavedLayer) -> Tensor:
    return layer.var < 0


def _untouched(layer: SavedLayer) -> Tensor:
    return _all_or_none(layer, bool((layer.mean == 0).all() and (layer.var == 1).all()))


def _identical_variance(layer: SavedLayer) -> Tensor:
    identical = layer.channels > 1 and bool((layer.var == layer.var[0]).all())
    return _all_or_none(layer, identical) & ~_untouched(layer)


def _no_variance(layer: SavedLayer) -> Tensor:
    return (layer.var >= 0) & (layer.var < CONSTANT_VARIANCE)


def _constant_input(layer: SavedLayer) -> Tensor:
    return _no_variance(layer) & (layer.least_var <= CONSTANT_VARIANCE)


def _variance_underflow(layer: SavedLayer) -> Tensor:
    return _no_variance(layer) & (layer.least_var > CONSTANT_VARIANCE)


def _variance_below_eps(layer: SavedLayer) -> Tensor:
    return (layer.var >= CONSTANT_VARIANCE) & (layer.var < layer.eps)


def _huge_variance(layer: SavedLayer) -> Tensor:
    typical = layer.var[layer.var.isfinite() & (layer.var > 0)]
    if not len(typical):
        return _all_or_none(layer, False)
    return layer.var.isfinite() & (layer.var > HUGE_VARIANCE_RATIO * typical.median())


def _far_mean(layer: SavedLayer) -> Tensor:
    far = mean_over_std(layer)
    # For a constant input the standard deviation is meaningless.
    return far.isfinite() & (far > FAR_MEAN) & ~_no_variance(layer)


def _zero_weight(layer: SavedLayer) -> Tensor:
    return _all_or_none(layer, False) if layer.weight is None else layer.weight.abs() < ZERO_WEIGHT


def _behind(layer: SavedLayer) -> Tensor:
    steps = layer.state.get("steps")
    return _all_or_none(layer, False) if steps is None else steps < steps.max()


def _state_not_finite(layer: SavedLayer) -> Tensor:
    return _any_not_finite(layer, *layer.state.values(), *layer.training_state.values())


def _state_disagrees(layer: SavedLayer) -> Tensor:
    if not layer.state:
        return _all_or_none(layer, False)
    mean, _ = moments(layer.sums)
    allowed = STATE_MEAN * (layer.var + layer.eps).sqrt() + STATE_ROUNDING * layer.mean.abs()
    # An empty state has no mean to compare.
    return (layer.sums.count > 0) & ((mean - layer.mean).abs() > allowed)


def _unusable_state(layer: SavedLayer) -> Tensor:
    return _all_or_none(layer, layer.unusable_state)


CRITERIA = (
    Criterion(
        "not_finite",
        ERROR,
        "running_mean or running_var is NaN or infinite: the output in evaluation is NaN or a constant.",
        _not_finite,
    ),
    Criterion("affine_not_finite", ERROR, "weight or bias is NaN or infinite: so is the output.", _affine_not_finite),
    Criterion(
        "negative_variance",
        ERROR,
        "running_var is negative: evaluation divides by the root of a number that is negative or far too small.",
        _negative_variance,
    ),
    Criterion(
        "untouched",
        WARNING,
        "mean 0 and variance 1 in every channel: the statistics were never updated, so evaluation does not normalise.",
        _untouched,
    ),
    Criterion(
        "identical_variance",
        WARNING,
        "running_var is the same for all channels: it is probably an initial value, not from data.",
        _identical_variance,
    ),
    Criterion(
        "constant_input",
        WARNING,
        f"running_var is below {CONSTANT_VARIANCE:g}: the input was a constant, so the channel is dead.",
        _constant_input,
    ),
    Criterion(
        "variance_underflow",
        WARNING,
        "running_var is 0 in a dtype that has no numbers below 6e-8, as float16: the channel may be dead, or have a "
        "small variance in float32, which this file does not show.",
        _variance_underflow,
    ),
    Criterion(
        "variance_below_eps",
        WARNING,
        "running_var is below eps: the output varies less than it should, and depends on eps.",
        _variance_below_eps,
    ),
    Criterion(
        "huge_variance",
        WARNING,
        f"running_var is over {HUGE_VARIANCE_RATIO:g} times the median of its layer, as after a few batches with very "
        "large inputs.",
        _huge_variance,
    ),
    Criterion(
        "far_mean", WARNING, f"|mean|/std is over {FAR_MEAN:g}: in bfloat16 no digits are left of x - mean.", _far_mean
    ),
    Criterion(
        "zero_weight",
        WARNING,
        f"|weight| is below {ZERO_WEIGHT:g}: the output is the bias for any input, so the channel is dead.",
        _zero_weight,
    ),
    Criterion(
        "behind",
        WARNING,
        "fewer updates than in the layer's other channels: in the other batches, the inputs were not finite.",
        _behind,
    ),
    Criterion(
        "state_not_finite",
        WARNING,
        "the state from which the statistics are computed is not finite: evaluation may work, further training will "
        "not.",
        _state_not_finite,
    ),
    Criterion(
        "state_disagrees",
        WARNING,
        "running_mean differs from the mean of the state: the next training step will continue from the state.",
        _state_disagrees,
    ),
    Criterion(
        "unusable_state",
        WARNING,
        "the state is incomplete or in 16 bits: loading seeds a new state from running_mean and running_var.",
        _unusable_state,
    ),
)
