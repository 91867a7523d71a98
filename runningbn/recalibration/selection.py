"""Select the layers of a model to recalibrate."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Union

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer, is_lazy

from ..layers.buffers import VIEW
from .flags import all_modules, all_tensors

Layers = Union[Callable[[str, nn.Module], bool], Iterable[Union[str, nn.Module]], None]


def updatable(model: nn.Module) -> dict[str, _BatchNorm]:
    """The layers that can be recalibrated, by their first name."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and _is_tracking(m)}
    # Flags of other modules are ignored: dropout in training mode inside a model in evaluation mode freezes no layer.
    in_training = model.training or any(layer.training for layer in layers.values())
    return {name: layer for name, layer in layers.items() if layer.training or not in_training}


def _is_tracking(layer: _BatchNorm) -> bool:
    """Whether the layer has running statistics that training would update."""
    return has_statistics(layer) and layer.track_running_stats


def has_statistics(layer: _BatchNorm) -> bool:
    """Whether the layer has running statistics, and they have values."""
    buffers = layer.running_mean, layer.running_var
    return all(isinstance(b, Tensor) and not isinstance(b, UninitializedBuffer) and not b.is_meta for b in buffers)


def left_alone(model: nn.Module, updated: Iterable[nn.Module]) -> dict[str, str]:
    """The other modules with running statistics: by first name, the reason why each is not updated."""
    left = {
        module
        for module in set(all_modules(model)).difference(updated)
        if all(isinstance(getattr(module, view, None), Tensor) for view in VIEW)
    }
    if not left:
        return {}
    possible = set(updatable(model).values())
    return {name: _reason(module, possible) for name, module in model.named_modules() if module in left}


def _reason(module: nn.Module, possible: Collection[nn.Module]) -> str:
    if module in possible:
        return "not among the requested layers"
    if isinstance(module, _BatchNorm):
        if not module.track_running_stats:
            return "frozen (track_running_stats=False)"
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            return "on the meta device: load its weights first; offloaded layers cannot be updated"
        return "frozen (in evaluation mode while the model is in training mode)"
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted: recalibrate the model before scripting it"
    # torch.export replaces modules by plain ones that only have buffers.
    if type(module) is nn.Module or type(module).__name__ == "InterpreterModule":
        return "exported: recalibrate the model before exporting it"
    return f"{type(module).__name__} is not an nn.BatchNorm"


def not_initialised(model: nn.Module) -> str | None:
    """Which tensor of a lazy module has no values yet; None if all have some."""
    if not any(map(is_lazy, all_tensors(model))):  # several times as fast as by name
        return None
    tensors = (*model.named_parameters(), *model.named_buffers())
    lazy = next(name for name, tensor in tensors if is_lazy(tensor))
    return f"{lazy} is not initialised yet; run a batch through the model first"


def chosen(model: nn.Module, layers: Layers) -> dict[str, _BatchNorm]:
    """The layers to recalibrate: all updatable ones, or those requested.

    Raises:
        ValueError: for a requested layer that cannot be updated, or a model with lazy modules.
    """
    found = updatable(model)
    if (reason := not_initialised(model)) is not None:
        raise ValueError(reason)
    if layers is None:
        return found
    if isinstance(layers, (str, nn.Module)):
        raise ValueError(f"layers: expected a function or a collection of names or modules, got {layers!r}")
    if callable(layers):
        return {name: layer for name, layer in found.items() if layers(name, layer)}
    names = {module: name for name, module in found.items()}
    aliases = {name: names[m] for name, m in model.named_modules(remove_duplicate=False) if m in names}
    picked = set()
    for wanted in layers:
        name = names.get(wanted) if isinstance(wanted, nn.Module) else aliases.get(wanted)  # type: ignore[call-overload]
        if name is None:
            raise ValueError(
                f"layers: expected names or modules of get_bn_modules(model), {[*found]}, got {wanted!r}: not in the "
                "model, not a BatchNorm, without running statistics, or frozen (in evaluation mode while the model is "
                "in training mode)"
            )
        picked.add(name)
    return {name: layer for name, layer in found.items() if name in picked}
