"""Read a data loader while training reads it: with a separate iterator, and with its random state restored."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from ..recalibration.hooks import random_state_kept


class Combined:
    """Several loaders in one of Lightning's collections, read in parallel."""

    def __init__(self, loaders: Any, mode: str, lightning: str) -> None:
        self.loaders, self.mode, self.lightning = loaders, mode, lightning

    def __iter__(self) -> Iterator[Any]:
        utilities = import_module(f"{self.lightning}.utilities.combined_loader")
        # CombinedLoader yields a batch, its index and the index of its loader.
        for batch, _, _ in utilities.CombinedLoader(self.loaders, self.mode):
            yield batch


class Share:
    """The part of one process, every n-th batch, of a loader that has all data in each process."""

    def __init__(self, loaders: Iterable[Any], rank: int, size: int) -> None:
        self.loaders, self.rank, self.size = loaders, rank, size

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.loaders, self.rank, None, self.size)


class Part(NamedTuple):
    """A loader, or a part of it that may have a random state.

    Attributes:
        part: the object.
        is_sampler: whether it is a sampler: iterating may change its attributes, such as a number of the epoch.
    """

    part: Any
    is_sampler: bool


@contextmanager
def separate_loader(loader: Any, copied: Callable[[Any], Any] | None = None) -> Iterator[Any]:
    """A loader over the same data with a separate iterator; on leaving, samplers and random generators are restored.

    Args:
        loader: a loader, also one of accelerate, or `Combined`.
        copied: gives a single loader a separate iterator; `copied_loader` by default.
    """
    loader = _without_accelerate(loader)
    parts = list(_parts(loader))
    samplers = [(vars(part), dict(vars(part))) for part, is_sampler in parts if is_sampler]
    generators = {id(g): g for part, _ in parts for g in vars(part).values() if isinstance(g, _GENERATORS)}
    states = [(generator, _state(generator)) for generator in generators.values()]
    try:
        yield _mapped(loader, copied or copied_loader)
    finally:
        for attributes, before in samplers:
            attributes.clear()
            attributes.update(before)
        for generator, state in states:
            _set_state(generator, state)


def _without_accelerate(loader: Any) -> Any:
    """The loader of this process's data inside accelerate's, which counts epochs, synchronises and broadcasts."""
    inner = getattr(loader, "base_dataloader", loader)
    # isinstance would ask its __class__, which is that of the loader inside.
    if type(loader).__name__ == "DataLoaderDispatcher" and loader.state.num_processes > 1:
        return Share(inner, loader.state.process_index, loader.state.num_processes)
    return inner


def _mapped(loader: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(loader, (Combined, Share)):
        new = copy.copy(loader)
        new.loaders = _mapped_collection(loader.loaders, function)
        return new
    return function(loader)


def _mapped_collection(loaders: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(loaders, dict):
        return {key: _mapped_collection(part, function) for key, part in loaders.items()}
    if isinstance(loaders, (list, tuple)):
        return [_mapped_collection(part, function) for part in loaders]
    return function(loaders)


def copied_loader(loader: Any) -> Any:
    """A copy of the loader without an iterator; with persistent workers, a loader has one iterator, used by training.

    Raises:
        ValueError: if the data can be read only once, or if the loader keeps one iterator for all epochs.
    """
    check_rereadable(loader.dataset if isinstance(loader, DataLoader) else loader)
    if not isinstance(loader, DataLoader):
        return loader
    if any(name != "_iterator" and isinstance(value, Iterator) for name, value in vars(loader).items()):
        raise ValueError(
            f"{type(loader).__name__} keeps one iterator for all epochs, which training reads; pass a separate "
            "dataloader= to RecalibrateBatchNorm"
        )
    copied = copy.copy(loader)
    vars(copied).update(_iterator=None, persistent_workers=False)
    return copied


def check_rereadable(source: Any) -> None:
    """Check that a data set, or a loader of another class, can be read again from its start.

    Raises:
        ValueError: for an iterator, and for an IterableDataset that returns the same iterator again; also inside data
            sets that wrap others in `dataset`.
    """
    if isinstance(source, Iterator) or (isinstance(source, IterableDataset) and _has_one_iterator(source)):
        raise ValueError(
            f"{type(source).__name__} can be read only once, and training reads it; pass a separate dataloader= to "
            "RecalibrateBatchNorm"
        )
    if hasattr(source, "__dict__") and vars(source).get("dataset") is not None:
        check_rereadable(vars(source)["dataset"])


def _has_one_iterator(source: Iterable[Any]) -> bool:
    with random_state_kept(nn.Module()):  # files may be shuffled before an iterator is returned
        return iter(source) is iter(source)


def _parts(thing: Any, is_sampler: bool = False) -> Iterator[Part]:
    """A loader and its parts that usually have a random generator."""
    if isinstance(thing, (Combined, Share)):
        yield from _parts(thing.loaders)
    elif isinstance(thing, (dict, list, tuple)):
        for part in thing.values() if isinstance(thing, dict) else thing:
            yield from _parts(part)
    elif hasattr(thing, "__dict__"):
        yield Part(thing, is_sampler)
        for name in ("sampler", "batch_sampler", "dataset", "transform", "loader"):
            if vars(thing).get(name) is not None:
                yield from _parts(vars(thing)[name], name.endswith("sampler"))


def _generator_types() -> tuple[type, ...]:
    try:
        import numpy
    except ImportError:
        return torch.Generator, random.Random
    return torch.Generator, random.Random, numpy.random.Generator, numpy.random.RandomState


_GENERATORS = _generator_types()


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if hasattr(generator, "bit_generator"):
        return copy.deepcopy(generator.bit_generator.state)
    return generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
