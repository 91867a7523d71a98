"""Context managers that observe the BatchNorm layers of a model and restore the model afterwards.

While a model is observed, its modules are in evaluation mode, and an `Observer` runs the forward of each chosen layer.
Everything is restored on leaving, after an exception as well.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from ..ops.compat import compiler_is_loaded
from .flags import all_tensors, restore_flags, set_training, training_flags
from .interception import OutsideUseRecorder
from .observer import Observer

# Wrappers for parallel training; their forward communicates or copies the model.
PARALLEL_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)

# Whether this version of torch can run compiled code in eager mode.
_CAN_BE_EAGER = hasattr(torch.compiler, "set_stance")


def recording_outside_use(observer: Observer) -> AbstractContextManager[Any]:
    """Record in `observer.used_outside` the layers whose statistics other code normalises by.

    Does nothing where torch.compile would have to trace the recording.
    """
    if _CAN_BE_EAGER or not compiler_is_loaded():
        # Not inside a generator: that would leave the mode once more when it is collected after an interrupt.
        return OutsideUseRecorder(observer.layers, observer.used_outside)
    return nullcontext()


@contextmanager
def observed(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Evaluate the model without gradients, with the observer running its layers; then restore everything.

    Wrappers for parallel training are bypassed, so that a forward does not communicate. Compiled code runs in eager
    mode.
    """
    flags = training_flags(model)
    with ExitStack() as stack:
        stack.callback(restore_flags, flags)
        for module, _ in flags:
            set_training(module, False)
            if isinstance(module, PARALLEL_WRAPPERS):
                replace_forward(stack, module, module.module.__call__)
        for number, layer in enumerate(observer.layers):
            _refuse_observed(layer)
            replace_forward(stack, layer, partial(observer.forward, number, layer.forward))
        if _CAN_BE_EAGER and compiler_is_loaded():
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        yield


def _refuse_observed(layer: nn.Module) -> None:
    forward = vars(layer).get("forward")
    if isinstance(forward, partial) and isinstance(getattr(forward.func, "__self__", None), Observer):
        raise RuntimeError(
            "the model is being recalibrated or diagnosed already; another recalibration or diagnosis of it cannot run "
            "inside a block of precise_bn or a forward pass"
        )


@contextmanager
def head_skipped(model: nn.Module, layers: Collection[nn.Module]) -> Iterator[None]:
    """Skip the modules after the last of the layers, where the structure shows that nothing else needs their output.

    This holds in a ``nn.Sequential``, and recursively in a ``nn.Sequential`` that is its last part and is used only
    there. How other modules use their submodules is not known, so nothing is skipped in them. Modules with hooks are
    not skipped.
    """
    wanted = set(layers)
    with ExitStack() as stack:
        module = model.module if isinstance(model, PARALLEL_WRAPPERS) else model
        while type(module) is nn.Sequential and "forward" not in vars(module) and not _has_hooks(module):
            parts = list(module)
            last = max((i for i, part in enumerate(parts) if wanted.intersection(part.modules())), default=None)
            if last is None or any(_has_hooks(m) for part in parts[last + 1 :] for m in part.modules()):
                break
            replace_forward(stack, module, partial(_run_in_order, parts[: last + 1]))
            module = parts[last]
            places = Counter(part for _, part in model.named_modules(remove_duplicate=False))
            if places[module] > 1:
                break
        yield


def _run_in_order(modules: list[nn.Module], input: Any) -> Any:
    for module in modules:
        input = module(input)
    return input


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def replace_forward(stack: ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    """Replace the forward of a module until the stack is closed."""
    own = vars(module)
    if "forward" in own:
        stack.callback(own.__setitem__, "forward", own["forward"])
    else:
        stack.callback(own.pop, "forward", None)
    own["forward"] = forward


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """Restore the random state of torch, Python and NumPy, which loaders and transforms use."""
    numpy_random = sys.modules.get("numpy.random")
    state_of_python = random.getstate()
    state_of_numpy = numpy_random.get_state() if numpy_random else None
    accelerators = {tensor.device for tensor in all_tensors(model) if tensor.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in accelerators), "cuda")
    try:
        with torch.random.fork_rng(sorted({device.index or 0 for device in accelerators}), device_type=kind):
            yield
    finally:
        random.setstate(state_of_python)
        if numpy_random:
            numpy_random.set_state(state_of_numpy)
