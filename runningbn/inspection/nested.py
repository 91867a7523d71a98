"""State dicts inside dicts and lists, as checkpoints have them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Levels of dicts and lists; what lies deeper is no state dict that anybody loads.
DEEPEST = 64


@dataclass(frozen=True, eq=False, slots=True)
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
        return Place(self, shown(key), self.depth + 1)


def shown(key: Any) -> str:
    """A key as part of a place."""
    if isinstance(key, str):
        return key
    return str(key) if isinstance(key, int) and abs(key) < 2**63 else type(key).__name__  # str refuses huge numbers


def _plain(item: Any) -> Any:
    return item if isinstance(item, (Mapping, list, tuple)) else None


def _pairs(inside: Any) -> list[tuple[Any, Any]]:
    return list(inside.items()) if isinstance(inside, Mapping) else list(enumerate(inside))


def find(contents: Any, key: str, opened: Callable[[Any], Any] = _plain) -> list[Any]:
    """What is under a key, whose parts are joined by dots and may have dots themselves; more than one in odd cases."""
    found, waiting = [], [(contents, key)]
    while waiting:
        item, rest = waiting.pop()
        for name, value in _pairs(opened(item) or ()):
            if (part := shown(name)) == rest:
                found.append(value)
            elif part and rest.startswith(part + "."):
                waiting.append((value, rest[len(part) + 1 :]))
    return found


def walk(
    contents: Any, opened: Callable[[Any], Any] = _plain, place: Place | None = None
) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """Every mapping in dicts, lists and tuples with its place, outer ones first, and of it what has a string as key.

    One that is in several places is at the first of them.

    Args:
        contents: what to look into.
        opened: takes an item to what is in it, a mapping, list or tuple; None for what has nothing inside.
        place: of the contents.
    """
    seen: set[int] = set()
    # No recursion, for a file says how deep it is; and a place is made when it is reached, for there may be many.
    waiting: list[tuple[Place | None, Any, Any]] = [(None, None, contents)]
    while waiting:
        outer, key, item = waiting.pop()
        if id(item) in seen or (inside := opened(item)) is None:
            continue
        seen.add(id(item))
        here = (place or Place()) if outer is None else outer.inner(key)
        if isinstance(inside, Mapping):
            yield here, {key: value for key, value in inside.items() if isinstance(key, str)}
        if here.depth < DEEPEST:
            nested = [(here, key, value) for key, value in _pairs(inside) if not isinstance(value, _LEAVES)]
            waiting += reversed(nested)


_LEAVES = (str, bytes, int, float, type(None))
