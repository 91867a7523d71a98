"""Read a data loader while training reads it: with a separate iterator, and with its random generators restored."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch.utils.data import DataLoader


class Combined:
    """Several loaders in one of Lightning's collections, read in parallel."""

    def __init__(self, loaders: Any, mode: str, lightning: str) -> None:
        self.loaders, self.mode, self.lightning = loaders, mode, lightning

    def __iter__(self) -> Iterator[Any]:
        utilities = import_module(f"{self.lightning}.utilities.combined_loader")
        # CombinedLoader yields a batch, its index and the index of its loader.
        for batch, _, _ in utilities.CombinedLoader(self.loaders, self.mode):
            yield batch


@contextmanager
def separate_loader(loader: Any) -> Iterator[Any]:
    """A loader over the same data with a separate iterator; on leaving, the random generators are restored."""
    copied = _mapped(loader, _copied)
    generators = {id(g): g for part in _parts(loader) for g in vars(part).values() if isinstance(g, _GENERATORS)}
    states = [(generator, _state(generator)) for generator in generators.values()]
    try:
        yield copied
    finally:
        for generator, state in states:
            _set_state(generator, state)


def _mapped(loader: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(loader, Combined):
        return Combined(_mapped_collection(loader.loaders, function), loader.mode, loader.lightning)
    return function(loader)


def _mapped_collection(loaders: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(loaders, dict):
        return {key: _mapped_collection(part, function) for key, part in loaders.items()}
    if isinstance(loaders, (list, tuple)):
        return [_mapped_collection(part, function) for part in loaders]
    return function(loaders)


def _copied(loader: Any) -> Any:
    """A copy of the loader without an iterator; with persistent workers, a loader has one iterator, used by training.

    Raises:
        ValueError: if the data can be read only once.
    """
    source = loader.dataset if isinstance(loader, DataLoader) else loader
    if isinstance(source, Iterator):
        raise ValueError(
            f"{type(source).__name__} can be read only once, and training reads it; pass a separate dataloader= to "
            "RecalibrateBatchNorm"
        )
    if not isinstance(loader, DataLoader):
        return loader
    copied = copy.copy(loader)
    vars(copied).update(_iterator=None, persistent_workers=False)
    return copied


def _parts(thing: Any) -> Iterator[Any]:
    """A loader and its parts that usually have a random generator."""
    if isinstance(thing, Combined):
        yield from _parts(thing.loaders)
    elif isinstance(thing, (dict, list, tuple)):
        for part in thing.values() if isinstance(thing, dict) else thing:
            yield from _parts(part)
    elif hasattr(thing, "__dict__"):
        yield thing
        for name in ("sampler", "batch_sampler", "dataset", "transform"):
            if vars(thing).get(name) is not None:
                yield from _parts(vars(thing)[name])


def _generator_types() -> tuple[type, ...]:
    try:
        import numpy
    except ImportError:
        return torch.Generator, random.Random
    return torch.Generator, random.Random, numpy.random.Generator, numpy.random.RandomState


_GENERATORS = _generator_types()


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
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
