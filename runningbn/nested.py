"""State dicts inside dicts and lists, as checkpoints have them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Levels of dicts and lists; what lies deeper is no state dict that anybody loads.
DEEPEST = 64


@dataclass(frozen=True, eq=False)
class Place:
    """Where something is: in the outer place, under a key. ``str`` joins the keys by dots; "" is the whole."""

    outer: Place | None = None
    key: str = ""
    depth: int = 0

    def __str__(self) -> str:
        keys = []
        place = self
        while place.outer is not None:
            keys.append(place.key)
            place = place.outer
        return ".".join(reversed(keys))

    def inner(self, key: Any) -> Place:
        """The place under a key."""
        short = isinstance(key, int) and abs(key) < 2**63  # str refuses huge numbers
        return Place(self, key if isinstance(key, str) else str(key) if short else type(key).__name__, self.depth + 1)


def _plain(item: Any) -> Any:
    return item if isinstance(item, (Mapping, list, tuple)) else None


def walk(contents: Any, opened: Callable[[Any], Any] = _plain) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """Every mapping in dicts, lists and tuples with its place, outer ones first, and of it what has a string as key.

    Args:
        contents: what to look into.
        opened: takes an item to what is in it, a mapping, list or tuple; None for what has nothing inside.
    """
    seen: set[int] = set()
    waiting = [(Place(), contents)]  # no recursion: a file says how deep it is
    while waiting:
        place, item = waiting.pop()
        if id(item) in seen or (inside := opened(item)) is None:
            continue
        seen.add(id(item))
        if isinstance(inside, Mapping):
            yield place, {key: value for key, value in inside.items() if isinstance(key, str)}
            pairs = list(inside.items())
        else:
            pairs = list(enumerate(inside))
        if place.depth < DEEPEST:
            nested = [(key, value) for key, value in pairs if not isinstance(value, _LEAVES)]
            waiting += [(place.inner(key), value) for key, value in reversed(nested)]


_LEAVES = (str, bytes, int, float, type(None))
