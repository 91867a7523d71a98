"""Pass the batches of a loader to a model: call format, device and progress bar."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sized
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .hooks import PARALLEL_WRAPPERS

Forward = Callable[[nn.Module, Any], object]
Progress = Callable[[Iterable[Any], "int | None"], Iterable[Any]]


def check_num_iters(num_iters: object) -> None:
    """Raise a ValueError unless this is a number of batches, or None for all."""
    if num_iters is not None and (isinstance(num_iters, bool) or not isinstance(num_iters, Integral) or num_iters < 1):
        raise ValueError(f"num_iters: expected None or an integer of at least 1, got {num_iters!r}")


def runner(
    model: nn.Module, forward: Forward | None = None, device: torch.device | str | None = None
) -> Callable[[Any], None]:
    """A function that moves a batch to the device and calls the model on it, by `forward` or `call`.

    If `device` is None, the tensors move to the first device of a wrapper for parallel training; for any other model
    they are not moved.
    """
    forward = forward or call
    if device is None and isinstance(model, PARALLEL_WRAPPERS):
        target = torch.device(model.device_ids[0]) if model.device_ids else None
    else:
        target = None if device is None else torch.device(device)

    def run(batch: Any) -> None:
        forward(model, batch if target is None else moved(batch, target))

    return run


def call(model: nn.Module, batch: Any) -> object:
    """Call the model with a tensor, the first element of a list or tuple, or a mapping as keyword arguments.

    Raises:
        ValueError: for an empty list or tuple.
        TypeError: for a mapping that does not fit the model's forward.
    """
    if _is_sequence(batch):
        if not batch:
            raise ValueError("expected a batch, got an empty list or tuple")
        batch = batch[0]
    if not isinstance(batch, Mapping):
        return model(batch)
    _check_keywords(model, batch)
    return model(**batch)


def used_by_call(batch: Any) -> Any:
    """The batch without what `call` does not use: the elements of a list or tuple after the first."""
    return tuple(batch[:1]) if _is_sequence(batch) else batch


def _is_sequence(batch: Any) -> bool:
    # A PackedSequence is a named tuple, and an input by itself.
    return isinstance(batch, (list, tuple)) and not isinstance(batch, PackedSequence)


def _check_keywords(model: nn.Module, batch: Mapping[Any, Any]) -> None:
    while isinstance(model, PARALLEL_WRAPPERS):
        model = model.module
    try:
        inspect.signature(type(model).forward).bind(model, **batch)
    except TypeError as error:
        keys = ", ".join(map(str, batch))
        raise TypeError(
            f"{type(model).__name__}: a batch that is a mapping is passed as keyword arguments, here {keys}, and "
            f"{error}; give forward=lambda model, batch: ... to call the model in another way"
        ) from None
    except ValueError:  # the forward has no signature
        return


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors moved to the device: those in mappings, lists and tuples, and objects with a ``to``.

    Containers keep their class. If ``to`` returns None, the object is assumed to be moved in place.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if hasattr(batch, "to"):
        result = batch.to(device)
        return batch if result is None else result
    if isinstance(batch, (list, tuple)):
        return _refilled(batch, [moved(part, device) for part in batch])
    if isinstance(batch, Mapping):
        parts = {key: moved(part, device) for key, part in batch.items()}
        return _refilled(batch, parts)
    return batch


def _refilled(container: Any, parts: Any) -> Any:
    """A container of the same class and with the same attributes, and with other contents."""
    if type(container) in (list, tuple, dict):
        return type(container)(parts)
    new: Any
    if isinstance(container, tuple):
        # A constructor of a subclass may take other arguments.
        new = tuple.__new__(type(container), parts)
        if hasattr(container, "__dict__"):
            vars(new).update(vars(container))
        return new
    if not isinstance(container, (list, MutableMapping)):
        return parts
    new = copy.copy(container)
    if isinstance(container, list):
        new[:] = parts
    else:
        new.update(parts)
    return new


def keeping(batches: Iterable[Any], kept: list[Any]) -> Iterator[Any]:
    """Yield the batches and append each to `kept`."""
    for batch in batches:
        kept.append(batch)
        yield batch


def length(data_loader: Iterable[Any]) -> int | None:
    """The number of batches; None if it is not known."""
    try:
        return len(data_loader) if isinstance(data_loader, Sized) else None
    except Exception:  # a TypeError from a DataLoader over an IterableDataset, other errors from classes of users
        return None


def progress_bar(kind: str | None) -> Progress:
    """A function that wraps an iterable in a progress bar: None for no bar, or ``"tqdm"``.

    Raises:
        ValueError: for any other value.
        ImportError: without tqdm.
    """
    if kind is None:
        return lambda iterable, total: iterable
    if kind != "tqdm":
        raise ValueError(f"progress: expected None or 'tqdm', got {kind!r}")
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress='tqdm' needs tqdm: pip install 'runningbn[progress]'") from error
    return lambda iterable, total: tqdm(iterable, total=total)
