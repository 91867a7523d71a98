"""Which layers are centred, and why others are not."""

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
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..recalibration.batches import Forward
from ..recalibration.text import counted
from .layers import CENTERED, CenteredWeights, filter_means
from .uses import Uses, watched

Where = Callable[[str, nn.Module], bool]

# The layers that take out a constant in a channel, which is what the mean of a filter adds to it.
NORMALISATIONS = (_BatchNorm, _InstanceNorm, nn.GroupNorm)

logger = logging.getLogger("runningbn")


@dataclass
class Plan:
    """What to do with a model.

    Attributes:
        offsets: of the filters of every layer to centre.
        left_alone: the reasons, by name.
        wanted: whether one of these would be centred if it were built otherwise.
    """

    offsets: dict[nn.Module, Tensor] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)
    wanted: bool = False

    def carry_out(self) -> None:
        """Centre the layers and report it."""
        for layer, offset in self.offsets.items():
            layer.__class__ = CENTERED[type(layer)]
            layer.register_buffer("weight_offset", offset)
        level = logging.WARNING if self.wanted or not self.offsets else logging.INFO
        report(level, f"center_weights: {counted(len(self.offsets), 'layer')} centred", self.left_alone)


@dataclass
class Choice:
    """What is asked for. None means all that there are when it is decided, as layers may have been replaced by then.

    Attributes:
        layers: those that may be centred.
        normalisations: the normalisation layers that these have to feed.
        depthwise: whether depthwise convolutions may be centred.
    """

    layers: list[nn.Module] | None = None
    normalisations: list[nn.Module] | None = None
    depthwise: bool = False

    def layers_in(self, model: nn.Module) -> list[nn.Module]:
        """The layers that may be centred and are not yet."""
        chosen = None if self.layers is None else set(self.layers)
        layers = layers_of(model, tuple(CENTERED), lambda name, layer: chosen is None or layer in chosen)
        return [layer for layer in layers if not isinstance(layer, CenteredWeights)]

    def plan(self, model: nn.Module, forward: Forward, batch: Any) -> Plan:
        """Decide by one pass. The model is as before afterwards."""
        lazy = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if is_lazy(tensor)]
        if lazy:
            raise RuntimeError(f"center_weights: {lazy[0]} is not initialised yet; run a batch through the model first")
        layers, normalisations = self.layers_in(model), self.normalisations
        if normalisations is None:
            normalisations = layers_of(model, NORMALISATIONS)
        owners = Counter(id(p) for module in model.modules() for p in set(module._parameters.values()))
        # Before the pass, which puts sharded weights together.
        built = {layer: _reason_in_build(layer, owners) for layer in layers}
        uses = watched(model, layers, normalisations, forward, batch)
        plan, names = Plan(), names_of(model)
        for layer in layers:
            reason = _reason_in_use(layer, uses) or _reason_in_shape(layer, self.depthwise)
            if reason is None:
                reason = built[layer] or _reason_in_weight(layer, uses)
                plan.wanted |= reason is not None
            if reason is None:
                plan.offsets[layer] = _offset(layer, uses)
            else:
                plan.left_alone[names[layer]] = reason
        return plan


def _reason_in_use(layer: nn.Module, uses: Uses) -> str | None:
    """Why a layer does not feed normalisation layers alone, or None."""
    outputs = uses.outputs[layer]
    if not outputs:
        return "it was not called"
    others = sorted(set[str]().union(*(output.used_by for output in outputs)))
    fed = [output for output in outputs if output.normalised_by]
    if others or len(fed) < len(outputs):
        return f"its output goes to {', '.join(others) or 'nothing'}{', too' if fed else ''}"
    return None


def _reason_in_shape(layer: Any, depthwise: bool) -> str | None:
    """Why the filters of a layer are not to be centred, or None."""
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
        return "it has a forward of its own"
    if type(layer) not in CENTERED:
        return f"{type(layer).__name__} is a subclass of {_torch_class(layer).__name__}"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has hooks"
    weight = layer._parameters.get("weight")
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    return "its weight is that of another layer, too" if owners[id(weight)] > 1 else None


def _reason_in_weight(layer: nn.Module, uses: Uses) -> str | None:
    """What else would see the difference between the weight and the filters, or None."""
    others = uses.weight_used_by[layer]
    return f"its weight goes to {', '.join(sorted(others))}, too" if others else None


def _torch_class(layer: nn.Module) -> type[nn.Module]:
    return next(plain for plain in CENTERED if isinstance(layer, plain))


def _offset(layer: nn.Module, uses: Uses) -> Tensor:
    """0 for the filters of a layer that feeds fresh layers only, and otherwise the means that they have, (O,)."""
    # In inference mode, it would be a tensor that can never be loaded into.
    with torch.inference_mode(False), torch.no_grad():
        means = filter_means(layer)
        fed = set[nn.Module]().union(*(output.normalised_by for output in uses.outputs[layer]))
        return torch.zeros_like(means) if all(map(_is_fresh, fed)) else means


def _is_fresh(layer: nn.Module) -> bool:
    """Whether a normalisation layer has running statistics, and has seen no data."""
    mean, var, batches = (getattr(layer, name, None) for name in ("running_mean", "running_var", "num_batches_tracked"))
    if mean is None or var is None or batches is None or mean.is_meta:
        return False
    return bool((batches == 0) & (mean == 0).all() & (var == 1).all())


def layers_of(model: nn.Module, kinds: tuple[type[nn.Module], ...], where: Where | None = None) -> list[nn.Module]:
    """The layers of some kinds, each once; those that `where` says so for, by any of their names."""
    named = model.named_modules(remove_duplicate=False)
    found = [layer for name, layer in named if isinstance(layer, kinds) and (where is None or where(name, layer))]
    return list(dict.fromkeys(found))


def names_of(model: nn.Module) -> dict[nn.Module, str]:
    """The first name of each module."""
    return {module: name or "the model itself" for name, module in model.named_modules()}


def report(level: int, line: str, left_alone: Mapping[str, str]) -> None:
    """Log a line, and after it the names of what was left alone, by reason."""
    if left_alone:
        names: dict[str, list[str]] = {}
        for name, reason in left_alone.items():
            names.setdefault(reason, []).append(name)
        reasons = "; ".join(f"{', '.join(together)} ({reason})" for reason, together in names.items())
        line = f"{line}, {len(left_alone)} left alone: {reasons}"
    logger.log(level, "%s", line)
