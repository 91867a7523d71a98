"""Inputs whose class is derived from Tensor, as an image that carries its metadata.

torch's layers pass such an input to ``F.batch_norm``, and the ``__torch_function__`` of its class decides what happens
then and what comes out. The layers of this library make the same call, and take it over where the class has it carried
out. So such a class sees what it knows, and its output is of the class that torch's layer would give.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary

from .compat import class_functions_disabled, disabled_torch_function, torch_function_enabled

_BATCH_NORMS = (F.batch_norm, torch.batch_norm)

# The graph would have a call of F.batch_norm: right in evaluation, but in training it updates no state.
_TRACED = (
    "a training step that updates running statistics cannot be traced by torch.fx, as create_feature_extractor and "
    "quantisation do. Trace the model first and convert what comes out, or trace it in evaluation mode"
)


def is_derived(x: Tensor) -> bool:
    """Whether `through_class` is to make plain tensors of x.

    Not so of a class that only has a ``__torch_dispatch__``: it may have no memory of its own and sees every operation.
    """
    if torch_function_enabled() and _is_asked(x):
        return True
    return _only_adds(x) and not torch.compiler.is_compiling()


def through_class(compute: Callable[[Tensor], Tensor], layer: _BatchNorm, x: Tensor) -> Tensor:
    """``compute(x)`` for an x that `is_derived`: of a plain tensor, as what ``F.batch_norm`` does for that class."""
    if not _is_asked(x):
        return compute(plain(x))
    if isinstance(x, Proxy) and layer.training and layer.track_running_stats and layer.running_mean is not None:
        raise RuntimeError(_TRACED)
    if torch.compiler.is_compiling() and _has_default_function(type(x)):
        converted: Tensor = handle_torch_function(compute, (x,), x)
        return converted
    # Compilers can trace neither the function mode nor what most classes do in it: for these the layer runs uncompiled.
    call = torch.compiler.disable(_taken_over) if torch.compiler.is_compiling() else _taken_over
    return call(compute, layer, x)


def _taken_over(compute: Callable[[Tensor], Tensor], layer: _BatchNorm, x: Tensor) -> Tensor:
    momentum = layer.momentum if isinstance(layer.momentum, float) else 0.0
    with _TakenOver(compute):
        y: Tensor = F.batch_norm(
            x, layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.training, momentum, layer.eps
        )
    return y


def plain(x: Any) -> Any:
    """x as a Tensor, where its class only adds to it; also what is no tensor, as it is."""
    return x.as_subclass(Tensor) if isinstance(x, Tensor) and _only_adds(x) else x


def _is_asked(x: Tensor) -> bool:
    """Whether the class of x has a ``__torch_function__`` of its own. With function modes, torch says yes for all."""
    return type(x).__torch_function__ is not disabled_torch_function and has_torch_function_unary(x)


def _has_default_function(cls: Any) -> bool:
    default: Any = Tensor
    function = cls.__torch_function__
    return getattr(function, "__func__", function) is default.__torch_function__.__func__


def _only_adds(x: Tensor) -> bool:
    return type(x) is not Tensor and type(x).__torch_dispatch__ is Tensor.__torch_dispatch__


class _TakenOver(TorchFunctionMode):
    """Computes in the place of ``F.batch_norm``, once no class is left to ask."""

    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _BATCH_NORMS:
            return func(*args, **kwargs)
        classes = [cls for cls in types if cls is not Tensor]
        if not classes:
            with class_functions_disabled():
                return self.compute(plain(args[0] if args else kwargs["input"]))
        # torch would ask this mode again before the classes.
        with self:
            for cls in classes:
                result = cls.__torch_function__(func, types, args, kwargs)
                if result is not NotImplemented:
                    return result
        raise TypeError(f"no class of {[cls.__name__ for cls in classes]} implements {func.__name__}")
