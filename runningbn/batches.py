"""How the batches of a loader reach a model: in what form, on what device, with what bar of progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn

from .observe import PARALLEL_WRAPPERS

Forward = Callable[[nn.Module, Any], object]
Progress = Callable[[Iterable[Any], "int | None"], Iterable[Any]]


def runner(
    model: nn.Module, forward: Forward | None = None, device: torch.device | str | None = None
) -> Callable[[Any], None]:
    """What runs a batch through the model: moved to the device, then by `forward` or `call`.

    Without a device, tensors go where a wrapper for parallel training would have sent them, or stay where they are.
    """
    forward = forward or call
    if device is None and isinstance(model, PARALLEL_WRAPPERS):
        there = torch.device(model.device_ids[0]) if model.device_ids else None
    else:
        there = None if device is None else torch.device(device)

    def run(batch: Any) -> None:
        forward(model, batch if there is None else moved(batch, there))

    return run


def call(model: nn.Module, batch: Any) -> object:
    """Call the model with a tensor, the first element of a list or tuple, or a mapping as keyword arguments."""
    if isinstance(batch, (list, tuple)):
        if not batch:
            raise ValueError("expected a batch, got an empty list or tuple")
        batch = batch[0]
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with all tensors on the device: in mappings, lists and tuples, and whatever has a ``to``."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(part, device) for part in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(moved(part, device) for part in batch)
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(part, device) for key, part in batch.items()}
    return batch


def keeping(batches: Iterable[Any], kept: list[Any]) -> Iterator[Any]:
    """The batches, each also appended to `kept`."""
    for batch in batches:
        kept.append(batch)
        yield batch


def length(data_loader: Iterable[Any], num_iters: int | None) -> int | None:
    """How many batches there will be at most, if that is known."""
    try:
        known = len(data_loader) if isinstance(data_loader, Sized) else None
    except TypeError:  # of a DataLoader over an IterableDataset
        known = None
    return min((n for n in (known, num_iters) if n is not None), default=None)


def progress_bar(kind: str | None) -> Progress:
    """What shows the progress of a loop over an iterable: nothing, or tqdm.

    Raises:
        ValueError: for another kind.
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
