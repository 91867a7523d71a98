"""Read folders of ``torch.distributed.checkpoint``: the file ``.metadata``, and pieces of tensors in other files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import Budget, UnreadableError
from .spans import Span
from .tensors import SavedTensor, sizes
from .torch_files import read_pickle, read_zip
from .unpickling import DAMAGED, Stub

METADATA = ".metadata"


@dataclass(frozen=True)
class Piece:
    """A block of a tensor: offsets, shape, and the byte range of its ``torch.save`` file inside another file."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True, eq=False)
class ShardedTensor(SavedTensor):
    """A tensor that is stored in pieces."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    open: Callable[[str], Span]

    def read(self, budget: Budget) -> Tensor:
        """The tensor assembled from its pieces; see `tensors.SavedTensor`."""
        number = math.prod(self.shape)
        if sum(math.prod(piece.shape) for piece in self.pieces) != number:
            raise UnreadableError("has a tensor of which pieces are missing")
        budget.spend(16 * number)
        whole: Tensor | None = None
        for piece in self.pieces:
            part = _read_piece(self.open(piece.file).part(piece.start, piece.length), budget)
            if part.shape != piece.shape:
                raise UnreadableError(f"has a piece of the shape {tuple(part.shape)}, expected {piece.shape}")
            if part.is_meta:
                return part
            if len(piece.shape) != len(self.shape) or (whole is not None and whole.dtype != part.dtype):
                raise UnreadableError(DAMAGED)
            whole = part.new_zeros(self.shape) if whole is None else whole
            for begin, n, limit in zip(piece.offsets, piece.shape, self.shape):
                if begin + n > limit:
                    raise UnreadableError(DAMAGED)
            whole[tuple(slice(begin, begin + n) for begin, n in zip(piece.offsets, piece.shape))] = part
        return torch.zeros(self.shape, device="cpu") if whole is None else whole


def _read_piece(span: Span, budget: Budget) -> Tensor:
    budget.spend(span.size)
    pickled = (read_zip if span.read(0, min(span.size, 2)) == b"PK" else read_pickle)(span, budget)
    tensor = pickled.tensors.tensor(pickled.contents)
    if tensor is None:
        raise UnreadableError("has a piece that is no tensor")
    return tensor.read(budget)


def read_distributed(metadata: Span, open_file: Callable[[str], Span], budget: Budget) -> dict[str, Any]:
    """The tensors of a folder, nested as they were when they were saved.

    Args:
        metadata: the file ``.metadata``.
        open_file: opens another file of the folder by its name.
        budget: is charged for allocated memory.

    Raises:
        UnreadableError: if it is another kind of file, or damaged.
    """
    facts = _attributes(read_pickle(metadata, budget).contents)
    tensors, stored, paths = (facts.get(name) for name in ("state_dict_metadata", "storage_data", "planner_data"))
    if not isinstance(tensors, dict) or not isinstance(stored, dict):
        raise UnreadableError("is not the .metadata of torch.distributed.checkpoint")
    files = _FileCache(open_file)
    pieces: dict[str, list[Piece]] = {}
    for index, where in stored.items():
        key, offsets = (_attributes(index).get(name) for name in ("fqn", "offset"))
        if isinstance(key, str) and offsets is not None:
            shape = _shape_of_chunk(tensors.get(key), sizes(offsets))
            pieces.setdefault(key, []).append(_piece(sizes(offsets), shape, _attributes(where)))
    found: dict[str, Any] = {}
    for key, facts_of_tensor in tensors.items():
        size = _attributes(facts_of_tensor).get("size")
        if isinstance(key, str) and size is not None:
            tensor = ShardedTensor(sizes(size), tuple(pieces.get(key, ())), files)
            _put(found, _path(paths, key), tensor)
    return found


class _FileCache:
    """Files of a folder, each opened once. Names that refer to files outside of the folder are refused."""

    def __init__(self, open_file: Callable[[str], Span]) -> None:
        self._open, self._files = open_file, dict[str, Span]()

    def __call__(self, name: str) -> Span:
        if name not in self._files:
            if not name or name in (".", "..") or any(c in name for c in "/\\:\0"):
                raise UnreadableError(f"names a file that is not in its folder: {name!r}")
            self._files[name] = self._open(name)
        return self._files[name]


def _attributes(value: Any) -> Mapping[Any, Any]:
    return value.state if isinstance(value, Stub) and isinstance(value.state, dict) else {}


def _shape_of_chunk(tensor: Any, offsets: tuple[int, ...]) -> tuple[int, ...]:
    chunks = _attributes(tensor).get("chunks")
    for chunk in chunks if isinstance(chunks, list) else ():
        facts = _attributes(chunk)
        if sizes(facts.get("offsets")) == offsets:
            return sizes(facts.get("sizes"))
    raise UnreadableError(DAMAGED)


def _piece(offsets: tuple[int, ...], shape: tuple[int, ...], where: Mapping[Any, Any]) -> Piece:
    if where.get("transform_descriptors"):
        raise UnreadableError("has pieces that were compressed when they were saved, which cannot be read here")
    name = where.get("relative_path")
    start, length = sizes((where.get("offset"), where.get("length")))
    if not isinstance(name, str) or len(offsets) != len(shape):
        raise UnreadableError(DAMAGED)
    return Piece(offsets, shape, name, start, length)


def _path(paths: Any, key: str) -> tuple[str, ...]:
    """The nested keys of a tensor, which saving has joined by dots."""
    path = paths.get(key) if isinstance(paths, dict) else None
    if isinstance(path, tuple) and 0 < len(path) <= 16 and all(_is_key(part) for part in path):
        return tuple(map(str, path))
    return (key,)


def _is_key(part: Any) -> bool:
    return isinstance(part, str) or (type(part) is int and 0 <= part < 2**62)


def _put(target: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for part in path[:-1]:
        inner = target.setdefault(part, {})
        if not isinstance(inner, dict):
            return
        target = inner
    target[path[-1]] = value
