"""merge_statistics: pool the statistics of several models, from their state dicts alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layers.buffers import CHECKPOINTED, SETTLED, VIEW, are_settled, is_narrow
from ..ops.law import Law
from ..ops.state import Sums, moments, move_pivot, unbiased
from .summary import batches_tracked

_TRACKED = "num_batches_tracked"
_MAX_BATCHES = 2**62  # half the range of int64, so that counting can continue
_Layer = dict[str, Tensor]  # the statistics of one layer in one state dict, by the names of its buffers


def merge_statistics(
    state_dicts: Iterable[Mapping[str, Any]], weights: Iterable[float] | None = None
) -> dict[str, Tensor]:
    """Merge the statistics of all BatchNorm layers into those of all data together; for federated averaging.

    With weights p_k of the states, Σ p_k = 1, the mean and the variance of the mixture of all data are, per channel::

        mean = sum_k p_k * mean_k
        var  = sum_k p_k * (var_k + (mean_k - mean)**2)

    Averaging `running_var` omits the second term, the variance between the clients. If the clients have different kinds
    of data, this is most of the variance.

    The state of this library's layers consists of sums over the data, so it is merged exactly: layers trained with
    ``momentum=None``, each on a part of the data, give the state of one layer trained on all data, and training can
    continue from it. `running_var` is corrected as in the layers. For torch's layers, the formula above uses
    `running_var` as it is, with the correction n/(n − 1) of each part, which causes an error of that size.

    Data that several states have in common, as from an earlier round, count once for each state. To avoid this, call
    ``reset_running_stats()`` on the layers at the start of a round.

    A state without data contributes nothing: an empty state of this library's layers, or mean 0, variance 1 and no
    batches tracked.

    Args:
        state_dicts: the result of ``model.state_dict()`` for several models of one architecture.
        weights: of each state, ≥ 0: the number of elements per channel or samples of its statistics, or anything
            proportional to that. None: this library's layers are weighted by their effective number of elements,
            (Σw)²/Σw² per channel. torch's layers have equal weights, and so do this library's if the states of all
            were seeded from statistics of unknown weight.

    Returns:
        The statistics, as a dict with `running_mean`, `running_var`, `num_batches_tracked` (the sum), and the state of
        this library's layers, in the dtypes and on the devices of the first state. Parameters, and the buffers that
        training keeps about gradients, are not merged: ``model.load_state_dict({**averaged, **merged})``.

    Raises:
        TypeError: if a state is not a mapping, for example a model.
        ValueError: if there is no state or no statistics in them; if layers or channels differ; if statistics are not
            finite; if weights are not one finite number ≥ 0 for each state, or all zero, or missing where a layer was
            seeded from statistics of unknown weight in some of the states.

    Example:
        Two clients: one with a single element 0, one with three elements 4; the variance within each is 0:

        >>> import torch
        >>> from runningbn import merge_statistics
        >>> states = [{"running_mean": torch.tensor([x]), "running_var": torch.zeros(1)} for x in (0.0, 4.0)]
        >>> merge_statistics(states, weights=[1, 3])
        {'running_mean': tensor([3.]), 'running_var': tensor([3.])}
    """
    states = _listed(state_dicts)
    given = None if weights is None else _checked(weights, len(states))
    layers = [_layers(number, state) for number, state in enumerate(states)]
    _check_alike(layers)
    used = [number for number in range(len(states)) if given is None or given[number]]
    given = None if given is None else [given[number] for number in used]
    merged: dict[str, Tensor] = {}
    for prefix, first in layers[0].items():
        _check_finite(prefix, {number: layers[number][prefix] for number in used})
        parts = [layers[number][prefix] for number in used]
        result = _merge_states(prefix, parts, given) if "sums" in first else _merge_views(parts, given)
        merged.update({prefix + name: result[name].to(first[name]) for name in first})
    return merged


# --------------------------------------------------------------------------------------------------------------- inputs


def _listed(state_dicts: Any) -> list[Mapping[str, Any]]:
    expected = "merge_statistics: expected a sequence of state dicts, as model.state_dict() gives them"
    if isinstance(state_dicts, (Mapping, str)) or not isinstance(state_dicts, Iterable):
        raise TypeError(f"{expected}, got {type(state_dicts).__name__}")
    states = list(state_dicts)
    for number, state in enumerate(states):
        if not isinstance(state, Mapping):
            raise TypeError(f"{expected}, got {type(state).__name__} at {number}")
    if not states:
        raise ValueError(f"{expected}, got none")
    return states


def _checked(weights: Iterable[float], number: int) -> list[float]:
    given = [float(weight) for weight in weights]
    if len(given) != number:
        raise ValueError(f"merge_statistics: expected a weight for each of {number} states, got {len(given)}")
    if not all(math.isfinite(weight) and weight >= 0 for weight in given) or not any(given):
        raise ValueError(f"merge_statistics: weights have to be finite and ≥ 0, and not all 0, got {given}")
    return given


def _layers(number: int, state: Mapping[str, Any]) -> dict[str, _Layer]:
    """The statistics of every layer of a state dict, by the prefix of its keys."""
    found = {}
    for key in state:
        prefix = key.removesuffix("running_mean") if isinstance(key, str) else key
        if prefix == key or prefix[-1:] not in ("", ".") or not isinstance(state.get(f"{prefix}running_var"), Tensor):
            continue
        tensors = {name: state.get(prefix + name) for name in (*CHECKPOINTED, *VIEW, _TRACKED)}
        layer = {name: tensor.detach() for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
        shape = layer["running_mean"].shape
        if len(shape) != 1 or layer["running_var"].shape != shape or layer["running_mean"].is_meta:
            raise ValueError(
                f"merge_statistics: state {number}, {prefix}running_mean: expected values of the shape (C,), and as "
                f"many of running_var, got {tuple(shape)} and {tuple(layer['running_var'].shape)}"
            )
        own = [layer[name] for name in CHECKPOINTED if name in layer]
        # An incomplete state, or one in 16 bits, is ignored, as in loading.
        if len(own) < len(CHECKPOINTED) or any(part.shape != shape or is_narrow(part) for part in own):
            layer = {name: tensor for name, tensor in layer.items() if name not in CHECKPOINTED}
        found[prefix] = layer
    if not found:
        raise ValueError(
            f"merge_statistics: state {number} has no BatchNorm statistics, no running_mean beside a running_var"
        )
    return found


def _check_alike(layers: Sequence[dict[str, _Layer]]) -> None:
    first = {prefix + name: tensor.shape for prefix, layer in layers[0].items() for name, tensor in layer.items()}
    for number, found in enumerate(layers[1:], start=1):
        keys = {prefix + name: tensor.shape for prefix, layer in found.items() for name, tensor in layer.items()}
        for one, other, a, b in ((first, keys, 0, number), (keys, first, number, 0)):
            if missing := [key for key in one if key not in other]:
                raise ValueError(f"merge_statistics: state {b} has no {missing[0]!r}, which state {a} has")
        for key, shape in keys.items():
            if shape != first[key]:
                raise ValueError(
                    f"merge_statistics: {key!r} has the shape {tuple(first[key])} in state 0 and {tuple(shape)} in "
                    f"state {number}"
                )


def _check_finite(prefix: str, parts: Mapping[int, _Layer]) -> None:
    for number, part in parts.items():
        for name, tensor in part.items():
            if name != _TRACKED and not tensor.isfinite().all():
                raise ValueError(f"merge_statistics: state {number}, {prefix}{name}: expected finite numbers")


# ------------------------------------------------------------------------------------------------------------ the merge


def _wide(parts: Sequence[_Layer], name: str) -> Tensor:
    """A buffer of all states, (K, C), float64, on the CPU, since not every device has float64."""
    return torch.stack([part[name].to("cpu", torch.float64) for part in parts])


def _sums(wide: dict[str, Tensor]) -> Sums:
    """The linear states, each part (K, C)."""
    return Sums(*(wide[name] for name in Sums._fields))


def _shares(weights: Tensor) -> Tensor:
    """Weights (K, C) normalised to the sum 1 over K; 0 if all are 0."""
    return weights / weights.sum(0).clamp_min(torch.finfo(weights.dtype).tiny)


def _batches(parts: Sequence[_Layer], contributes: Tensor) -> Tensor:
    numbers = [batches_tracked(part.get(_TRACKED)) or 0 for part in parts]
    total = sum(number for number, does in zip(numbers, contributes.any(1).tolist()) if does)
    return torch.tensor(min(total, _MAX_BATCHES), device="cpu")


def _merge_views(parts: Sequence[_Layer], given: Sequence[float] | None) -> _Layer:
    """Merge layers that have only mean and variance."""
    means, variances = (_wide(parts, name) for name in VIEW)
    weights = torch.ones_like(means) if given is None else means.new_tensor(given)[:, None]
    weights = weights * means.new_tensor([[not _untouched(part)] for part in parts])
    shares = _shares(weights.expand_as(means))
    mean = (shares * means).sum(0)
    var = (shares * (variances + (means - mean).square())).sum(0)
    nothing = shares.sum(0) == 0
    return {
        "running_mean": torch.where(nothing, means[0], mean),
        "running_var": torch.where(nothing, variances[0], var),
        _TRACKED: _batches(parts, shares > 0),
    }


def _untouched(part: _Layer) -> bool:
    never_updated = batches_tracked(part.get(_TRACKED)) == 0
    return never_updated and bool((part["running_mean"] == 0).all() and (part["running_var"] == 1).all())


def _merge_states(prefix: str, parts: Sequence[_Layer], given: Sequence[float] | None) -> _Layer:
    """Merge states of this library's layers: scale each by its weight, and add."""
    wide = {name: _wide(parts, name) for name in (*CHECKPOINTED, *VIEW)}
    count, filled = wide["count"], wide["count"] > 0
    weights = _weights(prefix, wide, given) * filled
    # A state is an average over batches, and `count` is its average number of elements per batch. So the weights of the
    # states are proportional to weights/count; for cumulative averages over t batches, this is the share of t.
    gains = _shares(torch.where(filled, weights / count, 0))
    means, _ = moments(_sums(wide))
    # The pivot is rounded to its stored dtype first; otherwise the sums would be relative to a different pivot.
    pivot = (_shares(weights) * means).sum(0).to(parts[0]["shift"].dtype).double()
    moved = move_pivot(_sums(wide), pivot)
    sums = Sums(pivot, *((gains * part).sum(0) for part in (moved.sums, moved.sqrs, moved.count)))
    contributes = gains > 0
    merged = {
        **sums._asdict(),
        "count_sqrs": (gains.square() * wide["count_sqrs"]).sum(0),
        "debias": (gains * wide["debias"]).sum(0),
        "samples": (contributes * wide["samples"]).sum(0).clamp_max(SETTLED),
        "steps": (contributes * wide["steps"]).sum(0).clamp_max(SETTLED),
        _TRACKED: _batches(parts, contributes),
    }
    mean, var = moments(sums)
    if _corrects(wide):
        var = unbiased(var, sums.count, merged["count_sqrs"])
    else:
        law = Law()
        var = torch.where(merged["samples"] < law.warmup_samples, var.clamp_min(law.variance_floor), var)
    nothing = ~contributes.any(0)
    merged["running_mean"] = torch.where(nothing, wide["running_mean"][0], mean)
    merged["running_var"] = torch.where(nothing, wide["running_var"][0], var)
    return merged


def _weights(prefix: str, wide: dict[str, Tensor], given: Sequence[float] | None) -> Tensor:
    """Weights, (K, C): as given, or the effective numbers of elements, or 1 if none of these are known."""
    count, count_sqrs = wide["count"], wide["count_sqrs"]
    if given is not None:
        return count.new_tensor(given)[:, None].expand_as(count)
    unknown = are_settled(wide["samples"]) | ((count > 0) & (count_sqrs <= 0))
    if not unknown.any():
        return count.square() / count_sqrs.clamp_min(torch.finfo(count.dtype).tiny)
    if (unknown | (count == 0)).all():
        return torch.ones_like(count)
    raise ValueError(
        f"merge_statistics: expected weights, since {prefix.removesuffix('.') or 'the layer'} was seeded from "
        "statistics of unknown weight in some of the states and not in others"
    )


def _corrects(wide: dict[str, Tensor]) -> bool:
    """Whether `running_var` has Bessel's correction, as in PreciseBatchNorm, or none, as in RunningBatchNorm.

    A state dict does not contain the class of the layer, so this is detected from `running_var`. If the two cannot be
    distinguished, the correction is below rounding.
    """
    _, var = moments(_sums(wide))
    corrected = unbiased(var, wide["count"], wide["count_sqrs"])
    to_corrected, to_biased = ((wide["running_var"] - each).abs() for each in (corrected, var))
    filled = wide["count"] > 0
    return bool((filled & (to_corrected < to_biased)).sum() > (filled & (to_biased < to_corrected)).sum())
