"""Choose the layers to centre, with the reason why others are not centred."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from ..layers.buffers import are_initial
from ..recalibration.batches import Forward
from ..recalibration.selection import not_initialised
from ..recalibration.text import counted, grouped, shown
from .layers import CENTERED, CenteredWeights, centered_class, filter_means, has_own_forward, torch_class
from .uses import Uses, trace_uses

Where = Callable[[str, nn.Module], bool]

# Layers that remove a constant offset per channel.
NORMALISATIONS = (_BatchNorm, _InstanceNorm, nn.GroupNorm)

logger = logging.getLogger("runningbn")


@dataclass
class Plan:
    """The layers of a model to centre.

    Attributes:
        offsets: the layers to centre, each with the offsets of its filters.
        left_alone: the other layers by name, each with the reason.
        warns: whether a layer feeds only normalisation layers but is left alone for its class, hooks or weight.
    """

    offsets: dict[nn.Module, Tensor] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)
    warns: bool = False

    def apply(self) -> None:
        """Centre the layers and log the result."""
        for layer, offset in self.offsets.items():
            layer.__class__ = centered_class(type(layer))
            layer.register_buffer("weight_offset", offset)
        level = logging.WARNING if self.warns or not self.offsets else logging.INFO
        report(level, f"center_weights: {counted(len(self.offsets), 'layer')} centred", self.left_alone)


@dataclass
class Choice:
    """The request. None means all layers that the model has when the decision is made.

    Attributes:
        layers: layers that may be centred.
        normalisations: the normalisation layers that they must feed.
        depthwise: whether depthwise convolutions may be centred.
    """

    layers: list[nn.Module] | None = None
    normalisations: list[nn.Module] | None = None
    depthwise: bool = False

    def layers_in(self, model: nn.Module) -> list[nn.Module]:
        """The layers that may be centred and are not centred yet."""
        chosen = None if self.layers is None else set(self.layers)
        layers = layers_of(model, tuple(CENTERED), lambda name, layer: chosen is None or layer in chosen)
        return [layer for layer in layers if not isinstance(layer, CenteredWeights)]

    def plan(self, model: nn.Module, forward: Forward, batch: Any) -> Plan:
        """Decide by one forward pass. The model is restored afterwards."""
        if (reason := not_initialised(model)) is not None:
            raise RuntimeError(f"center_weights: {reason}")
        layers, normalisations = self.layers_in(model), self.normalisations
        if normalisations is None:
            normalisations = layers_of(model, NORMALISATIONS)
        owners = Counter(id(p) for module in model.modules() for p in set(module._parameters.values()))
        # Before the pass, in which sharded weights are gathered.
        built = {layer: _reason_in_build(layer, owners) for layer in layers}
        uses = trace_uses(model, layers, normalisations, forward, batch)
        plan, names = Plan(), names_of(model)
        for layer in layers:
            reason = _reason_in_use(layer, uses) or _reason_in_shape(layer, self.depthwise)
            if reason is None:
                reason = built[layer] or _reason_in_weight(layer, uses) or _reason_in_class(layer)
                plan.warns |= reason is not None
            if reason is None:
                plan.offsets[layer] = _offset(layer, uses)
            else:
                plan.left_alone[names[layer]] = reason
        return plan


def _reason_in_use(layer: nn.Module, uses: Uses) -> str | None:
    """Why a layer does not feed only normalisation layers, or None."""
    outputs = uses.outputs[layer]
    if not outputs:
        return "it was not called"
    others = sorted(set[str]().union(*(output.used_by for output in outputs)))
    fed = [output for output in outputs if output.normalised_by]
    if others or len(fed) < len(outputs):
        return f"its output goes to {', '.join(others) or 'nothing'}{', too' if fed else ''}"
    return None


def _reason_in_shape(layer: Any, depthwise: bool) -> str | None:
    """Why the filters of a layer should not be centred, or None."""
    groups = getattr(layer, "groups", 1)
    if groups > 1 and groups == layer.in_channels and not depthwise:
        return "it is depthwise"
    filters = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return "its filters have a single weight" if layer.weight.numel() == filters else None


def _reason_in_build(layer: nn.Module, owners: Mapping[int, int]) -> str | None:
    """Why a layer cannot be centred, or None."""
    if parametrize.is_parametrized(layer):
        return "it is parametrised"
    if "forward" in vars(layer):
        return "it has a custom forward"
    cls, base = type(layer), torch_class(type(layer))
    if has_own_forward(cls):
        return f"{cls.__name__} is a {base.__name__} with a forward of its own"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has hooks"
    weight = layer._parameters.get("weight")
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    if layer.weight is not weight:
        return "its weight is not the parameter of that name"
    if hasattr(layer, "weight_offset"):
        return "it has an attribute weight_offset"
    return "its weight is shared with another layer" if owners[id(weight)] > 1 else None


def _reason_in_class(layer: nn.Module) -> str | None:
    """Why a layer cannot change its class, or None. It is tried here, where nothing else has been changed yet."""
    cls = type(layer)
    try:
        centered = centered_class(cls)
    except Exception as error:
        return f"no class can be derived from {cls.__name__}: {error}"
    try:
        layer.__class__ = centered
        layer.__class__ = cls
    except Exception as error:
        return f"its class cannot be changed: {error}"
    return None


def _reason_in_weight(layer: nn.Module, uses: Uses) -> str | None:
    """Which other operations use the weight, which would no longer be the filters, or None."""
    others = uses.weight_used_by[layer]
    return f"its weight is also used by {', '.join(sorted(others))}" if others else None


def _offset(layer: nn.Module, uses: Uses) -> Tensor:
    """The offsets, (O,): 0 for a layer that feeds only fresh layers, the means of its filters otherwise."""
    # An inference tensor could not be loaded into.
    with torch.inference_mode(False), torch.no_grad():
        means = filter_means(layer)
        fed = set[nn.Module]().union(*(output.normalised_by for output in uses.outputs[layer]))
        return torch.zeros_like(means) if all(map(_is_fresh, fed)) else means


def _is_fresh(layer: nn.Module) -> bool:
    """Whether a normalisation layer has running statistics that were never updated."""
    mean, var, batches = (getattr(layer, name, None) for name in ("running_mean", "running_var", "num_batches_tracked"))
    if mean is None or var is None or batches is None or mean.is_meta:
        return False
    return are_initial(mean, var, batches)


def layers_of(model: nn.Module, kinds: tuple[type[nn.Module], ...], where: Where | None = None) -> list[nn.Module]:
    """The layers of some classes, each once; if `where` is given, those for which it returns True for any name."""
    named = model.named_modules(remove_duplicate=False)
    found = [layer for name, layer in named if isinstance(layer, kinds) and (where is None or where(name, layer))]
    return list(dict.fromkeys(found))


def names_of(model: nn.Module) -> dict[nn.Module, str]:
    """The first name of each module."""
    return {module: shown(name) for name, module in model.named_modules()}


def report(level: int, line: str, left_alone: Mapping[str, str]) -> None:
    """Log a line, followed by the names of the layers left alone, grouped by reason."""
    if left_alone:
        reasons = "; ".join(f"{names} ({reason})" for reason, names in grouped(left_alone).items())
        line = f"{line}, {len(left_alone)} left alone: {reasons}"
    logger.log(level, "%s", line)
