"""What forward passes change in a model besides its parameters: kept, and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .flags import restore_flags, training_flags
from .ranks import interrupts_deferred, is_sharded

# Of a tensor that is an attribute and no buffer, a copy is kept up to this size in bytes: larger ones are data.
_LARGEST = 2**24


class KeptState:
    """The buffers, the tensors among the attributes, and the training flags of a model as they are now.

    Buffers are kept with their values, whoever writes to them: observers of quantisation, membrane potentials, banks
    of features. A tensor that is a plain attribute, or lies in a list or dict that is one, is put back where another
    took its place, and its values up to 16 MiB. Where such a tensor or a buffer has changed, the other attributes of
    that module are put back too, since they may say what the tensor means. Parameters, and modules, are not kept; of
    models whose parameters are spread over processes only buffers and flags, for their wrappers move tensors about.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._flags = training_flags(model)
        self._modules = [] if is_sharded(model) else [_Attributes(module) for module in modules]
        buffers = [buffer for module in modules for _, buffer in module.named_buffers(recurse=False)]
        small = [t for part in self._modules for t in part.tensors() if t.nbytes <= _LARGEST]
        unique = {id(tensor): tensor for tensor in (*buffers, *small) if not tensor.is_meta}
        self._values = {key: _Values(tensor) for key, tensor in unique.items()}

    def restore(self) -> None:
        """Put back whatever differs, in place."""
        with torch.no_grad():
            changed = {key for key, kept in self._values.items() if kept.restore()}
            for part in self._modules:
                part.restore(changed)
        restore_flags(self._flags)


class _Attributes:
    """The attributes of a module, and what is in the lists and dicts among them."""

    def __init__(self, module: nn.Module) -> None:
        self.own = vars(module)
        self.kept = dict(self.own)
        self.containers: list[tuple[Any, Any]] = [
            (value, value.copy())
            for name, value in self.kept.items()
            if isinstance(value, (dict, list)) and name != "_parameters"
        ]

    def tensors(self) -> Iterator[Tensor]:
        contents = (_values(copy) for _, copy in self.containers)
        for values in (_values(self.kept), *contents):
            yield from (value for value in values if isinstance(value, Tensor))

    def restore(self, changed: set[int]) -> None:
        """`changed`: by id, the tensors that had other values."""
        touched = any(id(tensor) in changed for tensor in self.tensors())
        for container, copy in self.containers:
            if _has_other_tensors(container, copy):
                touched = True
                container.clear()
                (container.update if isinstance(container, dict) else container.extend)(copy)
        # A forward that observation has put in place is still there if putting it back was interrupted.
        replaced = self.own.get("forward") is not self.kept.get("forward")
        if touched or replaced or _has_other_tensors(self.own, self.kept):
            self.own.clear()
            self.own.update(self.kept)


class _Values:
    """A tensor and a copy of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.copy = tensor, tensor.detach().clone()
        self.version = _version(tensor)

    def restore(self) -> bool:
        """Whether the tensor had changed."""
        # Not every change counts as a version: `tensor.data` and foreign code write past it.
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
    except (RuntimeError, NotImplementedError):  # sparse, quantised and the like: as their versions say
        return True


def _values(container: Any) -> list[Any]:
    return list(container.values() if isinstance(container, dict) else container)


def _has_other_tensors(now: Any, before: Any) -> bool:
    """Whether an entry differs that is or was a tensor. A list that has grown collects something, and is no state."""
    if isinstance(now, list):
        pairs = list(zip(now, before)) if len(now) == len(before) else []
    else:
        pairs = [(now.get(key), before.get(key)) for key in {**before, **now}]
    return any(a is not b and (isinstance(a, Tensor) or isinstance(b, Tensor)) for a, b in pairs)


@contextmanager
def state_kept(model: nn.Module) -> Iterator[KeptState]:
    """Put back the state of the model, and grad mode, when the block is left, however that is.

    An interrupt may come while something inside is putting things back. So it is done here once more.
    """
    kept, grad_mode = KeptState(model), torch.is_grad_enabled()
    try:
        yield kept
    finally:
        with interrupts_deferred():
            torch.set_grad_enabled(grad_mode)
            kept.restore()
