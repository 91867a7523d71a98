"""Detect the format of checkpoint files and folders by their contents, and load them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .contents import opened
from .distributed import METADATA, read_distributed
from .errors import Budget, CheckpointError, UnreadableError
from .layers import keys_of_layers, natural_order
from .spans import Span
from .tensors import SavedTensor
from .torch_files import read_pickle, read_zip

# Files written by save_pretrained and similar functions, in the order of search.
FILES_OF_A_FOLDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    METADATA,
)
# Other kinds of files that may have the name of a checkpoint: first bytes and message.
_OTHERS = (
    (b"version https://git-lfs", "is a pointer of git-lfs, not the file itself: fetch that by `git lfs pull`"),
    ((b"<!DOCTYPE", b"<!doctype", b"<html"), "is a page of HTML: the download went wrong"),
    (b"\x1f\x8b", "is compressed by gzip: unpack it"),
    (b"\x89HDF", "is an HDF5 file, as of Keras, not one of torch.save"),
)


@dataclass(frozen=True)
class Loaded:
    """The contents of a file.

    Attributes:
        contents: dicts and lists, with stubs for all other objects.
        tensor: returns the tensor that a value in the contents stands for; None if it is none.
    """

    contents: Any
    tensor: Callable[[Any], SavedTensor | None]


class Files:
    """The open files of one checkpoint, and the memory limit for reading them."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack, self.budget = stack, Budget()

    def open(self, path: Path) -> Span:
        """Open a file; the span covers all of it.

        Raises:
            CheckpointError: if it cannot be opened.
        """
        try:
            file = self._stack.enter_context(path.open("rb"))
            size = file.seek(0, os.SEEK_END)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: there is no such file") from None
        except (OSError, ValueError) as error:  # a name with a null character is a ValueError
            raise CheckpointError(f"{path}: cannot be opened: {getattr(error, 'strerror', None) or error}") from error
        self.budget.extend(size)
        return Span(file, 0, size)


@contextmanager
def loaded(path: Path) -> Iterator[tuple[Loaded, Budget]]:
    """Load a file or folder; its tensors can be read inside the block.

    Raises:
        CheckpointError: if it cannot be read, or for an `UnreadableError` inside the block.
    """
    with ExitStack() as stack:
        files = Files(stack)
        try:
            if path.is_dir():
                path = _file_of_folder(path)
            yield _load(path, files), files.budget
        except UnreadableError as error:
            raise CheckpointError(f"{path}: {error}") from error
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        except MemoryError as error:
            raise CheckpointError(f"{path}: there is not enough memory to read it") from error


def _file_of_folder(folder: Path) -> Path:
    for name in FILES_OF_A_FOLDER:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder}: is a folder, and has none of {', '.join(FILES_OF_A_FOLDER)} in it: name a file")


def _load(path: Path, files: Files) -> Loaded:
    if path.name.endswith(".index.json"):
        return _load_index(path, files)
    if path.name == METADATA:
        contents = read_distributed(files.open(path), lambda name: files.open(path.parent / name), files.budget)
        return Loaded(contents, _itself)
    return _load_file(path, files)


def _load_file(path: Path, files: Files) -> Loaded:
    try:
        span = files.open(path)
        start = span.read(0, min(span.size, 512))
        for signature, sentence in _OTHERS:
            if start.startswith(signature):
                raise UnreadableError(sentence)
        if start[257:262] == b"ustar":
            raise UnreadableError("is a tar archive: unpack it. torch.save before torch 0.2 wrote such files, too")
        if start.startswith(b"PK"):
            pickled = read_zip(span, files.budget)
        elif path.suffix == ".safetensors" or _starts_as_safetensors(start, span.size):
            return Loaded(_load_safetensors(path), _itself)
        else:
            pickled = read_pickle(span, files.budget)
    except UnreadableError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Loaded(pickled.contents, pickled.tensors.tensor)


def _starts_as_safetensors(start: bytes, size: int) -> bool:
    """Whether it starts with a length in 8 bytes, not above the size of the file, and the start of a JSON object."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8


@dataclass(frozen=True, eq=False)
class _Read(SavedTensor):
    """A tensor that was read by the safetensors library."""

    value: Any

    def read(self, budget: Budget) -> Any:
        return self.value


def _itself(value: Any) -> SavedTensor | None:
    return value if isinstance(value, SavedTensor) else None


def _load_safetensors(path: Path) -> dict[str, _Read]:
    """The tensors of layers with statistics; no others are read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            keys = sorted(keys_of_layers(file.keys()), key=natural_order)
            return {key: _Read(file.get_tensor(key)) for key in keys}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a safetensors file, or a damaged one ({error})") from error


def _load_index(path: Path, files: Files) -> Loaded:
    """The tensors of all shards that an index names."""
    span = files.open(path)
    try:
        names = set(json.loads(span.read(0, span.size))["weight_map"].values())
        shards = [path.parent / name for name in sorted(names)]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected an index of shards: JSON, with a weight_map of key to file") from error
    tensors: dict[str, SavedTensor] = {}
    for shard in shards:
        entry = _load_file(shard, files)
        contents = opened(entry.contents, files.budget)
        if not isinstance(contents, Mapping):
            raise CheckpointError(f"{shard}: expected a dict of tensors, got {type(entry.contents).__name__}")
        for key, value in contents.items():
            if isinstance(key, str) and (tensor := entry.tensor(value)) is not None:
                tensors[key] = tensor
    return Loaded({key: tensors[key] for key in sorted(tensors, key=natural_order)}, _itself)
