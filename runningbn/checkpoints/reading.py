"""Checkpoints, read without the code of their models.

A file is read as tensors alone: ``torch.load(weights_only=True)`` refuses what would run code, and safetensors holds
none. In what was read, state dicts are looked for at any depth, so that "state_dict", "model", "ema" and a Lightning
checkpoint need no rule each.
"""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .layers import StateDict, keys_of_layers, natural_order, read_state_dict

# What save_pretrained and its relatives leave in a folder, in the order in which they are looked for.
FILES_OF_A_FOLDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class CheckpointError(ValueError):
    """A file that cannot be read, or that has no statistics in it. The message says what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Text from a file as one that leaves a terminal alone: control characters are written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def read_checkpoint(path: Path) -> list[StateDict]:
    """Every state dict in a checkpoint that has BatchNorm statistics.

    Args:
        path: what ``torch.save`` or safetensors wrote, an index of shards, or a folder that has one of
            `FILES_OF_A_FOLDER`.

    Raises:
        CheckpointError: if it cannot be read safely, or has no statistics in it.
        ModuleNotFoundError: for safetensors, without that package.
    """
    contents = load_tensors(path)
    if not isinstance(contents, (Mapping, list, tuple)):
        raise CheckpointError(f"{path}: expected a dict with tensors in it, got {type(contents).__name__}")
    found = [state_dict for place, tensors in walk(contents) if (state_dict := read_state_dict(place, tensors))]
    if not any(state_dict.layers for state_dict in found):
        reasons = "; ".join(f"{name or 'the file itself'}: {why}" for entry in found for name, why in entry.left_out)
        raise CheckpointError(
            f"{path}: no BatchNorm statistics in it, that is no running_mean beside a running_var"
            + (f" ({reasons})" if reasons else "")
        )
    return found


def walk(contents: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping in dicts, lists and tuples, with the keys that lead to it, joined by dots; outer ones first."""
    seen: set[int] = set()
    waiting = [("", contents)]  # no recursion: a file says how deep it is
    while waiting:
        place, item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Mapping):
            yield place, {key: value for key, value in item.items() if isinstance(key, str)}
            inner = list(item.items())
        else:
            inner = list(enumerate(item))
        nested = [(key, value) for key, value in inner if isinstance(value, (Mapping, list, tuple))]
        waiting += [(f"{place}.{key}" if place else str(key), value) for key, value in reversed(nested)]


def load_tensors(path: Path) -> Any:
    """What a file or folder holds; of safetensors, only the tensors of layers with statistics.

    Raises:
        CheckpointError: if it cannot be read safely.
    """
    if path.is_dir():
        path = _file_of_folder(path)
    return _load_shards(path) if path.name.endswith(".index.json") else _load_file(path)


def _load_file(path: Path) -> Any:
    try:
        path.open("rb").close()  # readers meet OSErrors in damaged files, too
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error
    return _load_safetensors(path) if path.suffix == ".safetensors" else _load_torch(path)


def _file_of_folder(folder: Path) -> Path:
    for name in FILES_OF_A_FOLDER:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder}: is a folder, and has none of {', '.join(FILES_OF_A_FOLDER)} in it: name a file")


def _load_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is refused in a moment
            # Only the format before torch 1.6 is no zip file, and cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    # What the unpickler meets in a file of another kind raises whatever it happens to.
    except Exception as error:
        raise CheckpointError(f"{path}: {_refusal(error)}") from error


def _refusal(error: Exception) -> str:
    """Why ``torch.load`` would not read a file, and what can be done about it."""
    message = str(error)
    foreign = re.search(r"GLOBAL (\S+) was not an allowed global", message)
    if foreign:
        return (
            f"holds more than tensors, namely {foreign[1]}, as a model saved whole does. Loading that can run any code "
            "that is in the file, so it was not loaded. If you trust the file, load it with weights_only=False where "
            "its classes can be imported, and save the tensors alone: torch.save(model.state_dict(), PATH)"
        )
    if "TorchScript" in message:
        return (
            "is a TorchScript archive, which is code and tensors. If you trust it, save the tensors alone: "
            "torch.save(torch.jit.load(...).state_dict(), PATH)"
        )
    return "not a checkpoint of torch.save, or a damaged one"


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in sorted(keys_of_layers(file.keys()), key=natural_order)}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file, or a damaged one ({error})") from error


def _load_shards(path: Path) -> dict[str, Any]:
    try:
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        shards = [path.parent / name for name in sorted(names)]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: expected an index of shards: JSON, with a weight_map of key to file") from error
    tensors: dict[str, Any] = {}
    for shard in shards:
        contents = _load_file(shard)
        if not isinstance(contents, Mapping):
            raise CheckpointError(f"{shard}: expected a dict of tensors, got {type(contents).__name__}")
        tensors.update(contents)
    return {key: tensors[key] for key in sorted(tensors, key=natural_order)}
