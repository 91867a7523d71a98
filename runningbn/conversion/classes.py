"""The classes of converted BatchNorm layers, derived from the original class and from a layer of this library.

So ``isinstance`` checks in other code, to freeze layers or to exclude their weights from weight decay, still hold. The
classes for torch's own layers are defined here; those for subclasses are created when needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers.buffers import PooledStatistics
from ..layers.precise import PreciseBatchNorm, PreciseBatchNorm1d, PreciseBatchNorm2d, PreciseBatchNorm3d
from ..layers.running import RunningBatchNorm


class RunningBatchNorm1d(RunningBatchNorm, nn.BatchNorm1d):
    """What `batchnormify` makes of ``nn.BatchNorm1d``; not meant to be constructed."""


class RunningBatchNorm2d(RunningBatchNorm, nn.BatchNorm2d):
    """What `batchnormify` makes of ``nn.BatchNorm2d``; not meant to be constructed."""


class RunningBatchNorm3d(RunningBatchNorm, nn.BatchNorm3d):
    """What `batchnormify` makes of ``nn.BatchNorm3d``; not meant to be constructed."""


class RunningSyncBatchNorm(RunningBatchNorm):
    """What `batchnormify` makes of ``nn.SyncBatchNorm``; not meant to be constructed.

    It is not a subclass of ``nn.SyncBatchNorm``: DistributedDataParallel refuses these on CPUs, where the layers of
    this library can synchronise.
    """


class PreciseSyncBatchNorm(PreciseBatchNorm):
    """What `batchnormify` makes of ``nn.SyncBatchNorm``, for inputs (N, C, *); not a subclass of it either."""

    _check_input_dim = RunningBatchNorm._check_input_dim


class NormAct(nn.Module):
    """timm's norm-act layers around another normalisation: y = act(drop(norm(x)))."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """The normalisation, then drop and activation, as in timm; `mask` as for the layers."""
        y: Tensor = self.act(self.drop(super().forward(input, mask)))
        return y


class RunningBatchNormAct(NormAct, RunningBatchNorm):
    """The class that version 0.1.0 gave to timm's norm-act layers, for models pickled with it."""


class RunningBatchNormAct2d(NormAct, RunningBatchNorm2d):
    """What `batchnormify` makes of timm's ``BatchNormAct2d``; not meant to be constructed."""


class PreciseBatchNormAct2d(NormAct, PreciseBatchNorm2d):
    """What `batchnormify` makes of timm's ``BatchNormAct2d``; not meant to be constructed."""


# The target class of each layer of torch and, below, of timm's norm-act layers by their base class of torch. timm's
# SyncBatchNormAct calls ``super().forward``, then drop and act: the class that it is derived from only normalises.
RUNNING: dict[type[nn.Module], type[PooledStatistics]] = {
    nn.BatchNorm1d: RunningBatchNorm1d,
    nn.BatchNorm2d: RunningBatchNorm2d,
    nn.BatchNorm3d: RunningBatchNorm3d,
    nn.SyncBatchNorm: RunningSyncBatchNorm,
}
PRECISE: dict[type[nn.Module], type[PooledStatistics]] = {
    nn.BatchNorm1d: PreciseBatchNorm1d,
    nn.BatchNorm2d: PreciseBatchNorm2d,
    nn.BatchNorm3d: PreciseBatchNorm3d,
    nn.SyncBatchNorm: PreciseSyncBatchNorm,
}
RUNNING_ACT: dict[type[nn.Module], type[PooledStatistics]] = {
    nn.BatchNorm2d: RunningBatchNormAct2d,
    nn.SyncBatchNorm: RunningSyncBatchNorm,
}
PRECISE_ACT: dict[type[nn.Module], type[PooledStatistics]] = {
    nn.BatchNorm2d: PreciseBatchNormAct2d,
    nn.SyncBatchNorm: PreciseSyncBatchNorm,
}


class BatchNormOfInput(_BatchNorm):
    """A converted ``nn.SyncBatchNorm`` before its first input, which decides the number of dimensions.

    The first forward pass changes its class to ``nn.BatchNorm1d``, ``2d`` or ``3d``, as torch's lazy layers do. Not
    meant to be constructed.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in BY_DIMENSIONS:
            raise ValueError(f"expected an input of 2 to 5 dimensions, got shape {tuple(input.shape)}")
        if not torch.compiler.is_compiling():
            self.__class__ = BY_DIMENSIONS[input.dim()]  # type: ignore[assignment]


# The layer by the number of dimensions of its input.
BY_DIMENSIONS: dict[int, type[_BatchNorm]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}


def instance_of_both(ours: type[PooledStatistics], origin: type[nn.Module]) -> type[PooledStatistics]:
    """A class derived from `ours` and `origin`.

    This is `ours` itself if it is a subclass of `origin`, if `origin` is a ``nn.SyncBatchNorm`` with torch's forward,
    or if no class can be derived from both. If `wraps_forward(origin)`, `origin` is the first base, so that its
    ``super().forward`` is that of `ours`.
    """
    if issubclass(ours, origin) or (issubclass(origin, nn.SyncBatchNorm) and not wraps_forward(origin)):
        return ours
    if (ours, origin) not in _made:
        _made[ours, origin] = _derived(ours, origin)
    return _made[ours, origin]


_made: dict[tuple[type[PooledStatistics], type[nn.Module]], type[PooledStatistics]] = {}


def _derived(ours: type[PooledStatistics], origin: type[nn.Module]) -> type[PooledStatistics]:
    kind = "Running" if issubclass(ours, RunningBatchNorm) else "Precise"
    members = {
        "__doc__": f"What `batchnormify` makes of ``{origin.__name__}``.",
        "__module__": __name__,
        "__reduce_ex__": _reduced,
        "_made_of": (ours, origin),
    }
    if wraps_forward(origin):
        if issubclass(origin, nn.SyncBatchNorm):  # whose forward would otherwise come before that of `ours`
            ours = type(ours.__name__, (ours, nn.SyncBatchNorm), {"__module__": __name__})
        return type(f"{kind}{origin.__name__}", (origin, ours), members)
    try:
        return type(f"{kind}{origin.__name__}", (ours, origin), members)
    except Exception:  # whatever its metaclass or __init_subclass__ raises
        return ours


# Names in the code of methods that use the statistics, or that may access them indirectly.
_OF_STATISTICS = {"running_mean", "running_var", "num_batches_tracked", "momentum", "batch_norm", "native_batch_norm"}
_OF_STATISTICS |= {"getattr", "setattr", "vars", "__dict__", "_buffers", "buffers", "named_buffers", "state_dict"}


def wraps_forward(cls: type[nn.Module]) -> bool:
    """Whether a subclass of a layer of torch leaves the normalisation to ``super().forward``.

    Its forward must be undecorated Python code that calls ``super().forward``, and no method except the constructor may
    name statistics or another BatchNorm. Anything else around the call is allowed, such as reshaping the input or
    taking the features of a sparse tensor.
    """
    own = [base for base in cls.__mro__ if issubclass(base, _BatchNorm) and not base.__module__.startswith("torch.nn.")]
    if issubclass(cls, PooledStatistics) or not any("forward" in vars(base) for base in own):
        return False
    forward = getattr(cls.forward, "__code__", None)
    if forward is None or not {"super", "forward"} <= set(_names(forward)):
        return False
    members = (value for base in own for name, value in vars(base).items() if name != "__init__")
    codes = (getattr(getattr(member, "__func__", member), "__code__", None) for member in members)
    named = {name for code in codes if code is not None for name in _names(code)}
    return not any(name in _OF_STATISTICS or "BatchNorm" in name for name in named)


def _names(code: CodeType) -> Iterator[str]:
    """The names in the code of a function and of its inner functions, and string constants that may be names."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            yield constant


def _reduced(layer: Any, protocol: Any) -> tuple[Any, ...]:
    """``__reduce_ex__`` for pickles and copies: the class is in no module, so it is created again on loading."""
    return _empty, layer._made_of, layer.__getstate__() if hasattr(layer, "__getstate__") else dict(vars(layer))


def _empty(ours: type[PooledStatistics], origin: type[nn.Module]) -> PooledStatistics:
    cls = instance_of_both(ours, origin)
    return cls.__new__(cls)


def is_norm_act(layer: nn.Module) -> bool:
    """Whether it is timm's ``BatchNormAct2d``, or a converted one; not ``SyncBatchNormAct``, which wraps a forward."""
    cls = type(layer)
    if issubclass(cls, NormAct):
        return True
    # By name, without importing timm. Subclasses that do not override the forward are included.
    origin = next((base for base in cls.__mro__ if base.__name__ == "BatchNormAct2d"), None)
    if origin is None or not issubclass(cls, nn.BatchNorm2d) or cls.forward is not vars(origin).get("forward"):
        return False
    return isinstance(getattr(layer, "drop", None), nn.Module) and isinstance(getattr(layer, "act", None), nn.Module)
