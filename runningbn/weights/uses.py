"""Trace how a forward pass uses the outputs and weights of some layers, without changing the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..ops.compat import TorchDispatchMode, tree_map_only
from ..recalibration.batches import Forward, runner
from ..recalibration.hooks import observed, random_state_kept, replace_forward
from ..recalibration.observer import Observer


class Output:
    """The uses of a tensor that a layer returned.

    Attributes:
        normalised_by: the normalisation layers that take it as input.
        used_by: the names of the other operations that use it.
    """

    def __init__(self) -> None:
        self.normalised_by: set[nn.Module] = set()
        self.used_by: set[str] = set()


class Uses(TorchDispatchMode):
    """Records the operations of a forward pass that use the outputs or weights of layers.

    Attributes:
        outputs: of each layer, one for each call.
        weight_used_by: for each layer, the operations outside of it that use its weight.

    Args:
        layers: the layers to trace.
    """

    def __init__(self, layers: Collection[nn.Module]) -> None:
        super().__init__()
        self.outputs: dict[nn.Module, list[Output]] = {layer: [] for layer in layers}
        self.weight_used_by: dict[nn.Module, set[str]] = {layer: set() for layer in layers}
        self._owners = {id(layer._parameters.get("weight")): layer for layer in layers}
        # By identity, with weak references, so that activations are freed as usual.
        self._followed = WeakTensorKeyDictionary()
        self._running: list[nn.Module] = []
        self._normalised: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__.strip("_")
        for tensor in _tensors(args, kwargs):
            output, owner = self._followed.get(tensor), self._owners.get(id(tensor))
            if output is not None and not any(tensor is x for x in self._normalised):
                output.used_by.add(name)
            if owner is not None and owner not in self._running:
                self.weight_used_by[owner].add(name)
        return func(*args, **kwargs)

    def run_layer(self, layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the forward of a layer and trace its output from then on."""
        self._running.append(layer)
        try:
            y = forward(*args, **kwargs)
        finally:
            self._running.pop()
        self.outputs[layer].append(Output())
        if isinstance(y, Tensor):
            self._followed[y] = self.outputs[layer][-1]
        return y

    def run_normalisation(self, layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the forward of a normalisation layer; operations in it that use its input are not recorded."""
        inputs = list(_tensors(args, kwargs))[:1]
        for x in inputs:
            if (output := self._followed.get(x)) is not None:
                output.normalised_by.add(layer)
        before, self._normalised = self._normalised, [*self._normalised, *inputs]
        try:
            return forward(*args, **kwargs)
        finally:
            self._normalised = before

    def end(self) -> None:
        """Record a use by the caller for tensors that still exist: they were returned, or are stored somewhere."""
        for output in self._followed.values():
            output.used_by.add("the caller")


def _tensors(args: Any, kwargs: Any) -> Iterator[Tensor]:
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors(argument, {})


def trace_uses(
    model: nn.Module, layers: Collection[nn.Module], normalisations: Collection[nn.Module], forward: Forward, batch: Any
) -> Uses:
    """Run a batch through the model, in evaluation mode and without gradients, and restore the model."""
    uses = Uses(layers)
    results = []

    def run(model: nn.Module, batch: Any) -> None:
        # A copy, since the model may write into its input, and the same batch is used again.
        results.append(forward(model, tree_map_only(Tensor, torch.clone, batch)))

    with ExitStack() as stack:
        # In inference mode, composite operations would reach the dispatch mode undecomposed.
        stack.enter_context(torch.inference_mode(False))
        # Autocast caches casts of weights; those made here have no gradients and must not be reused.
        stack.callback(torch.clear_autocast_cache)
        stack.enter_context(random_state_kept(model))
        stack.enter_context(_buffers_kept(model))
        stack.enter_context(observed(model, Observer([], _no_moments)))
        for layer in layers:
            replace_forward(stack, layer, partial(uses.run_layer, layer, layer.forward))
        for layer in normalisations:
            replace_forward(stack, layer, partial(uses.run_normalisation, layer, layer.forward))
        with uses:
            runner(model, run)(batch)
        uses.end()
    return uses


def _no_moments(number: int) -> NoReturn:
    raise AssertionError("no layer is observed")


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    before = [
        (module, name, buffer, buffer._version, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, version, values in before:
            module._buffers[name] = buffer
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(values)
