"""batchnormify: convert the BatchNorm layers of an existing model, and convert them back.

A layer is converted in place: it stays the same object and changes its class, as ``torch.nn.utils.parametrize`` and
torch's lazy modules do. So all references to it stay valid: shared layers, plain lists of layers, hooks, optimizers,
pruning masks, and the model itself if it is the layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal, TypeVar, Union, overload

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers.buffers import VIEW, PooledStatistics
from ..layers.precise import PreciseBatchNorm
from ..layers.running import RunningBatchNorm, check_gradient, check_max_lag
from ..momentum import Horizon, check_momentum
from ..ops.pooling import check_synchronisation
from ..recalibration.batches import call
from ..recalibration.text import counted
from ..weights.centering import bake_weights, decide, decide_at_first_pass, is_centered
from ..weights.choice import Choice, Where, report
from .classes import PRECISE, PRECISE_ACT, RUNNING, RUNNING_ACT, BatchNormOfInput, instance_of_both, is_norm_act
from .rules import (
    bad_momentum,
    batch_norms,
    is_already,
    is_foreign,
    reason_to_leave,
    reason_to_leave_foreign,
    torch_type,
)

Kind = Literal["running", "precise", "torch"]
Target = Union[Kind, Callable[[nn.Module], nn.Module]]
ModelT = TypeVar("ModelT", bound=nn.Module)

_COMMON_OPTIONS = ("momentum", "sync", "process_group")
_RUNNING_OPTIONS = ("gradient", "max_lag")  # of RunningBatchNorm only
_OPTIONS = {"running": {*_COMMON_OPTIONS, *_RUNNING_OPTIONS}, "precise": set(_COMMON_OPTIONS), "torch": set[str]()}


# A model keeps its class; if the model is itself the layer, its class changes.
@overload
def batchnormify(
    model: _BatchNorm,
    to: Target = "running",
    *,
    where: Where | None = None,
    center_weights: Any = False,
    **layer_kwargs: Any,
) -> nn.Module: ...
@overload
def batchnormify(
    model: ModelT, to: Kind = "running", *, where: Where | None = None, center_weights: Any = False, **layer_kwargs: Any
) -> ModelT: ...
@overload
def batchnormify(
    model: nn.Module, to: Callable[[nn.Module], nn.Module], *, where: Where | None = None
) -> nn.Module: ...
def batchnormify(
    model: nn.Module,
    to: Target = "running",
    *,
    where: Where | None = None,
    center_weights: Any = False,
    **layer_kwargs: Any,
) -> nn.Module:
    """Convert the BatchNorm layers of a model, in place.

    Kept: parameters (the same objects), statistics, eps, affine, dtype, device, training flag, requires_grad, hooks,
    and the identity of every layer. The outputs in evaluation mode do not change, between any two targets. timm's
    ``BatchNormAct2d`` and ``SyncBatchNormAct`` keep their drop and act. ``nn.SyncBatchNorm`` becomes a layer with
    ``sync=True`` and the same process group, for inputs of any number of dimensions.

    A converted layer is an instance of its former class, and of `RunningBatchNorm` or `PreciseBatchNorm1d/2d/3d`:
    ``isinstance(layer, nn.BatchNorm2d)`` still holds, but its ``type`` changes. What was a ``nn.SyncBatchNorm``
    is no longer an instance of it, since DistributedDataParallel does not accept these on CPUs.

    Left alone, and named in the log with the reason: lazy layers without parameters yet, layers without running
    statistics or with ``track_running_stats=False``, parametrised layers, scripted layers, subclasses whose forward
    does not leave the normalisation to ``super().forward``, and modules with BatchNorm in their name and running
    statistics that are not subclasses of ``nn.BatchNorm``, as the frozen layers of torchvision, timm and transformers.
    One line is logged to the logger ``runningbn``, as a warning if a layer was left alone.

    Args:
        model: any module, a single layer included.
        to: what to convert to:

            - ``"running"``: `RunningBatchNorm`, by default with ``momentum=Horizon()``;
            - ``"precise"``: `PreciseBatchNorm1d/2d/3d`, with the momentum of the layer;
            - ``"torch"``: the former class of a converted layer; for other layers of this library
              ``nn.BatchNorm1d/2d/3d``, or ``nn.SyncBatchNorm`` for those with ``sync=True``. A float momentum or None
              is kept, a rule becomes 0.1; the statistics take the dtype of the weight. Centred weights are baked,
              unless `where` is given. A ``nn.SyncBatchNorm`` becomes ``nn.BatchNorm1d/2d/3d``, depending on its first
              input;
            - a callable that takes each layer and returns its replacement.
        where: ``where(name, module)`` returns whether to convert a layer. A layer with several names is converted if it
            returns True for any of them. It is called for ``nn.BatchNorm`` and its subclasses only.
        center_weights: an example batch, or True to use the first forward pass of the model. Centres the filters of the
            layers that feed normalisation layers (with `where`: converted ones), as `center_weights` does, which has
            more options. For the targets ``"running"`` and ``"precise"``.
        **layer_kwargs: options of the layers: `momentum`, `sync`, `process_group` (running and precise), `gradient` and
            `max_lag` (running). They are also set on layers that are of the target kind already.

    Returns:
        The model; its replacement if a callable replaces the model itself.

    Raises:
        TypeError: for an argument that is not a module, or an option that the target does not take.
        ValueError: for an unknown target or a bad option. The model is then unchanged; so it is after an exception in
            the forward pass of the example batch.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from runningbn import batchnormify
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> type(batchnormify(model)[1]).__name__
        'RunningBatchNorm2d'
        >>> type(batchnormify(model, "torch")[1]).__name__
        'BatchNorm2d'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"batchnormify: expected a torch.nn.Module, got {type(model).__name__}")
    _check_options(to, layer_kwargs)
    centers = center_weights is not False and center_weights is not None
    if centers and to not in ("running", "precise"):
        raise TypeError(f"batchnormify(to={to!r}) does not take center_weights; call runningbn.center_weights(model)")
    convertible: list[nn.Module] = []
    left_alone: dict[str, str] = {}
    for names, layer in batch_norms(model):
        if is_foreign(layer):
            # `where` is not called: the module may lack attributes of nn.BatchNorm. With `where`, it is not reported.
            if where is None:
                left_alone[names[0]] = reason_to_leave_foreign(layer)
            continue
        if where is not None and not any(where(name, layer) for name in names):
            continue
        reason = None if callable(to) else reason_to_leave(layer, to)
        if reason is None and to == "precise" and "momentum" not in layer_kwargs:
            reason = bad_momentum(layer)
        if reason is None:
            convertible.append(layer)
        else:
            left_alone[names[0]] = reason
    choice = Choice(normalisations=None if where is None else convertible) if centers else None
    # Decided before anything is changed, since the pass may fail.
    plan = None if choice is None or center_weights is True else decide(model, choice, call, center_weights)
    if callable(to):
        model = _replace(model, {layer: to(layer) for layer in convertible})
    else:
        convert = {"running": _to_running, "precise": _to_precise, "torch": _to_torch}[to]
        convertible = [layer for layer in convertible if not is_already(layer, to, layer_kwargs)]
        # Buffers made in inference mode could neither be loaded into nor reset, nor be trained by torch's layers.
        with torch.inference_mode(False):
            for layer in convertible:
                convert(layer, **layer_kwargs)
    _report(to, len(convertible), left_alone)
    if plan is not None:
        plan.apply()
    elif choice is not None:
        decide_at_first_pass(model, choice)
    elif to == "torch" and where is None and is_centered(model):
        bake_weights(model)
    return model


def _check_options(to: Target, options: dict[str, Any]) -> None:
    if callable(to):
        known = set[str]()
    elif isinstance(to, str) and to in _OPTIONS:
        known = _OPTIONS[to]
    else:
        raise ValueError(f"batchnormify: expected to={', '.join(map(repr, _OPTIONS))} or a callable, got {to!r}")
    unknown = sorted(options.keys() - known)
    if unknown:
        takes = ", ".join(sorted(known)) or "no options"
        raise TypeError(f"batchnormify(to={to!r}) takes {takes}, got {', '.join(unknown)}")
    if "momentum" in options:
        check_momentum(options["momentum"])
    if "gradient" in options:
        check_gradient(options["gradient"])
    if "max_lag" in options:
        check_max_lag(options["max_lag"])
    check_synchronisation(options.get("sync", False), options.get("process_group"))


def _to_running(layer: Any, **options: Any) -> None:
    was_running = isinstance(layer, RunningBatchNorm)
    if not was_running or layer.converted_from is not None:
        _become(layer, RUNNING_ACT if is_norm_act(layer) else RUNNING)
    if not was_running:
        layer.momentum, layer.gradient = Horizon(), "running"
    _set_options(layer, options)


def _to_precise(layer: Any, **options: Any) -> None:
    if not isinstance(layer, PreciseBatchNorm):
        _become(layer, PRECISE_ACT if is_norm_act(layer) else PRECISE)
        for name in _RUNNING_OPTIONS:
            layer.__dict__.pop(name, None)
    _set_options(layer, options)


def _set_options(layer: PooledStatistics, options: dict[str, Any]) -> None:
    for name, value in options.items():
        setattr(layer, name, value)
    if options.get("sync") is False:
        layer.process_group = None


def _become(layer: Any, counterparts: dict[type[nn.Module], type[PooledStatistics]]) -> None:
    """Change the class of a layer of torch or of this library to one of this library, with the buffers of that class.

    `counterparts` maps the original class of torch to the new class.
    """
    origin, had_state = torch_type(layer), isinstance(layer, PooledStatistics)
    assert origin is not None
    had_training_buffers = getattr(layer, "training_buffers", ())
    layer.__class__ = _class_for(origin, counterparts)
    layer.converted_from = origin
    if had_state:
        if had_training_buffers != layer.training_buffers:
            layer.install_training_state()
    else:
        layer.install_state()
        layer.seed()
        if issubclass(origin, nn.SyncBatchNorm):
            layer.sync, layer.process_group = True, layer.__dict__.pop("process_group", None)


def _class_for(
    origin: type[nn.Module], counterparts: dict[type[nn.Module], type[PooledStatistics]]
) -> type[PooledStatistics]:
    ours = next(ours for plain, ours in counterparts.items() if issubclass(origin, plain))
    return instance_of_both(ours, origin)


def _to_torch(layer: Any) -> None:
    if not isinstance(layer, PooledStatistics):
        layer.__class__ = BatchNormOfInput
        del layer.process_group
        return
    origin = torch_type(layer)
    assert origin is not None
    layer.remove_state()
    if layer.momentum is not None and not isinstance(layer.momentum, (float, int)):
        layer.momentum = 0.1
    if layer.weight is not None:
        for name in VIEW:
            buffer = layer._buffers[name]
            if buffer is not None:
                layer._buffers[name] = buffer.to(layer.weight.dtype)
    group = layer.process_group
    for name in (*_RUNNING_OPTIONS, "converted_from", "input_dim", "sync", "_group"):
        layer.__dict__.pop(name, None)
    layer.__class__ = origin  # type: ignore[assignment]
    if issubclass(origin, nn.SyncBatchNorm):
        layer.process_group = group


def _replace(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    for old, new in replacements.items():
        if not isinstance(new, nn.Module):
            raise TypeError(f"batchnormify: expected the callable to return a module for {old}, got {new!r}")
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]
    return replacements.get(model, model)


def _report(to: Target, converted: int, left_alone: dict[str, str]) -> None:
    target = to if isinstance(to, str) else getattr(to, "__name__", repr(to))
    level = logging.WARNING if left_alone else logging.INFO
    report(level, f"batchnormify: {counted(converted, 'layer')} converted to {target}", left_alone)
