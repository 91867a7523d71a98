"""Save and restore the state of a model that forward passes may change, apart from its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.compat import number_of_function_modes, pop_function_mode, torch_functions_disabled
from .flags import all_modules, restore_flags, training_flags
from .ranks import interrupts_deferred, is_sharded

# Containers of every module that hold no state: the parameters are not restored, submodules and hooks are no tensors.
_WITHOUT_STATE = {name for name, value in vars(nn.Module()).items() if isinstance(value, dict)} - {"_buffers"}
# Largest size in bytes up to which the values of a tensor attribute that is no buffer are copied; larger ones are data.
_MAX_BYTES = 2**24


class KeptState:
    """A copy of the buffers, tensor attributes and training flags of a model.

    - Buffers are restored with their values, for example of quantisation observers or of memory banks.
    - A tensor that is a plain attribute, or an entry of a list or dict attribute, is restored if it was replaced. Its
      values are restored if it has at most 16 MiB.
    - If a buffer or such a tensor has changed, the other attributes of its module are restored, too, since they may
      describe the tensor.
    - Parameters and submodules are not saved. For models whose parameters are sharded over processes, only buffers and
      flags are saved, since their wrappers replace tensors.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = all_modules(model)
        self._flags = training_flags(model)
        self._modules = [] if is_sharded(model) else [_Attributes(module) for module in modules]
        buffers = [buffer for module in modules for buffer in module._buffers.values() if buffer is not None]
        small = [t for part in self._modules for t in part.tensors if t.nbytes <= _MAX_BYTES]
        unique = {id(tensor): tensor for tensor in (*buffers, *small) if not tensor.is_meta}
        self._values = {key: _Values(tensor) for key, tensor in unique.items()}

    def restore(self) -> None:
        """Restore whatever differs, in place."""
        with torch.no_grad():
            changed = {key for key, kept in self._values.items() if kept.restore()}
            for part in self._modules:
                part.restore(changed)
        restore_flags(self._flags)


class _Attributes:
    """The attributes of a module, and copies of the lists and dicts among them."""

    def __init__(self, module: nn.Module) -> None:
        self.own = vars(module)
        self.kept = dict(self.own)
        self.containers: list[tuple[Any, Any]] = [
            (value, value.copy())
            for name, value in self.kept.items()
            if isinstance(value, (dict, list)) and name not in _WITHOUT_STATE
        ]
        contents = (self.kept, *(copy for _, copy in self.containers))
        self.tensors = [value for values in contents for value in _values(values) if isinstance(value, Tensor)]

    def restore(self, changed: set[int]) -> None:
        """`changed`: the ids of the tensors whose values had changed."""
        touched = bool(changed) and any(id(tensor) in changed for tensor in self.tensors)
        for container, copy in self.containers:
            if _has_other_tensors(container, copy):
                touched = True
                container.clear()
                (container.update if isinstance(container, dict) else container.extend)(copy)
        # `observed` and its interceptor replace these. An interrupt may have kept them from restoring one.
        replaced = any(self.own.get(name) is not self.kept.get(name) for name in ("forward", "_normalize_only"))
        if touched or replaced or _has_other_tensors(self.own, self.kept):
            self.own.clear()
            self.own.update(self.kept)


class _Values:
    """A tensor and a copy of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.copy = tensor, tensor.detach().clone()
        self.version = _version(tensor)

    def restore(self) -> bool:
        """Restore the values; return whether they had changed."""
        # Writes through `tensor.data` or by extensions do not increase the version, so values are compared as well.
        if _version(self.tensor) == self.version and _equal(self.tensor, self.copy):
            return False
        if self.tensor.shape != self.copy.shape:
            self.tensor.resize_(self.copy.shape)
        self.tensor.copy_(self.copy)
        return True


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    try:
        return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())
    except (RuntimeError, NotImplementedError):  # sparse, quantised and similar tensors: rely on the version alone
        return True


def _values(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def _has_other_tensors(now: Any, before: Any) -> bool:
    """Whether an entry that is or was a tensor was replaced. A list whose length has changed is not taken as state."""
    if len(now) == len(before) and all(map(is_, _values(now), _values(before))):
        return False
    if isinstance(now, list):
        pairs = list(zip(now, before)) if len(now) == len(before) else []
    else:
        pairs = [(now.get(key), before.get(key)) for key in {**before, **now}]
    return any(a is not b and (isinstance(a, Tensor) or isinstance(b, Tensor)) for a, b in pairs)


@contextmanager
def state_kept(model: nn.Module) -> Iterator[KeptState]:
    """Restore the state of the model, of grad mode and of torch functions on leaving, after an exception as well.

    Code inside the block restores state, too, but an interrupt may stop it. So all is restored here once more.
    """
    kept, grad_mode, modes = KeptState(model), torch.is_grad_enabled(), number_of_function_modes()
    torch_functions = torch_functions_disabled()
    with torch_functions:  # from here on, its exit restores what is set now
        pass
    try:
        yield kept
    finally:
        with interrupts_deferred():
            torch.set_grad_enabled(grad_mode)
            torch_functions.__exit__(None, None, None)
            while number_of_function_modes() > modes:
                pop_function_mode()
            kept.restore()
