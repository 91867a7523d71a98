"""The classes that `batchnormify` gives to BatchNorm layers, derived from what these were and from a layer of ours.

So code that asks for the class, to freeze layers or to leave their weights out of weight decay, finds them as before.
The classes of torch's own layers are written out; those of their subclasses are made when they are needed.
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

    No instance of it: DistributedDataParallel refuses those on CPUs, where layers of this library can synchronise.
    """


class PreciseSyncBatchNorm(PreciseBatchNorm):
    """What `batchnormify` makes of ``nn.SyncBatchNorm``, for inputs (N, C, *); likewise no instance of it."""

    _check_input_dim = RunningBatchNorm._check_input_dim  # type: ignore[assignment]


class NormAct(nn.Module):
    """timm's norm-act layers around another normalisation: y = act(drop(norm(x)))."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """The normalisation, dropped and activated as timm does; `mask` as for the layers."""
        y: Tensor = self.act(self.drop(super().forward(input, mask)))
        return y


class RunningBatchNormAct(NormAct, RunningBatchNorm):
    """What version 0.1.0 made of timm's norm-act layers, for models that were pickled with it."""


class RunningBatchNormAct2d(NormAct, RunningBatchNorm2d):
    """What `batchnormify` makes of timm's ``BatchNormAct2d``; not meant to be constructed."""


class RunningSyncBatchNormAct(NormAct, RunningSyncBatchNorm):
    """What `batchnormify` makes of timm's ``SyncBatchNormAct``; not meant to be constructed."""


class PreciseBatchNormAct2d(NormAct, PreciseBatchNorm2d):
    """What `batchnormify` makes of timm's ``BatchNormAct2d``; not meant to be constructed."""


class PreciseSyncBatchNormAct(NormAct, PreciseSyncBatchNorm):
    """What `batchnormify` makes of timm's ``SyncBatchNormAct``; not meant to be constructed."""


# What each layer of torch becomes, and, below, each of timm's norm-act layers, by what it is a subclass of.
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
    nn.SyncBatchNorm: RunningSyncBatchNormAct,
}
PRECISE_ACT: dict[type[nn.Module], type[PooledStatistics]] = {
    nn.BatchNorm2d: PreciseBatchNormAct2d,
    nn.SyncBatchNorm: PreciseSyncBatchNormAct,
}


class BatchNormOfInput(_BatchNorm):
    """``nn.BatchNorm`` made of ``nn.SyncBatchNorm``, which takes any input.

    The first forward pass makes it ``nn.BatchNorm1d``, ``2d`` or ``3d``, whichever takes its input, as torch's lazy
    layers are made; before that it stands for any of them. Not meant to be constructed.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in BY_DIMENSIONS:
            raise ValueError(f"expected an input of 2 to 5 dimensions, got shape {tuple(input.shape)}")
        if not torch.compiler.is_compiling():
            self.__class__ = BY_DIMENSIONS[input.dim()]  # type: ignore[assignment]


# The layer that takes inputs of so many dimensions.
BY_DIMENSIONS: dict[int, type[_BatchNorm]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}


def instance_of_both(ours: type[PooledStatistics], origin: type[nn.Module]) -> type[PooledStatistics]:
    """`ours` itself, or a class derived from both where it is no subclass of `origin`.

    What is made of a ``nn.SyncBatchNorm`` is no instance of it, see `RunningSyncBatchNorm`. An `origin` that
    `wraps_forward` comes first in the new class, so that its ``super().forward`` is that of `ours`. One that cannot be
    derived from gives `ours`.
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
    except TypeError:
        return ours


# What a method names that has to do with statistics itself, or that looks for them in another way.
_OF_STATISTICS = {"running_mean", "running_var", "num_batches_tracked", "momentum", "batch_norm", "native_batch_norm"}
_OF_STATISTICS |= {"getattr", "setattr", "vars", "__dict__", "_buffers", "buffers", "named_buffers", "state_dict"}


def wraps_forward(cls: type[nn.Module]) -> bool:
    """Whether a subclass of a layer of torch leaves all normalising to ``super().forward``.

    Its forward, written in Python and not decorated, calls ``super().forward``, and none of its methods but the
    constructor names statistics or another BatchNorm. What it does around the call, to reshape its input or to take the
    features of a sparse tensor, does not matter.
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
    """What the code of a function names, that of functions in it included, and strings that may be names."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            yield constant


def _reduced(layer: Any, protocol: Any) -> tuple[Any, ...]:
    """For pickles and copies: no module has the class, so it is made again."""
    return _empty, layer._made_of, layer.__getstate__() if hasattr(layer, "__getstate__") else dict(vars(layer))


def _empty(ours: type[PooledStatistics], origin: type[nn.Module]) -> PooledStatistics:
    cls = instance_of_both(ours, origin)
    return cls.__new__(cls)


def is_norm_act(layer: nn.Module) -> bool:
    """Whether it is one of timm's norm-act layers, or one of ours made of one."""
    cls = type(layer)
    if issubclass(cls, NormAct):
        return True
    # By name, without importing timm. A subclass that keeps the forward will do.
    origin = next((base for base in cls.__mro__ if base.__name__ in ("BatchNormAct2d", "SyncBatchNormAct")), None)
    if origin is None or not issubclass(cls, tuple(PRECISE_ACT)) or cls.forward is not vars(origin).get("forward"):
        return False
    return isinstance(getattr(layer, "drop", None), nn.Module) and isinstance(getattr(layer, "act", None), nn.Module)
