"""Join batches into one, and estimate the memory that a forward pass of it needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..ops.compat import TorchDispatchMode, tree_flatten, tree_leaves, tree_unflatten


class NotJoinedError(ValueError):
    """The batches cannot be joined."""


def check_joinable(batches: Sequence[Any]) -> None:
    """Check that `joined` takes the batches.

    All must have the same structure, of lists, tuples, dicts and their like. The tensors of a batch must have the same
    length. Corresponding tensors must agree in everything but that length, and other values must be equal.

    Raises:
        NotJoinedError: if they cannot be joined.
    """
    flat = [tree_flatten(batch) for batch in batches]
    if any(structure != flat[0][1] for _, structure in flat):
        raise NotJoinedError("the batches differ in structure")
    for leaves, _ in flat:
        _length(leaves)
    for parts in zip(*(leaves for leaves, _ in flat)):
        _check_alike(parts)


def joined(batches: Sequence[Any]) -> Any:
    """One batch of the samples of all; a copy. The tensors are concatenated along their first dimension."""
    flat = [tree_leaves(batch) for batch in batches]
    return tree_unflatten([_joined(parts) for parts in zip(*flat)], tree_flatten(batches[0])[1])


def samples(batch: Any) -> int:
    """The length of the tensors in a batch."""
    return _length(tree_leaves(batch))


def _length(leaves: list[Any]) -> int:
    lengths = {len(leaf) if leaf.dim() else None for leaf in leaves if isinstance(leaf, Tensor)}
    length = lengths.pop() if len(lengths) == 1 else None
    if length is None:
        raise NotJoinedError("expected tensors of one length in each batch")
    return length


def _check_alike(parts: tuple[Any, ...]) -> None:
    first = parts[0]
    if isinstance(first, Tensor):
        if type(first) is not Tensor or len({_kind(part) for part in parts}) > 1:
            raise NotJoinedError("the tensors differ in more than their length, or are of a subclass")
    # Other objects, such as arrays, may hold samples.
    elif not isinstance(first, (str, bytes, bool, int, float, type(None))) or any(part != first for part in parts):
        raise NotJoinedError("the batches hold values that differ, or objects other than tensors and numbers")


def _kind(part: Any) -> tuple[Any, ...]:
    tensor = isinstance(part, Tensor)
    return (type(part), part.shape[1:], part.dtype, part.device, part.layout) if tensor else (type(part),)


def _joined(parts: tuple[Any, ...]) -> Any:
    first = parts[0]
    if not isinstance(first, Tensor):
        return first
    return torch.cat([part.detach() for part in parts]).requires_grad_(first.requires_grad)


class PeakMemory(TorchDispatchMode):
    """Measures the largest number of bytes in tensors made inside the block that are alive at the same time.

    Attributes:
        peak: the bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: otherwise torch imports its compiler at the first use of a mode, which takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata not in given:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
