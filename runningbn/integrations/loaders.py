"""Reading the loader that training reads, beside it: without its iterator, and with its random generators put back."""

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
    """Several loaders in Lightning's collections, read side by side."""

    def __init__(self, loaders: Any, mode: str, lightning: str) -> None:
        self.loaders, self.mode, self.lightning = loaders, mode, lightning

    def __iter__(self) -> Iterator[Any]:
        utilities = import_module(f"{self.lightning}.utilities.combined_loader")
        # Batches come with their number and that of their loader.
        for batch, _, _ in utilities.CombinedLoader(self.loaders, self.mode):
            yield batch


@contextmanager
def beside(loader: Any) -> Iterator[Any]:
    """A loader over the same data that can be iterated while the other one is; its generators are put back."""
    copied = _mapped(loader, _second)
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


def _second(loader: Any) -> Any:
    """The loader again, with no iterator of its own: one with persistent workers has a single one, and training it."""
    source = loader.dataset if isinstance(loader, DataLoader) else loader
    if isinstance(source, Iterator):
        raise ValueError(
            f"{type(source).__name__} can be read only once, and training needs it; give RecalibrateBatchNorm a "
            "dataloader of its own"
        )
    if not isinstance(loader, DataLoader):
        return loader
    second = copy.copy(loader)
    vars(second).update(_iterator=None, persistent_workers=False)
    return second


def _parts(thing: Any) -> Iterator[Any]:
    """A loader and what it is made of: everything that usually has a generator."""
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
