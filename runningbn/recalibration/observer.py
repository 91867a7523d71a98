"""Collect the moments of the inputs of BatchNorm layers, and normalise by the batch or by given statistics.

In evaluation mode, ``nn.BatchNorm``, ``nn.SyncBatchNorm``, the layers of this library and most subclasses make one call
of ``torch.nn.functional.batch_norm`` with their own buffers. That call is intercepted. So what a subclass does around
it (permuting, casting, an activation) stays in effect. For subclasses without such a call, see `conventions`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import kernels
from ..layers.buffers import PooledStatistics
from ..ops.compat import (
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    outside_transforms,
    peek_interpreter_stack,
    torch_functions_disabled,
)
from ..ops.derived_tensors import is_derived, through_class
from ..ops.state import moments
from ..ops.step import normalize_by_itself
from .conventions import (
    Arguments,
    Convention,
    InputMoments,
    Moments,
    batch_moments,
    candidates,
    detect_convention,
    replaced,
)
from .flags import set_training
from .interception import BatchNormInterceptor
from .moments import Call

# Forwards that consist of one call of batch_norm with the layer's own weight, bias and eps.
_PLAIN = {_BatchNorm.forward, nn.SyncBatchNorm.forward}


class EnoughSeen(BaseException):
    """Ends a forward pass early. It is no Exception, so that an ``except Exception`` in a model does not catch it."""


class Observer:
    """Collects the moments of the inputs of some layers, and normalises by the batch or by fixed statistics.

    If grad mode is on, as inside a model that differentiates in its forward, the layers are differentiable. Layers are
    referred to by their index.

    Attributes:
        layers: the observed layers.
        so_far: returns the mean and variance to use for a batch with a single element per channel.
        names: of the layers, for messages.
        calls: the calls since the last `take_calls`, in order.
        fixed: mean and variance by layer, for layers that normalise by these instead of their batch.
        watched: the layers to collect from.
        last: (layer, calls): after this number of calls of that layer, `EnoughSeen` is raised.
        settle: if given, called with the first call of each layer that is not fixed; returns what to fix it to.
        conventions: by layer, for subclasses with a custom forward, once detected.
        used_outside: layers whose statistics other code normalises by, see `OutsideUseRecorder`.
    """

    def __init__(self, layers: list[_BatchNorm], so_far: Callable[[int], Moments], names: Sequence[str] = ()) -> None:
        self.layers, self.so_far, self.names = layers, so_far, names
        self.calls: list[Call] = []
        self.fixed: dict[int, Moments] = {}
        self.watched: set[int] = set(range(len(layers)))
        self.last: tuple[int, int] | None = None
        self.settle: Callable[[Call], Moments] | None = None
        self.conventions: dict[int, Convention] = {}
        self.used_outside: set[int] = set()
        self._without_batch_norm_call: set[int] = set()

    def take_calls(self) -> list[Call]:
        """Return and clear `calls`."""
        calls, self.calls = self.calls, []
        return calls

    def forward(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the forward of a layer, with the normalisation done by the observer."""
        layer = self.layers[number]
        if getattr(forward, "__func__", None) in _PLAIN:
            # This forward does nothing else, so no function mode is needed, which is slower.
            x = _input_of_forward(*args, **kwargs)
            layer._check_input_dim(x)
            if type(x) is not Tensor and is_derived(x):
                compute = partial(self.normalize, number, weight=layer.weight, bias=layer.bias, eps=layer.eps)
                return through_class(compute, layer, x)
            # Function modes, as `OutsideUseRecorder`, have nothing to see here, and take longer than a small layer.
            with torch_functions_disabled() if type(x) is Tensor else nullcontext():
                return self.normalize(number, x, layer.weight, layer.bias, layer.eps)
        training = layer.training
        # The caller may have called train() inside the block.
        set_training(layer, False)
        try:
            if number not in self._without_batch_norm_call:
                unknown = number not in self.conventions and self._has_own_class(layer)
                arguments, seen = Arguments(args, kwargs) if unknown else None, len(self.calls)
                with BatchNormInterceptor(layer, partial(self._normalize_call, number)) as interceptor:
                    y = forward(*args, **kwargs)
                if interceptor.uses_slice:
                    raise RuntimeError(
                        f"{self._described(number)} normalises by a part of running_mean and running_var, as in a "
                        "slimmable network; leave it out with layers=..., or recalibrate an extracted sub-network"
                    )
                if interceptor.intercepted:
                    if arguments is not None and not _has_other_processes():
                        self._detect_correction(number, forward, arguments, self.calls[seen:])
                    return y
                self._without_batch_norm_call.add(number)
                if arguments is not None and not torch.is_grad_enabled():
                    args, kwargs = arguments.copies()
            return self._evaluate(number, forward, *args, **kwargs)
        finally:
            set_training(layer, training)

    def _normalize_call(self, number: int, mask: Tensor | None, *arguments: Any) -> Tensor:
        return self.normalize(number, *arguments) if mask is None else self.normalize_real(number, mask, *arguments)

    def normalize_real(
        self, number: int, mask: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        """`normalize` for the elements where the mask is True; 0 for the others."""
        y = torch.zeros_like(x)
        samples = int(mask.flatten(1).any(1).sum()) if mask.dim() > 1 else None
        y.movedim(1, -1)[mask] = self.normalize(number, x.movedim(1, -1)[mask], weight, bias, eps, samples)
        return y

    def normalize(
        self, number: int, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, samples: int | None = None
    ) -> Tensor:
        """y = (x − mean)·(var + eps)^−½·weight + bias, with the moments of the batch or `fixed`; records those of x.

        `samples` is N, if it is not the size of the first dimension of x.
        """
        layer, samples = self.layers[number], len(x) if samples is None else samples
        if x.dim() < 2 or x.shape[1] != layer.num_features or not x.is_floating_point():
            raise RuntimeError(
                f"{type(layer).__name__}: expected a floating-point input of shape (N, {layer.num_features}, *), "
                f"got {tuple(x.shape)} of {x.dtype}"
            )
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        n, by = x.numel() // x.shape[1], self.fixed.get(number)
        transformed = _inside_torch_func()
        differentiates = transformed or torch.is_grad_enabled()
        if differentiates:
            weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
        if n > 1 and (by is None or number in self.watched):
            by_batch = by is None and self.settle is None
            if by_batch and not differentiates:
                y, mean, var = kernels.batch_norm(x, weight, bias, eps, dtype)
            else:
                with outside_transforms() if transformed else nullcontext():
                    mean, var = moments(kernels.batch_sums(_plain(x.detach()), dtype).sums)
                if by_batch and transformed:
                    y = F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
                elif by_batch:
                    y = normalize_by_itself(x, weight, bias, eps, mean, var)
            by = self._record(Call(number, mean, var, n, samples)) or by
            if by is None:
                return y
        elif n == 1:
            self._record(_single(number, _plain(x.detach()), dtype))
        # A single element normalised by its own mean would always be 0.
        mean, var = (moment.to(x.device, dtype) for moment in by or self.so_far(number))
        if differentiates:
            return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        # The same operation as in evaluation, so that deeper layers get bit for bit the same input.
        return kernels.aten.normalize(x, mean, var, weight, bias, eps) if n else torch.empty_like(x)

    def _evaluate(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluate a layer that does not call ``batch_norm``, with the moments of its input or `fixed` as buffers."""
        layer, by = self.layers[number], self.fixed.get(number)
        x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if x is None:
            raise RuntimeError(f"{type(layer).__name__}: expected a tensor as input")
        n = x.numel() // layer.num_features
        if n > 1 and (by is None or number in self.watched):
            found = self._moments(number, forward, args, kwargs, x)
            by = self._record(Call(number, found.mean, found.var, n, len(x))) or by
            if by is None:
                mean, var = batch_moments(x, found) if torch.is_grad_enabled() else (found.mean, found.var)
                with replaced(layer, mean, var):
                    return forward(*args, **kwargs)
        elif n == 1:
            self._record(_single(number, x, torch.promote_types(x.dtype, torch.float32)))
        with replaced(layer, *(by or self.so_far(number))):
            return forward(*args, **kwargs)

    def _moments(
        self, number: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor
    ) -> InputMoments:
        """The moments of x in the convention of the layer."""
        layer, known = self.layers[number], self.conventions.get(number)
        found = candidates(layer, x)
        if known is not None:
            found = [one for one in found if one.dim == known.dim]
        elif all(bool((one.mean + one.var).isfinite().all()) for one in found):
            cause = None
            try:
                convention = detect_convention(layer, forward, Arguments(args, kwargs), found)
            except Exception as error:  # its training step may fail on the temporary buffers
                convention, cause = None, error
            if convention is None:
                raise RuntimeError(
                    f"{self._described(number)} has a custom forward that does not call torch's batch_norm, and its "
                    "update of running_mean and running_var in training is not a moving average of the mean and "
                    f"variance of its input, {tuple(x.shape)} of {x.dtype}; leave it out with layers=..."
                ) from cause
            self.conventions[number] = convention
            found = [one for one in found if one.dim == convention.dim]
        if not found:
            raise RuntimeError(
                f"{self._described(number)}: expected a floating-point input with {layer.num_features} channels in its "
                f"second or last dimension, got {tuple(x.shape)} of {x.dtype}"
            )
        return found[0]

    def _has_own_class(self, layer: _BatchNorm) -> bool:
        """Whether the class may update its statistics in another way than torch does."""
        return type(layer).forward not in _PLAIN and not isinstance(layer, PooledStatistics)

    def _detect_correction(
        self, number: int, forward: Callable[..., Any], arguments: Arguments, calls: list[Call]
    ) -> None:
        """Detect the convention of a layer that calls torch's batch_norm in evaluation; its training may differ."""
        if len(calls) != 1 or calls[0].n < 2 or not bool((calls[0].mean + calls[0].var).isfinite().all()):
            return
        seen = InputMoments(calls[0].mean, calls[0].var, calls[0].n, narrow=True)
        try:
            convention = detect_convention(self.layers[number], forward, arguments, [seen])
        except Exception:  # the training step is needed only for the convention; the default is used without it
            convention = None
        self.conventions[number] = convention or Convention()

    def _described(self, number: int) -> str:
        name, kind = self.names[number] if self.names else "", type(self.layers[number]).__name__
        return f"{name} ({kind})" if name else kind

    def _record(self, call: Call) -> Moments | None:
        """Record a call; returns the statistics that `settle` fixes the layer to, if it does."""
        if call.layer not in self.watched:
            return None
        self.calls.append(call)
        if self.last == (call.layer, sum(other.layer == call.layer for other in self.calls)):
            raise EnoughSeen
        if self.settle is not None and call.layer not in self.fixed:
            with outside_transforms() if _inside_torch_func() else nullcontext():
                self.fixed[call.layer] = self.settle(call)
        return self.fixed.get(call.layer)


def _has_other_processes() -> bool:
    """Whether there are other processes. A training step of the layer could wait for one that has no batch now."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _input_of_forward(input: Tensor) -> Tensor:
    """The argument of a plain forward; a TypeError for any other arguments."""
    return input


def _inside_torch_func() -> bool:
    """Whether this runs inside ``torch.func.grad`` or a similar transform, which takes only torch's own functions."""
    return peek_interpreter_stack() is not None


def _plain(x: Tensor) -> Tensor:
    """The tensor inside the wrappers of ``torch.func`` for derivatives.

    Raises:
        RuntimeError: under ``torch.func.vmap``, where the moments of a batch are not defined.
    """
    while is_functorch_wrapped_tensor(x):
        if is_batchedtensor(x):
            raise RuntimeError(
                "under torch.func.vmap a BatchNorm layer cannot be updated; leave it out with layers=..."
            )
        x = get_unwrapped(x)
    return x


def _single(number: int, x: Tensor, dtype: torch.dtype) -> Call:
    """The call for one element per channel: the element is the mean, and the variance is 0."""
    mean = x.detach().reshape(-1).to(dtype)
    return Call(number, mean, torch.zeros_like(mean), 1, 1)
