"""Read checkpoints without the code of their models.

State dicts are searched at any depth of the contents of a file. So "state_dict", "model", "ema", a Lightning checkpoint
and a pickled model need no separate rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .contents import opened
from .errors import Budget, CheckpointError, UnreadableError
from .formats import Loaded, loaded
from .layers import StateDict, keys_of_layers, read_state_dict
from .nested import Place, find, walk
from .tensors import SavedTensor, is_tensor
from .unpickling import Stub

# Largest number of state dicts with statistics in one file; a file with more is taken as an attack on memory.
MAX_STATE_DICTS = 1000


@dataclass(frozen=True)
class Source:
    """A checkpoint, or a part of it.

    Attributes:
        path: of a file or folder.
        key: the keys of the part, joined by dots; "" for the whole checkpoint.
    """

    path: Path
    key: str = ""

    @classmethod
    def parse(cls, text: str) -> Source:
        """Parse PATH or PATH:KEY. The longest existing path is used, so a path may contain colons."""
        end = len(text)
        while end > 0:
            if _exists(Path(text[:end])):
                return cls(Path(text[:end]), text[end + 1 :])
            end = text.rfind(":", 0, end)
        # No such path exists: return the probable file, for the error message. A single letter is a Windows drive.
        path, _, key = text.partition(":")
        return cls(Path(path), key) if len(path) > 1 else cls(Path(text))

    def __str__(self) -> str:
        return f"{self.path}:{self.key}" if self.key else str(self.path)

    def within(self, place: str) -> str:
        """A place relative to this part."""
        return place.removeprefix(self.key).removeprefix(".") if self.key else place


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long a name, or a null character
        return False


def read_checkpoint(source: Source | Path, eps: float | None = None) -> list[StateDict]:
    """Read every state dict in a checkpoint that has BatchNorm statistics.

    Nothing in a file is imported, called or run: see `unpickling`. Only tensors of layers with statistics are read, and
    memory is limited by a `Budget` that depends on the size of the files.

    Args:
        source: a file of ``torch.save`` (a state dict, alone or nested, or a whole model) or safetensors, a pickle of
            numpy arrays, an index of shards, a folder of ``save_pretrained`` or ``torch.distributed.checkpoint``; or a
            part of one.
        eps: of all layers. If None, the value in the file, which whole models contain, otherwise 1e-5.

    Raises:
        CheckpointError: if it cannot be read safely, or if it, or the given part of it, has no statistics.
        ModuleNotFoundError: for safetensors, without that package.
    """
    if isinstance(source, Path):
        source = Source(source)
    with loaded(source.path) as (checkpoint, budget):
        contents = checkpoint.contents
        if is_tensor(contents) or opened(contents, budget) is None:
            raise CheckpointError(f"{source.path}: expected a dict with tensors in it, got {_kind(contents)}")
        found = list(_state_dicts(checkpoint, source.key, budget, eps))
        if any(state_dict.layers for state_dict in found):
            return found
        whole = list(_state_dicts(checkpoint, "", budget, eps)) if source.key else []
    raise CheckpointError(f"{source.path}: {_nothing(source, whole, found)}")


def _nothing(source: Source, whole: Sequence[StateDict], fitting: Sequence[StateDict]) -> str:
    places = [repr(entry.place) if entry.place else "the file itself" for entry in whole if entry.layers]
    if source.key and places:
        return f"no BatchNorm statistics under the key {source.key!r}; there are some under: {', '.join(places)}"
    reasons = "; ".join(f"{name or 'the file itself'}: {why}" for entry in fitting for name, why in entry.left_out)
    where = f" under the key {source.key!r}" if source.key else ""
    return f"no BatchNorm statistics in it{where}, that is no running_mean beside a running_var" + (
        f" ({reasons})" if reasons else ""
    )


def _kind(contents: Any) -> str:
    if is_tensor(contents):
        return "a tensor"
    return f"the object {contents.name}" if isinstance(contents, Stub) else type(contents).__name__


def _state_dicts(checkpoint: Loaded, key: str, budget: Budget, eps: float | None) -> Iterator[StateDict]:
    """The state dicts under a key; for "", all state dicts."""
    number = 0

    def inside(item: Any) -> Any:
        return None if is_tensor(item) else opened(item, budget)

    contents, start = checkpoint.contents, Place()
    if key:
        contents, start = find(contents, key, inside), Place(Place(), key)
        contents = contents[0] if len(contents) == 1 else contents
    for place, entries in walk(contents, inside, start):
        keys = keys_of_layers(entries)
        if not keys:
            continue
        number += 1
        if number > MAX_STATE_DICTS:
            raise UnreadableError(f"holds more than {MAX_STATE_DICTS:,} state dicts with BatchNorm statistics")
        name = str(place)
        budget.spend(len(name))
        state_dict = read_state_dict(name, _tensors(entries, keys, checkpoint.tensor, budget), eps)
        if state_dict:
            yield state_dict


def _tensors(
    entries: Mapping[str, Any], keys: Sequence[str], tensor: Callable[[Any], SavedTensor | None], budget: Budget
) -> dict[str, Any]:
    """The values under these keys; saved tensors are read, other values are returned as they are."""
    found = {}
    for key in keys:
        saved = tensor(entries[key])
        found[key] = entries[key] if saved is None else saved.read(budget)
    return found
