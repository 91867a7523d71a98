"""Find state dicts nested in dicts and lists, as in checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Largest depth of dicts and lists in which state dicts are searched.
MAX_DEPTH = 64


@dataclass(frozen=True, eq=False, slots=True)
class Place:
    """The position of an item: a key in an outer place. ``str`` joins the keys by dots; "" is the whole file."""

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
        """The place of the item under a key."""
        return Place(self, key_as_text(key), self.depth + 1)


def key_as_text(key: Any) -> str:
    """A key as part of a place."""
    if isinstance(key, str):
        return key
    return str(key) if isinstance(key, int) and abs(key) < 2**63 else type(key).__name__  # str refuses huge numbers


def _plain(item: Any) -> Any:
    return item if isinstance(item, (Mapping, list, tuple)) else None


def _pairs(inside: Any) -> list[tuple[Any, Any]]:
    return list(inside.items()) if isinstance(inside, Mapping) else list(enumerate(inside))


def find(contents: Any, key: str, opened: Callable[[Any], Any] = _plain) -> list[Any]:
    """The values under a key of parts joined by dots. Parts may contain dots, so several values may match."""
    found, waiting = [], [(contents, key)]
    while waiting:
        item, rest = waiting.pop()
        for name, value in _pairs(opened(item) or ()):
            if (part := key_as_text(name)) == rest:
                found.append(value)
            elif part and rest.startswith(part + "."):
                waiting.append((value, rest[len(part) + 1 :]))
    return found


def walk(
    contents: Any, opened: Callable[[Any], Any] = _plain, place: Place | None = None
) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """Every mapping in dicts, lists and tuples with its place, outer ones first, restricted to string keys.

    A mapping that occurs in several places is returned once, at the first of them.

    Args:
        contents: the object to search.
        opened: returns the contents of an item, a mapping, list or tuple; None if it has none.
        place: of the contents.
    """
    seen: set[int] = set()
    # Without recursion, since the file determines the depth. Places are created when reached, since there may be many.
    waiting: list[tuple[Place | None, Any, Any]] = [(None, None, contents)]
    while waiting:
        outer, key, item = waiting.pop()
        if id(item) in seen or (inside := opened(item)) is None:
            continue
        seen.add(id(item))
        here = (place or Place()) if outer is None else outer.inner(key)
        if isinstance(inside, Mapping):
            yield here, {key: value for key, value in inside.items() if isinstance(key, str)}
        if here.depth < MAX_DEPTH:
            nested = [(here, key, value) for key, value in _pairs(inside) if not isinstance(value, _LEAVES)]
            waiting += reversed(nested)


_LEAVES = (str, bytes, int, float, type(None))
