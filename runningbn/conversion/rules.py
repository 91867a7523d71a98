"""Which layers of a model `batchnormify` can convert, with the reason why others cannot be converted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from ..layers.buffers import OWN_BUFFERS, TRAINING, VIEW, PooledStatistics
from ..layers.precise import PreciseBatchNorm
from ..layers.running import RunningBatchNorm
from ..momentum import check_momentum
from .classes import BY_DIMENSIONS, PRECISE, BatchNormOfInput, NormAct, is_norm_act, wraps_forward

_UNDECIDED = "its input dimensions are not known; run a batch through the model first, without torch.compile"


def batch_norms(model: nn.Module) -> Iterator[tuple[list[str], nn.Module]]:
    """Every BatchNorm layer once, with all its names."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _BatchNorm) or _is_scripted_batch_norm(module) or is_foreign(module):
            names.setdefault(module, []).append(name)
    yield from ((found, module) for module, found in names.items())


def _is_scripted_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule) and str(module.original_name).startswith("BatchNorm")


def is_foreign(module: nn.Module) -> bool:
    """Whether it has BatchNorm in its name and running statistics, but is not an ``nn.BatchNorm``."""
    if "BatchNorm" not in type(module).__name__ or isinstance(module, _BatchNorm):
        return False
    return set(VIEW) <= {name for name, _ in module.named_buffers(recurse=False)}


def reason_to_leave_foreign(layer: nn.Module) -> str:
    """Why a layer that `is_foreign` is not converted."""
    if not layer._parameters:
        return "it is frozen; its statistics and affine parameters are constants"
    return f"{type(layer).__name__} is not a subclass of nn.BatchNorm"


def reason_to_leave(layer: nn.Module, to: str) -> str | None:
    """Why a layer cannot be converted, or None."""
    if isinstance(layer, torch.jit.ScriptModule):
        return "it is scripted; convert the model before torch.jit.script"
    assert isinstance(layer, _BatchNorm)
    if isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params():
        return "it is lazy and not initialised; run a batch through the model first"
    if parametrize.is_parametrized(layer):
        return "it is parametrised; remove the parametrisation first"
    removes_own = to == "torch" and isinstance(layer, (PooledStatistics, nn.SyncBatchNorm))
    has_statistics = layer.running_mean is not None and layer.running_var is not None
    if not has_statistics and not removes_own:
        return "it has no running statistics"
    if not layer.track_running_stats and not removes_own:
        return "it is frozen: track_running_stats=False, so its statistics are not updated"
    if isinstance(layer, BatchNormOfInput) and to != "torch":
        return _UNDECIDED
    if removes_own and not isinstance(layer, PooledStatistics) and type(layer).forward is not nn.SyncBatchNorm.forward:
        return f"{type(layer).__name__} has a custom forward"
    if "forward" in vars(layer) or not (_has_known_forward(type(layer)) or is_norm_act(layer)):
        return f"{type(layer).__name__} has a custom forward"
    if isinstance(layer, RunningBatchNorm) and to != "running" and torch_type(layer) is None:
        if layer.input_dim is None:
            return _UNDECIDED
        return f"there is no nn.BatchNorm for inputs of {layer.input_dim} dimensions"
    taken = [] if to == "torch" else _taken_names(layer, (*OWN_BUFFERS, *TRAINING) if to == "running" else OWN_BUFFERS)
    return f"it has attributes of the same names as new buffers: {', '.join(taken)}" if taken else None


def _taken_names(layer: nn.Module, names: tuple[str, ...]) -> list[str]:
    """Which buffers of the new class a layer could not get, as something else of its own has the name."""
    buffers = layer._buffers if isinstance(layer, PooledStatistics) else {}
    return [name for name in names if hasattr(layer, name) and name not in buffers]


def _has_known_forward(cls: type[nn.Module]) -> bool:
    if wraps_forward(cls):
        return True
    if issubclass(cls, PooledStatistics):
        if "_made_of" in vars(cls):
            return True
        return cls.forward in (RunningBatchNorm.forward, PreciseBatchNorm.forward, NormAct.forward)
    if issubclass(cls, nn.SyncBatchNorm):
        return cls.forward is nn.SyncBatchNorm.forward
    return cls.forward is _BatchNorm.forward and issubclass(cls, (*PRECISE, BatchNormOfInput))


def torch_type(layer: nn.Module) -> type[nn.Module] | None:
    """The class of torch for a layer: its original class, or the ``nn.BatchNorm`` for the dimensions of its inputs."""
    if not isinstance(layer, PooledStatistics):
        return type(layer)
    if layer.converted_from is not None:
        return layer.converted_from
    if layer.sync:
        return nn.SyncBatchNorm
    if isinstance(layer, RunningBatchNorm):
        return BY_DIMENSIONS.get(layer.input_dim or 0)
    return next(plain for plain, precise in PRECISE.items() if isinstance(layer, precise))


def bad_momentum(layer: nn.Module) -> str | None:
    """Why the momentum of a layer cannot be kept, or None."""
    assert isinstance(layer, _BatchNorm)
    try:
        check_momentum(layer.momentum)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def is_already(layer: nn.Module, to: str, options: dict[str, Any]) -> bool:
    """Whether there is nothing to convert and nothing to set."""
    if to == "torch":
        return not isinstance(layer, (PooledStatistics, nn.SyncBatchNorm))
    # In models pickled by version 0.1.0, a converted layer is not an instance of its original class.
    ours = RunningBatchNorm if to == "running" else PreciseBatchNorm
    if not isinstance(layer, ours) or options:
        return False
    origin = layer.converted_from
    return origin is None or issubclass(origin, nn.SyncBatchNorm) or isinstance(layer, origin)
