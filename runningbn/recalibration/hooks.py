"""Watching the BatchNorm layers of a model at work, without leaving a trace in it.

While a model is observed, its modules are in evaluation mode, and each chosen layer hands its input to an `Observer`.
Everything is put back afterwards, whatever happens.
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
from torch import nn

from .flags import restore_flags, set_training, training_flags
from .interception import Elsewhere
from .observer import Observer

# What stands around a model for parallel training, and communicates or copies in its forward.
PARALLEL_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)

# Whether this torch can run compiled code uncompiled.
_CAN_BE_EAGER = hasattr(torch.compiler, "set_stance")


@contextmanager
def looking_elsewhere(observer: Observer) -> Iterator[None]:
    """Let the observer see every operation, where no compiler would have to trace that."""
    if _CAN_BE_EAGER or "torch._dynamo" not in sys.modules:
        with Elsewhere(observer.layers, observer.elsewhere):
            yield
    else:
        yield


@contextmanager
def observed(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Evaluate the model without gradients, its layers in the hands of the observer; then put everything back.

    Wrappers for parallel training are stepped around, so that a forward does not communicate, and compiled code is
    run uncompiled.
    """
    flags = training_flags(model)
    with ExitStack() as stack:
        stack.callback(restore_flags, flags)
        for module, _ in flags:
            set_training(module, False)
            if isinstance(module, PARALLEL_WRAPPERS):
                replace_forward(stack, module, module.module.__call__)
        for number, layer in enumerate(observer.layers):
            replace_forward(stack, layer, partial(observer.forward, number, layer.forward))
        # Without dynamo in the process nothing is compiled, and importing it would take seconds.
        if "torch._dynamo" in sys.modules and _CAN_BE_EAGER:
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
