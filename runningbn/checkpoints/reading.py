"""The BatchNorm layers of a checkpoint, read without the code of its model.

A file is read as tensors alone: ``torch.load(weights_only=True)`` refuses what would run code, and safetensors holds
none. In what was read, state dicts are looked for at any depth, so that "state_dict", "model", "ema" and a Lightning
checkpoint need no rule each. A layer is whatever has a `running_mean` and a `running_var`; keys are kept whole,
"module." included. An InstanceNorm that tracks statistics has the same keys, so it is listed, too.
"""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..buffers import is_narrow
from ..statistics import GradientState, State, Sums

AFFINE = ("weight", "bias")
VIEW = ("running_mean", "running_var")
# What RunningBatchNorm and PreciseBatchNorm keep beside it. The last two are of no use beyond a backward pass.
STATE = tuple(name for name in State._fields if name not in (*VIEW, "num_batches_tracked", "last_keep", "last_gain"))
# One number per channel each, where a layer has them.
PER_CHANNEL = (*VIEW, *AFFINE, *STATE, *GradientState._fields)

# A state taken over from elsewhere says that it is settled by a number of samples that no training reaches.
TAKEN_OVER = 1e30

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


@dataclass(frozen=True)
class Layer:
    """One BatchNorm layer of a checkpoint. C channels; tensors are (C,), float64, on the CPU.

    Attributes:
        name: its prefix in the state dict, without the last dot; "" where the layer was saved by itself.
        dtype: of `running_mean` in the file.
        mean, var: `running_mean` and `running_var`.
        weight, bias: None where there is none.
        batches: `num_batches_tracked`, None where there is none.
        state: the pooled state of our layers; empty for all others.
        gradient_state: the running sums of RunningBatchNorm's backward pass, likewise.
        unusable_state: whether it has parts of a state, or all of it in 16 bits, which a load does not take over.
    """

    name: str
    dtype: torch.dtype
    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    batches: int | None
    state: Mapping[str, Tensor]
    gradient_state: Mapping[str, Tensor]
    unusable_state: bool

    @property
    def channels(self) -> int:
        """C."""
        return len(self.mean)

    @property
    def sums(self) -> Sums:
        """The linear state of one of our layers."""
        return Sums(*(self.state[name] for name in Sums._fields))

    @property
    def effective_elements(self) -> Tensor:
        """How many elements of equal weight would know as much, (C,): (Σw)²/Σw², Kish 1965."""
        return self.state["count"].square() / self.state["count_sqrs"]

    @property
    def taken_over(self) -> bool:
        """Whether the state was seeded by statistics from elsewhere; how much data they saw is not known then."""
        return bool((self.state["samples"] > TAKEN_OVER).any())


@dataclass(frozen=True)
class StateDict:
    """The layers of one state dict.

    Attributes:
        place: where it is in the file, such as "state_dict"; "" where it is the file.
        layers: in the order of the file; safetensors has no order, so there by name.
        left_out: layers that have a `running_mean` or `running_var` but are none to judge: name and reason.
    """

    place: str
    layers: tuple[Layer, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def channels(self) -> int:
        """Of all layers."""
        return sum(layer.channels for layer in self.layers)


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


# ------------------------------------------------------------------------------------------------------------ files


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
            keys = list(file.keys())
            prefixes = _prefixes(keys)
            wanted = [key for key in keys if key.removesuffix(_leaf(key)) in prefixes]
            return {key: file.get_tensor(key) for key in sorted(wanted, key=_natural_order)}
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
    return {key: tensors[key] for key in sorted(tensors, key=_natural_order)}


# ------------------------------------------------------------------------------------------------------ state dicts


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


def read_state_dict(place: str, tensors: Mapping[str, Any]) -> StateDict | None:
    """The layers among these tensors; None where nothing is called `running_mean` or `running_var`."""
    layers, left_out = [], []
    for prefix in _prefixes(tensors):
        entries = {name: tensors.get(prefix + name) for name in (*PER_CHANNEL, "num_batches_tracked")}
        parts = {name: entry for name, entry in entries.items() if isinstance(entry, Tensor)}
        name = prefix.removesuffix(".")
        if reason := _unfit(parts):
            left_out.append((name, reason))
        else:
            layers.append(_layer(name, parts))
    return StateDict(place, tuple(layers), tuple(left_out)) if layers or left_out else None


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _prefixes(keys: Any) -> list[str]:
    """What stands before `running_mean` or `running_var`, in the order of the keys."""
    return list(dict.fromkeys(key.removesuffix(_leaf(key)) for key in keys if _leaf(key) in VIEW))


def _natural_order(key: str) -> list[tuple[bool, int, str]]:
    """Layer 2 before layer 10."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in key.split(".")]


def _unfit(parts: Mapping[str, Tensor]) -> str:
    """Why these are not the tensors of a layer; empty where they are."""
    missing = [name for name in VIEW if name not in parts]
    if missing:
        return f"it has no {missing[0]}"
    shape = parts["running_mean"].shape
    if len(shape) != 1 or shape[0] == 0:
        return f"running_mean has the shape {tuple(shape)}, expected (C,)"
    for name, value in parts.items():
        if value.is_meta or value.layout != torch.strided or value.is_quantized or value.is_complex():
            return f"{name} holds no plain real numbers"
        if name in (*VIEW, *AFFINE) and value.shape != shape:
            return f"{name} has the shape {tuple(value.shape)}, and running_mean {tuple(shape)}"
    return ""


def _layer(name: str, parts: Mapping[str, Tensor]) -> Layer:
    mean = parts["running_mean"]
    own = {part: parts[part] for part in STATE if part in parts}
    usable = len(own) == len(STATE) and all(t.shape == mean.shape and not is_narrow(t) for t in own.values())
    wide = {part: value.double() for part, value in parts.items() if value.shape == mean.shape}
    return Layer(
        name=name,
        dtype=mean.dtype,
        mean=wide["running_mean"],
        var=wide["running_var"],
        weight=wide.get("weight"),
        bias=wide.get("bias"),
        batches=_batches(parts.get("num_batches_tracked")),
        state={part: wide[part] for part in own} if usable else {},
        gradient_state={part: wide[part] for part in GradientState._fields if part in wide} if usable else {},
        unusable_state=bool(own) and not usable,
    )


def _batches(tracked: Tensor | None) -> int | None:
    # Averaged weights may bring it as a fraction.
    if tracked is None or tracked.numel() != 1 or not tracked.isfinite().all():
        return None
    return int(tracked)
