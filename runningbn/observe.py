"""Watching the BatchNorm layers of a model at work, without leaving a trace in it.

While a model is observed, its modules are in evaluation mode, and each chosen layer hands the moments of its input to
an `Observer`, which also says what the input is normalised by. Everything is put back afterwards, whatever happens.

A layer is reached through what it calls: in evaluation, ``nn.BatchNorm``, ``nn.SyncBatchNorm``, the layers of this
library and most subclasses come down to one call of ``torch.nn.functional.batch_norm`` with their own buffers, and that
call is taken over. So what a subclass does around it (permuting, casting, an activation) is respected. A subclass that
computes by itself is asked to update scratch buffers instead.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from . import kernels
from .accumulate import Call
from .buffers import PooledStatistics
from .subclasses import is_derived, through_class

Moments = tuple[Tensor, Tensor]

# What stands around a model for parallel training, and communicates or copies in its forward.
PARALLEL_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)

# The names of the arguments of the two functions that all of torch's own normalisation goes through.
_ARGUMENTS: dict[Callable[..., Any], tuple[str, ...]] = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
}


# The forwards that are one call of batch_norm with the layer's own weight, bias and eps.
_PLAIN = {_BatchNorm.forward, nn.SyncBatchNorm.forward}


class EnoughSeen(BaseException):
    """Ends a forward pass of which nothing more is needed. Not an Exception, so that models do not swallow it."""


class Observer:
    """Collects the moments of the inputs of some layers and normalises by what it is told to.

    Attributes:
        layers: by number.
        so_far: mean and variance of a layer by its number, for batches that have no variance of their own.
        calls: what was seen since `take_calls`, in order.
        fixed: mean and variance by layer number, for layers that normalise by these and not by their batch.
        watched: the numbers of the layers to collect from.
        last: (layer, calls): after so many calls of that layer, `EnoughSeen` is raised.
    """

    def __init__(self, layers: list[_BatchNorm], so_far: Callable[[int], Moments]) -> None:
        self.layers, self.so_far = layers, so_far
        self.calls: list[Call] = []
        self.fixed: dict[int, Moments] = {}
        self.watched: set[int] = set(range(len(layers)))
        self.last: tuple[int, int] | None = None
        self._compute_by_themselves: set[int] = set()

    def take_calls(self) -> list[Call]:
        """The calls since the last time."""
        calls, self.calls = self.calls, []
        return calls

    def forward(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the layer's forward gives, normalised by what the observer says."""
        layer = self.layers[number]
        if getattr(forward, "__func__", None) in _PLAIN:
            # Nothing else happens in there, and so the detour by torch's function modes is spared.
            x = args[0] if args else kwargs["input"]
            layer._check_input_dim(x)
            return self.normalize(number, x, layer.weight, layer.bias, layer.eps)
        if number not in self._compute_by_themselves:
            mask = args[1] if len(args) > 1 else kwargs.get("mask")
            with _TakeOver(self, number, mask if isinstance(layer, PooledStatistics) else None) as taken:
                y = forward(*args, **kwargs)
            if taken.reached:
                return y
            self._compute_by_themselves.add(number)
        return self._update_scratch(number, forward, *args, **kwargs)

    def normalize_real(
        self, number: int, x: Tensor, mask: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        """`normalize` for the elements that a mask says are real, and 0 elsewhere."""
        y = torch.zeros_like(x)
        samples = int(mask.flatten(1).any(1).sum()) if mask.dim() > 1 else None
        y.movedim(1, -1)[mask] = self.normalize(number, x.movedim(1, -1)[mask], weight, bias, eps, samples)
        return y

    def normalize(
        self, number: int, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, samples: int | None = None
    ) -> Tensor:
        """y = (x − mean)·(var + eps)^−½·weight + bias by the batch or by what is fixed; the moments of x are noted.

        `samples` is N where the first dimension of x does not say it.
        """
        layer, samples = self.layers[number], len(x) if samples is None else samples
        if type(x) is not Tensor and is_derived(x):
            compute = partial(self.normalize, number, weight=weight, bias=bias, eps=eps, samples=samples)
            return through_class(compute, layer, x)
        if x.dim() < 2 or x.shape[1] != layer.num_features or not x.is_floating_point():
            raise RuntimeError(
                f"{type(layer).__name__}: expected a floating-point input of shape (N, {layer.num_features}, *), "
                f"got {tuple(x.shape)} of {x.dtype}"
            )
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        n, by = x.numel() // x.shape[1], self.fixed.get(number)
        if n > 1 and (by is None or number in self.watched):
            affine = (weight, bias, eps) if by is None else (None, None, 1.0)
            y, mean, var = kernels.batch_norm(x, *affine, dtype)
            self._note(Call(number, mean, var, n, samples))
            if by is None:
                return y
        elif n == 1:
            self._note(_single(number, x, dtype))
        # One element normalised by itself would be 0 whatever it is.
        mean, var = (moment.to(x.device, dtype) for moment in by or self.so_far(number))
        # By the operation of evaluation, rounding for rounding: deep layers are to see what they will see there.
        return kernels.aten.normalize(x, mean, var, weight, bias, eps) if n else torch.empty_like(x)

    def _update_scratch(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """For a layer that computes by itself: let it train on scratch buffers and see what it makes of them."""
        layer, by = self.layers[number], self.fixed.get(number)
        x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if x is None:
            raise RuntimeError(f"{type(layer).__name__}: expected a tensor as input")
        n = x.numel() // layer.num_features
        if n > 1 and (by is None or number in self.watched):
            mean, var = (torch.zeros_like(t) for t in (layer.running_mean, layer.running_var))  # type: ignore[arg-type]
            versions = mean._version, var._version
            with _statistics_replaced(layer, mean, var, training=True):
                y = forward(*args, **kwargs)
                mean_after, var_after = layer.running_mean, layer.running_var
            if mean_after is None or var_after is None or (mean_after is mean and mean._version == versions[0]):
                raise RuntimeError(
                    f"{type(layer).__name__} has a forward of its own that neither calls torch's batch_norm nor "
                    "updates running_mean and running_var; leave it out with layers=..."
                )
            self._note(Call(number, mean_after, var_after * ((n - 1) / n), n, len(x)))
            if by is None:
                return y
        elif n == 1:
            self._note(_single(number, x, torch.promote_types(x.dtype, torch.float32)))
        mean, var = by or self.so_far(number)
        own = layer.running_mean
        assert own is not None
        with _statistics_replaced(layer, mean.to(own.device, own.dtype), var.to(own.device, own.dtype), training=False):
            return forward(*args, **kwargs)

    def _note(self, call: Call) -> None:
        if call.layer not in self.watched:
            return
        self.calls.append(call)
        if self.last == (call.layer, sum(other.layer == call.layer for other in self.calls)):
            raise EnoughSeen


def _single(number: int, x: Tensor, dtype: torch.dtype) -> Call:
    """One element per channel: its own mean, without variance."""
    mean = x.detach().reshape(-1).to(dtype)
    return Call(number, mean, torch.zeros_like(mean), 1, 1)


class _TakeOver(TorchFunctionMode):
    """Hands the layer's call of ``batch_norm`` to the observer; `reached` says whether there was one."""

    def __init__(self, observer: Observer, number: int, mask: Tensor | None) -> None:
        super().__init__()
        self.observer, self.number, self.mask = observer, number, mask
        self.statistics = observer.layers[number].running_mean
        self.reached = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ARGUMENTS:
            call = dict(zip(_ARGUMENTS[func], args)) | (kwargs or {})
            if call["running_mean"] is self.statistics:
                self.reached = True
                affine = call.get("weight"), call.get("bias"), call.get("eps", 1e-5)
                if self.mask is not None:
                    return self.observer.normalize_real(self.number, call["input"], self.mask, *affine)
                return self.observer.normalize(self.number, call["input"], *affine)
        return func(*args, **(kwargs or {}))


@contextmanager
def _statistics_replaced(layer: _BatchNorm, mean: Tensor, var: Tensor, training: bool) -> Iterator[None]:
    """The layer with other statistics, which an update in training sets to those of the batch."""
    buffers, training_before, momentum = dict(layer._buffers), layer.training, layer.momentum
    tracked = layer.num_batches_tracked
    layer._buffers["running_mean"], layer._buffers["running_var"] = mean, var
    layer._buffers["num_batches_tracked"] = None if tracked is None else tracked.clone()
    layer.momentum, layer.training = 1.0, training
    try:
        yield
    finally:
        layer._buffers.update(buffers)
        layer.momentum, layer.training = momentum, training_before


@contextmanager
def observed(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Evaluate the model without gradients, its layers in the hands of the observer; then put everything back.

    Wrappers for parallel training are stepped around, so that a forward does not communicate, and compiled code is
    run uncompiled.
    """
    flags = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        stack.callback(_restore_flags, flags)
        for module, _ in flags:
            module.training = False
            if isinstance(module, PARALLEL_WRAPPERS):
                replace_forward(stack, module, module.module.__call__)
        for number, layer in enumerate(observer.layers):
            replace_forward(stack, layer, partial(observer.forward, number, layer.forward))
        # Without dynamo in the process nothing is compiled, and importing it would take seconds.
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        yield


@contextmanager
def head_skipped(model: nn.Module, layers: Collection[nn.Module]) -> Iterator[None]:
    """Leave out what comes after the last of the layers, where the structure says that nothing else depends on it.

    That is in a ``nn.Sequential``, and in one that is its last part and nowhere else, for then the output is nobody's
    input. What other modules do with their parts cannot be known. Nothing is left out that has hooks.
    """
    wanted = set(layers)
    places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    with ExitStack() as stack:
        module = model.module if isinstance(model, PARALLEL_WRAPPERS) else model
        while type(module) is nn.Sequential and "forward" not in vars(module) and not _has_hooks(module):
            parts = list(module)
            last = max((i for i, part in enumerate(parts) if wanted.intersection(part.modules())), default=None)
            if last is None or any(_has_hooks(m) for part in parts[last + 1 :] for m in part.modules()):
                break
            replace_forward(stack, module, partial(_one_after_another, parts[: last + 1]))
            module = parts[last]
            if places[module] > 1:
                break
        yield


def _one_after_another(modules: list[nn.Module], input: Any) -> Any:
    for module in modules:
        input = module(input)
    return input


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _restore_flags(flags: list[tuple[nn.Module, bool]]) -> None:
    for module, training in flags:
        module.training = training


def replace_forward(stack: ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    """Give a module another forward until the stack is closed."""
    own = vars(module)
    if "forward" in own:
        stack.callback(own.__setitem__, "forward", own["forward"])
    else:
        stack.callback(own.pop, "forward", None)
    own["forward"] = forward


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """Put back what loaders and their transforms draw from: the generators of torch, Python and NumPy."""
    numpy_random = sys.modules.get("numpy.random")
    state_of_python = random.getstate()
    state_of_numpy = numpy_random.get_state() if numpy_random else None
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    accelerators = sorted({d.index or 0 for d in devices if d.type not in ("cpu", "meta")})
    kind = next((d.type for d in devices if d.type not in ("cpu", "meta")), "cuda")
    try:
        with torch.random.fork_rng(accelerators, device_type=kind):
            yield
    finally:
        random.setstate(state_of_python)
        if numpy_random:
            numpy_random.set_state(state_of_numpy)
